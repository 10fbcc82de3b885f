"""The stock ``tritonclient.grpc``, synchronous, over a real socket: what it reads is what Triton would have said."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import trio
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

import triton_trio
from tests.parity.world import IDENTITY, Gate, eventually, in_thread, serve_world, write_model
from triton_trio.lifecycle import Outcome

pytestmark = pytest.mark.network


def tensor(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def simple_input(rows: int = 1) -> list[triton.InferInput]:
    return [tensor("INPUT0", np.arange(rows * 4, dtype=np.float32).reshape(rows, 4), "FP32")]


def script_input(value: int) -> list[triton.InferInput]:
    return [tensor("IN", np.array([value], np.int32), "INT32")]


async def test_health_and_server_metadata(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models", server_id="me") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                assert it.is_server_live()
                assert it.is_server_ready()
                assert it.is_model_ready("simple")
                assert it.is_model_ready("simple", "1")
                metadata = it.get_server_metadata()
                assert metadata.name == "me"
                assert metadata.version == triton_trio.__version__
                # perf_analyzer asks for server-side statistics only if it finds this.
                assert "statistics" in metadata.extensions

        await in_thread(client)


async def test_model_metadata_and_config(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                metadata = it.get_model_metadata("simple", as_json=True)
                assert metadata == {
                    "name": "simple",
                    "versions": ["1"],
                    "platform": "identity",
                    "inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": ["-1", "4"]}],
                    "outputs": [{"name": "OUTPUT0", "datatype": "FP32", "shape": ["-1", "4"]}],
                }
                no_batch = it.get_model_metadata("once")
                assert [list(each.shape) for each in no_batch.inputs] == [[1]]
                config = it.get_model_config("simple").config
                assert (config.name, config.backend, config.max_batch_size) == ("simple", "identity", 8)
                assert config.input[0].name == "INPUT0"
                assert list(config.input[0].dims) == [4]
                assert config.output[0].label_filename == "labels.txt"
                assert it.get_model_config("repeat").config.model_transaction_policy.decoupled

        await in_thread(client)


async def test_infer(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                result = it.infer("simple", simple_input(3), request_id="17", parameters={"mine": "x", "n": 3})
                np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), np.arange(12, dtype=np.float32).reshape(3, 4))
                response = result.get_response()
                assert (response.id, response.model_name, response.model_version) == ("17", "simple", "1")
                assert "triton_final_response" not in response.parameters
                wanted = [triton.InferRequestedOutput("OUTPUT0")]
                for options in ({"compression_algorithm": "gzip"}, {"compression_algorithm": "deflate"}):
                    result = it.infer("simple", simple_input(), outputs=wanted, model_version="1", **options)
                    assert result.as_numpy("OUTPUT0").shape == (1, 4)

        await in_thread(client)


ALL_TYPES: dict[str, np.ndarray] = {
    "BOOL": np.array([True, False, True]),
    "UINT8": np.array([0, 255], np.uint8),
    "UINT16": np.array([0, 65535], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "INT8": np.array([-128, 127], np.int8),
    "INT16": np.array([-(2**15), 2**15 - 1], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32),
    "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "FP16": np.array([0.5, -65504], np.float16),
    "FP32": np.array([0.1, np.inf, -0.0], np.float32),
    "FP64": np.array([0.1, -1e300], np.float64),
    "BYTES": np.array([b"", b"\0\xff", "grüße".encode()], object),
    "BF16": np.array([1.5, -2.0, 3.140625], ml_dtypes.bfloat16),
}


async def test_every_datatype_comes_back_as_it_went(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                inputs = [tensor(f"IN_{name}", array, name) for name, array in ALL_TYPES.items()]
                result = it.infer("all_types", inputs)
                for name, array in ALL_TYPES.items():
                    np.testing.assert_array_equal(result.as_numpy(f"OUT_{name}"), array, err_msg=name)
                    assert result.get_output(f"OUT_{name}").datatype == name

                # Tensors without elements still have their entry, so that clients find the others by position.
                empty = [tensor(f"IN_{name}", array[:0], name) for name, array in ALL_TYPES.items()]
                result = it.infer("all_types", empty)
                assert [len(each) for each in result.get_response().raw_output_contents] == [0] * len(ALL_TYPES)
                assert result.as_numpy("OUT_INT64").shape == (0,)

        await in_thread(client)


async def test_classification(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                scores = np.array([[0.1, 3.3, -1, 2.0], [9, 8, 7, 6]], np.float32)
                wanted = [triton.InferRequestedOutput("OUTPUT0", class_count=2)]
                result = it.infer("simple", [tensor("INPUT0", scores, "FP32")], outputs=wanted)
                assert result.get_output("OUTPUT0").datatype == "BYTES"
                assert result.as_numpy("OUTPUT0").tolist() == [
                    [b"3.300000:1:one", b"2.000000:3:three"],
                    [b"9.000000:0:zero", b"8.000000:1:one"],
                ]
                wanted = [triton.InferRequestedOutput("OUTPUT0", class_count=10)]
                result = it.infer("simple", [tensor("INPUT0", scores, "FP32")], outputs=wanted)
                assert result.as_numpy("OUTPUT0").shape == (2, 4)

        await in_thread(client)


async def test_statistics(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                for rows in (1, 3, 3):
                    it.infer("simple", simple_input(rows))
                with pytest.raises(InferenceServerException):
                    it.infer("simple", [tensor("INPUT0", np.zeros((1, 5), np.float32), "FP32")])
                statistics = it.get_inference_statistics("simple").model_stats
                assert len(statistics) == 1
                one = statistics[0]
                assert (one.name, one.version) == ("simple", "1")
                assert (one.inference_count, one.execution_count) == (7, 3)
                assert one.last_inference > 1_600_000_000_000
                stats = one.inference_stats
                assert (stats.success.count, stats.fail.count, stats.queue.count) == (3, 1, 3)
                assert (stats.compute_infer.count, stats.cache_hit.count) == (3, 0)
                assert stats.success.ns > 0
                assert [(each.batch_size, each.compute_infer.count) for each in one.batch_stats] == [(1, 1), (3, 2)]
                everything = it.get_inference_statistics().model_stats
                assert [each.name for each in everything] == ["all_types", "once", "repeat", "simple"]
                as_json = it.get_inference_statistics("simple", "1", as_json=True)
                assert as_json["model_stats"][0]["inference_count"] == "7"

        await in_thread(client)


async def test_repository_index_load_and_unload(tmp_path: Path) -> None:
    models = tmp_path / "models"
    async with serve_world(models, explicit=True, load_models=["simple"]) as (server, address):
        write_model(models, "late", IDENTITY, files={"labels.txt": "a"})

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                index = it.get_model_repository_index(as_json=True)["models"]
                assert {"name": "simple", "version": "1", "state": "READY"} in index
                assert {"name": "late"} in index
                it.load_model("late")
                assert it.is_model_ready("late")
                it.infer("late", simple_input())
                it.load_model("late", config=json.dumps({"backend": "identity", "max_batch_size": 2, **_io()}))
                assert it.get_model_config("late").config.max_batch_size == 2
                it.unload_model("late", unload_dependents=True)
                with pytest.raises(InferenceServerException, match="Request for unknown model: 'late'"):
                    it.infer("late", simple_input())
                with pytest.raises(InferenceServerException) as caught:
                    it.load_model("nowhere")
                assert "failed to load 'nowhere'" in caught.value.message()

        await in_thread(client)
        await eventually(lambda: [model.name for model in server.repository.loaded()] == ["simple"])


def _io() -> dict[str, Any]:
    return {
        "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [4]}],
    }


async def test_several_versions(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_model(models, "many", IDENTITY + "version_policy { all {} }\n", versions=(1, 3, 10), files={"labels.txt": ""})
    async with serve_world(models) as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                assert list(it.get_model_metadata("many").versions) == ["1", "3", "10"]
                assert list(it.get_model_metadata("many", "3").versions) == ["3"]
                assert it.infer("many", simple_input()).get_response().model_version == "10"
                assert it.infer("many", simple_input(), model_version="3").get_response().model_version == "3"
                assert [each.version for each in it.get_inference_statistics("many").model_stats] == ["1", "3", "10"]

        await in_thread(client)


async def test_settings_and_shared_memory(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                assert not it.get_system_shared_memory_status().regions
                assert not it.get_cuda_shared_memory_status().regions
                disabled = (
                    "[StatusCode.UNIMPLEMENTED] Client shared memory is disabled. Start the server with "
                    "'--allow-client-shm=true' to enable."
                )
                for refused in (
                    lambda: it.register_system_shared_memory("r", "/r", 4),
                    lambda: it.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 4),
                    it.unregister_system_shared_memory,
                    it.unregister_cuda_shared_memory,
                ):
                    with pytest.raises(InferenceServerException) as caught:
                        refused()
                    assert str(caught.value) == disabled
                settings = it.get_trace_settings(as_json=True)["settings"]
                assert settings["trace_level"] == {"value": ["OFF"]}
                assert settings["trace_rate"] == {"value": ["1000"]}
                with pytest.raises(InferenceServerException, match="does not trace requests"):
                    it.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})

        await in_thread(client)


async def test_async_infer_and_its_cancel(tmp_path: Path) -> None:
    gate = Gate()
    async with serve_world(tmp_path / "models", {"once": gate}) as (server, address):
        answers: queue.Queue[tuple[triton.InferResult | None, InferenceServerException | None]] = queue.Queue()
        with triton.InferenceServerClient(address) as it:

            def callback(result: Any, error: Any) -> None:
                answers.put((result, error))

            first = it.async_infer("once", script_input(1), callback)
            await gate.wait_held()
            second = it.async_infer("once", script_input(2), callback)
            await eventually(lambda: server.statistics().in_flight == 2)
            second.cancel()  # queued
            first.cancel()  # executing
            for _ in range(2):
                result, error = await in_thread(lambda: answers.get(timeout=5))
                assert result is None
                assert error is not None
                assert error.message() == "Locally cancelled by application!"
                assert error.status() == "StatusCode.CANCELLED"
            await eventually(lambda: server.statistics().in_flight == 0)
            counters = server.model("once").counters
            assert counters.outcomes == {Outcome.CANCELLED: 2}
            assert counters.reasons == {("client_reset", "queued"): 1, ("client_reset", "executing"): 1}
            await eventually(lambda: gate.waiting == 0)

            gate.open()
            it.async_infer("once", script_input(3), callback)
            result, error = await in_thread(lambda: answers.get(timeout=5))
            assert error is None
            assert result is not None
            assert result.as_numpy("OUT").tolist() == [3]
            await trio.to_thread.run_sync(it.close)


async def test_client_timeout(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models", {"once": Gate()}) as (server, address):

        def client() -> None:
            with triton.InferenceServerClient(address) as it:
                with pytest.raises(InferenceServerException) as caught:
                    it.infer("once", script_input(1), client_timeout=0.2)
                assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"

        await in_thread(client)
        await eventually(lambda: server.statistics().in_flight == 0)
        counters = server.model("once").counters
        assert sum(counters.outcomes.values()) == 1
        # The client resets its call when its own clock says so; who is first is a race that either may win.
        assert set(counters.outcomes) <= {Outcome.DEADLINE, Outcome.CANCELLED}


async def test_a_client_that_vanishes(tmp_path: Path) -> None:
    gate = Gate()
    async with serve_world(tmp_path / "models", {"once": gate}) as (server, address):
        it = triton.InferenceServerClient(address)
        it.async_infer("once", script_input(1), lambda result, error: None)
        await gate.wait_held()
        await in_thread(it.close)
        await eventually(lambda: server.statistics().in_flight == 0)
        assert server.model("once").counters.outcomes == {Outcome.CANCELLED: 1}
