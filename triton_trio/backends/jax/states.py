"""The states of sequences on the device: one array for each state, with a row for each slot of one instance.

Before a batch's program, another takes its members' rows out of the arrays; when it has succeeded, a third puts the new
states there, in place: the arrays are donated.  So a state does not come to the host between two requests, the model's own
program is the same wherever its states are kept, and what failed or was cancelled has changed no state.

What a row holds is its sequence's only if that sequence has put it there: known by generation, for a slot has one owner
after the other.  Anybody else starts from the initial states, which have a row of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import Unavailable
from ...tensor import DTYPES
from .checks import Avals, aval, model_dims
from .device import Turn
from .memory import tree_bytes
from .programs import precision
from .turns import stack_inputs

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...config import ModelConfig
    from ...request import Array
    from ...states import StateSlots
    from .loader import ModelFunctions
    from .options import JaxOptions
    from .placed import PlacedModel
    from .turns import Rows

#: By input name, on the device.
Arrays = dict[str, Any]


def gather_inputs(batch: Batch, placed: PlacedModel, bucket: int, states: StateStore | None) -> dict[str, Any]:
    """The inputs of a batch: rows from the host, and the states that are on the device; in the device thread."""
    inputs: dict[str, Any] = stack_inputs(batch, placed.config, bucket, on_device=placed.states_on_device)
    return inputs if states is None else inputs | states.take(batch.members, bucket)


class StateLayout:
    """The arrays of a model's instances on one device, and the programs that take rows and put them there.

    Behind the rows of the slots is one more: the initial states, where nothing is ever put.
    """

    def __init__(self, config: ModelConfig, slots: StateSlots, device: jax.Device, *, x64: bool) -> None:
        assert config.sequence_batching is not None
        states = config.sequence_batching.states
        self.count = slots.count
        self.x64 = x64
        #: Of one row, by input name.
        self.shapes = {state.input_name: state.dims for state in states}
        self._dtypes = {state.input_name: DTYPES[state.datatype] for state in states}
        self._outputs = {state.input_name: state.output_name for state in states}
        self._hidden = slots.hidden
        self._initial = {name: slots.initial[name].reshape(dims) for name, dims in self.shapes.items()}
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._make: Callable[..., Arrays] | None = None
        # By bucket.
        self._take: dict[int, Callable[..., Arrays]] = {}
        self._put: dict[int, Callable[..., Arrays]] = {}

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        functions: ModelFunctions,
        options: JaxOptions,
        slots: StateSlots | None,
        device: jax.Device,
    ) -> StateLayout | None:
        """None where the server keeps the states; see :class:`JaxOptions`, ``state_on_device``."""
        batching = config.sequence_batching
        if slots is None or batching is None or not options.state_on_device:
            return None
        if functions.run is not None or functions.emit is not None:
            return None
        made = {spec.name: model_dims(spec) for spec in config.outputs}
        if any(-1 in state.dims or made[state.output_name] != state.dims for state in batching.states):
            return None
        return cls(config, slots, device, x64=options.x64)

    @property
    def bytes(self) -> int:
        """What the arrays of one instance take."""
        return tree_bytes(self._avals(self.count + 1))

    def shown(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs that clients may see."""
        return {name: value for name, value in outputs.items() if name not in self._hidden}

    def build(self, buckets: Sequence[int]) -> Iterator[Callable[[], None]]:
        """Compilations, each for a worker thread; call them all."""
        arrays = self._avals(self.count + 1)

        def make(initial: Arrays) -> Arrays:
            return {
                name: jnp.zeros((self.count + 1, *value.shape), value.dtype).at[self.count].set(value)
                for name, value in initial.items()
            }

        def take(arrays: Arrays, rows: jax.Array) -> Arrays:
            return {name: array.at[rows].get(mode="promise_in_bounds") for name, array in arrays.items()}

        def put(arrays: Arrays, new: Arrays, rows: jax.Array) -> Arrays:
            return {
                name: array.at[rows].set(new[name], mode="drop", unique_indices=True) for name, array in arrays.items()
            }

        def compile_make() -> None:
            self._make = jax.jit(make).lower(self._avals()).compile()

        def compile_bucket(bucket: int) -> None:
            rows = aval((bucket,), np.dtype(np.int32), sharding=self._sharding)
            self._take[bucket] = jax.jit(take).lower(arrays, rows).compile()
            put_in_place = jax.jit(put, donate_argnums=0)
            self._put[bucket] = put_in_place.lower(arrays, self._avals(bucket), rows).compile()

        yield compile_make
        for bucket in buckets:
            yield lambda bucket=bucket: compile_bucket(bucket)  # type: ignore[misc]

    def make(self) -> Arrays:
        """New arrays, in which no sequence has anything."""
        assert self._make is not None
        return self._make(self._initial)

    def take(self, arrays: Arrays, rows: Array) -> Arrays:
        """Args: rows: int32[bucket]."""
        return self._take[len(rows)](arrays, rows)

    def put(self, arrays: Arrays, outputs: Mapping[str, Any], rows: Array) -> Arrays:
        """The arrays with new states, in place of the old ones.

        Args:
          rows: int32[bucket], no two of them equal; what is beyond the arrays' last row is put nowhere.
        """
        new = {name: outputs[output] for name, output in self._outputs.items()}
        return self._put[len(rows)](arrays, new, rows)

    def outputs(self, outputs: Mapping[str, Any]) -> list[Any]:
        """The new states among the outputs of the model's program."""
        return [outputs[name] for name in self._outputs.values()]

    def _avals(self, *lead: int) -> Avals:
        return {
            name: aval((*lead, *dims), self._dtypes[name], sharding=self._sharding)
            for name, dims in self.shapes.items()
        }


