"""The engine: one task for each device that a language model is on, and the slots there that requests use.

The task hands out turns; what a turn does is decided in the device thread when it is dispatched, with one program running
and none behind it.  So tokens are read one program behind, and a cancel is on the device with the program after those two.
A lock makes decisions of the two threads one after the other; it is held for microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import trio

from ....errors import TritonError, Unavailable
from ..controller import ChunkController
from ..device import WINDOW, DeviceState, DeviceThread, Turn
from ..job import DeviceJob
from ..turns import start_copy
from .llama import Params
from .programs import Compiled, LlamaPrograms
from .schedule import Generation, Program, ScheduleStatistics, Settings, SlotSchedule, Token
from .slots import Emitted, SlotState

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


class SlotPrograms:
    """The programs and what they work on.  ``state`` is the device thread's while programs are out."""

    def __init__(
        self, programs: LlamaPrograms, params: Params, prefill: Mapping[int, Compiled], decode: Mapping[int, Compiled]
    ) -> None:
        self.spec = programs.spec
        self.prefill = prefill
        self.decode = decode
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

    def unload(self) -> None:
        self.state = self._params = None


class SlotTurn(Turn):
    """One program of the engine; None until it is dispatched, and for good if there was nothing to do."""

    def __init__(self, engine: SlotEngine, *, waiting: bool) -> None:
        self.program: Program | None = None
        self.emitted: Any = None
        self._engine = engine
        self._waiting = waiting

    def dispatch(self) -> bool:
        self.program = self._engine.decide(waiting=self._waiting)
        if self.program is None:
            return False
        self.steps = self.program.steps
        self.emitted = self._engine.programs.run(self.program)
        start_copy(self.emitted)
        return True

    def wait(self) -> None:
        self.emitted = Emitted(*map(np.asarray, self.emitted))  # type: ignore[arg-type]

    def ready(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.emitted))

    def done(self, seconds: float) -> None:
        if self.steps and seconds:
            self._engine.controller.observe(self.steps, seconds)


class SlotEngine:
    """Serves the slots of one device.

    Args:
      waiting: how many requests wait for a slot.
      controller: says how many steps a decode may have, when nobody waits.
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
    ) -> None:
        self.name = name
        self.schedule = schedule
        self._model = model
        self._device = device
        self.programs = programs
        self.controller = controller
        self._waiting = waiting
        self._work = trio.Event()
        self._lock = threading.Lock()
        self._out: list[Program] = []  # programs on the device
        self._over: TritonError | None = None
        self._prefills = self._decodes = self._steps = self._resets = 0

    def statistics(self) -> EngineStatistics:
        spec, step = self.programs.spec, self.controller.step_seconds
        return EngineStatistics(
            model=self._model,
            device=self._device.name,
            slots=spec.slots,
            cache_bytes=spec.cache_bytes,
            schedule=self.schedule.statistics(),
            prefills=self._prefills,
            decodes=self._decodes,
            steps=self._steps,
            k=self.controller.k,
            step_ms=None if step is None else step * 1e3,
            resets=self._resets,
            compiles=len(self.programs.prefill) + len(self.programs.decode),
        )

    # A request's side

    @asynccontextmanager
    async def open_generation(self, slot: int, prompt: np.ndarray, settings: Settings) -> AsyncIterator[Generation]:
        """Make a text in a slot that is free.  Leaving the block gives the slot back, whatever became of the text.

        Raises:
          Unavailable: the device was given up, or the model is being unloaded.

        **Cancellation:** when the exception passes through, no program that is on the device works for this text: at most
        the two that were out when it was cancelled have run.  If the device never comes back, the watchdog ends that
        wait with :meth:`abandon`.
        """
        if self._over is not None:
            raise type(self._over)(*self._over.args)
        with self._lock:
            generation = self.schedule.admit(slot, prompt, settings)
        self._work.set()
        try:
            yield generation
        except trio.Cancelled:
            self._leave(generation)
            # Shielded without a deadline of its own: the bound is the watchdog's abandon(), which ends every text here.
            with trio.CancelScope(shield=True):
                while generation.busy:
                    await generation.news.park()
            raise
        finally:
            self._leave(generation)
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
        tokens = list(generation.unread)
        generation.unread.clear()
        # Its row may have stood still for that.
        self._work.set()
        return tokens

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
                    async with DeviceJob(self._device, self.name) as job:
                        await self._serve(job)
                except TritonError as exc:
                    self._lose(exc)
        finally:
            self._end(Unavailable(f"model '{self._model}' is being unloaded"))
            self.programs.unload()

    async def _serve(self, job: DeviceJob) -> None:
        while True:
            while job.outstanding < CREDITS and self.schedule.has_work():
                job.submit(SlotTurn(self, waiting=self._waiting() > 0))
            if not job.outstanding:
                return
            turn = await job.next()
            assert isinstance(turn, SlotTurn)
            if turn.program is not None:
                self._receive(turn.program, turn)

    def _receive(self, program: Program, turn: SlotTurn) -> None:
        if program.steps:
            self._decodes += 1
            self._steps += program.steps
        else:
            self._prefills += 1
        with self._lock:
            self._out.remove(program)
            self.schedule.receive(program, turn.emitted, turn.seconds)

    def decide(self, *, waiting: bool) -> Program | None:
        """In the device thread: what it does next."""
        with self._lock:
            steps = self.controller.pick(self.schedule.most_steps())
            program = self.schedule.next_program(waiting=waiting, steps=steps)
            if program is not None:
                self._out.append(program)
            return program

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
        self._over = self._over or error
        self._drop(error, everybody=True)

    def _drop(self, error: TritonError, *, everybody: bool) -> None:
        with self._lock:
            out, self._out = self._out, []
            self.schedule.lose(error, everybody=everybody)
            self.schedule.dropped(out)
