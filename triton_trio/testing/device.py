"""A gate between the device thread and the device, so that tests decide when a program ends.

::

    gate = DeviceGate()
    backend = JaxBackend(executor=gate.executor)
    ...
    await gate.wait_dispatched(2)      # one program running, one queued behind it
    request.cancel()
    gate.let_end(2)

The programs are real and run on the real device; only the device thread does not hear of a program's end before the test
says so.  What a load measures passes the gate and is not counted.  Nothing sleeps: the test waits for what the device
thread does, and the device thread for what the test says.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

import trio

from ..backends.jax.device import Executor

if TYPE_CHECKING:
    from ..backends.jax.device import Turn
    from ..backends.jax.job import DeviceJob


class _Passed:
    """Mail that says that time has passed; to a device thread that does not wait for it, mail of a job without turns."""

    draining = False
    turns = ()


_PASSED: Any = _Passed()


class DeviceGate(Executor):
    """An executor whose programs end when they are told to.  Made in the Trio run that uses it."""

    def __init__(self) -> None:
        self.dispatched = 0  #: programs put on the device so far
        self.ended = 0  #: of these, how many the device thread has waited for
        #: Steps of each dispatched program, in order; 0 for one that makes none.
        self.steps: list[int] = []
        #: Seconds for which each dispatch of a late job was put off, in order.
        self.held: list[float] = []
        self._holding: Queue[DeviceJob | None] | None = None
        self._permits = threading.Semaphore(0)
        self._opened = False
        self._failures: deque[tuple[int, str]] = deque()
        self._token = trio.lowlevel.current_trio_token()
        self._changed = trio.lowlevel.ParkingLot()

    def executor(self, device: str) -> Executor:
        """For ``JaxBackend(executor=gate.executor)``."""
        return self

    # The test's side

    async def wait_dispatched(self, count: int) -> None:
        """Wait until ``count`` programs have been dispatched.  **Cancellation:** only the wait ends."""
        while self.dispatched < count:
            await self._changed.park()
        await trio.lowlevel.checkpoint()

    async def wait_ended(self, count: int) -> None:
        """Wait until ``count`` programs have ended.  **Cancellation:** only the wait ends."""
        while self.ended < count:
            await self._changed.park()
        await trio.lowlevel.checkpoint()

    async def wait_held(self, count: int) -> None:
        """Wait until dispatches have been put off ``count`` times.  **Cancellation:** only the wait ends."""
        while len(self.held) < count:
            await self._changed.park()
        await trio.lowlevel.checkpoint()

    def let_pass(self) -> None:
        """The time for which the latest dispatch is put off has passed."""
        if self._holding is not None:
            self._holding.put(_PASSED)

    def let_end(self, count: int = 1) -> None:
        """The next ``count`` programs may end; they may be dispatched later."""
        for _ in range(count):
            self._permits.release()

    def open(self) -> None:
        """From now on programs end by themselves."""
        self._opened = True
        self._permits.release()
        self.let_pass()

    def fail(self, program: int, message: str) -> None:
        """The ``program``-th program that is dispatched (from 1) will raise ``message`` when it ends."""
        self._failures.append((program, message))

    # The device thread's side

    def dispatch(self, turn: Turn) -> bool:
        if not turn.dispatch():
            return False
        if turn.at_load:
            return True
        self.dispatched += 1
        self.steps.append(turn.steps)
        self._tell()
        return True

    def wait(self, turn: Turn) -> None:
        if turn.at_load:
            turn.wait()
            return
        if not self._opened:
            self._permits.acquire()
        try:
            turn.wait()
            for program, message in tuple(self._failures):
                if program == self.ended + 1:
                    self._failures.remove((program, message))
                    raise RuntimeError(message)
        finally:
            self.ended += 1
            self._tell()

    def ready(self, turn: Turn) -> bool:
        return self._opened and turn.ready()

    def hold(self, mail: Queue[DeviceJob | None], seconds: float) -> DeviceJob | None:
        self._holding = mail  # before the look at _opened, which open() sets before it looks here
        try:
            if not self._opened:
                self.held.append(seconds)
                self._tell()
            job = mail.get(timeout=seconds if self._opened else None)
        finally:
            self._holding = None
        if job is _PASSED:
            raise Empty
        return job

    def _tell(self) -> None:
        try:
            self._token.run_sync_soon(self._changed.unpark_all)
        except trio.RunFinishedError:
            return  # the test is over
