"""A model on a device: its parameters there, its compiled programs, its counters.  Instances on one device share it."""

from __future__ import annotations

import functools
import logging
import traceback
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import trio

from ...errors import InternalError, InvalidArgument
from .accounts import Typical
from .checks import FunctionChecker, aval
from .compilation_cache import CACHE_HITS
from .compilations import Compilations
from .controller import ChunkController
from .job import open_trial
from .loader import Form, LoadContext
from .memory import MIB, failure_text, tree_bytes
from .probe import measure_step
from .programs import ProgramBuilder, ProgramSet, RowShapes, precision, row_avals, static_shapes
from .states import OpenStates, StateLayout, StateStore
from .turns import row_shapes

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ..base import ModelContext
    from .device import DeviceThread
    from .loader import ModelFunctions
    from .options import JaxOptions

LOGGER = logging.getLogger("triton_trio.jax")


@dataclass(frozen=True, slots=True)
class BucketStatistics:
    """One set of programs."""

    bucket: int
    k: int  #: steps the next chunk will have
    step_ms: float | None  #: device time of one step, averaged; None until measured
    target_ms: float  #: what a chunk should take


@dataclass(frozen=True, slots=True)
class PlacedStatistics:
    model: str
    device: str
    compiles: int
    compiles_cached: int  #: of these, how many the compilation cache already had
    #: While requests waited, and for nothing: 0, or an explicit model calls its functions with a Python number here and a
    #: numpy scalar there, makes a new function for each request, or has one that its run on zeros did not come by.
    compiles_after_load: int
    compiles_for_shapes: int  #: while requests waited: the shape was new to a model that takes any
    executions: int
    cancels: int  #: executions that were cancelled
    joined: int  #: requests that joined an execution under way
    device_seconds: float
    device_seconds_wasted: float  #: of these, programs whose request had left when they ended
    device_seconds_saved: float  #: what cancelled requests would have gone on to take; an estimate
    state_bytes: int  #: on the device, for the sequences of all instances there
    #: Of the largest batch, the quickest of a few tries; None for other forms, variable dims, or ``warmup`` false.
    step_ms_at_load: float | None
    buckets: tuple[BucketStatistics, ...]


