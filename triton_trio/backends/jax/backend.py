"""The JAX backend: ``backend: "jax"`` in config.pbtxt, and plain functions in ``<version>/model.py``.

Or, with the parameter ``model_format: "llama"``, a language model and no code: see
:class:`~triton_trio.backends.jax.generation.options.TextOptions`.

With the parameter ``worker_process: "true"`` all of it is in a process of its own: see :mod:`triton_trio.backends.worker`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import trio

from ...errors import InvalidArgument
from ..base import Backend, BackendInstance, BackendModel, ModelContext, Placement
from ..worker import launch, open_worker_model
from ..worker.process import python, worker_environment
from .apply import execute_apply
from .checks import check_config
from .device import DeviceState, DeviceStatistics, DeviceThread, Executor
from .explicit import FunctionCache, execute_explicit, warm_up
from .generation.model import LlamaModel, is_language_model, open_language_model
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

#: Of a worker process: it shares its devices with others, so it must not take all their memory when it begins.
WORKER_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

#: Seconds a Python thread may keep the GIL while a device thread waits for it; Python's own default is ten times that.
SWITCH_INTERVAL = 5e-4


@contextmanager
def short_switch_interval(seconds: float = SWITCH_INTERVAL) -> Iterator[None]:
    """Make Python threads give up the GIL sooner.  Process-wide; what was set before is set again.

    With Python's 5 ms, an event loop that never rests delays each dispatch of the device thread by up to 5 ms, more
    than a whole chunk takes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, seconds))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Devices:
    """The device threads of one backend: started with a device's first user, ended with its last."""

    def __init__(self, executor: Callable[[str], Executor]) -> None:
        self._executor = executor
        self._threads: dict[jax.Device, tuple[DeviceThread, list[object]]] = {}
        self._settings = ExitStack()

    def statistics(self) -> tuple[DeviceStatistics, ...]:
        return tuple(thread.statistics() for thread, _ in self._threads.values())

    @contextmanager
    def use(self, device: jax.Device) -> Iterator[DeviceThread]:
        """The thread of ``device``; a dead one is replaced."""
        if not self._threads:
            self._settings.enter_context(short_switch_interval())
        entry = self._threads.get(device)
        if entry is None or entry[0].state is DeviceState.DEAD:
            name = f"{device.platform}:{device.id}"
            entry = self._threads[device] = (DeviceThread(name, executor=self._executor(name)), [])
        thread, users = entry
        user = object()
        users.append(user)
        try:
            yield thread
        finally:
            users.remove(user)
            if not users:
                thread.close()
                if self._threads.get(device) is entry:
                    del self._threads[device]
            if not self._threads:
                self._settings.close()


class JaxInstance(BackendInstance):
    def __init__(self, placed: PlacedModel, functions: FunctionCache, states: StateStore | None = None) -> None:
        self.availability = placed.device.availability
        self.keeps_states = states is not None
        self._states = states
        self._placed = placed
        self._functions = functions

    async def execute(self, batch: Batch) -> None:
        with self._placed.counted(batch):
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

    def abandon(self) -> None:
        self._placed.device.abandon("the device did not let go in time after a cancel; reload the model")


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
        """The first instance on a device loads the parameters and compiles; the last one frees both.

        **Cancellation:** see :meth:`PlacedModel.load`.
        """
        device = await trio.to_thread.run_sync(find_device, self._context.config.name, placement)
        with self._devices.use(device) as thread:
            entry = self._placed.get(device)
            if entry is None:
                placed = PlacedModel(self._context, self._functions, self._options, device, thread)
                entry = self._placed[device] = (placed, FunctionCache(placed))
            placed, functions = entry
            placed.users += 1
            try:
                if placed.users == 1:
                    await placed.load()
                    if self._functions.form is Form.EXPLICIT:
                        await warm_up(placed, functions)
                    placed.loaded()
                else:
                    placed.check_memory()
                states = await placed.open_states()
                try:
                    yield JaxInstance(placed, functions, states)
                finally:
                    if states is not None:
                        states.close()
            finally:
                placed.users -= 1
                if not placed.users:
                    placed.unload()
                    del self._placed[device]


class JaxBackend(Backend):
    """Serves models written for JAX; see :mod:`triton_trio.backends.jax.loader` for the three forms.

    Args:
      executor: makes, for the device of the given name, what calls it; for tests.
      workers: whether models may ask for a process of their own; not in such a process.
    """

    def __init__(self, executor: Callable[[str], Executor] = lambda name: Executor(), *, workers: bool = True) -> None:
        self._devices = Devices(executor)
        self._workers = workers

    def statistics(self) -> tuple[DeviceStatistics, ...]:
        """One for each device in use in this process."""
        return self._devices.statistics()

    def auto_complete(self, config: ModelConfig, model_directory: Path) -> ModelConfig:
        """A language model's tensors are known; those of model.py are what config.pbtxt says."""
        return complete(config) if is_language_model(config) else config

    def place(self, group: InstanceGroup, config: ModelConfig) -> InstanceGroup:
        """On every GPU that JAX has, or else on the CPU; with another platform as default, that stays JAX's choice."""
        if group.kind != "KIND_AUTO" and (group.kind != "KIND_GPU" or group.gpus):
            return group
        platform, count = self._found_by_a_worker if wants_worker(config) else find_platform()
        if group.kind == "KIND_AUTO" and platform in ("cpu", "gpu"):
            group = replace(group, kind=f"KIND_{platform.upper()}")
        if group.kind == "KIND_GPU" and not group.gpus and platform == "gpu":
            group = replace(group, gpus=tuple(range(count)))
        return group

    @cached_property
    def _found_by_a_worker(self) -> tuple[str, int]:
        """As :func:`find_platform`, which would take the devices, and their memory, into this process for ever."""
        command = python("-c", f"from {__name__} import find_platform; print(*find_platform())")
        environment = worker_environment(WORKER_ENVIRONMENT)
        found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        platform, count = found.stdout.split()[-2:]
        return platform, int(count)

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[JaxModel | LlamaModel | WorkerModel]:
        """Import model.py and recognise its form, or open a language model's files; instances do the rest.

        **Cancellation:** before and after that; nothing is left behind.
        """
        config = context.config
        if self._workers and wants_worker(config):
            start = partial(launch, f"{__name__}:{in_worker.__name__}", WORKER_ENVIRONMENT)
            async with open_worker_model(context, start) as worker_model:
                yield worker_model
            return
        if is_language_model(config):
            async with open_language_model(context, find_device=find_device, use=self._devices.use) as language_model:
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


def find_platform() -> tuple[str, int]:
    """JAX's default platform, and how many devices it has.  Blocking: the first call starts JAX's backends."""
    platform = jax.default_backend()
    return platform, len(jax.local_devices(backend=platform))


def find_device(model_name: str, placement: Placement) -> jax.Device:
    """The JAX device of a placement.  Blocking: the first call starts JAX's backends."""
    platform = {"KIND_CPU": "cpu", "KIND_GPU": "gpu"}.get(placement.kind)
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError as exc:
        raise InvalidArgument(
            f"model '{model_name}': instance {placement.name} wants {placement.kind}, and JAX has no {platform} here "
            f"({exc}); it has {sorted({device.platform for device in jax.devices()})}"
        ) from None
    if platform == "cpu":
        return devices[0]
    if placement.device >= len(devices):
        raise InvalidArgument(
            f"model '{model_name}': instance {placement.name} wants device {placement.device}, JAX has {len(devices)}: "
            + ", ".join(map(str, devices))
        )
    return devices[placement.device]
