"""config.pbtxt as attributes: golden files, what replace() does, and round trips through text, JSON and the wire."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as witness

from triton_trio._pb import inference as pb
from triton_trio.config import (
    DynamicBatching,
    EnsembleScheduling,
    EnsembleStep,
    InitialState,
    InstanceGroup,
    ModelConfig,
    ModelWarmup,
    OldestStrategy,
    QueuePolicy,
    RateLimiter,
    RateLimiterResource,
    SequenceBatching,
    SequenceControl,
    SequenceState,
    TensorSpec,
    VersionPolicy,
    WarmupInput,
    config_to_pb,
    format_model_config,
    parse_model_config,
    parse_model_config_json,
)
from triton_trio.errors import InvalidArgument

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.pbtxt"))


def golden(name: str) -> ModelConfig:
    return parse_model_config((Path(__file__).parent / "golden" / f"{name}.pbtxt").read_text())


def test_simple_golden_file() -> None:
    config = golden("simple")
    assert config == ModelConfig(
        name="simple",
        backend="jax",
        platform="",
        default_model_filename="",
        version_policy=VersionPolicy(latest=None, specific=(3, 1)),
        max_batch_size=8,
        inputs=(
            TensorSpec("IMAGE", "FP32", (3, -1, -1), format="FORMAT_NCHW"),
            TensorSpec("PROMPT", "BYTES", (1,), reshape=(), optional=True),
        ),
        outputs=(TensorSpec("CLASS", "BF16", (1000,), label_filename="labels.txt"),),
        decoupled=True,
        dynamic_batching=DynamicBatching(
            preferred_batch_size=(4, 8),
            max_queue_delay_microseconds=500,
            priority_levels=2,
            default_priority_level=2,
            default_queue_policy=QueuePolicy("REJECT", 1_000_000, False, 64),
            priority_queue_policy={1: QueuePolicy("DELAY", 2000, True, 0)},
        ),
        sequence_batching=None,
        ensemble_scheduling=None,
        instance_groups=(
            InstanceGroup(
                name="simple_0",
                kind="KIND_GPU",
                count=2,
                gpus=(0, 1),
                rate_limiter=RateLimiter((RateLimiterResource("R1", 4), RateLimiterResource("R2", 2, True)), 2),
            ),
            InstanceGroup(name="spare", kind="KIND_CPU", count=1, passive=True),
        ),
        parameters={"chunk_ms": "2"},
        response_cache=False,
        model_warmup=(ModelWarmup("zeros", 4, {"IMAGE": WarmupInput("FP32", (3, 8, 8))}),),
        message=config.message,
    )


def test_sequence_golden_file() -> None:
    config = golden("sequence")
    assert config.dynamic_batching is None
    assert config.sequence_batching == SequenceBatching(
        strategy=OldestStrategy(max_candidate_sequences=8, preferred_batch_size=(4,), max_queue_delay_microseconds=100),
        max_sequence_idle_microseconds=1_000_000,
        controls=(
            SequenceControl("START", "CONTROL_SEQUENCE_START", "FP32", 0.0, 1.0),
            SequenceControl("READY", "CONTROL_SEQUENCE_READY", "BOOL", False, True),
            SequenceControl("CORRID", "CONTROL_SEQUENCE_CORRID", "BYTES"),
        ),
        states=(SequenceState("STATE_IN", "STATE_OUT", "INT32", (1,), InitialState("first", "INT32", (1,))),),
        iterative_sequence=True,
    )


def test_the_backend_sees_the_tensors_that_a_sequence_batcher_adds_and_clients_do_not() -> None:
    config = golden("sequence")
    view = config.backend_view()
    assert view.inputs == (
        *config.inputs,
        TensorSpec("START", "FP32", (1,)),
        TensorSpec("READY", "BOOL", (1,)),
        TensorSpec("CORRID", "BYTES", (1,)),
        TensorSpec("STATE_IN", "INT32", (1,)),
    )
    assert view.outputs == (*config.outputs, TensorSpec("STATE_OUT", "INT32", (1,)))
    assert config_to_pb(view) == config_to_pb(config)
    assert golden("simple").backend_view() == golden("simple")


def test_a_state_that_clients_may_see_is_one_output_of_the_backend() -> None:
    config = parse_model_config(
        """name: "m" backend: "b" output { name: "O" data_type: TYPE_INT32 dims: 2 label_filename: "labels" }
        sequence_batching { state { input_name: "I" output_name: "O" data_type: TYPE_INT32 dims: -1 } }"""
    )
    assert config.backend_view().outputs == config.outputs


def test_ensemble_golden_file() -> None:
    config = golden("ensemble")
    assert (config.backend, config.platform, config.instance_groups) == ("", "ensemble", ())
    assert config.ensemble_scheduling == EnsembleScheduling(
        steps=(
            EnsembleStep("decode", -1, {"BYTES": "RAW"}, {"PIXELS": "pixels"}),
            EnsembleStep("classify", 2, {"IMAGE": "pixels"}, {"PROB": "SCORE"}),
        ),
        max_inflight_requests=16,
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_everything_survives_to_the_wire(path: Path) -> None:
    """Triton's own client reads from our ModelConfig message all that it reads from the file, and our defaults."""
    config = parse_model_config(path.read_text())
    ours = witness.ModelConfig.FromString(bytes(config_to_pb(config)))
    theirs = text_format.Parse(path.read_text(), witness.ModelConfig())
    assert ours == text_format.Parse(format_model_config(config), witness.ModelConfig())
    for field, value in theirs.ListFields():
        # A default never replaces what the file says, so merging the file into the result changes no scalar.
        if field.message_type is None:
            assert getattr(ours, field.name) == value
    assert theirs.metric_tags == ours.metric_tags
    assert theirs.optimization.cuda == ours.optimization.cuda
    assert list(theirs.input) == list(ours.input)


