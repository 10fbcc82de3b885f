"""The engine: one task for each device that a language model is on, and the slots there that requests use.

The task hands out turns, :data:`CREDITS` of them, so that the device need not wait for Trio.  What a turn does is decided in
the device thread when it is dispatched, with one program running and none behind it; so tokens are read one program behind.
A cancel needs no task to run: whether a text's reader is still there is read when the decision is made, so from the abort
function on no program is dispatched for it, and those two are all that it had.  A lock makes decisions of the two threads
one after the other; it is held for microseconds.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import trio

from ....errors import TritonError, Unavailable
from ...availability import Availability
from ..controller import ChunkController
from ..device import WINDOW, DeviceState, DeviceThread, Turn
from ..job import DeviceJob
from ..turns import start_copy
from .llama import Params
from .programs import Compiled, LlamaPrograms
from .schedule import Generation, Program, Reader, ScheduleStatistics, Settings, SlotSchedule, Token
from .slots import Emitted, SlotState

if TYPE_CHECKING:
    from .loading import LoadStatistics

#: Turns that may be out: two on the device, and one in line so that its thread need not wait for Trio.
CREDITS = WINDOW + 1


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One language model on one device."""

    model: str
    device: str
    slots: int
    cache_bytes: int
    schedule: ScheduleStatistics
    prefills: int  #: programs that have ended
    decodes: int
    steps: int  #: in them
    k: int  #: steps the next decode may have
    step_ms: float | None  #: device time of one; None until measured
    resets: int  #: how often an error on the device took every text there
    compiles: int  #: all of them before the model was ready: programs are compiled ahead, and none can compile again
    load: LoadStatistics | None  #: None: it was not loaded from files


class SlotPrograms:
    """The programs and what they work on.  ``state`` is the device thread's while programs are out."""

    def __init__(
        self, programs: LlamaPrograms, params: Params, prefill: Mapping[int, Compiled], decode: Mapping[int, Compiled]
    ) -> None:
        self.spec = programs.spec
        self.prefill = prefill
        self.decode = decode
        self.load: LoadStatistics | None = None
        self.state: SlotState | None = None
        self._params: Params | None = params
        self._programs = programs

    def run(self, program: Program) -> Emitted:
        """In the device thread."""
        state, self.state = self.state or self._programs.state(), None
        if program.chunk is not None:
            packed = program.chunk.pack(self.spec, program.length)
            self.state, emitted = self.prefill[program.length](self._params, state, *packed)
        else:
            self.state, emitted = self.decode[program.steps](self._params, state, program.evict, program.hold)
        return emitted  # type: ignore[no-any-return]

    def renew(self) -> None:
        """Every slot is free, as at the start.  Blocking."""
        self.state = None
        self.state = self._programs.state()

    def unload(self) -> None:
        self.state = self._params = None


class SlotTurn(Turn):
    """One program of the engine; None until it is dispatched, and for good if there was nothing to do."""

    def __init__(self, engine: SlotEngine) -> None:
        self.program: Program | None = None
        self.emitted: Any = None
        self._engine = engine

    def dispatch(self) -> bool:
        program = self._engine.decide(self)
        if program is None:
            return False
        self.steps = program.steps
        self.emitted = self._engine.programs.run(program)
        start_copy(self.emitted)
        return True

    def wait(self) -> None:
        # Copies: a view would keep the device's arrays until the engine has another turn in hand.
        self.emitted = Emitted(*map(np.array, self.emitted))  # type: ignore[arg-type]

    def ready(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.emitted))

    def expect(self) -> float | None:
        return None if self.program is None else self._engine.expect(self.program)

    def done(self, seconds: float) -> None:
        if self.program is not None and seconds:
            self._engine.observe(self.program, seconds)


