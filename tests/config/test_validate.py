"""A table of configurations that cannot be, with the exact words; Triton's own where it has some."""

from __future__ import annotations

import pytest

from triton_trio.config import parse_model_config
from triton_trio.errors import InvalidArgument

SEQUENCE = "sequence_batching { control_input { %s } }"
START = 'name: "S" control { kind: CONTROL_SEQUENCE_START %s }'
STATE = 'sequence_batching { state { input_name: "I" output_name: "O" data_type: TYPE_INT32 %s } }'
CLASH = (
    "sequence batching tensor '%s' is given to the model as more than one of input, control input and state for m; "
    "clients do not send controls and states, so do not list them as inputs"
)
STEP = 'model_name: "%s" model_version: -1 input_map { key: "i" value: "%s" } output_map { key: "o" value: "%s" }'
FALSE_TRUE = "'int32_false_true', 'fp32_false_true'"


def tensor(fields: str) -> str:
    return f"input {{ {fields} }}"


BAD = [
    ("max_batch_size: -1", "'max_batch_size' must be non-negative value for m"),
    (
        "version_policy { specific { versions: [ 1, 0 ] } }",
        "version_policy 'specific' must list versions >= 1 for m",
    ),
    # Dynamic batching
    (
        "max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 4, 0 ] }",
        "dynamic batching preferred size must be positive for m",
    ),
    (
        "max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 4, 9 ] }",
        "dynamic batching preferred size must be <= max batch size for m",
    ),
    (
        "dynamic_batching { preferred_batch_size: 1 }",
        "dynamic batching preferred size must be <= max batch size for m",
    ),
    (
        "dynamic_batching { priority_levels: 3 }",
        "default priority level must be in range [1, 3] for m",
    ),
    (
        "dynamic_batching { priority_levels: 3 default_priority_level: 4 }",
        "default priority level must be in range [1, 3] for m",
    ),
    (
        "dynamic_batching { priority_levels: 100000 default_priority_level: 1 }",
        "dynamic batching priority_levels must be <= 65536 for m",
    ),
    (
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { } } }",
        "priority queue policy must have priority level in range [1, 2] for m",
    ),
    (
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 0 value { } } }",
        "priority queue policy must have priority level in range [1, 2] for m",
    ),
    (
        "dynamic_batching { priority_queue_policy { key: 1 value { } } }",
        "priority_queue_policy has no effect without priority_levels for m; set priority_levels, or use "
        "default_queue_policy",
    ),
    (
        "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
        "Only one priority level is allowed when 'preserve_ordering' is true for m",
    ),
    (
        "dynamic_batching { preserve_ordering: true "
        "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }",
        "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
    ),
    (
        "dynamic_batching { preserve_ordering: true priority_levels: 1 default_priority_level: 1 "
        "priority_queue_policy { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 1 } } }",
        "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
    ),
    # Sequence batching
    (
        "sequence_batching { } response_cache { enable: true }",
        "Response Cache does not currently support model m with sequence batching scheduler. Please disable the "
        "response cache.",
    ),
    (SEQUENCE % "", "sequence batching control tensor must have a name for m"),
    (
        'sequence_batching { control_input { name: "S" } control_input { name: "S" } }',
        "sequence batching control tensor 'S' is specified for multiple control kinds for m",
    ),
    (
        SEQUENCE % 'name: "S" control { int32_false_true: [ 0, 1 ] } control { int32_false_true: [ 0, 1 ] }',
        "sequence batching specifies multiple CONTROL_SEQUENCE_START tensors for m",
    ),
    (
        SEQUENCE % (START % ""),
        f"sequence batching must specify either {FALSE_TRUE} or 'bool_false_true' for CONTROL_SEQUENCE_START for m",
    ),
    (
        SEQUENCE % (START % "int32_false_true: [ 0, 1 ] bool_false_true: [ false, true ]"),
        f"sequence batching specifies more than one from {FALSE_TRUE} and 'bool_false_true' for "
        "CONTROL_SEQUENCE_START for m",
    ),
    (
        SEQUENCE % (START % "int32_false_true: [ 0, 1, 2 ]"),
        "sequence batching control 'int32_false_true' must have exactly 2 entries for CONTROL_SEQUENCE_START for m",
    ),
    (
        SEQUENCE % 'name: "S" control { kind: CONTROL_SEQUENCE_CORRID int32_false_true: [ 0, 1 ] }',
        f"sequence batching must not specify either {FALSE_TRUE} or 'bool_false_true' for CONTROL_SEQUENCE_CORRID "
        "for m",
    ),
    (
        SEQUENCE % 'name: "S" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 }',
        "unexpected data type for control CONTROL_SEQUENCE_CORRID for m. Allowed data types are TYPE_UINT64, "
        "TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING",
    ),
    (
        "max_batch_size: 4 sequence_batching { oldest { preferred_batch_size: 0 } }",
        "sequence batching preferred batch size must be positive for m",
    ),
    (
        "max_batch_size: 4 sequence_batching { oldest { preferred_batch_size: 5 } }",
        "sequence batching preferred batch size must be <= max batch size for m",
    ),
    (
        "sequence_batching { oldest { max_candidate_sequences: -1 } }",
        "sequence batching max_candidate_sequences must be >= 0 for m",
    ),
    (
        "sequence_batching { direct { minimum_slot_utilization: 1.5 } }",
        "sequence batching minimum slot utilization must be in range (0.0, 1.0] for m",
    ),
    ("sequence_batching { state { } }", "sequence batching state must specify 'input_name' for m"),
    (
        'sequence_batching { state { input_name: "I" } }',
        "sequence batching state must specify 'output_name' for m",
    ),
    (
        'sequence_batching { state { input_name: "I" output_name: "A" } state { input_name: "I" output_name: "B" } }',
        "sequence batching state input_name 'I' is used more than once for m",
    ),
    (
        SEQUENCE % 'name: "S" control { int32_false_true: [ 0, 1 ] } '
        "control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] }",
        "sequence batching control tensor 'S' is specified for multiple control kinds for m",
    ),
    (
        SEQUENCE % (START % "int32_false_true: [ 0, 1 ]") + tensor('name: "S" data_type: TYPE_INT32 dims: 1'),
        CLASH % "S",
    ),
    (
        'sequence_batching { control_input { name: "I" } state { input_name: "I" output_name: "O" data_type: TYPE_INT32 } }',
        CLASH % "I",
    ),
    (STATE % "" + tensor('name: "I" data_type: TYPE_INT32 dims: 1'), CLASH % "I"),
    (
        'sequence_batching { state { input_name: "I" output_name: "O" } }',
        "sequence batching state 'I' must specify 'data_type' for m",
    ),
    (
        STATE % "dims: 0",
        "sequence batching state 'I' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m",
    ),
    (
        STATE % "use_growable_memory: true",
        "In order to 'use_growable_memory', you must also enable 'use_same_buffer_for_input_output' for state input name "
        "'I' for m",
    ),
    (
        STATE % "dims: 2" + 'output { name: "O" data_type: TYPE_FP32 dims: 2 }',
        "sequence batching state 'I' is TYPE_INT32, but its output 'O' is TYPE_FP32 for m",
    ),
    (
        STATE % "initial_state { } initial_state { }",
        "initial_state field for state input 'I' must contain exactly one or zero element. Found '2' elements.",
    ),
    (
        STATE % 'initial_state { name: "z" data_type: TYPE_FP32 zero_data: true }',
        "The data type used for 'initial_state' field of state 'I' does not match the state data type.",
    ),
    (
        STATE % "initial_state { data_type: TYPE_INT32 zero_data: true }",
        "Field 'name' must be set when using initial_state for state input 'I'.",
    ),
    (
        STATE % 'dims: 2 initial_state { name: "z" data_type: TYPE_INT32 dims: [ 2, 1 ] zero_data: true }',
        "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input 'I'. 2 != 1",
    ),
    (
        STATE % 'dims: -1 initial_state { name: "z" data_type: TYPE_INT32 dims: -1 zero_data: true }',
        "'initial_state' field for state input name 'I' contains variable dimensions.",
    ),
    (
        STATE % 'dims: 2 initial_state { name: "z" data_type: TYPE_INT32 dims: 3 zero_data: true }',
        "'initial_state' dim for input name 'I' doesn't match 'state' dim description. 3 != 2",
    ),
    (
        STATE % 'initial_state { name: "z" data_type: TYPE_INT32 }',
        "initial_state setting expects state 'I' to have state_data set",
    ),
    # Response cache and metrics
    (
        "model_transaction_policy { decoupled: true } response_cache { enable: true }",
        "Response Cache does not currently support model m with 'decoupled' transaction policy. Please disable the "
        "response cache.",
    ),
    ("model_metrics { metric_control { } }", "metric control must specify 'metric_identifier'"),
    (
        "model_metrics { metric_control { metric_identifier { } } }",
        "metric identifier must specify non-empty 'family'",
    ),
    (
        'model_metrics { metric_control { metric_identifier { family: "f" } } }',
        "metric control must specify 'histogram_options'",
    ),
    (
        'model_metrics { metric_control { metric_identifier { family: "f" } histogram_options { } } }',
        "histogram options must specify non-empty 'buckets'",
    ),
    # Instances
    (
        'instance_group { name: "g" count: -1 }',
        "instance group g of model m has count -1; it must be at least 1, or 0 for the default",
    ),
    (
        "instance_group { kind: KIND_CPU gpus: 0 }",
        "instance group m_0 of model m has kind KIND_CPU but specifies one or more GPUs",
    ),
    (
        "instance_group { kind: KIND_MODEL gpus: 0 }",
        "instance group m_0 of model m has kind KIND_MODEL but specifies one or more GPUs",
    ),
    (
        "instance_group { kind: KIND_GPU gpus: [ 0, -1 ] }",
        "instance group m_0 of model m specifies a negative gpu id: [0, -1]",
    ),
    (
        "instance_group { gpus: [ 1, 1 ] }",
        "instance group m_0 of model m specifies gpu id 1 more than once; raise its count instead",
    ),
    (
        'instance_group { profile: "1" }',
        "instance group m_0 of model m and platform  specifies profile field which is only supported for TensorRT "
        "models",
    ),
    (
        'instance_group { name: "g" } instance_group { name: "g" }',
        "instance group name g is used more than once for m",
    ),
    # Tensors
    (tensor("data_type: TYPE_FP32 dims: 1"), "model input must specify 'name' for m"),
    (tensor('name: "X" dims: 1'), "model input 'X' must specify 'data_type' for m"),
    (tensor('name: "X" data_type: TYPE_FP32'), "model input 'X' must specify 'dims' for m"),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 1, 0 ]'),
        "model input 'X' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m",
    ),
    (
        'output { name: "Y" data_type: TYPE_FP32 dims: [ -2 ] }',
        "model output 'Y' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: 1') * 2,
        "model input 'X' is specified more than once for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: 1 reshape { }'),
        "model input 'X' cannot have empty reshape for non-batching model as scalar tensors are not supported for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: 4 reshape { shape: [ 2, 0 ] }'),
        "model input 'X' reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: 4 reshape { shape: [ 2, 3 ] }'),
        "model input 'X' has different size for dims and reshape for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 4, -1 ] reshape { shape: [ 4 ] }'),
        "model input 'X' has different size for dims and reshape for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 4, -1 ] reshape { shape: [ -1, 4 ] }'),
        "model input 'X' has different size for dims and reshape for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 4, -1 ] reshape { shape: [ 4, -1, -1 ] }'),
        "model input 'X' has different number of variable-size dimensions for dims and reshape for m",
    ),
    (
        "max_batch_size: 2 " + tensor('name: "X" data_type: TYPE_FP32 dims: 2 reshape { }'),
        "model input 'X' has different size for dims and reshape for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 4 ] format: FORMAT_NHWC'),
        "model input NHWC/NCHW require 3 dims for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 4 ] is_shape_tensor: true'),
        "shape tensors are only supported for TensorRT platform for m",
    ),
    (
        'output { name: "Y" data_type: TYPE_FP32 dims: 1 is_non_linear_format_io: true }',
        "Non-linear IO format is only supported for the TensorRT platform for m",
    ),
    (
        "batch_input { kind: BATCH_ELEMENT_COUNT data_type: TYPE_FP32 }",
        "batch input kind 'BATCH_ELEMENT_COUNT' expects 1 source input, got 0 for m",
    ),
    (
        'batch_input { source_input: "X" data_type: TYPE_INT8 }',
        "batch input data type must be TYPE_INT32 or TYPE_FP32 for m",
    ),
    (
        'batch_input { source_input: "X" data_type: TYPE_INT32 }',
        "unknown source input name 'X' for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: 1') + 'batch_output { source_input: "X" target_name: "Y" }',
        "unknown target output name 'Y' for m",
    ),
    (
        tensor('name: "X" data_type: TYPE_FP32 dims: 1')
        + 'output { name: "Y" data_type: TYPE_FP32 dims: 1 }'
        + 'batch_output { source_input: "X" target_name: [ "Y", "Y" ] }',
        "target output name 'Y' can only be specified once for m",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:60] for text, _ in BAD])
