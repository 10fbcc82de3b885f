"""The leader of several hosts: sends each record before it dispatches, and hears what has ended on the others.

There is a byte stream to each follower.  Records go one way, the numbers of those whose programs have ended there come
back.  Nobody can go on without one of the hosts, for its part of parameters and state is nowhere else.  So whatever goes
wrong anywhere, a lost connection, a gap, a program that failed, a host that does not answer in time, ends the plan, and with
it every text; all processes have to be started again.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar

import trio

from ....errors import Unavailable
from ....groups import WithoutGroups
from ..device import LOGGER, WINDOW
from .engine import SlotPrograms
from .plan import Kind, PlanBroken, PlanFormat, PlanRecord
from .schedule import Program
from .slots import Emitted

#: Records that a follower may be behind: what the window has on the device, and as many whose end is under way to the leader.
LAG = 2 * WINDOW
#: Seconds that a follower may take to run what it was sent, and that a farewell may take.
PATIENCE = 60.0
_FAREWELL = 1.0
_FIRST_WORD = 5.0
#: What a follower says: a record's number.  Its program, and all before it, have ended there.
ENDED = struct.Struct("<Q")
#: What it says before all others: there is nothing left to load.
READY = ENDED.pack(0)
T = TypeVar("T")


class Leader:
    """The leader's side; made by :func:`open_leader`."""

    def __init__(
        self,
        plan: PlanFormat,
        followers: Mapping[str, trio.abc.Stream],
        on_lost: Callable[[str], None],
        patience: float,
    ) -> None:
        self._plan = plan
        self._streams = dict(followers)
        self._on_lost = on_lost
        self._patience = patience
        self._token = trio.lowlevel.current_trio_token()
        # Of both threads, under this lock.
        self._room = threading.Condition()
        self._number = 0
        self._ended = dict.fromkeys(followers, 0)  # the latest record that has ended there
        self.lost = ""  #: why there is no plan any more
        self.parted = False  #: it was the end, and every follower has been told
        # Of the Trio thread.
        self._lines: dict[str, trio.MemorySendChannel[bytes]] = {}
        self._limits: dict[str, trio.CancelScope] = {}
        self._scope = trio.CancelScope()

    @property
    def number(self) -> int:
        """Of the latest record."""
        return self._number

    # In the device thread

    def publish(self, program: Program) -> None:
        """Send the next record.

        Blocks while a follower is :data:`LAG` records behind; :meth:`_hear` bounds that.

        Raises:
          Unavailable: a host is lost.
        """
        with self._room:
            self._room.wait_for(lambda: self.lost or self._number - min(self._ended.values()) < LAG)
            if self.lost:
                raise Unavailable(self.lost)
            self._number += 1
            record = PlanRecord.of(self._number, program, self._plan.spec)
        self._token.run_sync_soon(self._send, record)

    def lose_soon(self, why: str) -> None:
        self._token.run_sync_soon(self.lose, why)

    # In the Trio thread

    def lose(self, why: str) -> None:
        """It is over.  Sync; idempotent."""
        if self.lost:
            return
        with self._room:
            self.lost = why
            self._room.notify_all()
        self._scope.cancel(reason=why)
        self._on_lost(why)

    def _send(self, record: PlanRecord) -> None:
        if self.lost:
            return
        for name, line in self._lines.items():
            self._limits[name].deadline = min(self._limits[name].deadline, trio.current_time() + self._patience)
            line.send_nowait(record.encode())  # there is room: it is at most LAG behind

    async def _speak(self, name: str, line: trio.MemoryReceiveChannel[bytes]) -> None:
        try:
            async for data in line:
                await self._streams[name].send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.lose(f"the connection to {name} is lost")

    async def _hear(self, name: str) -> None:
        """What has ended there.  A follower that owes an answer has ``patience`` seconds for it."""
        heard = bytearray()
        with self._limits[name]:
            try:
                while data := await self._streams[name].receive_some():
                    heard += data
                    whole = len(heard) - len(heard) % ENDED.size
                    if whole:
                        self._heard(name, ENDED.unpack_from(heard, whole - ENDED.size)[0])
                        del heard[:whole]
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            self.lose(f"the connection to {name} is lost")
            return
        self.lose(f"{name} did not end record {self._ended[name] + 1} within {self._patience:g} s")

    def _heard(self, name: str, number: int) -> None:
        with self._room:
            self._ended[name] = max(number, self._ended[name])
            self._room.notify_all()
            owes = self._ended[name] < self._number
        self._limits[name].deadline = trio.current_time() + self._patience if owes else float("inf")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until a host is lost, or cancelled.

        **Cancellation:** followers are told that it was the end; bounded by a second.  Their connections are closed.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for name in self._streams:
                        self._lines[name], line = trio.open_memory_channel[bytes](LAG)
                        self._limits[name] = trio.CancelScope()
                        # Owner of both: this nursery; they end with the connection, or are cancelled with it.
                        nursery.start_soon(self._speak, name, line, name=f"records for {name}")
                        nursery.start_soon(self._hear, name, name=f"what {name} has done")
                    task_status.started()
        finally:
            with trio.move_on_after(_FAREWELL, shield=True):
                await self._part()

    async def _part(self) -> None:
        with self._room:
            farewell = b"" if self.lost else PlanRecord(self._number + 1, Kind.END).encode()
            self.lost = self.lost or "the model is being unloaded"
            self._room.notify_all()
        parted = bool(farewell)
        for stream in self._streams.values():
            try:
                await stream.send_all(farewell)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                parted = False  # it has its own reasons to end
            await trio.aclose_forcefully(stream)
        self.parted = parted


