"""A language model behind the server: each slot is an instance that takes one request when it is free."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import jax
import trio

from ....errors import InvalidArgument
from ....groups import WithoutGroups
from ...base import BackendModel, ModelContext
from ...base import Placement as InstancePlacement
from ..controller import ChunkController
from ..device import DeviceThread
from .engine import EngineStatistics, SlotEngine, SlotPrograms
from .hosts import lead
from .instance import TextInstance
from .leader import LeadingPrograms
from .options import TextOptions
from .placement import Placement
from .programs import Compiled, LlamaPrograms, slot_spec
from .request import check
from .schedule import SlotSchedule
from .tokenizer import Tokenizer
from .weights import Checkpoint, load_params, open_checkpoint

if TYPE_CHECKING:
    from ....config import ModelConfig
    from .llama import Params

Programs = TypeVar("Programs", bound=SlotPrograms)


def is_language_model(config: ModelConfig) -> bool:
    """Whether ``parameters`` say so; raises :exc:`InvalidArgument` for a format that nobody knows."""
    found = config.parameters.get("model_format")
    if found not in (None, "llama"):
        raise InvalidArgument(
            f"model '{config.name}': parameter model_format in config.pbtxt must be 'llama', or left out for a model "
            f"in model.py; got '{found}'"
        )
    return found is not None


class LoadedModel:
    """A model on one device: its engine, and which of its slots are instances."""

    def __init__(self, tokenizer: Tokenizer, programs: SlotPrograms) -> None:
        self.tokenizer = tokenizer
        self.programs = programs
        self.engine: SlotEngine | None = None
        self.instances = 0


class LlamaModel(BackendModel):
    """One loaded version; each device it is placed on has its own parameters, programs and slots.

    Args:
      find_device: of a placement; blocking.
      use: the thread of a device, for as long as the block lasts.
    """

    def __init__(
        self,
        context: ModelContext,
        options: TextOptions,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        find_device: Callable[[str, InstancePlacement], jax.Device],
        use: Callable[[jax.Device], AbstractContextManager[DeviceThread]],
    ) -> None:
        self._context = context
        self._options = options
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._find_device = find_device
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

        **Cancellation:** between two tensors while weights are loaded, and between two compilations.
        """
        device = await trio.to_thread.run_sync(self._find_device, self._context.config.name, placement)
        loaded = self._loaded.get(device)
        if loaded is not None:
            yield self._instance(loaded, device)
            return
        options = self._options
        devices = await trio.to_thread.run_sync(find_mesh, self._context.config.name, device, options.devices)
        several = any(each.process_index != device.process_index for each in devices)
        # A mesh is used from its first device's thread: all that is over several devices has one order on them.
        with WithoutGroups(nurseries=1), self._use(device) as thread:
            kind = LeadingPrograms if several else SlotPrograms
            programs = await load_programs(self._checkpoint, options, devices, kind)
            loaded = self._loaded[device] = LoadedModel(self._tokenizer, programs)
            try:
                async with lead(programs, thread.abandon), trio.open_nursery() as nursery:
                    engine = loaded.engine = self._engine(loaded, thread)
                    # Owner: this nursery; ended here, when the slots' instances have ended.
                    nursery.start_soon(engine.run, name=engine.name)
                    try:
                        yield self._instance(loaded, device)
                    finally:
                        nursery.cancel_scope.cancel(reason="model unloaded")
            finally:
                del self._loaded[device]

    def _instance(self, loaded: LoadedModel, device: jax.Device) -> TextInstance:
        assert loaded.engine is not None
        slot, loaded.instances = loaded.instances, loaded.instances + 1
        if slot >= self._options.slots:
            raise InvalidArgument(
                f"model '{self._context.config.name}': its slots on {device} are all of one instance; leave count at 1, "
                "and let the parameter slots say how many texts are made side by side"
            )
        return TextInstance(loaded.engine, slot, loaded.tokenizer)

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
        )


def find_mesh(model_name: str, first: jax.Device, count: int) -> list[jax.Device]:
    """So many devices, ``first`` among them: this process's own, or all that all processes have.  Blocking.

    Raises:
      InvalidArgument: there are not so many.
    """
    if count == 1:
        return [first]
    here, all_of_them = jax.local_devices(backend=first.platform), jax.devices(first.platform)
    if first != here[0]:
        raise InvalidArgument(
            f"model '{model_name}': the {count} devices that share it are counted from the first, but an instance is "
            "placed on another; give its instance_group count 1 and gpus: [ 0 ]"
        )
    if count > len(here) and count != len(all_of_them):
        there = f", {len(all_of_them)} in all processes together" if len(all_of_them) > len(here) else ""
        raise InvalidArgument(
            f"model '{model_name}': tensor_parallel in config.pbtxt is {count}; JAX has {len(here)} {first.platform} "
            f"devices here{there}"
        )
    return here[:count] if count <= len(here) else all_of_them


async def load_programs(
    checkpoint: Checkpoint, options: TextOptions, devices: Sequence[jax.Device], kind: type[Programs]
) -> Programs:
    """Parameters on the devices, and everything compiled.

    **Cancellation:** between two tensors, and between two compilations.
    """
    placement = Placement.on(devices)
    spec = slot_spec(
        checkpoint.config,
        placement,
        slots=options.slots,
        context=min(options.context, checkpoint.config.context),
        end_tokens=checkpoint.end_tokens,
        dtype=options.activations(),
    )

    def load() -> tuple[LlamaPrograms, Params]:
        between = trio.from_thread.check_cancelled
        params = load_params(checkpoint, placement, dtype=spec.dtype, int8=options.int8, between=between)
        return LlamaPrograms(spec, placement, params), params

    programs, params = await trio.to_thread.run_sync(load)
    prefill: dict[int, Compiled] = {}
    for length in sorted({min(length, spec.context) for length in options.prefill}):
        prefill[length] = await trio.to_thread.run_sync(programs.prefill, length)
        await trio.lowlevel.checkpoint()
    decode: dict[int, Compiled] = {}
    for steps in options.ladder:
        decode[steps] = await trio.to_thread.run_sync(programs.decode, steps)
        await trio.lowlevel.checkpoint()
    return kind(programs, params, prefill, decode)


@asynccontextmanager
async def open_language_model(
    context: ModelContext,
    *,
    find_device: Callable[[str, InstancePlacement], jax.Device],
    use: Callable[[jax.Device], AbstractContextManager[DeviceThread]],
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
        checkpoint = open_checkpoint(options.find_weights(context.version_directory))
        return checkpoint, checkpoint.tokenizer()

    checkpoint, tokenizer = await trio.to_thread.run_sync(read)
    yield LlamaModel(context, options, checkpoint, tokenizer, find_device=find_device, use=use)
