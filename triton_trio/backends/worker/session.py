"""One worker process, from its start to its end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ...errors import Unavailable
from ...groups import WithoutGroups
from ..availability import Availability
from .connection import Connection
from .execution import RemoteExecution
from .logs import log
from .messages import (
    Ended,
    Fail,
    Finish,
    GivenUp,
    Hello,
    InstanceOpened,
    Lingers,
    Log,
    Look,
    Message,
    ModelOpened,
    Refused,
    Released,
    Report,
    Reschedule,
    Respond,
    read_error,
    read_lanes,
)
from .plain import read_statistics
from .process import Child, describe_end
from .wire import NonsenseError

if TYPE_CHECKING:
    from ...batch import Batch

LOGGER = logging.getLogger("triton_trio.worker")

#: Messages that are read before other tasks run.
TURN = 16


class Session:
    """See the module.

    Args:
      name: of the worker, for messages.
      availability: lost with the process.
      on_news: called when the process has said something of an execution.
      reap_limit: seconds in which a process must have ended that was killed, or has closed its end of the connection.
    """

    def __init__(
        self,
        name: str,
        child: Child,
        availability: Availability,
        *,
        on_news: Callable[[], None],
        reap_limit: float,
    ) -> None:
        self.child = child
        self.connection = Connection(child.socket)
        self.end = ""  #: once it has ended: how
        self.lanes: dict[tuple[str, int], int] = {}  #: of the model, once it is opened: see :class:`ModelOpened`
        self.reports: dict[str, tuple[float, object]] = {}  #: what instances count, and when they said so
        self.executions: dict[int, RemoteExecution] = {}
        self._name = name
        self._availability = availability
        self._on_news = on_news
        self._reap_limit = reap_limit
        self._alive = trio.CancelScope()
        self._why = ""
        self._looking: set[str] = set()
        self._asked: trio.Event | None = None
        #: The answer that makes sense next, beside :class:`Refused`.  A process begins with one that nobody has asked for.
        self._expected: type[Message] | None = Hello
        self._answer: Message | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Around the use of the process; left early, without an exception, when it has ended.

        Afterwards there is no process any more, and everybody who waited for it has an error.

        **Cancellation:** the process is killed.
        """
        try:
            # The scope inside: what a kill makes of ask() is alone only without the cancels of the tasks here.
            with WithoutGroups(nurseries=1), self._alive:
                async with trio.open_nursery() as nursery:
                    # Owner of the three: this nursery; ended here, and by the process's end.
                    nursery.start_soon(self.connection.write, name=f"writer to {self._name}")
                    nursery.start_soon(self._watch, name=f"end of {self._name}")
                    nursery.start_soon(self._read, name=f"reader of {self._name}")
                    try:
                        yield
                    finally:
                        nursery.cancel_scope.cancel(reason="worker process ended")
        finally:
            await self._retire()  # noqa: ASYNC102 - each wait in it is shielded, and has a limit

    def kill(self, why: str) -> None:
        """End it now.  Sync: everybody who waits for it has an error when this returns."""
        self._why = self._why or why
        self._availability.lose()
        self.child.kill()
        self._lose()

    @property
    def asked(self) -> bool:
        """It has not answered yet."""
        return self._asked is not None

    async def ask(self, message: Message | None, expected: type[Message]) -> None:
        """Post ``message``, and wait for the answer.

        Args:
          expected: what the answer must be.  A process that says anything else, or says it when nobody has asked, makes no
            sense and is killed.

        Raises:
          TritonError: it was refused, or the process has ended.

        **Cancellation:** nobody may ask this process again.
        """
        assert self._asked is None
        self._asked = trio.Event()
        if message is not None:
            self.connection.post(message)
        if self._answer is None and not self.end:
            self._expected = expected
            await self._asked.wait()
        self._asked = None
        answer, self._answer = self._answer, None
        if answer is None:
            raise Unavailable(f"the {self._name} {self.end or self._why}")
        if isinstance(answer, Refused):
            raise read_error(answer.error)

    def look(self, instance: str) -> None:
        """Ask for the instance's next report, unless it is being waited for."""
        if instance not in self._looking:
            self._looking.add(instance)
            self.connection.post(Look(instance))

    async def execute(self, number: int, instance: str, batch: Batch) -> None:
        """See :meth:`RemoteExecution.join`."""
        execution = self.executions[number] = RemoteExecution(number, instance, batch, self.connection)
        try:
            await execution.join()
        finally:
            del self.executions[number]

    # Inside

    async def _watch(self) -> None:
        # A process that it has started may hold the socket: then its end is not the connection's.
        await self.child.wait()
        self.connection.end()

    async def _read(self) -> None:
        count = 0
        try:
            while (message := await self.connection.receive()) is not None:
                self._receive(message)
                count += 1
                if count % TURN == 0:
                    await trio.lowlevel.checkpoint()
        except Exception:
            # NonsenseError, or a message that makes no sense now: nothing that a worker says may end the server.
            LOGGER.exception("the %s said what makes no sense", self._name)
            self.kill("said what makes no sense")
        self._availability.lose()
        self._alive.cancel(reason="worker process ended")

    def _receive(self, message: Message) -> None:
        match message:
            case Respond() | Finish() | Reschedule() | Fail() | Released() | Lingers() | Ended():
                execution = self.executions.get(message.execution)
                if execution is not None:
                    execution.receive(message)
                self._on_news()
            case Hello() | ModelOpened() | InstanceOpened() | Refused():
                self._take_answer(message)
            case GivenUp(why):
                self.kill(f"was killed: {why}")
            case Report():
                self._looking.discard(message.instance)
                self.reports[message.instance] = (trio.current_time(), read_statistics(message.statistics))
            case Log():
                log(message, self.child.pid)
            case _:
                raise NonsenseError(f"a worker does not send {message}")

    def _take_answer(self, message: Message) -> None:
        if self._expected is None or not isinstance(message, (self._expected, Refused)):
            raise NonsenseError(f"nobody has asked for {message}")
        if isinstance(message, ModelOpened):
            self.lanes = read_lanes(message.lanes)
        self._expected = None
        self._answer = message
        if self._asked is not None:
            self._asked.set()

    async def _retire(self) -> None:
        if not self._alive.cancel_called:
            self.child.kill()
        code = await self._wait()
        if code is None:
            self.child.kill()
            code = await self._wait()
        self.connection.close()
        self.end = self._why or describe_end(code)
        if code is None:
            LOGGER.error("the %s (process %d) %s", self._name, self.child.pid, describe_end(code))
        self._lose()

    async def _wait(self) -> int | None:
        with trio.move_on_after(self._reap_limit, shield=True):
            return await self.child.wait()
        return None

    def _lose(self) -> None:
        error = Unavailable(f"the {self._name} {self._why or self.end}; it is being restarted")
        for execution in tuple(self.executions.values()):
            execution.lose(error)
        if self._asked is not None:
            self._asked.set()
