"""The JAX backend: ``backend: "jax"`` in config.pbtxt, and plain functions in ``<version>/model.py``.

Or, with the parameter ``model_format: "llama"``, a language model and no code: see
:class:`~triton_trio.backends.jax.generation.options.TextOptions`.

With the parameter ``worker_process: "true"`` all of it is in a process of its own: see :mod:`triton_trio.backends.worker`.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import trio

from ...errors import InvalidArgument, Unavailable
from ...groups import WithoutGroups
from ..base import Backend, BackendInstance, BackendModel, ModelContext, Placement
from ..worker import launch, open_worker_model
from ..worker.process import describe_end, python, worker_environment
from .apply import execute_apply
from .checks import check_config
from .compilation_cache import use_compilation_cache
from .compilations import Compilations
from .device import DeviceStatistics, Executor
from .devices import Devices, find_devices, find_platform
from .explicit import FunctionCache, execute_explicit, warm_up
from .generation.model import LlamaModel, is_language_model, open_language_model
from .generation.options import TextOptions
from .generation.request import complete
from .loader import Form, ModelFunctions, find_functions, imported
from .options import JaxOptions, wants_worker
from .placed import PlacedModel, PlacedStatistics
from .steps import execute_steps

if TYPE_CHECKING:
    from ...batch import Batch
    from ...config import InstanceGroup, ModelConfig
    from ...scopes import SequenceEnd
    from ..worker.model import WorkerModel
    from .states import StateStore

LOGGER = logging.getLogger("triton_trio.jax")

#: Of a worker process: it shares its devices with others, so it must not take all their memory when it begins.
WORKER_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

FIND_SECONDS = 60.0  #: for a process that looks which devices there are


class JaxInstance(BackendInstance):
    def __init__(self, placed: PlacedModel, functions: FunctionCache, states: StateStore | None = None) -> None:
        self.availability = placed.device.availability
        self.keeps_states = states is not None
        self._states = states
        self._placed = placed
        self._functions = functions
        self._batch: Batch | None = None

    async def execute(self, batch: Batch) -> None:
        self._batch = batch
        try:
            with self._placed.counted(batch):
                await self._execute(batch)
        finally:
            self._batch = None

    async def _execute(self, batch: Batch) -> None:
        form = self._placed.functions.form
        if self._states is not None:
            self._states.admit(batch)
        if form is Form.STEPS:
            await execute_steps(self._placed, batch, self._states)
        elif form is Form.APPLY:
            await execute_apply(self._placed, batch, self._states)
        else:
            await execute_explicit(self._placed, self._functions, batch)

    def on_sequence_end(self, end: SequenceEnd) -> None:
        if self._states is not None:
            self._states.forget(end.generation)

    def statistics(self) -> PlacedStatistics:
        """Of the model on this instance's device, which several instances may share."""
        return self._placed.statistics()

    def time_left(self, limit: float, unseen: float) -> float | None:
        device = self._placed.device
        return device.seconds_left(self._batch, limit, unseen) if device.holds(self._batch) else None

    def abandon(self) -> bool:
        device = self._placed.device
        # Else it is the model's own code that does not let go.
        if device.holds(self._batch):
            device.abandon("the device did not let go in time after a cancel; reload the model")
        return False


class JaxModel(BackendModel):
    """One loaded version; each device it is placed on has its own parameters and programs."""

    def __init__(self, context: ModelContext, functions: ModelFunctions, options: JaxOptions, devices: Devices) -> None:
        self._context = context
        self._functions = functions
        self._options = options
        self._devices = devices
        self._placed: dict[jax.Device, tuple[PlacedModel, FunctionCache]] = {}

    def statistics(self) -> tuple[PlacedStatistics, ...]:
        """One for each device that the model is on."""
        return tuple(placed.statistics() for placed, _ in self._placed.values())

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[JaxInstance]:
        """The first instance on a device loads the parameters and compiles, and frees both when it is closed, last of all.

        **Cancellation:** see :meth:`PlacedModel.load`.
        """
        (device,) = await trio.to_thread.run_sync(find_devices, self._context.config.name, placement)
        with self._devices.use([device]) as thread:
            entry = self._placed.get(device)
            if entry is not None:
                async with self._open_on(*entry) as instance:
                    yield instance
                return
            placed = PlacedModel(self._context, self._functions, self._options, device, thread)
            functions = FunctionCache(placed)
            try:
                with WithoutGroups(nurseries=1):
                    async with trio.open_nursery() as nursery:
                        placed.compilations = Compilations(nursery, placed.name)
                        self._placed[device] = placed, functions
                        try:
                            async with self._open_on(placed, functions) as instance:
                                yield instance
                        finally:
                            nursery.cancel_scope.cancel(reason="model unloaded")
            finally:
                placed.unload()
                del self._placed[device]

    @asynccontextmanager
    async def _open_on(self, placed: PlacedModel, functions: FunctionCache) -> AsyncIterator[JaxInstance]:
        placed.users += 1
        try:
            if placed.users == 1:
                await placed.load()
                if self._functions.form is Form.EXPLICIT:
                    await warm_up(placed, functions)
                placed.loaded()
            else:
                placed.check_memory()
            async with placed.open_states() as states:
                yield JaxInstance(placed, functions, states)
        finally:
            placed.users -= 1