def test_bad_configurations(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_model_config(f'name: "m" backend: "jax" {text}')
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('backend: "jax"', "model configuration must specify 'name'"),
        ('name: "m"', "unexpected platform type '' for m"),
        ('name: "m" platform: "xyz"', "unexpected platform type 'xyz' for m"),
        (
            'name: "m" platform: "ensemble" backend: "jax"',
            "Ensemble model 'm' must have platform type 'ensemble' and empty backend type",
        ),
        (
            'name: "m" platform: "ensemble"',
            "ensemble scheduling must be set for ensemble m whose platform is ensemble",
        ),
        (
            'name: "m" backend: "jax" ensemble_scheduling { }',
            "ensemble scheduling cannot be set for model 'm' whose platform is not ensemble",
        ),
    ],
)
def test_who_runs_it(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_model_config(text)
    assert caught.value.message == message


def ensemble(*steps: str, inputs: str = "A", outputs: str = "Z", extra: str = "") -> str:
    text = 'name: "e" platform: "ensemble" ' + extra
    for side, names in (("input", inputs), ("output", outputs)):
        for name in names.split():
            text += f'{side} {{ name: "{name}" data_type: TYPE_FP32 dims: 1 }}\n'
    return text + "ensemble_scheduling {" + "".join(f"step {{ {step} }}\n" for step in steps) + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ensemble(), "must specify 'step' for ensemble 'e'"),
        (
            ensemble(STEP % ("a", "A", "Z"), extra="instance_group { } "),
            "instance group should not be specified for ensemble 'e'",
        ),
        (
            ensemble(STEP % ("a", "A", "Z"), extra="optimization { } "),
            "optimization should not be specified for ensemble 'e'",
        ),
        (
            ensemble(STEP % ("a", "A", "Z"), extra="model_warmup { } "),
            "model_warmup can not be specified for ensemble 'e'",
        ),
        (ensemble(STEP % ("", "A", "Z")), "must specify 'model_name' in step 0 of ensemble 'e'"),
        (ensemble(STEP % ("a", "A", "Z"), 'model_name: "b"'), "must specify 'input_map' in step 1 of ensemble 'e'"),
        (
            ensemble('model_name: "b" input_map { key: "i" value: "A" }'),
            "must specify 'output_map' in step 0 of ensemble 'e'",
        ),
        (
            ensemble(STEP % ("a", "A", "Z"), STEP % ("b", "A", "Z")),
            "ensemble tensor 'Z' can appear in an output map only once for ensemble 'e' step 1",
        ),
        (
            ensemble(STEP % ("a", "A", "Z"), inputs="A B"),
            "ensemble input 'B' for ensemble e is not used",
        ),
        (
            ensemble(STEP % ("a", "A", "Z"), outputs="Z Y"),
            "ensemble output 'Y' for ensemble e is not used",
        ),
        (
            ensemble(STEP % ("a", "A", "B"), STEP % ("b", "B", "Z"), STEP % ("c", "A", "unused")),
            "ensemble tensor 'unused' is unused in ensemble 'e'",
        ),
        (
            ensemble(STEP % ("a", "A", "B"), STEP % ("b", "missing", "Z"), outputs="Z B"),
            "output 'Z' for ensemble 'e' is not written: at least one of its depending tensors, 'missing', is not "
            "connected",
        ),
        (
            ensemble(STEP % ("a", "A", "B"), STEP % ("b", "D", "C"), STEP % ("c", "C", "D"), outputs="B C"),
            "output 'C' for ensemble 'e' is not written: at least one of its depending tensors, 'D', is not connected",
        ),
    ],
)
def test_bad_ensembles(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_model_config(text)
    assert caught.value.message == message


def test_a_diamond_of_steps_is_fine() -> None:
    join = (
        'model_name: "d" input_map { key: "l" value: "L" } input_map { key: "r" value: "R" } '
        'output_map { key: "o" value: "Z" }'
    )
    text = ensemble(join, STEP % ("b", "B", "L"), STEP % ("c", "B", "R"), STEP % ("a", "A", "B"))
    scheduling = parse_model_config(text).ensemble_scheduling
    assert scheduling is not None
    assert len(scheduling.steps) == 4


@pytest.mark.parametrize(
    "text",
    [
        "max_batch_size: 0 dynamic_batching { }",
        "max_batch_size: 4 dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY } }",
        "max_batch_size: 1 " + tensor('name: "X" data_type: TYPE_FP32 dims: 1 reshape { }'),
        tensor('name: "X" data_type: TYPE_FP32 dims: [ 2, 4, -1, 6 ] reshape { shape: [ 8, -1, 1, 6 ] }'),
        "sequence_batching { } model_transaction_policy { decoupled: true }",
        'platform: "tensorrt_plan" ' + tensor('name: "X" data_type: TYPE_FP32 dims: 1 is_shape_tensor: true'),
        "instance_group { kind: KIND_GPU }",
    ],
)
def test_what_triton_permits(text: str) -> None:
    assert parse_model_config(f'name: "m" backend: "jax" {text}').name == "m"
