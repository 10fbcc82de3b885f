"""One OS thread for each device: it makes every dispatch to the device and every wait for it.

No API interrupts a running device program, and JAX by itself lets the host run 32 programs ahead.  So a device is
used in short programs, *turns*, of which at most :data:`WINDOW` are on the device at a time: one runs, one is queued
behind it to hide the host's part.  A turn is also the quantum of fairness: jobs (executions) take turns in rotation.
The turn of a *late* job is queued only when the running one is about to end (:class:`LateEnqueue`): a cancel then waits
for one program, not for two.

Trio tasks never touch the device.  A task opens a :class:`~triton_trio.backends.jax.job.DeviceJob`, submits turns and awaits
them; the thread answers with one ``TrioToken.run_sync_soon`` a turn.

**Joined cancellation.**  When a task that waits for its job is cancelled, the abort function marks the job: from that
moment no turn of it is dispatched.  If one is on the device, it says ``Abort.FAILED``: the thread waits for the device,
and only then the task is rescheduled, with Trio's own ``Cancelled``.  So when a job's block has been left, the device is
idle for it.  If the device never comes back, a watchdog calls :meth:`DeviceThread.abandon`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from queue import Empty, Queue
from typing import TYPE_CHECKING

import trio

from ..._process import DEVICE_THREAD
from ..availability import Availability
from .controller import LateEnqueue, program_seconds
from .memory import breaks_device

if TYPE_CHECKING:
    from .job import DeviceJob

LOGGER = logging.getLogger("triton_trio.jax")

#: Programs on the device at a time: one running, one queued.
WINDOW = 2


class DeviceState(StrEnum):
    READY = "ready"
    DEAD = "dead"  #: a program did not come back and was given up; a reload starts a new thread
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    name: str
    state: DeviceState
    jobs: int  #: executions that are using the device now
    chunks: int  #: programs with steps that have ended
    steps: int  #: steps in them
    row_steps: int  #: the same, times the rows of the program, masked ones and padding too
    bubbles: int  #: follow-up programs that were dispatched when the device had run out of work
    failures: int  #: programs that raised
    cancels: int  #: cancelled jobs that the device has let go of
    last_cancel_seconds: float  #: from the latest cancel to the device being idle for it
    max_cancel_seconds: float
    device_seconds: float
    margin_ms: float  #: how long before the running program's predicted end a late job's next one is queued
    dropped: int  #: completions that came when nobody could take them any more


@dataclass(slots=True)
class AtWork:
    """What a device thread waits for: the oldest program on the device, or a dispatch."""

    job: DeviceJob
    turn: Turn
    since: float  #: when the thread turned to it, by Trio's clock, as all that watches; later, if nobody could run meanwhile
    expected: float = 0.0  #: seconds that it is known to take, at least


class Executor:
    """How the thread talks to the device: directly.  Tests put a gate in its place (``triton_trio.testing.device``)."""

    def dispatch(self, turn: Turn) -> bool:
        return turn.dispatch()

    def wait(self, turn: Turn) -> None:
        turn.wait()

    def ready(self, turn: Turn) -> bool:
        return turn.ready()

    def hold(self, mail: Queue[DeviceJob | None], seconds: float) -> DeviceJob | None:
        """The next mail, which a cancel sends too; raises :exc:`queue.Empty` when ``seconds`` have passed without."""
        return mail.get(timeout=seconds)


class Turn(ABC):
    """One program for the device.  Its methods run in the device thread; its fields are read when it is complete."""

    #: The submitter gets the turn back when it is done on the device; else already when it is dispatched.
    reply_when_done = True
    #: It is for nobody's request: a model is tried.
    at_load = False
    #: What the submitter wants to hear of this turn, and every turn behind it, is already known: drop those.
    last = False
    steps = 0  #: steps it makes; known when it is dispatched
    width = 1  #: rows that make them, whether anybody wants them or not
    seconds = 0.0  #: of device time; known when it is done
    failure = ""  #: the text of what it raised; exceptions are never kept, for their frames pin arrays

    @abstractmethod
    def dispatch(self) -> bool:
        """Put the program on the device, without waiting; False if there was nothing to do."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the device is done and the results are on the host; raises what the program raised."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether :meth:`wait` would not block."""

    def expect(self) -> float | None:
        """How many seconds the program takes at least; None if nobody knows."""
        return None

    def done(self, seconds: float) -> None:  # noqa: B027  (most turns have nothing to do)
        """Called after :meth:`wait` with the program's device time."""

    def failed(self) -> None:  # noqa: B027  (most turns have nothing to do)
        """Called when :meth:`dispatch` or :meth:`wait` has raised."""


class Pause(Turn):
    """Puts nothing on the device, and is complete when there is room: when at most one program is there."""

    def dispatch(self) -> bool:
        return False

    def wait(self) -> None:
        """Nothing to wait for."""

    def ready(self) -> bool:
        return True


