"""What is compiled while requests wait for it: in tasks of the model's own, one for all who wait for the same.

A compilation takes seconds, and nothing can stop it.  A request that compiled by itself could not be left meanwhile, and what
it had compiled would be lost with it: clients with little time could come again and again, and never see their shape served.
So requests only wait, as for a load: each can leave at any time, and when the last has left, the task ends after the
compilation under way, which is kept.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Awaitable, Callable, Hashable

import trio

from ...errors import InternalError, TritonError, Unavailable, no_panic
from ...scopes import BatchScope, Reason


class _Shared:
    """One thing that is being compiled."""

    def __init__(self) -> None:
        self.waiters: BatchScope[object] = BatchScope()
        self.done = trio.Event()
        self.error: BaseException | None = None


class Compilations:
    """Of one model on one device.

    Args:
      nursery: of the tasks; ended when the model is unloaded.
      name: of the model, for messages.
    """

    def __init__(self, nursery: trio.Nursery, name: str) -> None:
        self._nursery = nursery
        self._name = name
        self._running: dict[Hashable, _Shared] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def wait(self, key: Hashable, what: str, compile_all: Callable[[], Awaitable[None]]) -> None:
        """Have ``compile_all`` run for ``key``, or wait until it has run for somebody else.

        Args:
          what: for the name of the task.
          compile_all: cancelled between its compilations when nobody waits any more; it keeps what it has.

        Raises:
          Exception: what it raised, anew for each waiter; an author's code may know what to do about its own.
          InternalError: the same, of a type that cannot be made anew.

        **Cancellation:** the waiter leaves at once.
        """
        waiter = object()
        while True:
            shared = self._running.get(key)
            if shared is None:
                shared = self._running[key] = _Shared()
                # Owner: the nursery of the model; ended by itself, by its waiters' scope, or with the model.
                self._nursery.start_soon(self._run, key, shared, compile_all, name=f"compile {what} of {self._name}")
            if shared.waiters.join(waiter):
                break
            await shared.done.wait()  # it is ending, since all have left
        try:
            await shared.done.wait()
        finally:
            if shared.done.is_set():
                shared.waiters.discard(waiter)
            else:
                shared.waiters.leave(waiter, Reason.CALLER)
        if shared.error is not None:
            raise copy.copy(shared.error)

    async def _run(self, key: Hashable, shared: _Shared, compile_all: Callable[[], Awaitable[None]]) -> None:
        error: BaseException | None = Unavailable(f"{self._name} is being unloaded")
        try:
            with shared.waiters.cancel_scope, no_panic(f"{self._name}: compilation failed"):
                await compile_all()
                error = None
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever the author's function raises
            error = self._without_frames(exc)
        finally:
            shared.error = error
            del self._running[key]
            shared.done.set()

    def _without_frames(self, exc: BaseException) -> BaseException:
        """The same again, without what is in the frames that it came through; in the log, those are a note."""
        try:
            again = copy.copy(exc)
        except Exception:  # noqa: BLE001  # some take other arguments than they keep
            again = None
        if type(again) is not type(exc) or again.args != exc.args:
            again = InternalError(f"{self._name}: compilation failed: {type(exc).__name__}: {exc}")
        if not isinstance(exc, TritonError):
            again.add_note(f"It came from\n{''.join(traceback.format_exception(exc))}")
        return again
