"""A follower of several hosts: dispatches what the leader's records say, and decides nothing.

Two threads, for a record that comes must be on the device while the program before it runs: one dispatches, one waits.  There
is no window here; the leader's is everybody's.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import trio

from ....errors import InternalError, Unavailable
from ....groups import WithoutGroups
from ..device import LOGGER, Executor, Turn
from .engine import SlotPrograms
from .leader import ENDED, READY, read_word
from .plan import Kind, PlanBroken, PlanFormat, PlanReader, PlanRecord
from .schedule import Program
from .slots import Emitted

#: Seconds for programs on the device to end when the follower does.  Without the other hosts they may never.
RELEASE = 5.0
#: Seconds between two attempts to connect.
_AGAIN = 0.2
_GONE = trio.BrokenResourceError, trio.ClosedResourceError
_LOST = "the connection to the leader is lost; start all processes again"
T = TypeVar("T")


class Replayed(Turn):
    """One record's program."""

    def __init__(self, programs: SlotPrograms, record: PlanRecord) -> None:
        self.number = record.number
        self.steps = record.size if record.kind is Kind.DECODE else 0
        self._programs = programs
        self._program: Program = record.program()
        self._emitted: Any = None

    def dispatch(self) -> bool:
        self._emitted = self._programs.run(self._program)
        return True

    def wait(self) -> None:
        # Fetched, for what an error has poisoned looks ready.
        Emitted(*map(np.asarray, self._emitted))  # type: ignore[arg-type]

    def ready(self) -> bool:
        return all(leaf.is_ready() for leaf in self._emitted)


class Replayer:
    """The two threads.  Made and used in one Trio run."""

    def __init__(self, executor: Executor) -> None:
        self.ended = 0  #: the latest record whose program has ended
        self.failure = ""  #: of a program; it has ended it all
        self.news = trio.lowlevel.ParkingLot()
        self._executor = executor
        self._token = trio.lowlevel.current_trio_token()
        self._line: SimpleQueue[Replayed | None] = SimpleQueue()
        self._on_device: SimpleQueue[Replayed | None] = SimpleQueue()
        self._running = 2
        # Owner: follow(); ended by close().  Daemons, so that a program that never ends cannot keep the process.
        for target, name in ((self._dispatch, "dispatches records"), (self._wait, "waits for records' programs")):
            threading.Thread(target=self._guard, args=(target,), name=name, daemon=True).start()

    def put(self, turn: Replayed) -> None:
        """Dispatch it when those before are."""
        self._line.put(turn)

    async def close(self) -> None:
        """Nothing is dispatched any more; wait until the device is idle, at most :data:`RELEASE`.

        **Cancellation:** shielded, with that bound.
        """
        self._line.put(None)
        with trio.move_on_after(RELEASE, shield=True):
            while self._running:
                await self.news.park()

    # In the threads

    def _guard(self, target: Any) -> None:
        try:
            target()
        except Exception as exc:  # noqa: BLE001  (a program failed; its traceback would keep the arrays)
            LOGGER.error("a record's program failed: %s", traceback.format_exc())
            self._tell(self._fail, f"{type(exc).__name__}: {exc}")
        finally:
            self._on_device.put(None)
            self._tell(self._stopped)

    def _dispatch(self) -> None:
        while (turn := self._line.get()) is not None:
            self._executor.dispatch(turn)
            self._on_device.put(turn)

    def _wait(self) -> None:
        while (turn := self._on_device.get()) is not None:
            self._executor.wait(turn)
            self._tell(self._end, turn.number)

    def _tell(self, what: Any, *arguments: Any) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(what, *arguments)

    # In the Trio thread

    def _end(self, number: int) -> None:
        self.ended = number
        self.news.unpark_all()

    def _fail(self, failure: str) -> None:
        self.failure = self.failure or failure
        self._line.put(None)
        self.news.unpark_all()

    def _stopped(self) -> None:
        self._running -= 1
        self.news.unpark_all()


async def connect(host: str, port: int, plan: PlanFormat, process: int, *, within: float) -> trio.SocketStream:
    """Tell the leader what this process has, and hear that the leader has the same.

    Args:
      within: seconds to wait for a leader that does not listen yet.

    Raises:
      Unavailable: there is none, or it does not know this process; as PlanBroken, it has another plan.

    **Cancellation:** at any wait; nothing is left behind.
    """
    with trio.move_on_after(within):
        while True:
            try:
                async with AsyncExitStack() as stack:
                    stream = await stack.enter_async_context(await trio.open_tcp_stream(host, port))
                    await stream.send_all(plan.hello(process))
                    answer = await read_word(stream, plan.HELLO_BYTES)
                    if plan.speaker(answer) != 0:
                        raise Unavailable(
                            f"what listens at {host}:{port} does not know process {process}; the leader's log says why"
                        )
                    if why := plan.difference(answer):
                        raise PlanBroken(why)
                    stack.pop_all()
                    return stream
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(_AGAIN)
    raise Unavailable(f"no leader at {host}:{port} within {within:g} s")


async def load_with_leader(stream: trio.abc.Stream, load: Callable[[], Awaitable[T]]) -> T:
    """Load what is this host's, for as long as the leader is there, and tell it when that is done.

    Raises:
      Unavailable: the leader is lost.

    **Cancellation:** where ``load`` is.
    """

    async def watch() -> None:
        # It has nothing to say before all are ready.
        await read_word(stream, 1)
        raise Unavailable(_LOST)

    with WithoutGroups(nurseries=1):
        async with trio.open_nursery() as nursery:
            # Owner: this nursery; ended here, or the leader is lost.
            nursery.start_soon(watch, name="leader, while this process loads")
            loaded = await load()
            nursery.cancel_scope.cancel(reason="loaded")
    with suppress(*_GONE):  # who reads its records hears of it, too
        await stream.send_all(READY)
    return loaded


async def follow(
    stream: trio.abc.Stream, plan: PlanFormat, programs: SlotPrograms, *, executor: Executor | None = None
) -> None:
    """Dispatch what the leader's records say, in their order, until it says that it was the end.

    Raises:
      ExceptionGroup: of an Unavailable, the leader is lost; a PlanBroken, what came is no plan; an InternalError, a program
        failed here.

    **Cancellation:** anywhere; what is on the device has ended then, or cannot end (:data:`RELEASE`).
    """
    reader, replayer = PlanReader(plan), Replayer(executor or Executor())

    async def answer() -> None:
        said = 0
        while not reader.ended or said < reader.number:
            if said == replayer.ended and not replayer.failure:
                await replayer.news.park()
                continue
            if replayer.failure:
                raise InternalError(f"a program failed here: {replayer.failure}; start all processes again")
            said = replayer.ended
            with suppress(*_GONE):  # who reads hears of it, too
                await stream.send_all(ENDED.pack(said))

    try:
        async with trio.open_nursery() as nursery:
            # Owner: this nursery; ends when all has been said, or with it.
            nursery.start_soon(answer, name="what has ended")
            while not reader.ended:
                data: bytes | bytearray = b""
                with suppress(*_GONE):
                    data = await stream.receive_some()
                if not data:
                    raise Unavailable(_LOST)
                for record in reader.feed(data):
                    if record.kind is not Kind.END:
                        replayer.put(Replayed(programs, record))
            replayer.news.unpark_all()
    finally:
        await replayer.close()  # noqa: ASYNC102  (shielded and bounded in there)
