"""Our .proto files against Triton's descriptors, and the generated code against our .proto files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2

from triton_trio._pb import health, inference
from triton_trio.testing._pb import echo

ROOT = Path(__file__).parent.parent
GENERATED = ("triton_trio/_pb", "triton_trio/testing/_pb", "tests/_pb")

pool = descriptor_pool.DescriptorPool()
for _file in FileDescriptorSet.FromString((ROOT / "triton_trio/_pb/descriptors.bin").read_bytes()).file:
    pool.Add(_file)


def facts_of_message(message: Descriptor) -> Iterator[tuple[Any, ...]]:
    options = message.GetOptions()
    yield "message", message.full_name, options.map_entry, options.deprecated
    for oneof in message.oneofs:
        yield "oneof", oneof.full_name, tuple(field.name for field in oneof.fields)
    for field in message.fields:
        of_type = field.message_type or field.enum_type
        yield (
            "field",
            field.full_name,
            field.number,
            field.type,
            of_type.full_name if of_type else None,
            field.is_repeated,
            field.is_packed,
            field.has_presence,
            field.default_value,
            field.json_name,
            field.containing_oneof.name if field.containing_oneof else None,
        )
    for inner in message.nested_types:
        yield from facts_of_message(inner)
    for enum in message.enum_types:
        yield from facts_of_enum(enum)


def facts_of_enum(enum: EnumDescriptor) -> Iterator[tuple[Any, ...]]:
    yield "enum", enum.full_name, enum.is_closed
    for value in enum.values:
        yield "value", enum.full_name, value.name, value.number


def facts(file: FileDescriptor) -> set[str]:
    """Everything that two sides must agree on to understand each other, one line per fact."""
    found: list[tuple[Any, ...]] = [("package", file.package), ("imports", *(d.name for d in file.dependencies))]
    for message in file.message_types_by_name.values():
        found += facts_of_message(message)
    for enum in file.enum_types_by_name.values():
        found += facts_of_enum(enum)
    for service in file.services_by_name.values():
        found.append(("service", service.full_name))
        for method in service.methods:
            types = method.input_type.full_name, method.output_type.full_name
            found.append(("rpc", method.full_name, *types, method.client_streaming, method.server_streaming))
    return {repr(fact) for fact in found}


@pytest.mark.parametrize(
    ("name", "theirs", "least"),
    [("grpc_service.proto", service_pb2, 250), ("model_config.proto", model_config_pb2, 250)],
)
def test_wire_compatible_with_triton(name: str, theirs: Any, least: int) -> None:
    ours = facts(pool.FindFileByName(name))
    tritons = facts(theirs.DESCRIPTOR)
    assert len(tritons) > least
    assert sorted(ours - tritons) == []  # nothing that Triton does not have
    assert sorted(tritons - ours) == []  # nothing of Triton's missing


def test_the_health_service_is_the_standard_one() -> None:
    file = pool.FindFileByName("health.proto")
    service = file.services_by_name["Health"]
    (check,) = service.methods
    assert (check.full_name, check.client_streaming, check.server_streaming) == (
        "grpc.health.v1.Health.Check",
        False,
        False,
    )
    request, response = check.input_type, check.output_type
    assert [(f.name, f.number, f.type) for f in request.fields] == [("service", 1, 9)]
    assert [(f.name, f.number, f.type, f.enum_type.name) for f in response.fields] == [
        ("status", 1, 14, "ServingStatus")
    ]
    assert (request.full_name, response.full_name) == (
        "grpc.health.v1.HealthCheckRequest",
        "grpc.health.v1.HealthCheckResponse",
    )
    values = response.enum_types_by_name["ServingStatus"].values
    assert [(v.name, v.number) for v in values] == [("UNKNOWN", 0), ("SERVING", 1), ("NOT_SERVING", 2)]


@pytest.mark.parametrize("module", [inference, health, echo], ids=lambda module: module.__name__)
def test_every_message_and_enum_says_what_it_is(module: Any) -> None:
    for name in module.__all__:
        doc = (getattr(module, name).__doc__ or "").strip()
        assert doc, name
        assert not doc.startswith(f"{name}("), f"{name} has no comment in its .proto file"


def python_of(path: Path) -> str:
    """A module as Python sees it: no comments, no layout, and no version of the compiler that wrote it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("_COMPILER_VERSION")]
    return ast.dump(tree)


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    for tool in ("grpc_tools", "betterproto2_compiler"):
        pytest.importorskip(tool, reason="make protos needs the dev extra")
    subprocess.run([sys.executable, ROOT / "protos/generate.py", tmp_path], check=True, timeout=60)
    for directory in GENERATED:
        committed = {path.name: path for path in (ROOT / directory).iterdir() if path.is_file()}
        fresh = {path.name: path for path in (tmp_path / directory).iterdir()}
        assert committed.keys() == fresh.keys()
        for name, path in fresh.items():
            if path.suffix == ".py":
                assert python_of(path) == python_of(committed[name]), f"{directory}/{name}: run `make protos`"
            else:
                assert path.read_bytes() == committed[name].read_bytes(), f"{directory}/{name}: run `make protos`"


def test_law_14_generated_code_and_codec_bring_no_asyncio() -> None:
    program = (
        "import sys\n"
        "from triton_trio._pb import health_grpc, inference_grpc\n"
        "from triton_trio.grpc import codec\n"
        "codec.UpbCodec().decode(b'', inference_grpc.ModelInferRequest)\n"
        "sys.exit('asyncio' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
