"""``preserve_ordering``: answers leave in the order in which their requests were queued.

Several instances finish in any order.  An answer whose predecessors are still out is kept here, and goes when they have
been answered or *have left*: a cancelled request never holds back those behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ..request import InferenceRequest

Action = Callable[[], None]


class ResponseOrder:
    """Requests in order of arrival, each with its answer once there is one (non-decoupled models: one answer each)."""

    def __init__(self) -> None:
        self._expected: OrderedDict[InferenceRequest, Action | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._expected)

    def expect(self, request: InferenceRequest) -> None:
        """``request`` was queued; :meth:`hand_over` or :meth:`forget` must follow."""
        self._expected[request] = None

    def hand_over(self, request: InferenceRequest, answer: Action) -> None:
        """Run ``answer`` as soon as everything queued before ``request`` has been answered or has left."""
        if request in self._expected:
            self._expected[request] = answer
            self._release()

    def forget(self, request: InferenceRequest) -> None:
        """``request`` has ended without an answer from here; a no-op if it was answered."""
        if request in self._expected:
            del self._expected[request]
            self._release()

    def _release(self) -> None:
        while self._expected:
            request = next(iter(self._expected))
            answer = self._expected[request]
            if answer is None:
                return
            del self._expected[request]
            answer()