class DeviceThread:
    """The owner of one device.  Made and used in one Trio run.

    **Cancellation:** nothing here is awaited; the jobs are.
    """

    def __init__(
        self, name: str, *, executor: Executor | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.name = name
        self.state = DeviceState.READY
        self.why = ""  #: it was given up
        self.clock = clock
        # Not a SimpleQueue, whose get() waits for ever if its timeout has passed when it looks again (Python 3.11).
        self.mail: Queue[DeviceJob | None] = Queue()
        #: Of the instances that use it, of whatever model: when it is given up, all of them take no more work.
        self.availability = Availability()
        self.availability.restore()
        # Of the Trio thread.
        self.jobs: dict[DeviceJob, None] = {}
        self.dropped = 0
        self._cancels = 0
        self._last_cancel = self._max_cancel = 0.0
        self._executor = executor or Executor()
        self._token = trio.lowlevel.current_trio_token()
        self._watch_clock = trio.lowlevel.current_clock().current_time
        # Of the device thread.
        self._in_flight: deque[tuple[DeviceJob, Turn, float]] = deque()
        self._at_work: AtWork | None = None  # the other thread reads it
        self._ready: deque[DeviceJob] = deque()
        self._closing = False
        self._last_done = 0.0
        self._late = LateEnqueue()
        self._chunks = self._steps = self._row_steps = self._bubbles = self._failures = self._undeliverable = 0
        self._device_seconds = 0.0
        # Owner: whoever made this object; ended by close().  A daemon, so that a device that hangs cannot keep the
        # process from exiting.
        self._thread = threading.Thread(target=self._main, name=f"{DEVICE_THREAD}{name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<DeviceThread {self.name} {self.state.value}>"

    def close(self) -> None:
        """End the thread.  Sync: all jobs are over, so the thread has nothing to wait for (unless it is dead)."""
        if self.state is DeviceState.READY:
            self.state = DeviceState.CLOSED
            self.mail.put(None)
            self._thread.join(timeout=5.0)
        else:
            self.mail.put(None)

    def abandon(self, why: str) -> None:
        """The device does not come back: every job on it ends with an error now; what comes later is dropped."""
        if self.state is DeviceState.READY:
            self.state = DeviceState.DEAD
            self.why = why
            LOGGER.error("device %s is given up: %s", self.name, why)
            self.availability.end(f"device {self.name} was given up: {why}")
            for job in tuple(self.jobs):
                job.abandon(why)

    def holds(self, owner: object) -> bool:
        """Whether ``owner`` waits for programs of theirs that are on the device, or on their way there."""
        return any(job.owner is owner and job.in_flight and job.waiting for job in self.jobs)

    def seconds_left(self, owner: object, limit: float, unseen: float) -> float:
        """For how long the device may go on with the programs of ``owner``, which nobody wants any more; 0: not any longer.

        A program may take ``limit`` seconds more than it is known to, from when it was its turn.  A program ahead of them that
        somebody wants may take what it takes: a cancel costs nobody else their device.

        Args:
          unseen: seconds just past in which nobody could run, the device neither: see :func:`~triton_trio.scopes.wait_in_parts`.
        """
        if self.state is not DeviceState.READY:
            return 0.0
        at_work = self._at_work  # once: the other thread sets it
        if at_work is None:  # between two programs
            return limit
        if not (at_work.job.owner is owner or at_work.job.draining):
            return limit
        now = self._watch_clock()
        at_work.since = min(now, at_work.since + unseen)
        return max(0.0, at_work.since + at_work.expected + limit - now)

    def count_cancel(self, seconds: float) -> None:
        """A cancelled job's device is idle, ``seconds`` after the cancel."""
        self._cancels += 1
        self._last_cancel = seconds
        self._max_cancel = max(self._max_cancel, seconds)

    def statistics(self) -> DeviceStatistics:
        return DeviceStatistics(
            name=self.name,
            state=self.state,
            jobs=len(self.jobs),
            chunks=self._chunks,
            steps=self._steps,
            row_steps=self._row_steps,
            bubbles=self._bubbles,
            failures=self._failures,
            cancels=self._cancels,
            last_cancel_seconds=self._last_cancel,
            max_cancel_seconds=self._max_cancel,
            device_seconds=self._device_seconds,
            margin_ms=self._late.margin * 1e3,
            dropped=self.dropped + self._undeliverable,
        )

    # The device thread

    def _main(self) -> None:
        try:
            while not self._closing:
                self._read_mail(block=not self._ready and not self._must_wait())
                self._fill()
                if self._must_wait():
                    self._retire_oldest()
        except BaseException as exc:
            # A bug in this file.  Whoever waits must hear of it, for nobody will ever answer again.
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.abandon, f"its thread ended with {type(exc).__name__}: {exc}")
            raise

    def _must_wait(self) -> bool:
        """Somebody needs the oldest program's end.

        An explicit model's program that nobody asks for is not waited for: its author's next command would find the
        thread asleep and be dispatched late.
        """
        return bool(self._in_flight) and (
            bool(self._ready) or any(turn.reply_when_done or job.draining for job, turn, _ in self._in_flight)
        )

    def _read_mail(self, *, block: bool) -> None:
        while block or not self.mail.empty():
            self._open_mail(self.mail.get())
            block = False

    def _open_mail(self, job: DeviceJob | None) -> None:
        if job is None:
            self._closing = True
        elif job.draining:
            self._post_if_drained(job)
        elif job.turns and not job.in_rotation:
            job.in_rotation = True
            self._ready.append(job)

    def _fill(self, *, hold: bool = True) -> None:
        """Dispatch what there is room for; with ``hold``, wait until it is time for it."""
        held = False
        while self._ready and len(self._in_flight) < WINDOW:
            seconds = self._hold_seconds()
            if seconds > 0:
                if not hold:
                    return
                held = True
                try:
                    self._open_mail(self._executor.hold(self.mail, seconds))
                    continue  # if it was a cancel, there is no turn to wait for any more
                except Empty:
                    pass
            self._dispatch(self._ready.popleft(), held=held)
            held = False

    def _hold_seconds(self) -> float:
        job = self._ready[0]
        if not (job.late and job.turns and self._in_flight):
            return 0.0
        _, running, dispatched_at = self._in_flight[0]
        return self._late.hold(self.clock(), max(self._last_done, dispatched_at), running.expect())

    def _dispatch(self, job: DeviceJob, *, held: bool) -> None:
        job.in_rotation = False
        turn = job.take_turn()
        if turn is None:
            return
        if job.turns:
            job.in_rotation = True
            self._ready.append(job)
        follows = job.started and self._in_flight_is_done()
        began = self.clock()
        self._at_work = AtWork(job, turn, self._watch_clock())
        try:
            dispatched = self._executor.dispatch(turn)
        except Exception as exc:  # noqa: BLE001  (whatever a model raises is that model's error)
            self._fail(job, turn, exc)
            dispatched = False
        self._at_work = None
        if dispatched:
            # Small programs of a CPU run in the dispatch itself.
            at = began if self._executor.ready(turn) else self.clock()
            self._bubbles += follows
            if job.late and self._in_flight:
                # Late without having waited says nothing of the margin: the program was too short for any.
                self._late = self._late.queued(late=held and self._in_flight_is_done())
            job.started = True
            self._in_flight.append((job, turn, at))
            if not turn.reply_when_done:
                self._complete(job, turn)
            return
        job.give_back()
        self._complete(job, turn)
        self._post_if_drained(job)

    def _in_flight_is_done(self) -> bool:
        return not self._in_flight or self._executor.ready(self._in_flight[-1][1])

    def _retire_oldest(self) -> None:
        job, turn, dispatched_at = self._in_flight.popleft()
        # Nobody looked when it ended, so nobody knows how long it took: not counted, rather than with its idle time.
        unmeasured = not turn.reply_when_done and self._executor.ready(turn)
        self._at_work = AtWork(job, turn, self._watch_clock(), turn.expect() or 0.0)
        try:
            self._executor.wait(turn)
        except Exception as exc:  # noqa: BLE001  (whatever a model raises is that model's error)
            dropped = self._fail(job, turn, exc)
            if not turn.reply_when_done:
                # Its own answer is long given: whoever waits, waits for one of these.
                for other in dropped:
                    other.failure = turn.failure
                    self._post(job, other, None)
        now = self.clock()
        turn.seconds = 0.0 if unmeasured else program_seconds(now, dispatched_at, self._last_done)
        self._last_done = now
        self._at_work = None
        if not turn.failure:
            turn.done(turn.seconds)
        self._chunks += turn.steps > 0
        self._steps += turn.steps
        self._row_steps += turn.steps * turn.width
        self._device_seconds += turn.seconds
        # Before give_back(): from then on the job may be over, and its task reads them.
        job.device_seconds += turn.seconds
        job.steps += turn.steps
        job.give_back()
        if turn.last:
            job.drop_turns()
        # The next program goes out before anybody hears of this one: the device must not wait for Trio.  Nor must Trio
        # wait for a program whose time has not come.
        self._read_mail(block=False)
        self._fill(hold=False)
        if turn.reply_when_done:
            self._complete(job, turn)
        self._post_if_drained(job)

    def _fail(self, job: DeviceJob, turn: Turn, exc: Exception) -> list[Turn]:
        """What has been dropped with it."""
        turn.failure = f"{type(exc).__name__}: {exc}"
        turn.failed()
        self._failures += 1
        if not job.draining:
            LOGGER.error("%s failed on device %s: %s", job.name, self.name, traceback.format_exc())
        dropped = job.drop_turns()
        if found := breaks_device(turn.failure):
            why = (
                f"after {found} no program can run there in this process; restart it (see the parameter worker_process)"
            )
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.abandon, why)
        return dropped

    def _complete(self, job: DeviceJob, turn: Turn) -> None:
        job.finished += 1
        self._post(job, turn, None)

    def _post_if_drained(self, job: DeviceJob) -> None:
        if job.draining and job.in_flight == 0:
            job.draining = False
            self._post(job, None, self.clock() - job.joined_at)

    def _post(self, job: DeviceJob, turn: Turn | None, drained_after: float | None) -> None:
        try:
            self._token.run_sync_soon(job.receive_nowait, turn, job.finished, drained_after)
        except trio.RunFinishedError:
            self._undeliverable += 1