class StateStore:
    """The states of one instance's sequences.

    Whose a slot is, is the Trio thread's to say; the arrays, and who has states there, are the device thread's.
    """

    def __init__(self, layout: StateLayout, model: str) -> None:
        self._layout = layout
        self._model = model
        self._arrays: Arrays | None = None
        # By slot, generations of sequences; 0: none.
        self._owners = [0] * layout.count
        self._kept = [0] * layout.count  #: whose states are in the arrays
        self._lost: set[int] = set()  #: those whose states are gone, though they have not ended
        # One thread may forget a sequence while the other keeps the states of another.
        self._lock = threading.Lock()

    def close(self) -> None:
        """Free them."""
        self._arrays = None

    # In the Trio thread

    def admit(self, batch: Batch) -> None:
        """Before an execution: its sequences have these slots from now on.  Those that cannot go on are failed.

        Once is enough: only an execution of this instance can lose what a sequence has, and there is one at a time.
        """
        for member in batch.members:
            slot = member.request.state_slot
            if slot is None:
                continue
            self._owners[slot.index] = slot.generation
            if slot.generation in self._lost:
                batch.fail(
                    member,
                    Unavailable(
                        f"{member.request.label}sequence {member.request.sequence_id} of model '{self._model}' has lost "
                        "its state with a program that failed on the device; start it again"
                    ),
                )

    def forget(self, generation: int) -> None:
        """That sequence has ended."""
        with self._lock:
            self._lost.discard(generation)
            for table in (self._owners, self._kept):
                if generation in table:
                    table[table.index(generation)] = 0

    # In the device thread

    def open(self) -> None:
        """Begin to make the arrays."""
        with precision(self._layout.x64):
            self._arrays = self._layout.make()

    def wait_open(self) -> None:
        """Block until they are there; raises what went wrong."""
        for array in self._current().values():
            array.block_until_ready()

    def ready(self) -> bool:
        """Whether :meth:`wait_open` would not block."""
        return all(array.is_ready() for array in self._current().values())

    def take(self, members: Sequence[Member], bucket: int) -> Arrays:
        """The states of these members, one row each.

        As with other inputs, rows that no request fills and padding have what a real row has.
        """
        real = next(member for member in members if member.ready)
        rows = [self._source(member if member.ready else real) for member in members]
        rows += rows[:1] * (bucket - len(rows))
        return self._layout.take(self._current(), np.array(rows, np.int32))

    def put(self, outputs: Mapping[str, Any], rows: Sequence[tuple[Member, Rows]], bucket: int) -> None:
        """Keep the new states that a program has made for these members, of those who are there.

        Raises:
          JaxRuntimeError: the program has failed.
        """
        for output in self._layout.outputs(outputs):
            output.block_until_ready()  # no wait: the program's other outputs are there
        kept = []
        beyond = self._layout.count + 1
        target = np.arange(beyond, beyond + bucket, dtype=np.int32)
        for member, where in rows:
            slot = member.request.state_slot
            assert slot is not None
            # What comes late is not put where the slot's next owner has its own.
            if member.live and self._owners[slot.index] == slot.generation:
                target[where] = slot.index
                kept.append(slot)
        if not kept:
            return
        with precision(self._layout.x64):
            self._arrays = self._layout.put(self._current(), outputs, target)
        with self._lock:
            for slot in kept:
                self._kept[slot.index] = slot.generation

    def check(self) -> None:
        """After a program has failed: whatever it was that broke, sequences go on with their own states or not at all."""
        arrays = self._arrays or {}
        try:
            for array in arrays.values():
                array.block_until_ready()
        except RuntimeError:  # computed from what failed, or donated to it
            with self._lock:
                self._lost.update(filter(None, self._kept))
                self._kept = [0] * self._layout.count
            self._arrays = None

    def _current(self) -> Arrays:
        if self._arrays is None:
            self._arrays = self._layout.make()
        return self._arrays

    def _source(self, member: Member) -> int:
        slot = member.request.state_slot
        assert slot is not None
        return slot.index if self._kept[slot.index] == slot.generation else self._layout.count


class OpenStates(Turn):
    """Make a store's arrays."""

    at_load = True

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def dispatch(self) -> bool:
        self._store.open()
        return True

    def wait(self) -> None:
        self._store.wait_open()

    def ready(self) -> bool:
        return self._store.ready()
