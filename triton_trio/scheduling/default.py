"""The default scheduler: no batching, one request an execution, in order of arrival.

Triton hands such requests straight to its rate limiter, where a cancel is not seen any more; here they wait in an
ordinary queue and leave it like everywhere else.

The queue has no size of its own, as in Triton (nor has the dynamic batcher's without ``max_queue_size``).  It is bounded by
who can wait in it: each request belongs to a running handler, and frontends bound those (connections x streams, and
requests in flight on a stream).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..request import InferenceRequest
from .queue import INF, RequestQueue
from .queue_scheduler import QueueScheduler
from .scheduler import Seat


class DefaultScheduler(QueueScheduler):
    def __init__(self) -> None:
        super().__init__(RequestQueue())

    def form_batch(self, now: float, seat: Seat) -> tuple[Sequence[InferenceRequest], float]:
        for request in self.queue:
            self.queue.remove(request)
            return (request,), INF
        return (), INF