# Round trips

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_./:-]{0,8}", fullmatch=True)
DIMS = st.lists(st.one_of(st.just(-1), st.integers(1, 2**40)), min_size=1, max_size=4)
DATATYPES = st.sampled_from(witness.DataType.keys()[1:])
UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)


def tensors() -> st.SearchStrategy[Any]:
    one = st.fixed_dictionaries({"name": NAMES, "data_type": DATATYPES, "dims": DIMS})
    return st.lists(one, max_size=4, unique_by=lambda tensor: tensor["name"])


QUEUE_POLICY = st.fixed_dictionaries(
    {},
    optional={
        "timeout_action": st.sampled_from(["REJECT", "DELAY"]),
        "default_timeout_microseconds": UINT64,
        "allow_timeout_override": st.booleans(),
        "max_queue_size": UINT32,
    },
)
CONFIGS = st.fixed_dictionaries(
    {"name": NAMES, "backend": NAMES, "max_batch_size": st.integers(8, 64), "input": tensors(), "output": tensors()},
    optional={
        "dynamic_batching": st.fixed_dictionaries(
            {"priority_levels": st.just(3), "default_priority_level": st.integers(1, 3)},
            optional={
                "preferred_batch_size": st.lists(st.integers(1, 8), max_size=3),
                "max_queue_delay_microseconds": UINT64,
                "default_queue_policy": QUEUE_POLICY,
                "priority_queue_policy": st.dictionaries(st.integers(1, 3), QUEUE_POLICY),
            },
        ),
        "instance_group": st.lists(
            st.fixed_dictionaries(
                {"name": NAMES, "kind": st.sampled_from(["KIND_AUTO", "KIND_GPU"]), "count": st.integers(0, 9)},
                optional={
                    "gpus": st.lists(st.integers(0, 7), unique=True),
                    "rate_limiter": st.fixed_dictionaries(
                        {
                            "priority": UINT32,
                            "resources": st.lists(
                                st.fixed_dictionaries({"name": NAMES, "count": UINT32, "global": st.booleans()})
                            ),
                        }
                    ),
                },
            ),
            unique_by=lambda group: group["name"],
        ),
        "parameters": st.dictionaries(NAMES, st.fixed_dictionaries({"string_value": st.text(max_size=9)})),
        "model_transaction_policy": st.fixed_dictionaries({"decoupled": st.booleans()}),
        "version_policy": st.sampled_from(
            [{"all": {}}, {"latest": {"num_versions": 2}}, {"specific": {"versions": [1, 4]}}]
        ),
        "metric_tags": st.dictionaries(NAMES, st.text(max_size=5)),
    },
)


def as_text(fields: dict[str, Any]) -> str:
    return text_format.MessageToString(json_format.ParseDict(fields, witness.ModelConfig()), as_utf8=True)


@given(CONFIGS)
def test_parse_of_format_is_the_same(fields: dict[str, Any]) -> None:
    config = parse_model_config(as_text(fields))
    assert parse_model_config(format_model_config(config)) == config


@given(CONFIGS)
def test_text_and_json_are_the_same(fields: dict[str, Any]) -> None:
    message = json_format.ParseDict(fields, witness.ModelConfig())
    config = parse_model_config(as_text(fields))
    for keep_names in (True, False):
        text = json_format.MessageToJson(message, preserving_proto_field_name=keep_names)
        assert parse_model_config_json(text) == config


@given(CONFIGS)
def test_replacing_everything_by_itself_changes_nothing(fields: dict[str, Any]) -> None:
    config = parse_model_config(as_text(fields))
    assert config == config.replace()
    again = config.replace(
        max_batch_size=config.max_batch_size,
        inputs=config.inputs,
        outputs=config.outputs,
        decoupled=config.decoupled,
        dynamic_batching=config.dynamic_batching,
        instance_groups=config.instance_groups,
        parameters=config.parameters,
    )
    # In the messages, "not set" may have become "set to the default".
    assert dataclasses.replace(again, message=None) == dataclasses.replace(config, message=None)


