"""A language model behind the server: each slot is an instance that takes one request when it is free."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import jax
import trio

from ....errors import InvalidArgument
from ....groups import WithoutGroups
from ...base import BackendModel, ModelContext
from ...base import Placement as InstancePlacement
from ..controller import ChunkController
from ..device import LOGGER, DeviceThread
from ..devices import device_name, find_devices
from .engine import EngineStatistics, SlotEngine, SlotPrograms
from .hosts import lead
from .instance import CUTTERS, TextInstance
from .loading import Loader, log_load, warm_up
from .options import TextOptions
from .request import check
from .schedule import SlotSchedule
from .tokenizer import NoTokenizer, Tokenizer
from .weights import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ....config import ModelConfig


def is_language_model(config: ModelConfig) -> bool:
    """Whether ``parameters`` say so; raises :exc:`InvalidArgument` for a format that nobody knows."""
    found = config.parameters.get("model_format")
    if found not in (None, "llama"):
        raise InvalidArgument(
            f"model '{config.name}': parameter model_format in config.pbtxt must be 'llama', or left out for a model "
            f"in model.py; got '{found}'"
        )
    return found is not None


def check_instances(config: ModelConfig, devices: int) -> None:
    """Raises :exc:`InvalidArgument` if two instances of a group would be on one device.  Blocking: starts JAX's backends."""
    for group in config.instance_groups:
        here = 1 if group.gpus else len(jax.local_devices(backend="cpu" if group.kind == "KIND_CPU" else None))
        if group.count > max(here // devices, 1):
            raise too_many_instances(config, f"instance_group has count {group.count} where there is room for one")


def too_many_instances(config: ModelConfig, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"model '{config.name}': {what}; leave count at 1 where there are no more devices, and let the parameter slots say how "
        "many texts are made side by side"
    )


class LoadedModel:
    """A model on one device: its engine, and which of its slots are instances."""

    def __init__(self, tokenizer: Tokenizer, programs: SlotPrograms) -> None:
        self.tokenizer = tokenizer
        self.programs = programs
        self.engine: SlotEngine | None = None
        self.instances = 0
        self.cutters = trio.CapacityLimiter(CUTTERS)


class LlamaModel(BackendModel):
    """One loaded version; each device it is placed on has its own parameters, programs and slots.

    Args:
      use: the thread of some devices, for as long as the block lasts.
    """

    def __init__(
        self,
        context: ModelContext,
        options: TextOptions,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        use: Callable[[Sequence[jax.Device]], AbstractContextManager[DeviceThread]],
    ) -> None:
        self._context = context
        self._options = options
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._use = use
        self._loaded: dict[jax.Device, LoadedModel] = {}

    def lanes(self, placement: InstancePlacement) -> int:
        return self._options.slots

    def statistics(self) -> tuple[EngineStatistics, ...]:
        """One for each device that the model is on."""
        return tuple(loaded.engine.statistics() for loaded in self._loaded.values() if loaded.engine is not None)

    @asynccontextmanager
    async def open_instance(self, placement: InstancePlacement) -> AsyncIterator[TextInstance]:
        """The first slot on a device loads the parameters, compiles, and starts the engine; with it all of that ends.

        **Cancellation:** between two tensors while weights are loaded, between two compilations, and between two programs of
        the first run; nothing is left on the devices.
        """
        name = self._context.config.name
        devices = await trio.to_thread.run_sync(find_devices, name, placement, self._options.devices)
        device = devices[0]
        loaded = self._loaded.get(device)
        if loaded is not None:
            yield self._instance(loaded, device)
            return
        async with self._open_programs(devices) as (thread, programs):
            loaded = self._loaded[device] = LoadedModel(self._tokenizer, programs)
            try:
                async with trio.open_nursery() as nursery:
                    engine = loaded.engine = self._engine(loaded, thread)
                    # Owner: this nursery; ended here, when the slots' instances have ended.
                    nursery.start_soon(engine.run, name=engine.name)
                    try:
                        yield self._instance(loaded, device)
                    finally:
                        nursery.cancel_scope.cancel(reason="model unloaded")
            finally:
                del self._loaded[device]

    @asynccontextmanager
    async def _open_programs(self, devices: Sequence[jax.Device]) -> AsyncIterator[tuple[DeviceThread, SlotPrograms]]:
        """Loaded, tried and, over several hosts, led."""
        options, name = self._options, self._context.config.name
        loader = Loader(name, self._checkpoint, options, devices)
        with WithoutGroups(nurseries=1), self._use(devices) as thread:
            if any(each.process_index != devices[0].process_index for each in devices):
                async with lead(loader, thread) as leading:
                    log_load(name, leading)
                    yield thread, leading
                return
            programs = await loader.load(SlotPrograms)
            if options.warmup:
                await warm_up(name, programs, thread, options.target, self._context.release_limit)
            log_load(name, programs)
            yield thread, programs

    def _instance(self, loaded: LoadedModel, device: jax.Device) -> TextInstance:
        assert loaded.engine is not None
        slot, loaded.instances = loaded.instances, loaded.instances + 1
        if slot >= self._options.slots:
            raise too_many_instances(
                self._context.config, f"all slots on {device_name(device)} are taken by one instance"
            )
        outputs = frozenset(output.name for output in self._context.config.outputs)
        return TextInstance(loaded.engine, slot, loaded.tokenizer, loaded.cutters, outputs)

    def _engine(self, loaded: LoadedModel, thread: DeviceThread) -> SlotEngine:
        name = self._context.config.name
        return SlotEngine(
            f"generation of model '{name}' on {thread.name}",
            name,
            thread,
            loaded.programs,
            SlotSchedule(loaded.programs.spec, tuple(loaded.programs.prefill)),
            ChunkController(self._options.target, self._options.ladder),
            waiting=self._context.waiting,
            late=self._options.late_enqueue,
        )


@asynccontextmanager
async def open_language_model(
    context: ModelContext,
    *,
    use: Callable[[Sequence[jax.Device]], AbstractContextManager[DeviceThread]],
) -> AsyncIterator[LlamaModel]:
    """Open the files; instances do the rest.

    Raises:
      InvalidArgument: config.pbtxt or the files do not suit.
      NotFound: there are no weights.

    **Cancellation:** before and after the files are opened; nothing is left behind.
    """
    check(context.config)
    options = TextOptions.read(context.config)

    def read() -> tuple[Checkpoint, Tokenizer]:
        check_instances(context.config, options.devices)
        checkpoint = open_checkpoint(options.find_weights(context.version_directory))
        return checkpoint, checkpoint.tokenizer()

    checkpoint, tokenizer = await trio.to_thread.run_sync(read)
    await trio.lowlevel.checkpoint()
    name, known = context.config.name, checkpoint.config.vocab_size
    if isinstance(tokenizer, NoTokenizer):
        LOGGER.warning("model '%s': %s: it serves input_ids only", name, tokenizer.missing)
    elif tokenizer.vocab_size > known:
        LOGGER.warning(
            "model '%s': its tokenizer has %d tokens and the model %d: a text with one of the others is refused",
            name,
            tokenizer.vocab_size,
            known,
        )
    yield LlamaModel(context, options, checkpoint, tokenizer, use=use)
