"""The rate limiter: named resources that instances of all models share, and whose turn it is to have them.

An instance must hold what its ``instance_group.rate_limiter`` lists while it executes.  *The instance* waits for that,
never a request: requests stay in their queue, each in its own scope, and only when everything is in hand is a batch made
of those that are still there.  So a request that is cancelled while resources are awaited has nothing to give back, and
an instance whose last request has gone steps out of the line (:meth:`Permit.leave_line`).  Triton hands requests over
first and lets them wait inside its limiter, where it does not see a cancel any more.

**Whose turn it is.**  Who waits stands in one line, ordered by executions x priority (least first; then by who came
first).  What somebody in the line needs is spoken for: those behind may take what is left after that, and no more.  So an
instance that needs much is not passed for ever by those that need little, and one that waits for *this* resource never
holds up those who want another.

Everything but :meth:`Permit.wait_turn` is synchronous: in Trio each decision is atomic, and can be tested without a loop.
A wake-up is only the advice to look again; nothing is held until the one who looks says
:meth:`~Permit.acquire_nowait`, and then it is held by an object that its holder releases, once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import outcome
import trio

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from .. import config


@dataclass(frozen=True, slots=True)
class Resource:
    """So much there is of a resource (``--rate-limit-resource``), instead of as much as the greediest instance needs."""

    name: str
    count: int
    device: int | None = None  #: None: on each device; without meaning for a global resource


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """One resource; ``capacity == in_use + free`` at every moment."""

    name: str
    device: int | None  #: None: global
    capacity: int
    in_use: int
    waiters: int  #: instances in the line that need it

    @property
    def free(self) -> int:
        return self.capacity - self.in_use


@dataclass(frozen=True, slots=True)
class RateLimiterStatistics:
    resources: tuple[PoolStatistics, ...]
    waiters: int  #: instances in the line


class _Pool:
    """One resource on one device, or one for the server (device None)."""

    def __init__(self, name: str, device: int | None) -> None:
        self.name = name
        self.device = device
        self.needs: dict[Permit, int] = {}
        self.limit = 0
        self.in_use = 0

    @property
    def capacity(self) -> int:
        """The limit; or more, while that is still in use from the time before a model was unloaded."""
        return max(self.limit, self.in_use)


class Permit:
    """What one instance must hold to execute.  Made by :meth:`RateLimiter.register`."""

    def __init__(self, limiter: RateLimiter, name: str, needs: dict[_Pool, int], priority: int, turns: int) -> None:
        self.name = name
        self.held = False
        self._limiter = limiter
        self._needs = needs
        self._priority = priority
        self._turns = turns  # executions x priority
        self._task: trio.lowlevel.Task | None = None

    def __repr__(self) -> str:
        return f"<Permit of {self.name}: {self}, {'held' if self.held else 'not held'}>"

    def __str__(self) -> str:
        """``"2 of 'R1' (0 free)"``, for everything that is needed."""
        return ", ".join(
            f"{n} of '{pool.name}' ({pool.capacity - pool.in_use} free)" for pool, n in self._needs.items()
        )

    @property
    def waiting(self) -> bool:
        """In the line."""
        return self in self._limiter._line

    def wanted(self, *, besides: Collection[Permit] = ()) -> bool:
        """Whether one in the line, ``besides`` those, needs something of what this one holds."""
        return any(
            permit not in besides and not self._needs.keys().isdisjoint(permit._needs) for permit in self._limiter._line
        )

    def acquire_nowait(self) -> bool:
        """Take everything, if it is free and nobody better in the line wants it; otherwise stand in the line."""
        if self.held:
            raise RuntimeError(f"{self!r}: acquired twice")
        limiter = self._limiter
        limiter._line.setdefault(self, next(limiter._arrivals))
        if self not in limiter.turns():
            return False
        del limiter._line[self]
        for pool, needed in self._needs.items():
            pool.in_use += needed
        self.held = True
        return True

    async def wait_turn(self) -> None:
        """Wait until :meth:`acquire_nowait` is worth another try, or somebody has called :meth:`leave_line`.

        **Cancellation:** the instance leaves the line, at that instant.
        """
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            self.leave_line()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def leave_line(self) -> None:
        """There is nothing to execute any more: others may go ahead.  A no-op if it does not stand in the line."""
        if self._limiter._line.pop(self, None) is not None:
            self._wake()
            self._limiter._wake_turns()

    def release(self, *, executed: bool = True) -> None:
        """Give everything back; raises if it is not held.

        Args:
          executed: it was used, which counts for the order of the line.
        """
        if not self.held:
            raise RuntimeError(f"{self!r}: released, and not held")
        self.held = False
        if executed:
            self._turns += self._priority
        for pool, needed in self._needs.items():
            pool.in_use -= needed
        self._limiter._wake_turns()

    def _wake(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None))


class RateLimiter:
    """The resources of one server, and the line of instances that wait for them.

    Args:
      resources: how much there is of some; of each other one there is as much as the instance with the greatest need
        for it takes, so that every instance can execute.
    """

    def __init__(self, resources: Sequence[Resource] = ()) -> None:
        self._explicit: dict[str, list[Resource]] = {}
        for resource in resources:
            self._explicit.setdefault(resource.name, []).append(resource)
        self._pools: dict[tuple[str, int | None], _Pool] = {}
        self._line: dict[Permit, int] = {}  # with the number of its arrival
        self._arrivals = count()

    def statistics(self) -> RateLimiterStatistics:
        return RateLimiterStatistics(
            resources=tuple(
                PoolStatistics(
                    name=pool.name,
                    device=pool.device,
                    capacity=pool.capacity,
                    in_use=pool.in_use,
                    waiters=sum(permit in self._line for permit in pool.needs),
                )
                for pool in self._pools.values()
            ),
            waiters=len(self._line),
        )

    @contextmanager
    def register(self, name: str, device: int, limits: config.RateLimiter) -> Iterator[Permit]:
        """The permit of an instance, while it is loaded; the resources it needs exist as long.

        Args:
          name: of the instance.
          device: where it runs; 0 on the CPU, so that it shares with the first GPU, as in Triton.
          limits: from its configuration.

        Raises:
          InvalidArgument: there is too little for it ever to execute, or one resource is global here and of a device
            there.
        """
        # As in Triton the last of one name counts, if an instance lists several.
        wanted = {(r.name, None if r.is_global else device): r.count for r in limits.resources}
        for (resource, on), needed in wanted.items():
            self._check(name, resource, on, needed, wanted)
        needs = {self._pools.setdefault(key, _Pool(*key)): needed for key, needed in wanted.items()}
        # Executions before its time count as its own, or a model that is loaded late has everything to itself.
        turns = max((permit._turns for pool in needs for permit in pool.needs), default=0)
        permit = Permit(self, name, needs, limits.priority, turns)
        for pool, needed in needs.items():
            pool.needs[permit] = needed
            self._set_limit(pool)
        try:
            yield permit
        finally:
            permit.leave_line()
            if permit.held:
                raise RuntimeError(f"{permit!r}: unloaded before it was released")
            for pool in needs:
                del pool.needs[permit]
                self._set_limit(pool)
                if not pool.needs:
                    del self._pools[pool.name, pool.device]

    def _check(
        self, name: str, resource: str, device: int | None, needed: int, wanted: dict[tuple[str, int | None], int]
    ) -> None:
        if any(other == resource and (on is None) != (device is None) for other, on in (*self._pools, *wanted)):
            raise InvalidArgument(
                f'Resource "{resource}" is present as both global and device-specific resource in the model '
                f"configuration. (at instance {name})"
            )
        limit = self._explicit_limit(resource, device)
        if limit is not None and limit < needed:
            raise InvalidArgument(
                f'Resource count for "{resource}" is limited to {limit} which will prevent scheduling of one or more '
                f"model instances, the minimum required count is {needed} (for instance {name}; see "
                "--rate-limit-resource)"
            )

    def _explicit_limit(self, resource: str, device: int | None) -> int | None:
        if resource not in self._explicit:
            return None
        return max(
            (r.count for r in self._explicit[resource] if device is None or r.device in (device, None)), default=0
        )

    def _set_limit(self, pool: _Pool) -> None:
        limit = self._explicit_limit(pool.name, pool.device)
        pool.limit = max(pool.needs.values(), default=0) if limit is None else limit
        self._wake_turns()

    def turns(self) -> list[Permit]:
        """Those in the line who can have all they need now, best first."""
        if not self._line:
            return []
        left = {pool: pool.capacity - pool.in_use for pool in self._pools.values()}
        found = []
        for permit in sorted(self._line, key=lambda permit: (permit._turns, self._line[permit])):
            if all(left[pool] >= needed for pool, needed in permit._needs.items()):
                found.append(permit)
            # Free or not, it is spoken for.
            for pool, needed in permit._needs.items():
                left[pool] -= needed
        return found

    def _wake_turns(self) -> None:
        for permit in self.turns():
            permit._wake()
