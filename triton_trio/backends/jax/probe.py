"""A step model's first chunks, on zeros, at load: how long a step takes is known before the first request waits for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tensor import DTYPES
from .device import Turn
from .job import open_trial
from .programs import RowShapes, precision

if TYPE_CHECKING:
    from .placed import PlacedModel
    from .programs import ProgramSet

#: Times that each size of a chunk is tried.  The quickest counts: a machine can be too busy, but not too quick.
TRIES = 3
#: Seconds of chunks after which the last one is believed.
ENOUGH = 1.0


class Probe(Turn):
    """One chunk, the first one with ``init`` before it."""

    at_load = True

    def __init__(self, placed: PlacedModel, programs: ProgramSet, inputs: dict[str, Any], state: Any, k: int) -> None:
        self._placed = placed
        self._programs = programs
        self._inputs = inputs
        self._k = k
        self.state = state  #: carry and flags; None before the first chunk

    def dispatch(self) -> bool:
        programs, params = self._programs, self._placed.params
        state, self.state = self.state, None
        with precision(self._placed.options.x64):
            if state is None:
                assert programs.init is not None
                state = programs.init(params, self._inputs)
            # Rows that are done and rows that are not take the same time.
            keep = np.ones(programs.bucket, bool)
            carry, flags, _ = programs.chunks[self._k](params, *state, keep)
        self.state = carry, flags
        return True

    def wait(self) -> None:
        self.state[1][0].block_until_ready()

    def ready(self) -> bool:
        return bool(self.state[1][0].is_ready())


async def measure_step(placed: PlacedModel, programs: ProgramSet, shapes: RowShapes) -> float:
    """Device seconds of one step of a full batch.

    Raises:
      InternalError: the program failed on zeros; the text says how.

    **Cancellation:** between chunks; see :func:`~.job.open_trial`.
    """
    dtypes = {spec.name: DTYPES[spec.datatype] for spec in placed.config.inputs}
    inputs = {name: np.zeros((programs.bucket, *dims), dtypes[name]) for name, dims in shapes}
    spent = 0.0
    state: Any = None

    async def run_chunk(k: int) -> float:
        nonlocal state, spent
        probe = Probe(placed, programs, inputs, state, k)
        async with open_trial(placed.device, placed.name, placed.release_limit) as job:
            await job.call(probe)
        state, probe.state = probe.state, None
        spent += probe.seconds
        return probe.seconds

    controller = programs.controller
    per_step = await run_chunk(controller.ladder[0]) / controller.ladder[0]  # and init
    # A short chunk can be over before its dispatch is, and seem to take no time; the first that fills the target tells.
    for k in controller.ladder:
        chunk = math.inf
        for _ in range(TRIES):
            if spent < ENOUGH:
                chunk = min(chunk, await run_chunk(k))
        if chunk < math.inf:
            per_step = chunk / k
        if spent >= ENOUGH or chunk >= controller.target:
            break
    return per_step
