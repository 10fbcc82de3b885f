"""From files to a model that can begin: parameters, compiled programs, room for both, and one run of everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
import trio

from ....errors import InternalError, InvalidArgument
from ..compilation_cache import CACHE_HITS
from ..device import LOGGER, WINDOW, DeviceThread, Turn
from ..devices import device_name
from ..job import open_trial
from ..memory import MIB, failure_text
from .engine import SlotPrograms
from .fingerprint import fingerprint
from .placement import Placement
from .plan import PlanFormat
from .programs import Compiled, LlamaPrograms, ProgramMemory, slot_spec
from .schedule import Program
from .slots import PromptChunk
from .weights import load_params

if TYPE_CHECKING:
    from .options import TextOptions
    from .weights import Checkpoint

Programs = TypeVar("Programs", bound=SlotPrograms)

#: Times that a program is measured: the median of them tells what it takes, the quickest what it takes at least.
TRIES = 3


@dataclass(frozen=True, slots=True)
class LoadStatistics:
    """What a language model takes, and how long a cancel waits.  Bytes are those on each device, if several share the model."""

    devices: tuple[str, ...]
    params_bytes: int
    cache_bytes: int  #: keys and values of all slots, and what else is kept of them: as long as the model is loaded
    temporary_bytes: int  #: the most that a program takes besides, while it runs
    compiles: int
    compiles_cached: int  #: of these, how many the compilation cache already had
    #: Device time of one token for every slot: a cancel that finds the device at work waits for one, there is no less.
    #: None, as what follows, if ``warmup`` is false or devices of other processes share the model.
    step_ms: float | None = None
    prefill_ms: float | None = None  #: of the longest piece of a prompt
    cancel_ms: float | None = (
        None  #: what a cancel waits at most: two of the longest programs, in a context that is full
    )


class Loader:
    """Makes the programs of one model on one set of devices."""

    def __init__(self, model: str, checkpoint: Checkpoint, options: TextOptions, devices: Sequence[jax.Device]) -> None:
        self._name = f"model '{model}'"
        self._checkpoint = checkpoint
        self._options = options
        self._devices = tuple(map(device_name, devices))
        self._placement = Placement.on(devices)
        self._spec = slot_spec(
            checkpoint.config,
            self._placement,
            slots=options.slots,
            context=min(options.context, checkpoint.config.context),
            end_tokens=checkpoint.end_tokens,
            dtype=options.activations(),
        )
        self._prefill = sorted({min(length, self._spec.context) for length in options.prefill})
        self._params_bytes = self._state_bytes = self._temporary = 0
        self._compiles = self._cached = 0
        self._warned = False

    def plan(self) -> PlanFormat:
        """What all hosts of one model have to agree on.  Blocking: it reads some of the files."""
        return PlanFormat(
            self._spec,
            self._prefill,
            self._options.ladder,
            dtype=self._options.dtype or str(self._spec.dtype),
            weights=fingerprint(self._checkpoint.path),
        )

    async def load(self, kind: type[Programs]) -> Programs:
        """Parameters on the devices, and everything compiled.

        Raises:
          InvalidArgument: a file is wrong, or all of that does not fit.

        **Cancellation:** between two tensors, and between two compilations.
        """
        programs, params = await trio.to_thread.run_sync(self._load_params)
        self._state_bytes = bytes_on_each(programs.state_avals)
        self._params_bytes = bytes_on_each(params)
        self._check_memory("")
        prefill: dict[int, Compiled] = {}
        decode: dict[int, Compiled] = {}
        for length in self._prefill:
            prefill[length] = await self._compile(programs.prefill, length, f"a piece of {length} tokens")
        for steps in self._options.ladder:
            decode[steps] = await self._compile(programs.decode, steps, f"a program of {steps} token(s)")
        made = kind(programs, params, prefill, decode)
        made.load = self.statistics()
        return made

    def statistics(self) -> LoadStatistics:
        return LoadStatistics(
            self._devices, self._params_bytes, self._state_bytes, self._temporary, self._compiles, self._cached
        )

    def _load_params(self) -> tuple[LlamaPrograms, Any]:
        between, options = trio.from_thread.check_cancelled, self._options
        try:
            params = load_params(
                self._checkpoint,
                self._placement,
                dtype=options.matrices() or self._spec.dtype,
                int8=options.int8,
                between=between,
            )
            jax.block_until_ready(params)  # type: ignore[no-untyped-call]
        except jax.errors.JaxRuntimeError as exc:
            raise InvalidArgument(
                f"its parameters do not fit: {failure_text(self._name, self._devices[0], str(exc))}"
            ) from None
        with CACHE_HITS.counted() as hits:
            programs = LlamaPrograms(self._spec, self._placement, params)
        self._count(hits.count > 0)
        return programs, params

    async def _compile(self, make: Callable[[int], Compiled], size: int, what: str) -> Compiled:
        def compiled() -> tuple[Compiled, bool]:
            with CACHE_HITS.counted() as hits:
                return make(size), hits.count > 0

        program, cached = await trio.to_thread.run_sync(compiled)
        self._count(cached)
        memory = ProgramMemory.of(program)
        self._temporary = max(self._temporary, memory.temporary + memory.outputs)
        if memory.aliased < self._state_bytes and not self._warned:
            self._warned = True
            LOGGER.warning(
                "%s: %s: only %d of the %d bytes of KV cache and slots are updated in place, the others are copied each time; "
                "on a CPU it needs jax 0.9.2",
                self._name,
                what,
                memory.aliased,
                self._state_bytes,
            )
        self._check_memory(f" while {what} is made")
        await trio.lowlevel.checkpoint()
        return program

    def _count(self, cached: bool) -> None:
        self._compiles += 1
        self._cached += cached

    def _check_memory(self, when: str) -> None:
        limit, spec = self._options.memory_limit, self._spec
        needed = self._params_bytes + self._state_bytes + self._temporary
        if limit is None or needed <= limit:
            return
        raise InvalidArgument(
            f"{self._name} needs {needed / MIB:.1f} MiB on {' and on '.join(self._devices)}, more than "
            f"device_memory_limit_mb={limit / MIB:g}: {self._params_bytes / MIB:.1f} MiB of parameters, "
            f"{self._state_bytes / MIB:.1f} of KV cache for {spec.slots} slots of {spec.context} tokens"
            + (f", and {self._temporary / MIB:.1f}{when}" if when else "")
            + "; set fewer slots, a shorter context, dtype int8 or more devices in tensor_parallel, or raise the limit"
        )


def bytes_on_each(tree: Any) -> int:
    """Of arrays that have shardings, abstract or not: the part of one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class FirstRun(Turn):
    """One program that is tried."""

    at_load = True

    def __init__(self, programs: SlotPrograms, program: Program) -> None:
        self._programs = programs
        self._program = program
        self._emitted: Any = None

    def dispatch(self) -> bool:
        self._emitted = self._programs.run(self._program)
        return True

    def wait(self) -> None:
        jax.tree.map(np.asarray, self._emitted)

    def ready(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self._emitted))


