"""What makes a configuration impossible, in Triton's words where it has them.

Everything is checked on the message, where "not set" is still visible, after the defaults are filled in.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from ..descriptors import enum_name
from ..errors import InvalidArgument
from .defaults import ENSEMBLE_PLATFORM
from .ensemble_graph import validate_ensemble

#: Every level is a queue of its own.
MAX_PRIORITY_LEVELS = 65_536


def validate(message: Any, *, complete: bool) -> None:
    """Raise :exc:`InvalidArgument` for the first thing that is wrong.

    Args:
      message: a normalised ``ModelConfig``.
      complete: inputs and outputs must have their datatype and dims; otherwise the backend may still fill them in.
    """
    name = message.name
    if not name:
        raise InvalidArgument("model configuration must specify 'name'")
    if not message.backend and message.platform != ENSEMBLE_PLATFORM:
        raise InvalidArgument(f"unexpected platform type '{message.platform}' for {name}")
    if message.backend and message.platform == ENSEMBLE_PLATFORM:
        raise InvalidArgument(
            f"Ensemble model '{name}' must have platform type '{ENSEMBLE_PLATFORM}' and empty backend type"
        )
    if message.max_batch_size < 0:
        raise InvalidArgument(f"'max_batch_size' must be non-negative value for {name}")
    if any(version < 1 for version in message.version_policy.specific.versions):
        raise InvalidArgument(f"version_policy 'specific' must list versions >= 1 for {name}")
    choice = message.WhichOneof("scheduling_choice")
    if choice == "dynamic_batching":
        _validate_dynamic_batching(message)
    elif choice == "sequence_batching":
        _validate_sequence_batching(message)
    elif choice == "ensemble_scheduling":
        validate_ensemble(message)
    elif message.platform == ENSEMBLE_PLATFORM:
        raise InvalidArgument(
            f"ensemble scheduling must be set for ensemble {name} whose platform is {ENSEMBLE_PLATFORM}"
        )
    if message.model_transaction_policy.decoupled and message.response_cache.enable:
        raise cannot_be_cached(name, "'decoupled' transaction policy")
    _validate_metrics(message)
    _validate_instance_groups(message)
    _validate_tensors(message, "input", message.input, complete)
    _validate_tensors(message, "output", message.output, complete)
    _validate_batch_tensors(message)


# Scheduling


def _validate_dynamic_batching(message: Any) -> None:
    batching, name = message.dynamic_batching, message.name
    for size in batching.preferred_batch_size:
        if size <= 0:
            raise InvalidArgument(f"dynamic batching preferred size must be positive for {name}")
        if size > message.max_batch_size:
            raise InvalidArgument(f"dynamic batching preferred size must be <= max batch size for {name}")
    levels = batching.priority_levels
    if levels > MAX_PRIORITY_LEVELS:
        raise InvalidArgument(f"dynamic batching priority_levels must be <= {MAX_PRIORITY_LEVELS} for {name}")
    if levels:
        if not 1 <= batching.default_priority_level <= levels:
            raise InvalidArgument(f"default priority level must be in range [1, {levels}] for {name}")
        if not all(1 <= level <= levels for level in batching.priority_queue_policy):
            raise InvalidArgument(f"priority queue policy must have priority level in range [1, {levels}] for {name}")
    elif batching.priority_queue_policy:
        raise InvalidArgument(
            f"priority_queue_policy has no effect without priority_levels for {name}; "
            "set priority_levels, or use default_queue_policy"
        )
    if batching.preserve_ordering:
        if message.model_transaction_policy.decoupled:
            raise InvalidArgument(
                f"dynamic batching 'preserve_ordering' has no meaning for the responses of decoupled model {name}; "
                "remove one of the two"
            )
        if levels > 1:
            raise InvalidArgument(f"Only one priority level is allowed when 'preserve_ordering' is true for {name}")
        for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
            if policy.default_timeout_microseconds and enum_name(policy, "timeout_action") == "DELAY":
                raise InvalidArgument(
                    f"Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {name}"
                )


_CORRID = "CONTROL_SEQUENCE_CORRID"
_FALSE_TRUE = ("int32_false_true", "fp32_false_true", "bool_false_true")
_CORRID_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def cannot_be_cached(name: str, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"Response Cache does not currently support model {name} with {what}. Please disable the response cache."
    )


def _validate_sequence_batching(message: Any) -> None:
    batching, name = message.sequence_batching, message.name
    if message.response_cache.enable:
        raise cannot_be_cached(name, "sequence batching scheduler")
    _validate_controls(batching.control_input, name)
    if batching.WhichOneof("strategy_choice") == "oldest":
        for size in batching.oldest.preferred_batch_size:
            if size <= 0:
                raise InvalidArgument(f"sequence batching preferred batch size must be positive for {name}")
            if size > message.max_batch_size:
                raise InvalidArgument(f"sequence batching preferred batch size must be <= max batch size for {name}")
        if batching.oldest.max_candidate_sequences < 0:
            raise InvalidArgument(f"sequence batching max_candidate_sequences must be >= 0 for {name}")
    elif not 0.0 <= batching.direct.minimum_slot_utilization <= 1.0:
        raise InvalidArgument(f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {name}")
    _validate_states(message)
    added = [control.name for control in batching.control_input] + [state.input_name for state in batching.state]
    if clash := _first_duplicate([*(tensor.name for tensor in message.input), *added]):
        raise InvalidArgument(
            f"sequence batching tensor '{clash}' is given to the model as more than one of input, control input and "
            f"state for {name}; clients do not send controls and states, so do not list them as inputs"
        )


def _validate_states(message: Any) -> None:
    states, name = message.sequence_batching.state, message.name
    for field in ("input_name", "output_name"):
        names = [getattr(state, field) for state in states]
        if not all(names):
            raise InvalidArgument(f"sequence batching state must specify '{field}' for {name}")
        if twice := _first_duplicate(names):
            raise InvalidArgument(f"sequence batching state {field} '{twice}' is used more than once for {name}")
    outputs = {output.name: output for output in message.output}
    for state in states:
        where = f"sequence batching state '{state.input_name}'"
        if enum_name(state, "data_type") == "TYPE_INVALID":
            raise InvalidArgument(f"{where} must specify 'data_type' for {name}")
        if any(dim < 1 and dim != -1 for dim in state.dims):
            raise InvalidArgument(
                f"{where} dimension must be integer >= 1, or -1 to indicate a variable-size dimension for {name}"
            )
        if state.use_growable_memory and not state.use_same_buffer_for_input_output:
            raise InvalidArgument(
                "In order to 'use_growable_memory', you must also enable 'use_same_buffer_for_input_output' for state "
                f"input name '{state.input_name}' for {name}"
            )
        output = outputs.get(state.output_name)
        if output is not None and output.data_type not in (state.data_type, 0):
            raise InvalidArgument(
                f"{where} is {enum_name(state, 'data_type')}, but its output '{state.output_name}' is "
                f"{enum_name(output, 'data_type')} for {name}"
            )
        if len(state.initial_state) > 1:
            raise InvalidArgument(
                f"initial_state field for state input '{state.input_name}' must contain exactly one or zero element. "
                f"Found '{len(state.initial_state)}' elements."
            )
        for initial in state.initial_state:
            _validate_initial_state(state, initial)


def _validate_initial_state(state: Any, initial: Any) -> None:
    name = state.input_name
    if initial.data_type != state.data_type:
        raise InvalidArgument(
            f"The data type used for 'initial_state' field of state '{name}' does not match the state data type."
        )
    if not initial.name:
        raise InvalidArgument(f"Field 'name' must be set when using initial_state for state input '{name}'.")
    if len(initial.dims) != len(state.dims):
        raise InvalidArgument(
            "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input "
            f"'{name}'. {len(initial.dims)} != {len(state.dims)}"
        )
    for got, dim in zip(initial.dims, state.dims, strict=True):
        if got < 0:
            raise InvalidArgument(f"'initial_state' field for state input name '{name}' contains variable dimensions.")
        if dim not in (-1, got):
            raise InvalidArgument(
                f"'initial_state' dim for input name '{name}' doesn't match 'state' dim description. {got} != {dim}"
            )
    if initial.WhichOneof("state_data") is None or (
        initial.WhichOneof("state_data") == "data_file" and not initial.data_file
    ):
        raise InvalidArgument(f"initial_state setting expects state '{name}' to have state_data set")


def _validate_controls(control_inputs: Any, name: str) -> None:
    tensors = [tensor.name for tensor in control_inputs]
    if not all(tensors):
        raise InvalidArgument(f"sequence batching control tensor must have a name for {name}")
    if twice := _first_duplicate(tensors):
        raise InvalidArgument(
            f"sequence batching control tensor '{twice}' is specified for multiple control kinds for {name}"
        )
    controls = [control for tensor in control_inputs for control in tensor.control]
    kinds = [enum_name(control, "kind") for control in controls]
    if twice := _first_duplicate(kinds):
        raise InvalidArgument(f"sequence batching specifies multiple {twice} tensors for {name}")
    for tensor in control_inputs:
        if len(tensor.control) > 1:
            raise InvalidArgument(
                f"sequence batching control tensor '{tensor.name}' is specified for multiple control kinds for {name}"
            )
    for kind, control in zip(kinds, controls, strict=True):
        given = [field for field in _FALSE_TRUE if len(getattr(control, field))]
        if kind == _CORRID:
            if given:
                raise InvalidArgument(
                    "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or "
                    f"'bool_false_true' for {kind} for {name}"
                )
            if enum_name(control, "data_type") not in _CORRID_TYPES:
                raise InvalidArgument(
                    f"unexpected data type for control {kind} for {name}. Allowed data types are TYPE_UINT64, "
                    "TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING"
                )
        elif not given:
            raise InvalidArgument(
                "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' "
                f"for {kind} for {name}"
            )
        elif len(given) > 1:
            raise InvalidArgument(
                "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
                f"'bool_false_true' for {kind} for {name}"
            )
        elif len(getattr(control, given[0])) != 2:
            raise InvalidArgument(
                f"sequence batching control '{given[0]}' must have exactly 2 entries for {kind} for {name}"
            )


def _validate_metrics(message: Any) -> None:
    for control in message.model_metrics.metric_control:
        if not control.HasField("metric_identifier"):
            raise InvalidArgument("metric control must specify 'metric_identifier'")
        if not control.metric_identifier.family:
            raise InvalidArgument("metric identifier must specify non-empty 'family'")
        if not control.HasField("histogram_options"):
            raise InvalidArgument("metric control must specify 'histogram_options'")
        if not control.histogram_options.buckets:
            raise InvalidArgument("histogram options must specify non-empty 'buckets'")


# Instances


def _validate_instance_groups(message: Any) -> None:
    for group in message.instance_group:
        where = f"instance group {group.name} of model {message.name}"
        kind = enum_name(group, "kind")
        if group.count < 0:
            raise InvalidArgument(f"{where} has count {group.count}; it must be at least 1, or 0 for the default")
        if kind in ("KIND_CPU", "KIND_MODEL") and group.gpus:
            raise InvalidArgument(f"{where} has kind {kind} but specifies one or more GPUs")
        if any(gpu < 0 for gpu in group.gpus):
            raise InvalidArgument(f"{where} specifies a negative gpu id: {list(group.gpus)}")
        if twice := _first_duplicate(list(map(str, group.gpus))):
            raise InvalidArgument(f"{where} specifies gpu id {twice} more than once; raise its count instead")
        if group.profile and message.platform != "tensorrt_plan":
            raise InvalidArgument(
                f"{where} and platform {message.platform} specifies profile field which is only supported for "
                "TensorRT models"
            )
    if twice := _first_duplicate([group.name for group in message.instance_group]):
        raise InvalidArgument(f"instance group name {twice} is used more than once for {message.name}")


# Tensors


def _validate_tensors(message: Any, side: str, tensors: Any, complete: bool) -> None:
    name = message.name
    for tensor in tensors:
        _validate_tensor(message, side, tensor, complete)
    if twice := _first_duplicate([tensor.name for tensor in tensors]):
        raise InvalidArgument(f"model {side} '{twice}' is specified more than once for {name}")


def _validate_tensor(message: Any, side: str, tensor: Any, complete: bool) -> None:
    name = message.name
    if not tensor.name:
        raise InvalidArgument(f"model {side} must specify 'name' for {name}")
    where = f"model {side} '{tensor.name}'"
    if complete and enum_name(tensor, "data_type") == "TYPE_INVALID":
        raise InvalidArgument(f"{where} must specify 'data_type' for {name}")
    if complete and not tensor.dims:
        raise InvalidArgument(f"{where} must specify 'dims' for {name}")
    if any(dim < 1 and dim != -1 for dim in tensor.dims):
        raise InvalidArgument(
            f"{where} dimension must be integer >= 1, or -1 to indicate a variable-size dimension for {name}"
        )
    if tensor.HasField("reshape"):
        _validate_reshape(message, where, list(tensor.dims), list(tensor.reshape.shape))
    if side == "input" and enum_name(tensor, "format") != "FORMAT_NONE" and len(tensor.dims) != 3:
        raise InvalidArgument(f"model input NHWC/NCHW require 3 dims for {name}")
    if message.platform != "tensorrt_plan":
        if tensor.is_shape_tensor:
            raise InvalidArgument(f"shape tensors are only supported for TensorRT platform for {name}")
        if tensor.is_non_linear_format_io:
            raise InvalidArgument(f"Non-linear IO format is only supported for the TensorRT platform for {name}")


def _validate_reshape(message: Any, where: str, dims: list[int], shape: list[int]) -> None:
    name = message.name
    if not shape and message.max_batch_size == 0:
        raise InvalidArgument(
            f"{where} cannot have empty reshape for non-batching model as scalar tensors are not supported for {name}"
        )
    if any(dim < 1 and dim != -1 for dim in shape):
        raise InvalidArgument(
            f"{where} reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension for {name}"
        )
    before, after = _element_counts(dims), _element_counts(shape)
    if len(before) != len(after):
        raise InvalidArgument(
            f"{where} has different number of variable-size dimensions for dims and reshape for {name}"
            if -1 in dims and -1 in shape
            else f"{where} has different size for dims and reshape for {name}"
        )
    if before != after:
        raise InvalidArgument(f"{where} has different size for dims and reshape for {name}")


def _element_counts(dims: list[int]) -> list[int]:
    """Elements of each stretch between variable dimensions: a reshape may move none across them."""
    counts, start = [], 0
    for index, dim in enumerate([*dims, -1]):
        if dim == -1:
            counts.append(prod(dims[start:index]))
            start = index + 1
    return counts


_BATCH_INPUT_TYPES = ("TYPE_INT32", "TYPE_FP32")


def _validate_batch_tensors(message: Any) -> None:
    inputs = {tensor.name for tensor in message.input}
    outputs = {tensor.name for tensor in message.output}
    for side, tensors in (("input", message.batch_input), ("output", message.batch_output)):
        for tensor in tensors:
            if len(tensor.source_input) != 1:
                raise InvalidArgument(
                    f"batch {side} kind '{enum_name(tensor, 'kind')}' expects 1 source input, got "
                    f"{len(tensor.source_input)} for {message.name}"
                )
            if side == "input" and enum_name(tensor, "data_type") not in _BATCH_INPUT_TYPES:
                raise InvalidArgument(f"batch input data type must be TYPE_INT32 or TYPE_FP32 for {message.name}")
            for source in tensor.source_input:
                if source not in inputs:
                    raise InvalidArgument(f"unknown source input name '{source}' for {message.name}")
    for tensor in message.batch_output:
        for target in tensor.target_name:
            if target not in outputs:
                raise InvalidArgument(f"unknown target output name '{target}' for {message.name}")
        if twice := _first_duplicate(tensor.target_name):
            raise InvalidArgument(f"target output name '{twice}' can only be specified once for {message.name}")


def _first_duplicate(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
