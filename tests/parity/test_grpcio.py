"""Plain grpcio with tritonclient's generated stubs: codes and texts, typed contents, health, and what is malformed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trio
from tritonclient.grpc import service_pb2 as wire
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from tests.parity.world import DECOUPLED, SCRIPT, Gate, eventually, in_thread, serve_world, write_model
from triton_trio import Reason
from triton_trio.batch import Batch
from triton_trio.errors import AlreadyExists, InternalError, InvalidArgument, NotFound, TritonError, Unavailable
from triton_trio.lifecycle import Outcome

pytestmark = pytest.mark.network

Code = grpc.StatusCode


async def with_stub(address: str, client: Callable[[GRPCInferenceServiceStub], None]) -> None:
    def run() -> None:
        with grpc.insecure_channel(address) as channel:
            client(GRPCInferenceServiceStub(channel))

    await in_thread(run)


def script_request(value: int = 1, model: str = "once", **fields: Any) -> wire.ModelInferRequest:
    return wire.ModelInferRequest(
        model_name=model,
        inputs=[wire.ModelInferRequest.InferInputTensor(name="IN", datatype="INT32", shape=[1])],
        raw_input_contents=[np.array([value], np.int32).tobytes()],
        **fields,
    )


def simple_request(shape: tuple[int, ...] = (1, 4), datatype: str = "FP32", **fields: Any) -> wire.ModelInferRequest:
    count = int(np.prod(shape))
    return wire.ModelInferRequest(
        model_name="simple",
        inputs=[wire.ModelInferRequest.InferInputTensor(name="INPUT0", datatype=datatype, shape=shape)],
        raw_input_contents=[bytes(4 * count)],
        **fields,
    )


def parameter(**value: Any) -> dict[str, wire.InferParameter]:
    [(name, content)] = value.items()
    field = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(content)]
    return {name: wire.InferParameter(**{field: content})}


#: RPC, request, code, and the text: all of it, or its beginning if it ends with ``...``.
ERRORS: list[tuple[str, Any, grpc.StatusCode, str]] = [
    (
        "ModelInfer",
        script_request(model="nope"),
        Code.NOT_FOUND,
        "Request for unknown model: 'nope' is not found",
    ),
    (
        "ModelInfer",
        script_request(model_version="9"),
        Code.NOT_FOUND,
        "Request for unknown model: 'once' version 9 is not found",
    ),
    (
        "ModelInfer",
        script_request(model_version="one"),
        Code.INVALID_ARGUMENT,
        "failed to get model version from specified version string 'one' (details: stol), version should be an "
        "integral value > 0",
    ),
    (
        "ModelInfer",
        script_request(model="repeat"),
        Code.UNIMPLEMENTED,
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    ),
    (
        "ModelInfer",
        script_request(parameters=parameter(timeout="soon")),
        Code.INVALID_ARGUMENT,
        "invalid value type for 'timeout' parameter, expected int64_param.",
    ),
    (
        "ModelInfer",
        script_request(parameters=parameter(triton_x=True)),
        Code.INVALID_ARGUMENT,
        "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
        "'triton_' are allowed: triton_enable_empty_final_response",
    ),
    (
        "ModelInfer",
        simple_request((9, 4), id="5"),
        Code.INVALID_ARGUMENT,
        "[request id: 5] inference request batch-size must be <= 8 for 'simple'",
    ),
    (
        "ModelInfer",
        simple_request((1, 5)),
        Code.INVALID_ARGUMENT,
        "[request id: <id_unknown>] unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,4], got [1,5]. "
        "NOTE: Setting a non-zero max_batch_size...",
    ),
    (
        "ModelInfer",
        simple_request(datatype="INT32"),
        Code.INVALID_ARGUMENT,
        "[request id: <id_unknown>] inference input 'INPUT0' data-type is 'INT32', but model 'simple' expects 'FP32'",
    ),
    (
        "ModelInfer",
        wire.ModelInferRequest(model_name="simple"),
        Code.INVALID_ARGUMENT,
        "[request id: <id_unknown>] expected 1 inputs but got 0 inputs for model 'simple'. Got input(s) [], but "
        "missing required input(s) ['INPUT0']. Please provide all required input(s).",
    ),
    (
        "ModelInfer",
        script_request(outputs=[wire.ModelInferRequest.InferRequestedOutputTensor(name="X")]),
        Code.INVALID_ARGUMENT,
        "unexpected inference output 'X' for model 'once'",
    ),
    (
        "ModelReady",
        wire.ModelReadyRequest(name="nope"),
        Code.NOT_FOUND,
        "Request for unknown model: 'nope' is not found",
    ),
    (
        "ModelReady",
        wire.ModelReadyRequest(name="once", version="9"),
        Code.NOT_FOUND,
        "Request for unknown model: 'once' version 9 is not found",
    ),
    (
        "ModelMetadata",
        wire.ModelMetadataRequest(name="nope"),
        Code.NOT_FOUND,
        "Request for unknown model: 'nope' is not found",
    ),
    (
        "ModelConfig",
        wire.ModelConfigRequest(name="once", version="-1"),
        Code.INVALID_ARGUMENT,
        "invalid model version specified '-1' , version should be an integral value > 0",
    ),
    (
        "ModelStatistics",
        wire.ModelStatisticsRequest(name="nope"),
        Code.INVALID_ARGUMENT,
        "requested model 'nope' is not available",
    ),
    (
        "ModelStatistics",
        wire.ModelStatisticsRequest(name="once", version="2"),
        Code.INVALID_ARGUMENT,
        "requested model version is not available for model 'once'",
    ),
    (
        "RepositoryIndex",
        wire.RepositoryIndexRequest(repository_name="r"),
        Code.UNIMPLEMENTED,
        "'repository_name' specification is not supported",
    ),
    (
        "RepositoryModelLoad",
        wire.RepositoryModelLoadRequest(repository_name="r"),
        Code.UNIMPLEMENTED,
        "'repository_name' specification is not supported",
    ),
    (
        "RepositoryModelLoad",
        wire.RepositoryModelLoadRequest(model_name="simple"),
        Code.UNAVAILABLE,
        "explicit model load / unload is not allowed if polling is enabled",
    ),
    (
        "RepositoryModelLoad",
        wire.RepositoryModelLoadRequest(
            model_name="simple", parameters={"config": wire.ModelRepositoryParameter(bool_param=True)}
        ),
        Code.INVALID_ARGUMENT,
        "invalid value type for load parameter 'config', expected string_param.",
    ),
    (
        "RepositoryModelLoad",
        wire.RepositoryModelLoadRequest(
            model_name="simple", parameters={"file:1/m": wire.ModelRepositoryParameter(string_param="x")}
        ),
        Code.INVALID_ARGUMENT,
        "invalid value type for load parameter 'file:1/m', expected bytes_param.",
    ),
    (
        "RepositoryModelLoad",
        wire.RepositoryModelLoadRequest(
            model_name="simple", parameters={"colour": wire.ModelRepositoryParameter(string_param="x")}
        ),
        Code.INVALID_ARGUMENT,
        "unrecognized load parameter 'colour'.",
    ),
    (
        "RepositoryModelUnload",
        wire.RepositoryModelUnloadRequest(model_name="simple"),
        Code.UNAVAILABLE,
        "explicit model load / unload is not allowed if polling is enabled",
    ),
    (
        "RepositoryModelUnload",
        wire.RepositoryModelUnloadRequest(
            model_name="simple", parameters={"unload_dependents": wire.ModelRepositoryParameter(string_param="x")}
        ),
        Code.INVALID_ARGUMENT,
        "invalid value type for 'unload_dependents' parameter, expected bool_param.",
    ),
    (
        "SystemSharedMemoryRegister",
        wire.SystemSharedMemoryRegisterRequest(name="r"),
        Code.UNIMPLEMENTED,
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
    ),
    (
        "SystemSharedMemoryStatus",
        wire.SystemSharedMemoryStatusRequest(name="r"),
        Code.NOT_FOUND,
        "Unable to find system shared memory region: 'r'",
    ),
    (
        "CudaSharedMemoryStatus",
        wire.CudaSharedMemoryStatusRequest(name="r"),
        Code.NOT_FOUND,
        "Unable to find cuda shared memory region: 'r'",
    ),
    (
        "TraceSetting",
        wire.TraceSettingRequest(model_name="nope"),
        Code.NOT_FOUND,
        "Request for unknown model: 'nope' is not found",
    ),
    (
        "TraceSetting",
        wire.TraceSettingRequest(settings={"trace_file": wire.TraceSettingRequest.SettingValue(value=["/etc/x"])}),
        Code.UNIMPLEMENTED,
        "trace file location can not be updated through network protocol",
    ),
]


async def test_codes_and_texts(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client(stub: GRPCInferenceServiceStub) -> None:
            wrong = []
            for rpc, request, code, text in ERRORS:
                with pytest.raises(grpc.RpcError) as caught:
                    getattr(stub, rpc)(request, timeout=5)
                got = caught.value.code(), caught.value.details()
                matches = got[1].startswith(text[:-3]) if text.endswith("...") else got[1] == text
                if got[0] != code or not matches:
                    wrong.append(f"{rpc}: expected {code} {text!r}\n         got {got[0]} {got[1]!r}")
            assert not wrong, "\n".join(wrong)

        await with_stub(address, client)


async def test_an_error_of_a_request_with_a_long_id_arrives(tmp_path: Path) -> None:
    """In a header of its length clients found nothing but a broken stream."""
    too_long = "\N{FOX FACE}" * 100_000
    async with serve_world(tmp_path / "models") as (_server, address):

        def client(stub: GRPCInferenceServiceStub) -> None:
            found: list[tuple[grpc.StatusCode, str]] = []
            for request in (simple_request((1, 3), id=too_long), script_request(model=too_long)):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.ModelInfer(request, timeout=5)
                found.append((caught.value.code(), caught.value.details()))
            (code, text), (unknown, name) = found
            assert code is Code.INVALID_ARGUMENT
            assert text.startswith(f"[request id: {too_long[:256]}...] ")
            assert "shape" in text
            assert unknown is Code.NOT_FOUND
            assert name.startswith(f"Request for unknown model: '{too_long[:200]}")
            assert name.endswith("... (cut: it had 100042 characters)")

        await with_stub(address, client)


MODEL_ERRORS: list[tuple[type[TritonError], grpc.StatusCode]] = [
    (TritonError, Code.UNKNOWN),
    (InternalError, Code.INTERNAL),
    (NotFound, Code.NOT_FOUND),
    (InvalidArgument, Code.INVALID_ARGUMENT),
    (Unavailable, Code.UNAVAILABLE),
    (AlreadyExists, Code.ALREADY_EXISTS),
]


async def test_the_errors_of_a_model_keep_their_codes(tmp_path: Path) -> None:
    async def fail(batch: Batch) -> None:
        await batch.checkpoint()
        for member in batch.live():
            kind, _ = MODEL_ERRORS[int(member.inputs["IN"][0])]
            batch.fail(member, kind("the model says no"))

    async with serve_world(tmp_path / "models", {"once": fail}) as (_server, address):

        def client(stub: GRPCInferenceServiceStub) -> None:
            for index, (_, code) in enumerate(MODEL_ERRORS):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.ModelInfer(script_request(index), timeout=5)
                assert (caught.value.code(), caught.value.details()) == (code, "the model says no")

        await with_stub(address, client)


async def test_a_model_that_raises_is_internal_and_shows_no_traceback(tmp_path: Path) -> None:
    async def crash(batch: Batch) -> None:
        await batch.checkpoint()
        raise ZeroDivisionError("by zero")

    async with serve_world(tmp_path / "models", {"once": crash}) as (_server, address):

        def client(stub: GRPCInferenceServiceStub) -> None:
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(script_request(), timeout=5)
            assert caught.value.code() == Code.INTERNAL
            assert caught.value.details() == "model 'once' failed: ZeroDivisionError: by zero"
            assert stub.ServerReady(wire.ServerReadyRequest()).ready

        await with_stub(address, client)


async def test_typed_contents(tmp_path: Path) -> None:
    contents = wire.InferTensorContents
    typed: dict[str, tuple[wire.InferTensorContents, np.ndarray | list[bytes]]] = {
        "BOOL": (contents(bool_contents=[True, False]), np.array([True, False])),
        "UINT8": (contents(uint_contents=[1, 255]), np.array([1, 255], np.uint8)),
        "UINT16": (contents(uint_contents=[1, 2]), np.array([1, 2], np.uint16)),
        "UINT32": (contents(uint_contents=[1, 2]), np.array([1, 2], np.uint32)),
        "UINT64": (contents(uint64_contents=[1, 2**64 - 1]), np.array([1, 2**64 - 1], np.uint64)),
        "INT8": (contents(int_contents=[-1, 2]), np.array([-1, 2], np.int8)),
        "INT16": (contents(int_contents=[-1, 2]), np.array([-1, 2], np.int16)),
        "INT32": (contents(int_contents=[-1, 2]), np.array([-1, 2], np.int32)),
        "INT64": (contents(int64_contents=[-1, 2]), np.array([-1, 2], np.int64)),
        "FP32": (contents(fp32_contents=[0.5, 2]), np.array([0.5, 2], np.float32)),
        "FP64": (contents(fp64_contents=[0.1, 2]), np.array([0.1, 2], np.float64)),
    }
    models = tmp_path / "models"
    for name in typed:
        write_model(models, f"typed_{name}", SCRIPT.replace("INT32", name).replace("[ 1 ]", "[ 2 ]"))
    async with serve_world(models) as (_server, address):

        def client(stub: GRPCInferenceServiceStub) -> None:
            for name, (value, expected) in typed.items():
                response = stub.ModelInfer(
                    wire.ModelInferRequest(
                        model_name=f"typed_{name}",
                        inputs=[
                            wire.ModelInferRequest.InferInputTensor(name="IN", datatype=name, shape=[2], contents=value)
                        ],
                    ),
                    timeout=5,
                )
                assert response.outputs[0].datatype == name
                assert response.raw_output_contents[0] == expected.tobytes()

        await with_stub(address, client)


async def test_health(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (server, address):

        def check() -> bytes:
            with grpc.insecure_channel(address) as channel:
                call = channel.unary_unary("/grpc.health.v1.Health/Check")
                answer: bytes = call(b"", timeout=5)
                return answer

        assert await in_thread(check) == b"\x08\x01"  # SERVING
        server.started = False
        assert await in_thread(check) == b"\x08\x02"  # NOT_SERVING
        server.started = True


async def test_a_malformed_message_is_refused_and_its_neighbours_are_not(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with grpc.insecure_channel(address) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"\xff\xff\xff", timeout=5)
                assert caught.value.code() == Code.INTERNAL
                assert "ModelInferRequest" in caught.value.details()
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary("/inference.GRPCInferenceService/NoSuch")(b"", timeout=5)
                assert caught.value.code() == Code.UNIMPLEMENTED
                assert GRPCInferenceServiceStub(channel).ModelInfer(script_request(3), timeout=5).raw_output_contents

        await in_thread(client)


async def test_the_deadline_of_a_call_ends_the_request_in_the_server(tmp_path: Path) -> None:
    """A8: ``grpc-timeout`` is the RPC's deadline, and the request's.  A client without a clock of its own shows who acts."""
    async with serve_world(tmp_path / "models", {"once": Gate()}) as (server, address):

        def client(stub: GRPCInferenceServiceStub) -> None:
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(script_request(), metadata=[("grpc-timeout", "50m")])
            assert caught.value.code() == Code.DEADLINE_EXCEEDED

        await with_stub(address, client)
        await eventually(lambda: server.statistics().in_flight == 0)
        assert server.model("once").counters.outcomes == {Outcome.DEADLINE: 1}


async def test_an_admins_cancel_is_answered_with_a_text(tmp_path: Path) -> None:
    """D1: Triton's CANCELLED has none, and clients take that for a success."""
    gate = Gate()
    async with serve_world(tmp_path / "models", {"once": gate}) as (server, address), trio.open_nursery() as nursery:

        async def cancel_when_held() -> None:
            await gate.wait_held()
            next(iter(server.model("once")._live)).cancel(Reason.ADMIN)

        def client(stub: GRPCInferenceServiceStub) -> None:
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(script_request(id="8"), timeout=5)
            assert caught.value.code() == Code.CANCELLED
            assert caught.value.details() == "[request id: 8] request cancelled while executing: admin"

        nursery.start_soon(cancel_when_held)
        await with_stub(address, client)