async def greet_followers(
    listeners: Collection[trio.abc.Listener[trio.SocketStream]],
    plan: PlanFormat,
    processes: Collection[int],
    *,
    within: float,
) -> dict[str, trio.abc.Stream]:
    """Wait until each of these processes has connected and said what it has, which is what this one has.

    Args:
      listeners: wherever they may come: one for each address of this host's name.
      within: seconds for all of them.

    Raises:
      Unavailable: not all have come; as PlanBroken, one of them has another plan, and has been told so.

    **Cancellation:** at any wait; connections are closed, and the listeners stay open.
    """
    followers: dict[int, trio.abc.Stream] = {}
    known: set[int] = set()
    async with AsyncExitStack() as stack:

        async def greet(listener: trio.abc.Listener[trio.SocketStream]) -> None:
            while len(followers) < len(processes):
                stream = await stack.enter_async_context(await listener.accept())
                word = b""
                with trio.move_on_after(_FIRST_WORD):
                    word = await read_word(stream, plan.HELLO_BYTES)
                process = plan.speaker(word)
                if process is None or process not in processes or process in known:
                    LOGGER.warning("somebody connected to the leader who is not one of processes %s", [*processes])
                    await trio.aclose_forcefully(stream)
                    continue
                known.add(process)
                await _answer(stream, plan, word)
                followers[process] = stream
            nursery.cancel_scope.cancel(reason="all have come")

        with trio.move_on_after(within), WithoutGroups(nurseries=1):
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    # Owner: this nursery; ends when all have come, by whichever door.
                    nursery.start_soon(greet, listener, name="door of the leader")
        missing = sorted({*processes} - {*followers})
        if missing:
            raise Unavailable(f"no word from process {', '.join(map(str, missing))} within {within:g} s")
        stack.pop_all()
    return {f"process {process}": stream for process, stream in followers.items()}


async def _answer(stream: trio.abc.Stream, plan: PlanFormat, hello: bytes) -> None:
    with suppress(trio.BrokenResourceError):  # who waits for it to load hears of that
        await stream.send_all(plan.hello(0))
    if why := plan.difference(hello):
        # It says the same and ends.  If this process ended first, JAX would end that one, in its own words.
        with trio.move_on_after(_FAREWELL):
            await read_word(stream, 1)
        raise PlanBroken(why)


async def read_word(stream: trio.abc.Stream, size: int) -> bytes:
    """What comes; less if no more does."""
    word = b""
    with suppress(trio.BrokenResourceError):
        while len(word) < size and (data := await stream.receive_some(size - len(word))):
            word += data
    return word


async def load_with_followers(
    followers: Mapping[str, trio.abc.Stream], load: Callable[[], Awaitable[T]], *, within: float
) -> T:
    """Load what is this host's while the followers do the same, and wait until all of them are ready.

    Args:
      followers: by name; greeted, with nothing else said yet.
      within: seconds that they may take longer than this host.

    Raises:
      Unavailable: one is lost, or takes too long.

    **Cancellation:** where ``load`` is, and at any wait for the others.
    """
    loading = {*followers}

    async def hear(name: str, stream: trio.abc.Stream) -> None:
        if await read_word(stream, len(READY)) != READY:
            raise Unavailable(f"the connection to {name} was lost while it loaded")
        loading.discard(name)

    with trio.CancelScope() as scope, WithoutGroups(nurseries=1):
        async with trio.open_nursery() as nursery:
            for name, stream in followers.items():
                # Owner: this nursery; ends when the follower is ready, or lost.
                nursery.start_soon(hear, name, stream, name=f"{name} loads")
            loaded = await load()
            scope.deadline = trio.current_time() + within
    if loading:
        raise Unavailable(f"{', '.join(sorted(loading))} had not loaded {within:g} s after the leader")
    return loaded


@asynccontextmanager
async def open_leader(
    plan: PlanFormat,
    followers: Mapping[str, trio.abc.Stream],
    on_lost: Callable[[str], None],
    *,
    patience: float = PATIENCE,
) -> AsyncIterator[Leader]:
    """Lead for as long as the block lasts; what is on the device has ended before it is left.

    Args:
      followers: by name; all have loaded.  Closed when the block is left.
      on_lost: told why, once, when there is no way to go on.
      patience: seconds.

    **Cancellation:** see :meth:`Leader.run`.
    """
    leader = Leader(plan, followers, on_lost, patience)
    with WithoutGroups(nurseries=1):
        async with trio.open_nursery() as nursery:
            # Owner: this nursery; ended here, or by itself when a host is lost.
            await nursery.start(leader.run, name="leader of several hosts")
            try:
                yield leader
            finally:
                nursery.cancel_scope.cancel(reason="model unloaded")


class LeadingPrograms(SlotPrograms):
    """Programs that the followers dispatch, too: each is on its way to them before it is dispatched here."""

    leader: Leader

    def run(self, program: Program) -> Emitted:
        """In the device thread."""
        if self.state is None and self.leader.number:
            # The followers' state is as it was, or not, and nobody can tell.
            self.leader.lose_soon("a program failed on the leader, and the state that it had was lost")
            raise Unavailable("a program had failed on the leader")
        self.leader.publish(program)
        try:
            return super().run(program)
        except Exception as exc:
            self.leader.lose_soon(f"the leader could not dispatch what it had sent: {type(exc).__name__}: {exc}")
            raise
