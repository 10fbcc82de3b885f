"""The default scheduler: no batching, one request an execution, in order of arrival.

Triton hands such requests straight to its rate limiter, where a cancel is not seen any more; here they wait in an
ordinary queue and leave it like everywhere else.
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
