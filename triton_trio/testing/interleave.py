"""Every moment at which a cancel can arrive, without a sleep.

:func:`sweep` runs a scenario again and again, and cancels its victim one scheduling point later each time.
:func:`orders` is for what happens in one and the same tick: every order of some synchronous acts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from itertools import permutations
from types import TracebackType

import trio


class Victim(trio.abc.Instrument):
    """What a sweep cancels: ``with victim: ...`` around it, in the scenario.

    The cancel comes before the block is entered (``n == 0``), or just before the ``n``-th task step, of whatever task,
    that begins inside of it.
    """

    def __init__(self, n: int, reason: str) -> None:
        self.scope = trio.CancelScope()
        self._left = n
        self._reason = reason
        self._armed = False
        if n == 0:
            self.scope.cancel(reason=reason)

    @property
    def fired(self) -> bool:
        """Whether the cancel has been called, in time or not."""
        return self.scope.cancel_called

    @property
    def cancelled(self) -> bool:
        """Whether the block was ended by the cancel."""
        return self.scope.cancelled_caught

    def __enter__(self) -> Victim:
        self.scope.__enter__()
        self._armed = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self._armed = False
        return self.scope.__exit__(exc_type, exc, tb)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._armed and self._left:
            self._left -= 1
            if not self._left:
                self.scope.cancel(reason=self._reason)


async def sweep(
    scenario: Callable[[Victim], Awaitable[None]], *, reason: str = "client_reset", limit: int = 500
) -> int:
    """Run ``scenario`` with a cancel at scheduling point 0, 1, 2, ... until it completes uncancelled.

    The scenario opens whatever it needs, does ``with victim:`` around what may be cancelled, and asserts what must hold
    whether or not it was (``victim.cancelled``).  Returns the number of runs with a cancel.

    **Cancellation:** the scenario's.
    """
    for n in range(limit):
        victim = Victim(n, reason)
        trio.lowlevel.add_instrument(victim)
        try:
            await scenario(victim)
        except Exception as exc:
            exc.add_note(f"with the cancel at scheduling point {n}")
            raise
        finally:
            trio.lowlevel.remove_instrument(victim)
        if not victim.fired:
            return n
    raise AssertionError(f"the scenario still has scheduling points after {limit}")


def orders(acts: Iterable[str], count: int = 2) -> list[tuple[str, ...]]:
    """Every ``count`` of ``acts`` in every order, and each with itself: for ``pytest.mark.parametrize``.

    Synchronous acts one after the other, without a checkpoint between, are one scheduler tick.
    """
    names = tuple(acts)
    return [*permutations(names, count), *((name,) * count for name in names)]
