"""The dynamic batcher: waiting requests of one shape become one execution.

:meth:`DynamicBatcher.form_batch` is the whole decision.  It looks at no more requests than fit into one batch, so its
cost does not grow with the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from ..request import InferenceRequest
from .joining import Joining
from .ordering import ResponseOrder
from .queue import INF, RequestQueue
from .queue_scheduler import QueueScheduler
from .scheduler import Seat

if TYPE_CHECKING:
    from .rate_limiter import Permit


class DynamicBatcher(QueueScheduler):
    """Triton's ``dynamic_batching``.

    Args:
      queue: with its levels and policies.
      max_batch_size: rows an execution may have.
      preferred_sizes: rows at which a batch is sent without waiting for more.
      max_queue_delay: seconds the oldest request may wait for company.
      preserve_ordering: responses go out in the order in which their requests were queued.
    """

    def __init__(
        self,
        queue: RequestQueue,
        *,
        max_batch_size: int,
        preferred_sizes: Sequence[int] = (),
        max_queue_delay: float = 0.0,
        preserve_ordering: bool = False,
    ) -> None:
        super().__init__(queue)
        self.max_batch_size = max_batch_size
        self.preferred_sizes = frozenset(preferred_sizes or (max_batch_size,))
        self._max_preferred = max(self.preferred_sizes)
        self.max_queue_delay = max_queue_delay
        self.changes = 0  #: of the queue, that may let somebody join who could not before
        self.changed = trio.lowlevel.ParkingLot()  #: executions that wait for the next one
        if preserve_ordering:
            self.order = ResponseOrder()

    def ready_at(self, now: float, seat: Seat) -> float:
        taken, again_at = self._choose(now)
        return now if taken else again_at

    def form_batch(self, now: float, seat: Seat) -> tuple[Sequence[InferenceRequest], float]:
        taken, again_at = self._choose(now)
        for request in taken:
            self.queue.remove(request)
        if taken and self._idle and self.queue:
            # More is waiting than this batch takes, and another instance has nothing to do.
            self._wake()
        return taken, again_at

    def joining(self, seat: Seat) -> Joining:
        return Joining(self, seat)

    def take_head(self, signature: object, rows: int, *, all_or_none: bool = False) -> Sequence[InferenceRequest]:
        """Requests from the head of the queue, while they have ``signature`` and fit into ``rows`` rows.

        For an execution that goes on anyway: there is no reason to wait for company, or for a preferred size.
        """
        taken: list[InferenceRequest] = []
        for request in self.queue:
            if request.batch_size > rows or request.signature != signature:
                if all_or_none:
                    return ()
                break
            taken.append(request)
            rows -= request.batch_size
        for request in taken:
            self.queue.remove(request)
        if taken:
            if self._in_line:
                self._leave_line()
            self._look_again()
        return taken

    def permits_in_line(self) -> list[Permit]:
        """Of this model's own instances."""
        return [seat.permit for seat in self._in_line.values() if seat.permit is not None]

    def enqueue(self, request: InferenceRequest) -> None:
        super().enqueue(request)
        self._count_change()

    def _look_again(self) -> None:
        super()._look_again()
        self._count_change()

    def _count_change(self) -> None:
        self.changes += 1
        if self.changed:
            self.changed.unpark_all()

    def _choose(self, now: float) -> tuple[Sequence[InferenceRequest], float]:
        # Take requests in order while they fit and have the same shape.  Then, in this order:
        # 1. the oldest has waited long enough: send all taken;
        # 2. a preferred size was met on the way: send up to the largest one met;
        # 3. the next request went beyond every preferred size: send up to that one;
        # 4. the next does not fit (size or shape), or no preferred size is left to wait for: send all taken;
        # 5. otherwise ask again when the oldest has waited long enough.
        taken: list[InferenceRequest] = []
        rows = preferred = 0
        full = False
        oldest = INF
        for request in self.queue:
            if taken:
                if not preferred and rows + request.batch_size > self._max_preferred:
                    preferred = len(taken)
                if rows + request.batch_size > self.max_batch_size or request.signature != taken[0].signature:
                    full = True
                    break
            taken.append(request)
            rows += request.batch_size
            oldest = min(oldest, request.enqueued_at)
            if rows in self.preferred_sizes:
                preferred = len(taken)
            if rows >= self.max_batch_size:
                break
        due_at = oldest + self.max_queue_delay
        if self.max_queue_delay and now >= due_at:
            return taken, INF
        if preferred:
            return taken[:preferred], INF
        if full or rows >= self._max_preferred or now >= due_at:
            return taken, INF
        return (), due_at
