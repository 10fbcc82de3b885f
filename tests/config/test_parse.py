"""Reading a model's directory: what is filled in from its files, and what a person reads when it cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triton_trio.config import (
    InstanceGroup,
    ModelConfig,
    VersionPolicy,
    load_model_config,
    parse_model_config,
    parse_model_config_json,
)
from triton_trio.errors import InvalidArgument


def make_model(root: Path, name: str, config: str | None = None, *files: str) -> Path:
    directory = root / name
    (directory / "1").mkdir(parents=True)
    if config is not None:
        (directory / "config.pbtxt").write_text(config)
    for file in files:
        (directory / "1" / file).write_text("")
    return directory


def message_of(directory: Path, *, strict: bool = False, override_json: str | None = None) -> str:
    with pytest.raises(InvalidArgument) as caught:
        load_model_config(directory, strict=strict, override_json=override_json)
    return caught.value.message


# Defaults


def test_defaults_are_tritons(tmp_path: Path) -> None:
    config = load_model_config(make_model(tmp_path, "m", 'backend: "jax"'))
    assert config.name == "m"
    assert config.version_policy == VersionPolicy(latest=1)
    assert config.instance_groups == (InstanceGroup(name="m", kind="KIND_AUTO", count=1),)
    assert config.message.optimization.input_pinned_memory.enable
    assert config.message.optimization.output_pinned_memory.enable
    assert (config.max_batch_size, config.decoupled, config.dynamic_batching) == (0, False, None)


def test_groups_are_named_after_model_and_number(tmp_path: Path) -> None:
    text = 'backend: "jax" instance_group [ { count: 2 }, { name: "x" }, { kind: KIND_CPU } ]'
    groups = load_model_config(make_model(tmp_path, "m", text)).instance_groups
    assert [(group.name, group.count) for group in groups] == [("m_0", 2), ("x", 1), ("m_2", 1)]


def test_full_batches_are_preferred(tmp_path: Path) -> None:
    text = 'backend: "jax" max_batch_size: 8 dynamic_batching { }'
    batching = load_model_config(make_model(tmp_path, "m", text)).dynamic_batching
    assert batching is not None
    assert batching.preferred_batch_size == (8,)


@pytest.mark.parametrize(
    ("file", "backend", "platform"),
    [
        ("model.py", "python", ""),
        ("model.onnx", "onnxruntime", "onnxruntime_onnx"),
        ("model.plan", "tensorrt", "tensorrt_plan"),
        ("model.xml", "openvino", ""),
        ("model.pt", "pytorch", "pytorch_libtorch"),
        ("model.pt2", "pytorch", "torch_aoti"),
        ("model.graphdef", "tensorflow", "tensorflow_graphdef"),
    ],
)
def test_the_backend_is_told_by_the_file(tmp_path: Path, file: str, backend: str, platform: str) -> None:
    config = load_model_config(make_model(tmp_path, "m", None, file))
    assert (config.backend, config.platform, config.default_model_filename) == (backend, platform, file)
    assert config.inputs == ()


def test_a_backend_that_is_named_is_kept(tmp_path: Path) -> None:
    config = load_model_config(make_model(tmp_path, "m", 'backend: "jax"', "model.py"))
    assert (config.backend, config.default_model_filename) == ("jax", "")


def test_the_platform_or_the_file_name_tell_the_backend(tmp_path: Path) -> None:
    config = load_model_config(make_model(tmp_path, "a", 'platform: "onnxruntime_onnx"'))
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    config = load_model_config(make_model(tmp_path, "b", 'default_model_filename: "model.py"'))
    assert config.backend == "python"


def test_the_directory_name_tells_the_backend_last(tmp_path: Path) -> None:
    config = load_model_config(make_model(tmp_path, "m.identity"))
    assert (config.name, config.backend, config.default_model_filename) == ("m.identity", "identity", "model.identity")
    assert message_of(make_model(tmp_path, "plain", None, "weights.bin")) == (
        "Invalid model name: Could not determine backend for model 'plain' with no backend in model configuration. "
        "Expected model name of the form 'model.<backend_name>'."
    )


def test_the_first_version_is_looked_at(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "m")
    for version, file in ((10, "model.onnx"), (2, "model.py")):
        (directory / str(version)).mkdir()
        (directory / str(version) / file).write_text("")
    (directory / "1").rmdir()
    (directory / "notes").mkdir()
    assert load_model_config(directory).backend == "python"


def test_strict_needs_the_file_and_complete_tensors(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "m", None, "model.py")
    path = directory / "config.pbtxt"
    assert message_of(directory, strict=True) == (
        f"failed to read text proto from {path}: there is no such file, and auto-complete is off"
    )
    path.write_text('input { name: "X" }')
    assert load_model_config(directory).input("X").datatype == ""
    assert message_of(directory, strict=True) == "model input 'X' must specify 'data_type' for m"
    path.write_text('input { name: "X" data_type: TYPE_INT8 }')
    assert message_of(directory, strict=True) == "model input 'X' must specify 'dims' for m"


def test_the_name_is_the_directorys(tmp_path: Path) -> None:
    assert message_of(make_model(tmp_path, "there", 'name: "here" backend: "jax"')) == (
        "unexpected directory name 'there' for model 'here', directory name must equal model name"
    )


# Override


def test_an_override_is_taken_instead_of_the_file(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "m", 'backend: "jax" max_batch_size: 4 parameters { key: "a" value { } }')
    config = load_model_config(directory, override_json='{"backend": "identity", "max_batch_size": 2}')
    assert (config.backend, config.max_batch_size, config.parameters) == ("identity", 2, {})
    (directory / "config.pbtxt").write_text("garbage")
    assert load_model_config(directory, override_json='{"backend": "identity"}').backend == "identity"


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("{", ["not JSON: ", "line 1 column 2 (char 1)"]),
        ("[]", ["a model configuration in JSON must be an object: {...}"]),
        ('"x"', ["a model configuration in JSON must be an object: {...}"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"max_batchsize": 3}', ['no field named "max_batchsize"', ". Did you mean max_batch_size?"]),
        (
            '{"input": [{"data_type": "FP32"}]}',
            ["Invalid enum value FP32", "ModelConfig.input[0].data_type", "data_type. Did you mean TYPE_FP32?"],
        ),
        ('{"dynamic_batching": {}, "sequence_batching": {}}', ["scheduling_choice"]),
        (
            '{"instance_group": [{}, {"kind": 9}]}',
            ["instance_group[1].kind is 9; it must be one of KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL"],
        ),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, fragments: list[str]) -> None:
    message = message_of(make_model(tmp_path, "m", 'backend: "jax"'), override_json=override)
    assert message.startswith("Invalid config override: ")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_an_override_is_validated_like_a_file(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "m", 'backend: "jax"')
    assert message_of(directory, override_json=json.dumps({"backend": "jax", "max_batch_size": -1})) == (
        "'max_batch_size' must be non-negative value for m"
    )


def test_json_by_itself() -> None:
    config = parse_model_config_json('{"name": "m", "backend": "jax", "maxBatchSize": 4}')
    assert isinstance(config, ModelConfig)
    assert config == parse_model_config('name: "m" backend: "jax" max_batch_size: 4')


# Files that cannot be read


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        (
            'backend: "jax"\nmax_batchsize: 3',
            "2:1",
            'Message type "inference.ModelConfig" has no field named "max_batchsize". Did you mean max_batch_size?',
        ),
        (
            'backend: "jax"\ninput {\n  name: "X"\n  data_type: FP32\n}',
            "4:14",
            "'  data_type: FP32': Enum type \"inference.DataType\" has no value named FP32. Did you mean TYPE_FP32?",
        ),
        (
            "dynamic_batching { }\nsequence_batching { }",
            "2:1",
            'Field "sequence_batching" is specified along with field "dynamic_batching", another member of oneof '
            '"scheduling_choice" for message type "inference.ModelConfig".',
        ),
        (
            "dynamic_batching {\n  xyzzy: 1\n}",
            "2:3",
            'Message type "inference.ModelDynamicBatching" has no field named "xyzzy".',
        ),
        ('name: "a" name: "b"', "1:17", 'Message type "inference.ModelConfig" should not have multiple "name" fields.'),
        ("max_batch_size: 99999999999", "1:17", "'max_batch_size: 99999999999': Value out of range: 99999999999"),
    ],
)
def test_bad_files_are_located(tmp_path: Path, text: str, place: str, reason: str) -> None:
    directory = make_model(tmp_path, "m", text)
    assert message_of(directory) == f"failed to read text proto from {directory / 'config.pbtxt'}:{place}: {reason}"


def test_numbers_that_no_enum_has(tmp_path: Path) -> None:
    directory = make_model(
        tmp_path, "m", "dynamic_batching { priority_queue_policy { key: 2 value { timeout_action: 5 } } }"
    )
    assert message_of(directory) == (
        f"failed to read text proto from {directory / 'config.pbtxt'}: "
        "dynamic_batching.priority_queue_policy[2].timeout_action is 5; it must be one of REJECT, DELAY"
    )


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "m")
    path = directory / "config.pbtxt"
    path.write_bytes(b"\xff\xfe")
    assert message_of(directory).startswith(f"failed to read text proto from {path}: 'utf-8' codec can't decode")
    path.unlink()
    path.mkdir()
    assert "Is a directory" in message_of(directory)