class SlotEngine:
    """Serves the slots of one device.

    Args:
      waiting: how many requests wait for a slot; asked in the device thread, too.
      controller: says how many steps a decode may have, when nobody waits.
      late: decide on a program only when the one before it is about to end: a cancel, and a prompt that comes, then wait
        for one program and not for two.
    """

    def __init__(
        self,
        name: str,
        model: str,
        device: DeviceThread,
        programs: SlotPrograms,
        schedule: SlotSchedule,
        controller: ChunkController,
        *,
        waiting: Callable[[], int] = lambda: 0,
        late: bool = False,
    ) -> None:
        self.name = name
        self.schedule = schedule
        self._model = model
        self._device = device
        self.programs = programs
        self.controller = controller
        self._waiting = waiting
        self._late = late
        #: Of the device thread: seconds of the latest prefills, by length.
        self._prefill_seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=16))
        self._work = trio.Event()
        self._lock = threading.Lock()
        self._turns: dict[SlotTurn, None] = {}  # that are out
        self._over: TritonError | None = None
        self._prefills = self._decodes = self._steps = self._resets = 0

    def statistics(self) -> EngineStatistics:
        spec, step = self.programs.spec, self.controller.step_seconds
        with self._lock:
            schedule = self.schedule.statistics()
        return EngineStatistics(
            model=self._model,
            device=self._device.name,
            slots=spec.slots,
            cache_bytes=spec.cache_bytes,
            schedule=schedule,
            prefills=self._prefills,
            decodes=self._decodes,
            steps=self._steps,
            k=self.controller.k,
            step_ms=None if step is None else step * 1e3,
            resets=self._resets,
            compiles=len(self.programs.prefill) + len(self.programs.decode),
            load=self.programs.load,
        )

    @property
    def availability(self) -> Availability:
        """Of its device."""
        return self._device.availability

    # A request's side

    @asynccontextmanager
    async def open_generation(
        self, slot: int, prompt: np.ndarray, settings: Settings, reader: Reader
    ) -> AsyncIterator[Generation]:
        """Make a text in a slot that is free.  Leaving the block gives the slot back, whatever became of the text.

        Raises:
          Unavailable: the device was given up, or the model is being unloaded.

        **Cancellation:** from the instant in which ``reader`` is not live any more, no program is dispatched for it.  When
        the exception passes through, none is on the device: the two that were have run.  If the device never comes back,
        the watchdog ends that wait with :meth:`abandon`.
        """
        if self._over is not None:
            raise type(self._over)(*self._over.args)
        with self._lock:
            generation = self.schedule.admit(slot, prompt, settings, reader)
        self._work.set()
        completed = False
        try:
            yield generation
            completed = True
        except trio.Cancelled:
            self._leave(generation)  # at an unload its reader may have heard nothing yet
            # Shielded without a deadline of its own: the bound is the watchdog's abandon(), which ends every text here.
            with trio.CancelScope(shield=True):
                while generation.busy:
                    await generation.news.park()
            raise
        finally:
            self._leave(generation)
            with self._lock:
                self.schedule.settle(generation, completed=completed)
            self._work.set()

    def _leave(self, generation: Generation) -> None:
        with self._lock:
            self.schedule.leave(generation)

    async def tokens(self, generation: Generation) -> list[Token]:
        """What has come since; waits for at least one token.

        Raises:
          TritonError: what went wrong on the device.

        **Cancellation:** an ordinary checkpoint; no token is lost.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not generation.unread:
            if generation.error is not None:
                raise generation.error
            await generation.news.park()
        with self._lock:
            tokens = list(generation.unread)
            generation.unread.clear()
        # Its row may have stood still for that.
        self._work.set()
        return tokens

    def seconds_left(self, limit: float, unseen: float) -> float:
        """See :meth:`DeviceThread.seconds_left`."""
        return self._device.seconds_left(self, limit, unseen)

    def abandon(self) -> None:
        """The device does not come back."""
        self._device.abandon("the device did not let go in time after a cancel; reload the model")

    # The engine's task

    async def run(self) -> None:
        """Serve until cancelled.

        **Cancellation:** the device is awaited, then every text that is left fails.
        """
        try:
            while True:
                await self._work.wait()
                self._work = trio.Event()
                try:
                    async with DeviceJob(self._device, self.name, owner=self, late=self._late) as job:
                        await self._serve(job)
                except TritonError as exc:
                    self._lose(exc)
        finally:
            self._end(Unavailable(f"model '{self._model}' is being unloaded"))
            self.programs.unload()

    async def _serve(self, job: DeviceJob) -> None:
        while True:
            while len(self._turns) < CREDITS and self._has_work():
                following = SlotTurn(self)
                self._turns[following] = None
                job.submit(following)
            if not self._turns:
                return
            turn = await job.next()
            assert isinstance(turn, SlotTurn)
            del self._turns[turn]
            if turn.program is not None:
                self._receive(turn.program, turn)

    def _has_work(self) -> bool:
        with self._lock:
            return self.schedule.has_work()

    def _receive(self, program: Program, turn: SlotTurn) -> None:
        if program.steps:
            self._decodes += 1
            self._steps += program.steps
        else:
            self._prefills += 1
        with self._lock:
            self.schedule.receive(program, turn.emitted, turn.seconds)

    # In the device thread

    def decide(self, turn: SlotTurn) -> Program | None:
        """What the device does next."""
        with self._lock:
            if self._over is None:
                steps = self.controller.pick(self.schedule.most_steps())
                turn.program = self.schedule.next_program(waiting=self._waiting() > 0, steps=steps)
            return turn.program

    def expect(self, program: Program) -> float | None:
        """The least that it takes, by the latest of its kind; None if there was none."""
        if program.steps:
            return self.controller.expect(program.steps)
        return min(self._prefill_seconds[program.length], default=None)

    def observe(self, program: Program, seconds: float) -> None:
        """It has ended."""
        if program.steps:
            self.controller.observe(program.steps, seconds)
        else:
            self._prefill_seconds[program.length].append(seconds)

    # Errors

    def _lose(self, error: TritonError) -> None:
        """What was donated to a program that failed is gone; the device is idle, or given up."""
        self.programs.state = None
        if self._device.state is not DeviceState.READY:
            self._end(error)
            return
        self._resets += 1
        self._drop(error, everybody=False)
        self._work.set()  # for those who had not been on the device yet

    def _end(self, error: TritonError) -> None:
        # A copy: the error itself would keep the frames it came through until the model is unloaded.
        self._over = self._over or type(error)(*error.args)
        self._drop(error, everybody=True)

    def _drop(self, error: TritonError, *, everybody: bool) -> None:
        turns, self._turns = self._turns, {}
        with self._lock:
            self.schedule.lose(error, everybody=everybody)
            for turn in turns:
                if turn.program is not None:
                    self.schedule.dropped(turn.program, turn.seconds)
