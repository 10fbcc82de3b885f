"""What is compiled while requests wait for it: in tasks of the model's own, one for all who wait for the same.

A compilation takes seconds, and nothing can stop it.  A request that compiled by itself could not be left meanwhile, and what
it had compiled would be lost with it: clients with little time could come again and again, and never see their shape served.
So requests only wait, as for a load: each can leave at any time, and when the last has left, the task ends after the
compilation under way, which is kept.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from ...errors import InternalError, TritonError, Unavailable, no_panic
from ...scopes import BatchScope, Reason

#: What an exception may be made of to be made anew; anything else may be an array.
_PLAIN = (str, int, float, bytes, type(None))


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a compilation failed.  Not the exception itself, whose frames have arguments and tracers in them."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    note: str  #: where it came from, for the log

    @classmethod
    def of(cls, exc: BaseException, name: str) -> _Failure:
        """Of the same type, if that can be made anew from what it has; else of :exc:`InternalError`."""
        note = "" if isinstance(exc, TritonError) else f"It came from\n{''.join(traceback.format_exception(exc))}"
        found = cls(type(exc), exc.args, note)
        if all(isinstance(one, _PLAIN) for one in exc.args):
            with suppress(Exception):  # some take other arguments than they keep
                if found.anew().args == exc.args:
                    return found
        return cls(InternalError, (f"{name}: compilation failed: {type(exc).__name__}: {exc}",), note)

    def anew(self) -> BaseException:
        exc = self.kind(*self.args)
        if self.note:
            exc.add_note(self.note)
        return exc


class _Shared:
    """One thing that is being compiled."""

    def __init__(self) -> None:
        self.waiters: BatchScope[object] = BatchScope()
        self.done = trio.Event()
        self.failure: _Failure | None = None


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
        if shared.failure is not None:
            raise shared.failure.anew()

    async def _run(self, key: Hashable, shared: _Shared, compile_all: Callable[[], Awaitable[None]]) -> None:
        failure: _Failure | None = _Failure(Unavailable, (f"{self._name} is being unloaded",), "")
        try:
            with shared.waiters.cancel_scope, no_panic(f"{self._name}: compilation failed"):
                await compile_all()
                failure = None
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever the author's function raises
            failure = _Failure.of(exc, self._name)
        finally:
            shared.failure = failure
            del self._running[key]
            shared.done.set()
