"""A scheduler whose requests wait in one :class:`~.queue.RequestQueue`, with its priority levels and timeouts."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from ..errors import Unavailable
from ..lifecycle import Event
from ..request import InferenceRequest
from ..scopes import Reason
from .queue import RequestQueue
from .scheduler import INF, Scheduler, SchedulerStatistics


class QueueScheduler(Scheduler):
    """What the default scheduler and the dynamic batcher share: everything but ``form_batch``."""

    def __init__(self, queue: RequestQueue) -> None:
        super().__init__()
        self.queue = queue
        self._timer: trio.CancelScope | None = None
        self._timer_needed: trio.Event | None = None

    def __len__(self) -> int:
        return len(self.queue)

    def queued(self) -> Iterator[InferenceRequest]:
        return iter(self.queue)

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(queue=self.queue.statistics(), idle_instances=self.idle_instances)

    def start(self, nursery: trio.Nursery, name: str) -> None:
        # Owner: the model's nursery; ended by the model's scope.
        nursery.start_soon(self.run_timeouts, name=f"queue timeouts of {name}")

    def enqueue(self, request: InferenceRequest) -> None:
        """Queue a request; raises :exc:`Unavailable` if its queue is full."""
        now = trio.current_time()
        self.queue.append(request, now)
        request.enqueued_at = now
        request.place = self
        request.advance(Event.ENQUEUE)
        if self.order is not None:
            self.order.expect(request)
        if request.queue_deadline < INF:
            self._reset_timer(request.queue_deadline)
        if self._idle:
            self._wake()

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        self.queue.remove(request)
        self._look_again()

    async def run_timeouts(self) -> None:
        """Apply queue timeouts when they are due, whether or not an instance is free.

        **Cancellation:** ends at once; requests stay queued.
        """
        while True:
            deadline = self.queue.next_deadline()
            if deadline == INF:
                self._timer_needed = trio.Event()
                await self._timer_needed.wait()
                continue
            with trio.CancelScope(deadline=deadline) as self._timer:
                await trio.sleep_forever()
            self._timer = None
            self._expire()

    def _expire(self) -> None:
        # Not in the loop above: a local variable there would keep the last request's tensors alive until the next.
        for request in self.queue.expire(trio.current_time()):
            request.place = None
            request.fail_nowait(Unavailable("Request timeout expired"), Event.REJECT)
        self._look_again()

    def _look_again(self) -> None:
        # Without the one that has left, or at its new place, the rest may be a batch.
        if self._idle and self.queue:
            self._wake()

    def _reset_timer(self, deadline: float) -> None:
        if self._timer is not None and deadline < self._timer.deadline:
            self._timer.deadline = deadline
        elif self._timer_needed is not None:
            self._timer_needed.set()
            self._timer_needed = None