async def test_e1_a_drain_answers_everybody(tmp_path: Path) -> None:
    """What runs may end; what is still there at the limit is UNAVAILABLE; nobody is left without a status."""
    gates = {"once": Gate(), "never": Gate()}
    models = tmp_path / "models"
    write_model(models, "never", SCRIPT)
    write_model(models, "never_decoupled", DECOUPLED)
    async with serve_world(models, dict(gates)) as (server, address):
        counters = server.model("never").counters
        channel = grpc.insecure_channel(address)
        stub = GRPCInferenceServiceStub(channel)
        ends = stub.ModelInfer.future(script_request(7), timeout=10)
        stays = stub.ModelInfer.future(script_request(1, "never"), timeout=10)
        for gate in gates.values():
            await gate.wait_held()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.drain, 0.3)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not server.ready
            gates["once"].open()
            answer = await in_thread(lambda: ends.result(timeout=5))
            assert answer.raw_output_contents[0] == np.int32(7).tobytes()
            await trio.sleep_forever()  # at the limit the server ends, and so does its block
    error = await in_thread(lambda: stays.exception(timeout=5))
    assert error.code() == Code.UNAVAILABLE
    assert error.details()
    await in_thread(channel.close)
    assert counters.reasons == {("server_drain", "executing"): 1}
