"""The states of sequences on the device: one array for each state, with a row for each slot of one instance.

A program takes the rows of its batch out of the arrays and writes the new states in, in place: the arrays are donated.  So a
state does not come to the host between two requests, and that a sequence's next request finds what the one before it has
left is the device's own order.

What a row holds is its sequence's only if that sequence has written it: known by generation, for a slot has one owner
after the other.  Anybody else starts from the initial states, which have a row of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import Unavailable
from ...tensor import DTYPES
from .checks import Avals, aval, model_dims
from .memory import tree_bytes

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...config import ModelConfig
    from ...request import Array
    from ...states import StateSlots
    from .loader import ModelFunctions
    from .options import JaxOptions
    from .turns import Slot

#: By input name, on the device.
Arrays = dict[str, Any]
#: JAX's stubs leave it untyped.
_barrier: Any = jax.lax.optimization_barrier


class StateLayout:
    """The arrays, as a model's programs on one device see them; ``rows`` are two for each row of a bucket (int32[2, bucket]):
    from where its states come, and where the new ones go.

    Behind the rows of the slots are two more: the initial states, which nothing is written to, and one for what nobody
    wants, which nothing is read from.
    """

    def __init__(self, config: ModelConfig, slots: StateSlots, device: jax.Device) -> None:
        assert config.sequence_batching is not None
        self.count = slots.count
        self.initial_row, self.waste_row = slots.count, slots.count + 1
        #: Of one row, by input name: the model's functions see these among their inputs.
        self.shapes = {state.input_name: state.dims for state in config.sequence_batching.states}
        self._dtypes = {state.input_name: DTYPES[state.datatype] for state in config.sequence_batching.states}
        self._outputs = {state.input_name: state.output_name for state in config.sequence_batching.states}
        self._hidden = slots.hidden
        self._initial = {name: slots.initial[name].reshape(dims) for name, dims in self.shapes.items()}
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._make: Callable[..., Arrays] | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        functions: ModelFunctions,
        options: JaxOptions,
        slots: StateSlots | None,
        device: jax.Device,
    ) -> StateLayout | None:
        """None where the server has to keep the states; see :attr:`JaxOptions.state_on_device`."""
        batching = config.sequence_batching
        if slots is None or batching is None or not options.state_on_device:
            return None
        if functions.run is not None or functions.emit is not None:
            return None
        shown = {spec.name: model_dims(spec) for spec in config.outputs}
        # A program with nothing for clients would have no output whose end tells of its own.
        if slots.hidden.issuperset(shown) or any(
            -1 in state.dims or shown[state.output_name] != state.dims for state in batching.states
        ):
            return None
        return cls(config, slots, device)

    @property
    def bytes(self) -> int:
        """What the arrays of one instance take."""
        return tree_bytes(self.avals())

    def avals(self) -> Avals:
        """The arrays, abstract."""
        return {
            name: aval((self.count + 2, *dims), self._dtypes[name], sharding=self._sharding)
            for name, dims in self.shapes.items()
        }

    def rows_aval(self, bucket: int) -> Avals:
        return aval((2, bucket), np.dtype(np.int32), sharding=self._sharding)

    def initial_rows(self, bucket: int) -> Array:
        """Everybody reads the initial states, and nobody's new ones are kept."""
        return np.repeat(np.array([[self.initial_row], [self.waste_row]], np.int32), bucket, axis=1)

    def compile(self) -> None:
        """In a worker thread, before :meth:`make`."""

        def make(initial: Arrays) -> Arrays:
            return {
                name: jnp.zeros((self.count + 2, *value.shape), value.dtype).at[self.initial_row].set(value)
                for name, value in initial.items()
            }

        avals = {name: aval(value.shape, value.dtype, sharding=self._sharding) for name, value in self._initial.items()}
        self._make = jax.jit(make).lower(avals).compile()

    def make(self) -> Arrays:
        """New arrays, in which no sequence has anything."""
        assert self._make is not None
        return self._make(self._initial)

    # Around what the author wrote, lifted to a batch

    def reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """From ``(params, inputs)`` to ``(params, inputs, arrays, rows)``."""

        def program(params: Any, inputs: Any, arrays: Arrays, rows: jax.Array) -> Any:
            return function(params, {**inputs, **self._read(arrays, rows[0])})

        return program

    def writing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """From ``(params, carry) -> outputs`` to ``(params, carry, arrays, rows) -> (outputs, arrays)``."""

        def program(params: Any, carry: Any, arrays: Arrays, rows: jax.Array) -> Any:
            return self._write(arrays, function(params, carry), rows[1])

        return program

    def reading_and_writing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """From ``(params, inputs) -> outputs`` to ``(params, inputs, arrays, rows) -> (outputs, arrays)``."""
        reading = self.reading(function)

        def program(params: Any, inputs: Any, arrays: Arrays, rows: jax.Array) -> Any:
            return self._write(arrays, reading(params, inputs, arrays, rows), rows[1])

        return program

    # The barriers keep what the author wrote a computation of its own: with the copies fused into it, a row's bits could be
    # others than where the server keeps the states.

    def _read(self, arrays: Arrays, source: jax.Array) -> Arrays:
        found = {name: array.at[source].get(mode="promise_in_bounds") for name, array in arrays.items()}
        barred: Arrays = _barrier(found)
        return barred

    def _write(self, arrays: Arrays, outputs: Mapping[str, Any], target: jax.Array) -> tuple[dict[str, Any], Arrays]:
        outputs = _barrier(dict(outputs))
        arrays = dict(arrays)
        for name, output in self._outputs.items():
            # Row by row: XLA's scatter on a CPU copies the whole array, donated or not.
            for row in range(target.shape[0]):
                new = outputs[output][row : row + 1]
                arrays[name] = jax.lax.dynamic_update_slice_in_dim(arrays[name], new, target[row], 0)
        return {name: value for name, value in outputs.items() if name not in self._hidden}, arrays