# What a configuration can do


def test_replace_fills_in_what_a_backend_found() -> None:
    config = parse_model_config('name: "m" backend: "jax" dynamic_batching { }')
    assert config.dynamic_batching == DynamicBatching()
    done = config.replace(
        max_batch_size=16,
        inputs=[TensorSpec("X", "BYTES", (4, -1), reshape=(2, 2, -1), optional=True, allow_ragged_batch=True)],
        outputs=[TensorSpec("Y", "FP16", (1,), label_filename="y.txt")],
        decoupled=True,
        parameters={"a": "1"},
        instance_groups=[InstanceGroup(name="g", rate_limiter=RateLimiter((RateLimiterResource("R", 1, True),), 3))],
    )
    assert config.inputs == ()  # the original is as it was
    assert done.dynamic_batching == DynamicBatching(preferred_batch_size=(16,))
    assert done.input("X") == TensorSpec("X", "BYTES", (4, -1), (2, 2, -1), optional=True, allow_ragged_batch=True)
    assert done.output("Y").label_filename == "y.txt"
    assert (done.decoupled, done.parameters) == (True, {"a": "1"})
    assert done.instance_groups[0].rate_limiter.priority == 3
    message = config_to_pb(done)
    assert message.input[0].data_type is pb.DataType.TYPE_STRING
    assert message.input[0].reshape == pb.ModelTensorReshape(shape=[2, 2, -1])
    assert message.model_transaction_policy == pb.ModelTransactionPolicy(decoupled=True)


def test_replace_is_checked_and_incomplete_tensors_wait_for_the_backend() -> None:
    config = parse_model_config('name: "m" backend: "jax"')
    with pytest.raises(InvalidArgument, match="'max_batch_size' must be non-negative value for m"):
        config.replace(max_batch_size=-1)
    partial = config.replace(inputs=[TensorSpec("X", "", ())])
    with pytest.raises(InvalidArgument, match="model input 'X' must specify 'data_type' for m"):
        partial.check_complete()
    assert partial.replace(inputs=[TensorSpec("X", "FP32", (1,))]).check_complete().input("X").datatype == "FP32"


def test_an_input_is_not_an_output() -> None:
    config = parse_model_config('name: "m" backend: "jax"')
    with pytest.raises(ValueError, match="label_filename"):
        config.replace(inputs=[TensorSpec("X", "FP32", (1,), label_filename="x.txt")])
    with pytest.raises(ValueError, match="optional"):
        config.replace(outputs=[TensorSpec("X", "FP32", (1,), optional=True)])


def test_unknown_tensors_are_named_in_tritons_words() -> None:
    config = golden("simple")
    with pytest.raises(InvalidArgument, match="unexpected inference input 'Z' for model 'simple'"):
        config.input("Z")
    with pytest.raises(InvalidArgument, match="unexpected inference output 'Z' for model 'simple'"):
        config.output("Z")


def test_full_dims_have_the_batch_dimension_of_a_batching_model() -> None:
    spec = TensorSpec("X", "FP32", (3, -1))
    assert golden("simple").full_dims(spec) == (-1, 3, -1)
    assert parse_model_config('name: "m" backend: "jax"').full_dims(spec) == (3, -1)


@pytest.mark.parametrize(
    ("dims", "reshape", "request_shape", "model_shape"),
    [
        ((4,), None, (4,), (4,)),
        ((1,), (), (1,), ()),
        ((4, -1), (2, 2, -1), (4, 7), (2, 2, 7)),
        ((2, 4, -1, 6), (8, -1, 1, 6), (2, 4, 5, 6), (8, 5, 1, 6)),
        ((-1, 3, -1), (-1, 3, -1, 1), (5, 3, 6), (5, 3, 6, 1)),
    ],
)
def test_reshape_goes_both_ways(dims: Any, reshape: Any, request_shape: Any, model_shape: Any) -> None:
    spec = TensorSpec("X", "FP32", dims, reshape)
    assert spec.to_model_shape(request_shape) == model_shape
    assert spec.to_request_shape(model_shape) == request_shape


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [7]),
        ("version_policy { latest { } }", [7]),
        ("version_policy { latest { num_versions: 2 } }", [3, 7]),
        ("version_policy { latest { num_versions: 9 } }", [1, 3, 7]),
        ("version_policy { all { } }", [1, 3, 7]),
        ("version_policy { specific { versions: [ 7, 2, 1 ] } }", [1, 7]),
        ("version_policy { specific { } }", []),
    ],
)
def test_version_policy_selects(policy: str, expected: list[int]) -> None:
    config = parse_model_config(f'name: "m" backend: "jax" {policy}')
    assert config.version_policy.select([7, 1, 3]) == expected
    assert config.version_policy.select([]) == []
