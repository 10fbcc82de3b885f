"""The request queue: priority levels, each with its policy.  Pure state: no task, no clock, no await.

A queued request is in exactly one ordered map.  Whoever leaves early (cancel, queue timeout) is deleted from it in
O(1), at that instant; so the length counts live requests only, and a dead one never rejects a live one.  (Triton marks a
cancelled request and lets the batcher find it later; until then it fills ``max_queue_size``.)
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from ..errors import Unavailable
from ..request import InferenceRequest

INF = float("inf")


class TimeoutAction(Enum):
    REJECT = "REJECT"  #: answer UNAVAILABLE when the timeout passes
    DELAY = "DELAY"  #: serve it after everything of its level that has not timed out


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """One level's rules.  Times in seconds; 0 means none."""

    timeout_action: TimeoutAction = TimeoutAction.REJECT
    default_timeout: float = 0.0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What a :class:`RequestQueue` holds now."""

    queued: int  #: live requests waiting
    delayed: int  #: of these, past their timeout and kept by a DELAY policy
    by_level: dict[int, int]  #: live requests by priority level


@dataclass(slots=True)
class _Level:
    policy: QueuePolicy
    waiting: OrderedDict[InferenceRequest, None] = field(default_factory=OrderedDict)
    delayed: OrderedDict[InferenceRequest, None] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.delayed)


class RequestQueue:
    """Requests in the order in which they are to be served.

    Args:
      levels: number of priority levels; 1 is served first.
      default_level: for requests that ask for none, or for one that does not exist.
      policy: of every level without one in ``policies``.
    """

    def __init__(
        self,
        *,
        levels: int = 1,
        default_level: int = 1,
        policy: QueuePolicy | None = None,
        policies: dict[int, QueuePolicy] | None = None,
    ) -> None:
        policy = policy or QueuePolicy()
        policies = policies or {}
        self._levels = [_Level(policies.get(n, policy)) for n in range(1, levels + 1)]
        self._default_level = default_level
        self._size = 0
        # Queued requests with a deadline to come, by generation.  The heap of (deadline, generation) beside it has entries
        # for requests that have left; they are skipped when they come up.  It names requests instead of holding them, for
        # a request that has left must not keep its tensors alive until its timeout; and it is rebuilt when most of it is
        # such entries, so that it is bounded by the live requests too.
        self._timed: dict[int, InferenceRequest] = {}
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[InferenceRequest]:
        for level in self._levels:
            yield from level.waiting
            yield from level.delayed

    def __contains__(self, request: InferenceRequest) -> bool:
        level = self._level(request)
        return request in level.waiting or request in level.delayed

    def statistics(self) -> QueueStatistics:
        return QueueStatistics(
            queued=self._size,
            delayed=sum(len(level.delayed) for level in self._levels),
            by_level={n: len(level) for n, level in enumerate(self._levels, 1)},
        )

    def _level(self, request: InferenceRequest) -> _Level:
        asked = request.priority
        return self._levels[(asked if 0 < asked <= len(self._levels) else self._default_level) - 1]

    def append(self, request: InferenceRequest, now: float) -> None:
        """Queue ``request``; raises :exc:`Unavailable` if its level is full.  Sets ``request.queue_deadline``."""
        level = self._level(request)
        policy = level.policy
        if 0 < policy.max_queue_size <= len(level):
            raise Unavailable(f"{request.label}Exceeds maximum queue size")
        level.waiting[request] = None
        self._size += 1
        timeout = policy.default_timeout
        if policy.allow_timeout_override and request.timeout_us > 0:
            # An override may shorten the wait, never lengthen it; no default means an endless one.
            timeout = min(timeout or INF, request.timeout_us / 1e6)
        if timeout:
            request.queue_deadline = now + timeout
            self._timed[request.generation] = request
            if len(self._deadlines) > 64 + 2 * len(self._timed):
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._timed]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.queue_deadline, request.generation))

    def remove(self, request: InferenceRequest) -> bool:
        """Forget ``request``; False if it is not queued.  O(1)."""
        level = self._level(request)
        held = level.waiting if request in level.waiting else level.delayed
        if request not in held:
            return False
        del held[request]
        self._timed.pop(request.generation, None)
        self._size -= 1
        return True

    def next_deadline(self) -> float:
        """When :meth:`expire` has something to do; inf for never."""
        while self._deadlines and self._deadlines[0][1] not in self._timed:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else INF

    def expire(self, now: float) -> list[InferenceRequest]:
        """Apply timeouts that have passed: returns the rejected (already removed); delayed ones stay queued."""
        rejected = []
        while self.next_deadline() <= now:
            request = self._timed.pop(heapq.heappop(self._deadlines)[1])
            level = self._level(request)
            if level.policy.timeout_action is TimeoutAction.DELAY:
                del level.waiting[request]
                level.delayed[request] = None
            else:
                self.remove(request)
                rejected.append(request)
        return rejected