class JaxBackend(Backend):
    """Serves models written for JAX; see :mod:`triton_trio.backends.jax.loader` for the three forms.

    Args:
      executor: makes, for the device of the given name, what calls it; for tests.
      workers: whether models may ask for a process of their own; not in such a process.
    """

    def __init__(self, executor: Callable[[str], Executor] = lambda name: Executor(), *, workers: bool = True) -> None:
        self._devices = Devices(executor)
        self._workers = workers
        self._worker_environment = dict(WORKER_ENVIRONMENT)

    def configure(self, settings: Mapping[str, str]) -> None:
        """``compilation_cache_dir``: a directory where compiled programs are kept, for this process's and its workers' next
        start.  There is one for all of the process.
        """
        for name, value in settings.items():
            if name != "compilation_cache_dir":
                raise InvalidArgument(f"it has no setting '{name}', only compilation_cache_dir")
            self._worker_environment |= use_compilation_cache(value)

    def statistics(self) -> tuple[DeviceStatistics, ...]:
        """One for each device in use in this process."""
        return self._devices.statistics()

    def auto_complete(self, config: ModelConfig, model_directory: Path) -> ModelConfig:
        """A language model's tensors are known; those of model.py are what config.pbtxt says."""
        return complete(config) if is_language_model(config) else config

    def place(self, group: InstanceGroup, config: ModelConfig) -> InstanceGroup:
        """On every GPU that JAX has, or else on the CPU; with another platform as default, on that (``KIND_MODEL``).

        GPUs that share a language model are listed by the first of them.
        """
        if group.kind != "KIND_AUTO" and (group.kind != "KIND_GPU" or group.gpus):
            return group
        platform, count = self._found_by_a_worker if wants_worker(config) else find_platform()
        if group.kind == "KIND_AUTO" and (platform in ("cpu", "gpu") or not group.gpus):
            group = replace(group, kind={"cpu": "KIND_CPU", "gpu": "KIND_GPU"}.get(platform, "KIND_MODEL"))
        if group.kind == "KIND_GPU" and not group.gpus and platform == "gpu":
            shared = TextOptions.read(config).devices if is_language_model(config) else 1
            group = replace(group, gpus=tuple(range(0, count - shared + 1, shared)) or (0,))
        return group

    @cached_property
    def _found_by_a_worker(self) -> tuple[str, int]:
        """As :func:`find_platform`, which would take the devices, and their memory, into this process for ever.

        Raises:
          Unavailable: the process that was to find them has failed; another one is asked the next time.
        """
        command = python("-c", f"from {find_platform.__module__} import find_platform; print(*find_platform())")
        environment = worker_environment(self._worker_environment)
        try:
            found = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True, timeout=FIND_SECONDS
            )
        except subprocess.TimeoutExpired:
            how = f"has not ended within {FIND_SECONDS:g} s"
        except subprocess.CalledProcessError as exc:
            LOGGER.error("the process that looks for JAX's devices said:\n%s", exc.stderr)
            how = ": ".join((describe_end(exc.returncode), *exc.stderr.strip().splitlines()[-1:]))
        else:
            platform, count = found.stdout.split()[-2:]
            return platform, int(count)
        raise Unavailable(
            f"no devices for worker_process: the process that looks for them {how}; make JAX find its devices (drivers, "
            "JAX_PLATFORMS), or say in instance_group where the model is to be (kind, gpus)"
        )

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[JaxModel | LlamaModel | WorkerModel]:
        """Import model.py and recognise its form, or open a language model's files; instances do the rest.

        **Cancellation:** before and after that; nothing is left behind.
        """
        config = context.config
        if self._workers and wants_worker(config):
            start = partial(launch, f"{__name__}:{in_worker.__name__}", self._worker_environment)
            async with open_worker_model(context, start) as worker_model:
                yield worker_model
            return
        if is_language_model(config):
            async with open_language_model(context, use=self._devices.use) as language_model:
                yield language_model
            return
        check_config(config)
        options = JaxOptions.read(config)
        path = context.version_directory / (config.default_model_filename or "model.py")
        with ExitStack() as stack:
            module = await trio.to_thread.run_sync(stack.enter_context, imported(path, config.name, context.version))
            await trio.lowlevel.checkpoint()
            functions = find_functions(module, path, config, max_steps=options.max_steps)
            yield JaxModel(context, functions, options, self._devices)


def in_worker() -> JaxBackend:
    """The backend of a worker process."""
    return JaxBackend(workers=False)
