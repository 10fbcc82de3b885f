"""Whether instances can execute, where their device can be lost and made anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Availability:
    """Of one device, shared by its instances.  Who changes it does so synchronously; nobody polls it.

    While it is not ready no instance takes requests: they stay in their queue, and whoever is cancelled there leaves it as
    always.
    """

    def __init__(self) -> None:
        self.why = ""  #: it will never be ready again, and this is why
        self._restored = trio.Event()
        self._takers: set[trio.CancelScope] = set()

    @property
    def ready(self) -> bool:
        return self._restored.is_set() and not self.why

    def restore(self) -> None:
        """Instances may execute from now on."""
        self._restored.set()

    def lose(self) -> None:
        """Instances may not execute until :meth:`restore`; those that wait for requests stop waiting."""
        if self._restored.is_set():
            self._restored = trio.Event()
        for scope in self._takers:
            scope.cancel(reason="the device is not available")

    def end(self, why: str) -> None:
        """They never may again."""
        self.why = why
        self.lose()
        self._restored.set()

    async def wait(self) -> None:
        """Wait until it is ready, or will never be.  **Cancellation:** only the wait ends."""
        while not self._restored.is_set():
            await self._restored.wait()

    @contextmanager
    def while_ready(self) -> Iterator[None]:
        """Around waiting for requests: left early, without an exception, when the device is lost."""
        with trio.CancelScope() as scope:
            self._takers.add(scope)
            try:
                yield
            finally:
                self._takers.remove(scope)
