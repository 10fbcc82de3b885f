"""The process of one model version, from the server: started with the model, made again when it is lost.

It is lost when it ends by itself, whatever the reason, and when it is killed because its device did not let go.  Then every
execution in it is answered with an error, and a new process loads the model again; until it has, requests wait in
their queue, each in its own scope.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ...errors import TritonError, Unavailable
from ..availability import Availability
from .messages import Close, Hello, InstanceOpened, Message, ModelOpened, OpenInstance, OpenModel, Waiting
from .plain import write_config
from .session import Session

if TYPE_CHECKING:
    from ...batch import Batch
    from ..base import ModelContext, Placement
    from .process import Child

LOGGER = logging.getLogger("triton_trio.worker")


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """In seconds, but for ``restarts`` and ``reload_factor``."""

    start: float = 60.0  #: from the start of the process until its backend is imported
    reload: float = 60.0  #: for a new process to load the model, at least
    reload_factor: float = 10.0  #: or so many times what the first load has taken
    close: float = 5.0  #: from the request to close until the process has ended; then it is killed
    reap: float = 5.0  #: from a kill, or the end of the connection, until the process has ended
    restarts: int = 5  #: if it is lost more often than that within ``window``, the model is given up
    window: float = 300.0
    delay: float = 0.5  #: before the second restart within ``window``; twice as long before each further one


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """Of the worker process, which all instances of a model version share."""

    pid: int | None  #: None while there is none
    restarts: int
    last_end: str  #: how the latest process that was lost has ended
    executions: int  #: there now
    age: float  #: seconds since the process has said ``backend``; looking at it asks for the next report
    backend: object | None  #: what the instance's backend counts, in this process


class Worker:
    """See the module.

    Args:
      launch: starts a process.
    """

    def __init__(self, context: ModelContext, launch: Callable[[], Awaitable[Child]], limits: WorkerLimits) -> None:
        self.name = f"worker process of model '{context.config.name}'"
        self.availability = Availability()
        self.lanes: dict[tuple[str, int], int] = {}  #: by kind and device
        self._context = context
        self._launch = launch
        self._limits = limits
        self._scope = trio.CancelScope()
        self._closing = False
        self._session: Session | None = None  # with the model loaded, or about to be
        self._numbers = itertools.count(1)
        self._placements: list[Placement] = []  # of the instances that every new process has
        self._told_waiting = False
        self._load_seconds = 0.0
        self._losses: deque[float] = deque()
        self._restarts = 0
        self._last_end = ""

    def statistics(self, instance: str) -> WorkerStatistics:
        """As the process has said last; it is asked for the next report."""
        session, now = self._session, trio.current_time()
        if session is not None:
            session.look(instance)
        reported, backend = (now, None) if session is None else session.reports.get(instance, (now, None))
        return WorkerStatistics(
            pid=None if session is None else session.child.pid,
            restarts=self._restarts,
            last_end=self._last_end,
            executions=0 if session is None else len(session.executions),
            age=now - reported,
            backend=backend,
        )

    # What instances do

    async def execute(self, instance: str, batch: Batch) -> None:
        """See :meth:`~triton_trio.backends.BackendInstance.execute`."""
        if self._session is None or not self.availability.ready:
            raise Unavailable(self.availability.why or f"the {self.name} is being restarted")
        self._tell_waiting()
        await self._session.execute(next(self._numbers), instance, batch)

    def post(self, message: Message) -> None:
        """To the process, if there is one."""
        if self._session is not None:
            self._session.connection.post(message)

    def _tell_waiting(self) -> None:
        """Let the process know whether requests wait, if that has changed since one of the two has last said something."""
        waiting = self._context.waiting()
        if (waiting > 0) is not self._told_waiting:
            self._told_waiting = waiting > 0
            self.post(Waiting(waiting))

    def abandon(self) -> None:
        """Its device does not let go: kill it.  Everybody in it has an error when this returns."""
        if self._session is not None:
            self._session.kill("was killed, for its device did not let go in time after a cancel")

    async def open_instance(self, placement: Placement) -> None:
        """Open it in this process, and in those to come.

        Raises:
          TritonError: what was wrong; or the process has ended meanwhile.

        **Cancellation:** the wait ends; who cancels a load closes the worker.
        """
        if self._session is None:
            raise Unavailable(f"the {self.name} {self._last_end}")
        began = trio.current_time()
        await self._session.ask(_open_instance(placement), InstanceOpened)
        self._load_seconds += trio.current_time() - began
        self._placements.append(placement)

    # The life of the processes

    async def run(  # noqa: ASYNC128 - _live() gets the task_status and says started
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Load the model, and when that is done (``started()``) have a process for it until :meth:`close`.

        Raises:
          TritonError: the first load has failed.

        **Cancellation:** until it has started, the process is killed.  From then on it is not cancelled: requests that are
        being cancelled need the process until their devices have let go.
        """
        with self._scope:
            await self._live(task_status)
            if not self._scope.shield:
                raise Unavailable(f"the {self.name} {self._last_end}")
            while not self._closing and await self._may_restart():
                self._restarts += 1
                try:
                    await self._live()
                except TritonError as exc:
                    self._last_end = f"could not load the model again ({exc.message})"
            if not self._closing:
                await trio.sleep_forever()

    def close(self) -> None:
        """End :meth:`run`.  Sync: a process that has its model loaded is asked to close it, in the time that it has."""
        self._closing = True
        session, self._session = self._session, None
        if session is None or session.asked or not self.availability.ready:
            self._scope.cancel(reason="model unloaded")
        else:
            session.connection.post(Close())
            self._scope.deadline = trio.current_time() + self._limits.close
        self.availability.lose()

    async def _live(self, task_status: trio.TaskStatus[None] | None = None) -> None:
        """One process, from its start to its end; raises :exc:`TritonError` if it could not load the model."""
        limits = self._limits
        try:
            child = await self._launch()
        except OSError as exc:
            raise Unavailable(f"the {self.name} cannot be started: {exc}") from None
        session = Session(self.name, child, self.availability, on_news=self._tell_waiting, reap_limit=limits.reap)
        self._told_waiting = False
        try:
            async with session.open():
                with _fail_after(limits.start, f"the {self.name} has not begun within {limits.start:g} s"):
                    await session.ask(None, Hello)
                if task_status is not None:
                    began = trio.current_time()
                    await self._open_model(session)
                    self._load_seconds = trio.current_time() - began
                    self._scope.shield = True
                else:
                    limit = max(limits.reload, limits.reload_factor * self._load_seconds)
                    with _fail_after(limit, f"the {self.name} has not loaded the model again within {limit:g} s"):
                        await self._open_model(session)
                        for placement in self._placements:
                            await session.ask(_open_instance(placement), InstanceOpened)
                self._session = session
                self.availability.restore()
                if task_status is not None:
                    task_status.started()
                else:
                    LOGGER.info("the %s is there again, as process %d", self.name, session.child.pid)
                await trio.sleep_forever()
        finally:
            self._session = None
            self.availability.lose()
            self._last_end = session.end

    async def _open_model(self, session: Session) -> None:
        context = self._context
        wanted = OpenModel(
            write_config(context.config),
            context.version,
            str(context.model_directory),
            str(context.version_directory),
        )
        await session.ask(wanted, ModelOpened)
        self.lanes = session.lanes

    async def _may_restart(self) -> bool:
        """Wait until it is time for the next process; False if there have been too many."""
        limits, now = self._limits, trio.current_time()
        self._losses.append(now)
        while self._losses[0] < now - limits.window:
            self._losses.popleft()
        times = len(self._losses)
        if times > limits.restarts:
            why = (
                f"the {self.name} was lost {times} times within {limits.window:g} s; the last one {self._last_end}; "
                "reload the model"
            )
            LOGGER.error("%s", why)
            self.availability.end(why)
            return False
        LOGGER.error("the %s %s; it is being restarted", self.name, self._last_end)
        await trio.sleep(0 if times == 1 else limits.delay * 2 ** (times - 2))
        return True


def _open_instance(placement: Placement) -> OpenInstance:
    return OpenInstance(placement.name, placement.kind, placement.device)


@contextmanager
def _fail_after(seconds: float, message: str) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unavailable(message)