async def run_first(
    model: str, programs: SlotPrograms, device: DeviceThread, release_limit: float
) -> tuple[list[float], list[float]]:
    """Run every program once, and the one of one token some times more; the slots are as new afterwards.

    In contexts that are as good as full: the further back a text goes, the longer each program takes.

    Returns:
      Device seconds of one token for every slot, and of the longest piece of a prompt; each some times.

    Raises:
      InvalidArgument: a program failed: there is not enough memory, most of the time.

    **Cancellation:** between two programs; see :func:`~..job.open_trial`.
    """
    spec = programs.spec
    pieces: list[float] = []
    tokens: list[float] = []
    room = sum(programs.decode) + TRIES

    async def run(program: Program) -> float:
        turn = FirstRun(programs, program)
        async with open_trial(device, f"model '{model}'", release_limit) as job:
            await job.call(turn)
        return turn.seconds

    def piece(length: int, slot: int) -> Program:
        ids = np.zeros(length, np.int32)
        # A text that ends with its first token leaves its slot free; the last ones keep theirs, for the steps that follow.
        most = spec.context if length == min(programs.prefill) else 1
        start = max(spec.context - length - room, 0)
        chunk = PromptChunk(slot=slot, tokens=ids, start=start, owner=slot + 1, max_tokens=most, min_tokens=most)
        return Program((), length=length, chunk=chunk)

    nobody = np.zeros(spec.slots, np.int32), np.zeros(spec.slots, np.bool_)

    def steps(count: int) -> Program:
        return Program((), steps=count, evict=nobody[0], hold=nobody[1])

    try:
        for length in sorted(programs.prefill, reverse=True):
            tries = [await run(piece(length, number % spec.slots)) for number in range(max(spec.slots, TRIES))]
            pieces = pieces or tries
        for count in sorted(programs.decode, reverse=True):
            tokens = [await run(steps(count)) for _ in range(TRIES if count == 1 else 1)]
    except InternalError as exc:
        raise InvalidArgument(f"{exc.message}; that was in the first run, at load") from None
    await trio.to_thread.run_sync(programs.renew)
    return tokens, pieces


async def warm_up(
    model: str, programs: SlotPrograms, device: DeviceThread, target: float, release_limit: float
) -> None:
    """Run every program, and publish how long a cancel waits.

    Args:
      target: seconds that a program may take, if one token fits.
      release_limit: seconds.

    Raises, **Cancellation:** see :func:`run_first`.
    """
    assert programs.load is not None
    tokens, pieces = await run_first(model, programs, device, release_limit)
    step, longest = min(tokens), min(pieces)
    several = min(target, max(programs.decode) * median(tokens))  # as many tokens as fit
    bound = WINDOW * max(median(tokens), median(pieces), several)
    programs.load = replace(programs.load, step_ms=step * 1e3, prefill_ms=longest * 1e3, cancel_ms=bound * 1e3)
    if step > target:
        LOGGER.warning(
            "model '%s': one token for %d slot(s) takes %.1f ms, more than target_chunk_ms=%g: a cancel waits for no less, "
            "and for up to %.1f ms; set fewer slots or a smaller dtype, or raise the target",
            model,
            programs.spec.slots,
            step * 1e3,
            target * 1e3,
            bound * 1e3,
        )


def log_load(model: str, programs: SlotPrograms) -> None:
    """One line that says what it takes and what it gives."""
    load, spec = programs.load, programs.spec
    assert load is not None
    times = "how long a cancel waits was not measured"
    if load.step_ms is not None:
        times = (
            f"one token takes {load.step_ms:.1f} ms and the longest piece of a prompt {load.prefill_ms:.1f} ms: a cancel waits "
            f"for one token at least, for some {load.cancel_ms:.1f} ms at most"
        )
    LOGGER.info(
        "model '%s' on %s: %d slots of %d tokens; %.1f MiB of parameters, %.1f of KV cache, at most %.1f for a program%s; "
        "%d programs compiled, %d of them found in the compilation cache; %s",
        model,
        ", ".join(load.devices),
        spec.slots,
        spec.context,
        load.params_bytes / MIB,
        load.cache_bytes / MIB,
        load.temporary_bytes / MIB,
        " on each of them" if len(load.devices) > 1 else "",
        load.compiles,
        load.compiles_cached,
        times,
    )
