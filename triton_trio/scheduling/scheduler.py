"""What every scheduler is: a place where requests wait until an instance is in hand.

*Late binding*: requests stay queued, each in its own scope, until the instance asks; then one synchronous function
(:meth:`Scheduler.form_batch`) makes the batch from what is alive at that moment.  Nothing is prefetched, so there is no
gap between scheduler and device in which a cancel could go unseen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import outcome
import trio

from ..errors import Unavailable
from ..lifecycle import Event
from ..request import InferenceRequest
from ..scopes import Reason
from .ordering import ResponseOrder
from .queue import INF, QueueStatistics, RequestQueue


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    queue: QueueStatistics
    idle_instances: int  #: instances waiting for work


class Scheduler(ABC):
    """Requests in, batches out.

    :meth:`enqueue`, :meth:`leave` and :meth:`form_batch` are synchronous: in Trio each is atomic, and each can be
    tested without an event loop.  Only :meth:`next_batch` and :meth:`run_timeouts` wait.
    """

    def __init__(self, queue: RequestQueue) -> None:
        self.queue = queue
        #: Set where answers must leave in the order of arrival.
        self.order: ResponseOrder | None = None
        self._idle: OrderedDict[trio.lowlevel.Task, None] = OrderedDict()
        self._timer: trio.CancelScope | None = None
        self._timer_needed: trio.Event | None = None

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(queue=self.queue.statistics(), idle_instances=len(self._idle))

    # Decide

    @abstractmethod
    def form_batch(self, now: float) -> tuple[Sequence[InferenceRequest], float]:
        """The requests to execute now (removed from the queue), or none and the time at which to ask again.

        ``inf`` as that time means: not before the queue changes.
        """

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
        """A queued request was cancelled: its place is free when this returns, whether or not an instance is."""
        self.queue.remove(request)

    # Wait

    async def next_batch(self) -> Sequence[InferenceRequest]:
        """Wait for requests to execute; called by an instance that is ready to take them.

        **Cancellation:** the instance stops waiting; the queue is untouched.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            requests, again_at = self.form_batch(trio.current_time())
            if requests:
                return requests
            if again_at == INF:
                await self._park()
            else:
                with trio.move_on_at(again_at):
                    await self._park()

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._idle[task] = None

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._idle[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        # The instance that has waited longest; it looks at the queue itself, so a wake-up too many does no harm.
        task, _ = self._idle.popitem(last=False)
        trio.lowlevel.reschedule(task, outcome.Value(None))

    async def run_timeouts(self) -> None:
        """Apply queue timeouts when they are due, whether or not an instance is free.  Runs in the model's nursery.

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

    def _reset_timer(self, deadline: float) -> None:
        if self._timer is not None and deadline < self._timer.deadline:
            self._timer.deadline = deadline
        elif self._timer_needed is not None:
            self._timer_needed.set()
            self._timer_needed = None
