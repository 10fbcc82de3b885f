"""What a sequence batcher adds to the tensors of a request, and what it takes out of the answer.

*Control inputs* tell the model where in its sequence a request is (START, READY, END, CORRID).  *States* are outputs of
one request that are inputs of the sequence's next; clients see neither.  A sequence owns its state: a plain dict by input
name, which nobody else refers to.  So a new sequence has a new state, whatever became of the one before it, and the state
is freed with its sequence.  Where an instance keeps the states of its sequences (on its device), none of this is done:
requests then say where to find them (:class:`~triton_trio.states.StateSlot`).

Two of Triton's settings are about memory only and change no tensor here.  ``use_same_buffer_for_input_output``: a model
never writes into its inputs, and its sequence has one copy of a state between requests.  ``use_growable_memory``: any
state with a variable dim may change its shape from request to request.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InternalError, InvalidArgument
from ..request import NullRequest
from ..states import StateSlots
from ..tensor import DTYPES, datatype_of, format_shape

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..config.scheduling import SequenceControl, SequenceState
    from ..request import Array, InferenceRequest

#: Kinds of not-ready rows that are kept: one for each shape that requests have.
NULL_ROWS = 64

_START, _READY, _END, _CORRID = (f"CONTROL_SEQUENCE_{kind}" for kind in ("START", "READY", "END", "CORRID"))


class SequenceTensors:
    """The control inputs and states of one model; made once, when it is loaded.

    Controls have shape ``[1, 1]``, or ``[1]`` if the model does not batch; states have a batch dimension of 1 in front if
    it does.  Everything is synchronous.

    Args:
      config: with ``sequence_batching``.
      initial: what states start from, by input name, as
        :func:`~triton_trio.config.read_initial_states` has it; the others start from zeros.
    """

    def __init__(self, config: ModelConfig, initial: Mapping[str, Array] | None = None) -> None:
        batching = config.sequence_batching
        assert batching is not None
        self._model = config.name
        self._decoupled = config.decoupled
        self._lead = (1,) if config.max_batch_size > 0 else ()
        self._corrid = next((control for control in batching.controls if control.kind == _CORRID), None)
        self._limits = (0, 0)
        if self._corrid is not None and self._corrid.datatype != "BYTES":
            limits = np.iinfo(DTYPES[self._corrid.datatype])
            self._limits = (limits.min, limits.max)
        signals = [control for control in batching.controls if control.kind != _CORRID]
        self._controls = {
            (start, end): self._signals(signals, {_START: start, _READY: True, _END: end})
            for start in (False, True)
            for end in (False, True)
        }
        self._not_ready = self._signals(signals, {})
        if self._corrid is not None:
            self._not_ready[self._corrid.name] = self._correlation(self._corrid, 0)
        self._states = batching.states
        self._variable = tuple(state.input_name for state in batching.states if -1 in state.dims)
        shown = {output.name for output in config.outputs}
        self._hidden = frozenset(state.output_name for state in batching.states) - shown
        # Every new sequence starts with these very arrays.
        self._initial = {state.input_name: self._zeros(state) for state in batching.states} | dict(initial or {})
        self._null_rows: dict[Hashable, NullRequest] = {}

    def slots(self, count: int) -> StateSlots | None:
        """For instances of ``count`` slots that can keep states themselves; None: there is nothing to keep."""
        return StateSlots(count, self._initial, self._hidden) if self._states else None

    # Before

    def check(self, request: InferenceRequest) -> None:
        """Raise :exc:`InvalidArgument` if the model could not be told the request's correlation ID.

        0 and "" pass: whether a request may come without one is not decided here.
        """
        control, value = self._corrid, request.sequence_id
        if control is None or not value:
            return
        if isinstance(value, str) != (control.datatype == "BYTES"):
            got = "BYTES" if isinstance(value, str) else "UINT64"
            raise InvalidArgument(
                f"{request.label}sequence batching control '{control.name}' data-type is '{got}', but model "
                f"'{self._model}' expects '{control.datatype}'"
            )
        if not isinstance(value, str):
            lowest, highest = self._limits
            if not lowest <= value <= highest:
                raise InvalidArgument(
                    f"{request.label}correlation ID {value} does not fit sequence batching control '{control.name}' of "
                    f"model '{self._model}', which is {control.datatype}: use one from {lowest} to {highest}"
                )

    def initial_state(self) -> dict[str, Array]:
        """The state of a sequence that starts now, by input name."""
        return dict(self._initial)

    def signature(self, request: InferenceRequest, state: Mapping[str, Array]) -> Hashable:
        """Requests with equal ones may share a batch: :attr:`InferenceRequest.signature`, and the shapes of states.

        To be asked when a batch is formed, for the state's shape is known when the request before is answered.
        """
        if not self._variable:
            return request.signature
        return request.signature, tuple(state[name].shape for name in self._variable)

    def fill(self, request: InferenceRequest, state: Mapping[str, Array], *, start: bool, end: bool) -> None:
        """Add controls and states to the inputs of a request that is to be executed now.

        Called again for a request that was rescheduled, it replaces what it added before.
        """
        inputs = {**request.inputs, **self._controls[start, end], **state}
        if self._corrid is not None:
            inputs[self._corrid.name] = self._correlation(self._corrid, request.sequence_id)
        request.inputs = inputs

    def null_row(self, like: InferenceRequest) -> NullRequest:
        """A row without a request, to share a batch with ``like``, which :meth:`fill` has filled.

        READY, START and END are false, the correlation ID is 0 or empty, everything else is zeros.  Nothing can happen to
        such a row, so all those like one request are one object: a batch asks once.
        """
        key = tuple((name, array.shape) for name, array in like.inputs.items())
        row = self._null_rows.get(key)
        if row is None:
            zeros = {name: _zeros(array.shape, array.dtype) for name, array in like.inputs.items()}
            row = self._null_rows[key] = NullRequest(zeros | self._not_ready, like.signature)
            if len(self._null_rows) > NULL_ROWS:
                del self._null_rows[next(iter(self._null_rows))]
        return row

    # After

    def take_states(
        self, state: dict[str, Array], request: InferenceRequest, outputs: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Move the states of an answer into ``state``, all or none; returns what the client may see.

        That is everything else, and the states that config.pbtxt also lists as outputs.  The answers of a decoupled model
        need not have every state: what they leave out stays as it was.

        Raises:
          InternalError: the model left a state out, or made one of another datatype or shape.
        """
        taken = {}
        for spec in self._states:
            array = outputs.get(spec.output_name)
            if array is not None:
                self._check_state(spec, request, array)
                # A copy: the model's array may be a view of the whole batch's, or be used again for the next one.
                taken[spec.input_name] = array.astype(DTYPES[spec.datatype])
                taken[spec.input_name].flags.writeable = False
            elif not self._decoupled:
                raise InternalError(
                    f"{request.label}model '{self._model}' did not produce state output '{spec.output_name}'"
                )
        state.update(taken)
        if self._hidden.isdisjoint(outputs):
            return outputs
        return {name: array for name, array in outputs.items() if name not in self._hidden}

    # Inside

    def _check_state(self, spec: SequenceState, request: InferenceRequest, array: Array) -> None:
        dims = (*self._lead, *spec.dims)
        fits = array.ndim == len(dims) and all(dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True))
        datatype = _datatype(array)
        if datatype != spec.datatype or not fits:
            raise InternalError(
                f"{request.label}model '{self._model}' produced state output '{spec.output_name}' as {datatype} "
                f"{format_shape(array.shape)}, expected {spec.datatype} {format_shape(dims)}"
            )

    def _signals(self, controls: list[SequenceControl], on: Mapping[str, bool]) -> dict[str, Array]:
        return {
            control.name: self._control(control, control.true if on.get(control.kind) else control.false)
            for control in controls
        }

    def _control(self, control: SequenceControl, value: Any) -> Array:
        return _full((*self._lead, 1), DTYPES[control.datatype], value)

    def _correlation(self, control: SequenceControl, value: int | str) -> Array:
        if control.datatype == "BYTES":
            return self._control(control, str(value or "").encode())
        return self._control(control, value)

    def _zeros(self, state: SequenceState) -> Array:
        # As in Triton, a variable dim starts at 1 where initial_state does not say otherwise.
        initial = state.initial_state
        dims = tuple(1 if dim == -1 else dim for dim in (state.dims if initial is None else initial.dims))
        return _zeros((*self._lead, *dims), DTYPES[state.datatype])


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return _full(shape, dtype, b"" if dtype.hasobject else 0)


def _full(shape: tuple[int, ...], dtype: np.dtype[Any], value: object) -> Array:
    # Not np.full(), which makes an array of the value first and so loses the NULs at a string's end.
    array: Array = np.empty(shape, dtype)
    array.fill(value)
    array.flags.writeable = False
    return array


def _datatype(array: Array) -> str:
    try:
        return datatype_of(array)
    except InternalError:
        return str(array.dtype)