class StateStore:
    """The states of one instance's sequences.

    Whose a slot is, is the Trio thread's to say; the arrays, and who has written there, are the device thread's.
    """

    def __init__(self, layout: StateLayout, model: str) -> None:
        self._layout = layout
        self._model = model
        self._arrays: Arrays | None = None
        # By slot, generations of sequences; 0: none.
        self._owners = [0] * layout.count
        self._written = [0] * layout.count  #: whose states are in the arrays
        self._lost: set[int] = set()  #: those whose states are gone, though they have not ended
        # One thread may forget a sequence while the other writes another's state.
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Sequences that have states here."""
        return sum(map(bool, self._written))

    def open(self) -> None:
        """Make the arrays; blocking."""
        self._arrays = self._layout.make()
        for array in self._arrays.values():
            array.block_until_ready()

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
                        "its state: a program that wrote states has failed on the device; start it again"
                    ),
                )

    def forget(self, generation: int) -> None:
        """That sequence has ended."""
        with self._lock:
            self._lost.discard(generation)
            for table in (self._owners, self._written):
                if generation in table:
                    table[table.index(generation)] = 0

    # In the device thread

    def read(self, members: Sequence[Member], bucket: int) -> tuple[Arrays, Array]:
        """The arrays, and for the rows of a bucket, from where their states come.

        As with other inputs, rows that no request fills and padding read what a real row reads.
        """
        rows = self._layout.initial_rows(bucket)
        real = next(member for member in members if member.ready)
        sources = [self._source(member if member.ready else real) for member in members]
        rows[0, : len(sources)] = sources
        rows[0, len(sources) :] = sources[0]
        return self._current(), rows

    def write(
        self,
        program: Callable[[Arrays, Array], tuple[Any, Arrays]],
        slots: Sequence[Slot],
        *,
        bucket: int,
        reads: Sequence[Member] = (),
    ) -> Any:
        """Dispatch ``program``, which returns outputs and new arrays; returns the outputs.

        Args:
          slots: whose states it writes.
          reads: whose it reads; see :meth:`read`.
        """
        arrays, rows = self.read(reads, bucket) if reads else (self._current(), self._layout.initial_rows(bucket))
        written = []
        for slot in slots:
            state_slot = slot.member.request.state_slot
            assert state_slot is not None
            # What comes late is not written over what the slot's next owner has.
            if self._owners[state_slot.index] == state_slot.generation:
                rows[1, slot.rows] = state_slot.index
                written.append(state_slot)
        try:
            outputs, self._arrays = program(arrays, rows)
        except Exception:
            if any(array.is_deleted() for array in arrays.values()):
                self.lose()
            raise
        with self._lock:
            for state_slot in written:
                self._written[state_slot.index] = state_slot.generation
        return outputs

    def lose(self) -> None:
        """A program that wrote into the arrays has failed, so all that they had is gone."""
        with self._lock:
            self._lost.update(filter(None, self._written))
            self._written = [0] * self._layout.count
        self._arrays = None

    def _current(self) -> Arrays:
        if self._arrays is None:
            self._arrays = self._layout.make()
        return self._arrays

    def _source(self, member: Member) -> int:
        slot = member.request.state_slot
        assert slot is not None
        return slot.index if self._written[slot.index] == slot.generation else self._layout.initial_row