class PlacedModel:
    """See the module.  Made by :meth:`load`."""

    def __init__(
        self,
        context: ModelContext,
        functions: ModelFunctions,
        options: JaxOptions,
        jax_device: jax.Device,
        device: DeviceThread,
    ) -> None:
        self.config = context.config
        self.functions = functions
        self.options = options
        self.jax_device = jax_device
        self.device = device
        self.batched = self.config.max_batch_size > 0
        self.name = f"model '{self.config.name}'"
        self.release_limit = context.release_limit
        self.params: Any = None
        self.users = 0  #: instances; of the backend
        #: None: the server keeps the states of sequences, if there are any.
        self.layout = StateLayout.of(self.config, functions, options, context.states, jax_device)
        self.states_on_device = {} if self.layout is None else self.layout.shapes  #: inputs that requests do not bring
        self._context = context
        self._builder: ProgramBuilder | None = None
        self._sets: OrderedDict[RowShapes, dict[int, ProgramSet]] = OrderedDict()  #: by bucket; last, who was last used
        self._checked: set[RowShapes] = set()
        #: Sets of which a part is compiled, and what is left; the oldest first.
        self._begun: OrderedDict[tuple[int, RowShapes], tuple[ProgramSet, deque[Callable[[], None]]]] = OrderedDict()
        self._compiling = trio.Lock()
        self.compilations: Compilations | None = None  #: for requests
        self._loaded = False
        self._warned_of_compile = False
        self._step_at_load: float | None = None
        self._warned = self._warned_of_copies = False
        self._compiles = self._compiles_cached = self._compiles_after_load = self._compiles_for_shapes = 0
        self._executions = self._cancels = 0
        self._device_seconds = self._wasted_seconds = self._saved_seconds = 0.0
        self.joined = 0
        self.typical = Typical(options.max_steps)

    def statistics(self) -> PlacedStatistics:
        return PlacedStatistics(
            model=self.config.name,
            device=self.device.name,
            compiles=self._compiles,
            compiles_cached=self._compiles_cached,
            compiles_after_load=self._compiles_after_load,
            compiles_for_shapes=self._compiles_for_shapes,
            executions=self._executions,
            cancels=self._cancels,
            joined=self.joined,
            device_seconds=self._device_seconds,
            device_seconds_wasted=self._wasted_seconds,
            device_seconds_saved=self._saved_seconds,
            state_bytes=self.users * self._state_bytes,
            step_ms_at_load=None if self._step_at_load is None else self._step_at_load * 1e3,
            buckets=tuple(
                BucketStatistics(
                    found.bucket,
                    found.controller.k,
                    None if found.controller.step_seconds is None else found.controller.step_seconds * 1e3,
                    found.controller.target * 1e3,
                )
                for found in self.program_sets()
            ),
        )

    @property
    def _state_bytes(self) -> int:
        """For each instance."""
        return 0 if self.layout is None else self.layout.bytes

    @contextmanager
    def counted(self, batch: Batch) -> Iterator[None]:
        """Around one execution."""
        self._executions += 1
        try:
            yield
        except BaseException as exc:
            self._cancels += not isinstance(exc, Exception)  # a nursery inside makes a group of it
            raise
        finally:
            self.account(batch.members)

    def account(self, members: Iterable[Member]) -> None:
        """Count the device time of members that get no more of it."""
        for member in members:
            self._device_seconds += member.useful_seconds + member.wasted_seconds
            self._wasted_seconds += member.wasted_seconds
            self._saved_seconds += member.saved_seconds

    # Loading

    async def load(self) -> None:
        """Run the author's ``load``, move the parameters to the device, compile everything that can be compiled.

        Raises:
          InvalidArgument: something in model.py is wrong; the text says what.

        **Cancellation:** between these stages and between compilations; a compilation itself is waited for.
        """
        self.params = await trio.to_thread.run_sync(self._load_params)
        await trio.lowlevel.checkpoint()
        self._builder = ProgramBuilder(self.functions, self.options, self.jax_device, self.params, batched=self.batched)
        if self.layout is not None:
            for job in self.layout.build(self.options.buckets):
                await self.compile(job)
        shapes = static_shapes(self.config.inputs)
        if self.functions.form is not Form.EXPLICIT and shapes is not None:
            for bucket in self.options.buckets:
                await self._compile_set(bucket, shapes)
            programs = self._sets[shapes][self.options.buckets[-1]]
            if self.functions.form is Form.STEPS and self.options.warmup:
                await self._measure_step(programs, shapes)

    async def _measure_step(self, programs: ProgramSet, shapes: RowShapes) -> None:
        try:
            self._step_at_load = await measure_step(self, programs, shapes)
        except InternalError as exc:
            raise InvalidArgument(
                f"{exc.message}; that was on zeros, at load: if zeros are no valid input, set the parameter warmup to "
                "'false' in config.pbtxt"
            ) from None
        smallest = programs.controller.ladder[0]
        if smallest * self._step_at_load > self.options.target:
            self._warn_slow(smallest, self._step_at_load)

    def _load_params(self) -> Any:
        load = self.functions.load
        if load is None:
            return None
        context = LoadContext(self.config, self._context.version_directory, self._context.version, self.jax_device)
        where = f"model '{self.config.name}': {self.functions.path}: load()"
        with precision(self.options.x64), jax.default_device(self.jax_device):
            try:
                params = load(context)
            except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever the author's function raises
                LOGGER.error("%s failed: %s", where, traceback.format_exc())
                raise InvalidArgument(f"{where} failed: {type(exc).__name__}: {exc}") from None
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                    raise InvalidArgument(
                        f"{where} must return a pytree of arrays, params{jax.tree_util.keystr(path)} is a "
                        f"{type(leaf).__name__}; keep it in a global of model.py instead"
                    )
            # An array of Python's number: a weak type would make it another program's argument.
            params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), params)
            try:
                params = jax.device_put(params, self.jax_device)
                return jax.tree.map(lambda leaf: leaf.block_until_ready(), params)
            except jax.errors.JaxRuntimeError as exc:
                raise InvalidArgument(
                    f"{where} returned {tree_bytes(params) / MIB:.1f} MiB of parameters, and they do not fit: "
                    + failure_text(self.name, self.device.name, str(exc))
                ) from None

    @asynccontextmanager
    async def open_states(self) -> AsyncIterator[StateStore | None]:
        """For one instance; None: its requests bring their states.

        Raises:
          InvalidArgument: they do not fit.

        **Cancellation:** see :func:`~.job.open_trial`.
        """
        if self.layout is None:
            yield None
            return
        store = StateStore(self.layout, self.config.name)
        try:
            async with open_trial(self.device, self.name, self.release_limit) as job:
                await job.call(OpenStates(store))
        except InternalError as exc:
            raise InvalidArgument(
                f"{self.name}: {self.layout.bytes / MIB:.1f} MiB for the states of {self.layout.count} sequences do not "
                f"fit; set the parameter state_on_device to 'false' in config.pbtxt, or allow for fewer: {exc.message}"
            ) from None
        try:
            yield store
        finally:
            store.close()

    def shown(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Without the states that stay on the device."""
        return outputs if self.layout is None else self.layout.shown(outputs)

    def loaded(self) -> None:
        """Compilations from here on keep requests waiting; see :class:`PlacedStatistics`."""
        self._loaded = True

    @property
    def warm(self) -> bool:
        """Everything that a request of a known shape needs was compiled at load."""
        tried = self.functions.form is not Form.EXPLICIT or self.options.warmup
        return self._loaded and tried and static_shapes(self.config.inputs) is not None

    def unload(self) -> None:
        """Forget parameters and programs."""
        self.params = None
        self._builder = None
        self._sets.clear()
        self._begun.clear()

    # Programs

    async def program_set(self, batch: Batch) -> ProgramSet:
        """The programs for a batch; compiled now, the batch waiting, if its shape is new to a model with variable dims.

        **Cancellation:** see :meth:`Compilations.wait`.
        """
        bucket, shapes = self.options.bucket(batch.rows if self.batched else 1), self._shapes(batch)
        while True:
            found = self._sets.get(shapes, {}).get(bucket)
            if found is not None:
                self._sets.move_to_end(shapes)
                return found
            assert self.compilations is not None
            compile_set = functools.partial(self._compile_set, bucket, shapes)
            await self.compilations.wait((bucket, shapes), f"bucket {bucket}", compile_set)

    def program_sets(self) -> Iterator[ProgramSet]:
        """All that are kept."""
        return (found for sets in self._sets.values() for found in sets.values())

    def smaller_sets(self, batch: Batch, bucket: int) -> dict[int, ProgramSet]:
        """The compiled programs for this batch's shape below ``bucket``, by their buckets; compiles nothing."""
        sets = self._sets[self._shapes(batch)]
        return {smaller: found for smaller, found in sets.items() if smaller < bucket}

    def _shapes(self, batch: Batch) -> RowShapes:
        return row_shapes(batch, self.config.inputs, self.states_on_device, batched=self.batched)

    async def _compile_set(self, bucket: int, shapes: RowShapes) -> None:
        """Compile what there is for such a batch; or the rest of it, if somebody left in the middle.

        **Cancellation:** between compilations; those that were made are kept.
        """
        key = bucket, shapes
        async with self._compiling:
            if key not in self._begun:
                self._begun[key] = await self._begin_set(bucket, shapes)
            programs, jobs = self._begun[key]
            try:
                while jobs:
                    # Taken in the thread: who is cancelled on the way there has not run it.
                    await self.compile(lambda: jobs.popleft()(), new_shape=True)
                self._check_memory(programs)
            except Exception:
                del self._begun[key]
                raise
            del self._begun[key]
        if programs.not_donated and not self._warned_of_copies:
            self._warned_of_copies = True
            LOGGER.warning("%s: bucket %d: %s", self.name, bucket, programs.not_donated)
        self._sets.setdefault(shapes, {})[bucket] = programs
        self._sets.move_to_end(shapes)
        if len(self._sets) > self.options.shapes:  # all buckets of the one that has not been used for longest
            self._sets.popitem(last=False)

    async def _begin_set(self, bucket: int, shapes: RowShapes) -> tuple[ProgramSet, deque[Callable[[], None]]]:
        assert self._builder is not None
        row = row_avals(self.config.inputs, dict(shapes))
        if shapes not in self._checked:
            params = jax.tree.map(lambda leaf: aval(leaf.shape, leaf.dtype), self.params)
            checker = FunctionChecker(self.config, self.functions, params, row)

            def check() -> None:
                checker.check()
                if len(self._checked) < 4096:
                    self._checked.add(shapes)

            await self.compile(check, count=False)
        while len(self._begun) >= self.options.shapes:
            self._begun.popitem(last=False)
        programs = ProgramSet(bucket, ChunkController(self.options.target, self.options.ladder))
        return programs, deque(self._builder.build(programs, row))

    def check_memory(self) -> None:
        """For another instance on this device, which may have a batch of its own there; raises as :meth:`load`."""
        for programs in self.program_sets():
            self._check_memory(programs)

    def _check_memory(self, programs: ProgramSet) -> None:
        limit, memory = self.options.memory_limit, programs.memory
        if limit is None or memory is None:
            return
        params = tree_bytes(self.params)
        states = self._state_bytes
        needed = params + self.users * (memory.total + states)
        if needed > limit:
            raise InvalidArgument(
                f"{self.name}: bucket {programs.bucket} needs {needed / MIB:.1f} MiB on device {self.device.name}, more than "
                f"device_memory_limit_mb={limit / MIB:g}: {params / MIB:.1f} MiB of parameters and, for each of "
                f"{self.users} instance(s), {memory.total / MIB:.1f} MiB ({memory.arguments / MIB:.1f} of arguments, "
                f"{memory.outputs / MIB:.1f} of outputs, {memory.temporary / MIB:.1f} of temporaries)"
                + (f" and {states / MIB:.1f} MiB of states of sequences" if states else "")
                + "; make the largest "
                "batch or the tensors smaller, take fewer instances, "
                + ("set state_on_device to 'false', " if states else "")
                + "or raise the limit"
            )

    async def compile(self, job: Callable[[], None], *, count: bool = True, new_shape: bool = False) -> None:
        """Run one compilation in a worker thread, in the model's precision.

        ``new_shape`` says what it is for, should it come after the load.

        **Cancellation:** before and after it.  XLA cannot be interrupted, and leaving it running would be work that
        nobody owns.
        """

        def in_thread() -> bool:
            with precision(self.options.x64), CACHE_HITS.counted() as hits:
                job()
            return hits.count > 0

        cached = await trio.to_thread.run_sync(in_thread)
        if count:
            self._compiles += 1
            self._compiles_cached += cached
            self._compiles_for_shapes += self._loaded and new_shape
            self._compiles_after_load += self._loaded and not new_shape
        await trio.lowlevel.checkpoint()

    def warn_of_compile(self, what: str) -> None:
        """``what`` had to be compiled although its shapes were known."""
        if self._loaded and not self._warned_of_compile:
            self._warned_of_compile = True
            LOGGER.warning(
                "%s: %s was compiled while a request waited, for no new shape: give ctx.run() the same function object and "
                "the same types each time (a Python number and a numpy scalar are two types), and let the run on zeros "
                "come by every function",
                self.name,
                what,
            )

    def warn_if_slow(self, programs: ProgramSet) -> None:
        controller = programs.controller
        if not self._warned and controller.too_slow and controller.step_seconds is not None:
            self._warn_slow(controller.ladder[0], controller.step_seconds)

    def _warn_slow(self, smallest: int, step_seconds: float) -> None:
        self._warned = True
        chunk = smallest * step_seconds * 1e3
        LOGGER.warning(
            "%s: %s of step() %s %.1f ms, more than target_chunk_ms=%g: the cancel latency of this model is up to "
            "%.1f ms (one chunk running, one queued); do less in a step, or raise the target",
            self.name,
            "one call" if smallest == 1 else f"{smallest} calls",
            "takes" if smallest == 1 else "take",
            chunk,
            self.options.target * 1e3,
            2 * chunk,
        )
