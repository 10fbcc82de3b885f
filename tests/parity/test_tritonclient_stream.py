"""``tritonclient.grpc`` streams over a real socket: sequences of callbacks as Triton's QA expects them."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.parity.test_tritonclient import script_input, simple_input, tensor
from tests.parity.world import Gate, eventually, in_thread, repeat, serve_world, write_model
from triton_trio.lifecycle import Outcome

pytestmark = pytest.mark.network

Answers = queue.Queue[tuple[Any, Any]]


@contextmanager
def open_stream(address: str, **options: Any) -> Iterator[tuple[triton.InferenceServerClient, Answers]]:
    answers: Answers = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), **options)
        yield client, answers


def take(answers: Answers, count: int) -> list[Any]:
    """The next answers: a number, the text of an error, or ``end`` for a response without outputs."""
    taken = []
    for _ in range(count):
        result, error = answers.get(timeout=5)
        if error is not None:
            taken.append(error.message())
        else:
            value = result.as_numpy("OUT")
            taken.append("end" if value is None else int(value[0]))
    return taken


async def test_a_stream_of_requests(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with open_stream(address) as (it, answers):
                for index in range(20):
                    it.async_stream_infer("once", script_input(index), request_id=str(index))
                for index in range(20):
                    result, error = answers.get(timeout=5)
                    assert error is None
                    response = result.get_response()
                    assert (response.id, response.model_version) == (str(index), "1")
                    assert response.parameters["triton_final_response"].bool_param is True
                it.async_stream_infer("simple", simple_input(2))
                assert answers.get(timeout=5)[0].as_numpy("OUTPUT0").shape == (2, 4)
                it.stop_stream()
                assert answers.empty()

        await in_thread(client)


async def test_a_decoupled_model(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (server, address):

        def client() -> None:
            with open_stream(address) as (it, answers):
                it.async_stream_infer("repeat", script_input(3), request_id="a")
                assert take(answers, 3) == [0, 1, 2]
                it.async_stream_infer("repeat", script_input(2), request_id="b", enable_empty_final_response=True)
                finals = []
                for _ in range(3):
                    result, _ = answers.get(timeout=5)
                    assert result.get_response().id == "b"
                    finals.append(result.get_response().parameters["triton_final_response"].bool_param)
                assert finals == [False, False, True]
                it.async_stream_infer("repeat", script_input(0), enable_empty_final_response=True)
                assert take(answers, 1) == ["end"]
                it.stop_stream()
                assert answers.empty()

        await in_thread(client)
        assert server.model("repeat").counters.outcomes == {Outcome.OK: 3}


async def test_errors_in_a_stream(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        def client() -> None:
            with open_stream(address) as (it, answers):
                it.async_stream_infer("nope", script_input(3))
                it.async_stream_infer("once", script_input(1), model_version="x")
                it.async_stream_infer("once", simple_input(), request_id="7")
                it.async_stream_infer("once", script_input(5))
                assert take(answers, 4) == [
                    "Request for unknown model: 'nope' is not found",
                    "failed to get model version from specified version string 'x' (details: stol), version should be "
                    "an integral value > 0",
                    "unexpected inference input 'INPUT0' for model 'once'",
                    5,
                ]
                it.stop_stream()

        await in_thread(client)


async def test_an_error_ends_the_stream_of_a_client_that_wants_that(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models", {"once": Gate()}) as (server, address):

        def client() -> None:
            with open_stream(address, headers={"triton_grpc_error": "true"}) as (it, answers):
                it.async_stream_infer("once", script_input(1))
                it.async_stream_infer("nope", script_input(1))
                result, error = answers.get(timeout=5)
                assert result is None
                assert error.status() == "StatusCode.NOT_FOUND"
                assert error.message() == "Request for unknown model: 'nope' is not found"
                it.stop_stream()
                assert answers.empty()

        await in_thread(client)
        await eventually(lambda: server.statistics().in_flight == 0)
        assert server.model("once").counters.outcomes == {Outcome.CANCELLED: 1}


@pytest.mark.parametrize("model", ["once", "repeat"])
async def test_stop_stream_with_cancel_is_one_callback(tmp_path: Path, model: str) -> None:
    gate = Gate()
    async with serve_world(tmp_path / "models", {model: gate}) as (server, address):
        answers: Answers = queue.Queue()
        it = triton.InferenceServerClient(address)
        it.start_stream(lambda result, error: answers.put((result, error)))
        for index in range(16):
            it.async_stream_infer(model, script_input(index))
        await gate.wait_held()
        await eventually(lambda: server.statistics().in_flight == 16)
        await in_thread(lambda: it.stop_stream(cancel_requests=True))
        result, error = answers.get(timeout=5)
        assert result is None
        assert error.message() == "Locally cancelled by application!"
        assert error.status() == "StatusCode.CANCELLED"
        assert answers.empty()
        await eventually(lambda: server.statistics().in_flight == 0)
        counters = server.model(model).counters
        assert counters.outcomes == {Outcome.CANCELLED: 16}
        assert {reason for reason, _ in counters.reasons} == {"client_reset"}
        assert await in_thread(it.is_server_ready)
        await in_thread(it.close)


async def test_stop_stream_without_cancel_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    gate = Gate(repeat)
    async with serve_world(tmp_path / "models", {"repeat": gate}) as (_server, address):
        answers: Answers = queue.Queue()
        it = triton.InferenceServerClient(address)
        it.start_stream(lambda result, error: answers.put((result, error)))
        it.async_stream_infer("repeat", script_input(3))
        await gate.wait_held()
        gate.open()
        await in_thread(it.stop_stream)
        assert take(answers, 3) == [0, 1, 2]
        assert answers.empty()
        await in_thread(it.close)


async def test_stream_timeout(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models", {"once": Gate()}) as (server, address):

        def client() -> None:
            with open_stream(address, stream_timeout=0.2) as (it, answers):
                it.async_stream_infer("once", script_input(1))
                _, error = answers.get(timeout=5)
                assert isinstance(error, InferenceServerException)
                assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
                it.stop_stream()

        await in_thread(client)
        await eventually(lambda: server.statistics().in_flight == 0)
        assert sum(server.model("once").counters.outcomes.values()) == 1
        assert set(server.model("once").counters.outcomes) <= {Outcome.DEADLINE, Outcome.CANCELLED}


async def test_two_streams_do_not_know_each_other(tmp_path: Path) -> None:
    gate = Gate()
    async with serve_world(tmp_path / "models", {"once": gate}) as (_server, address):
        with open_stream(address) as (blocked, blocked_answers):
            blocked.async_stream_infer("once", script_input(1))
            await gate.wait_held()

            def client() -> None:
                with open_stream(address) as (it, answers):
                    it.async_stream_infer("repeat", script_input(2))
                    assert take(answers, 2) == [0, 1]
                    it.stop_stream(cancel_requests=True)

            await in_thread(client)
            gate.open()
            assert await in_thread(lambda: take(blocked_answers, 1)) == [1]
            await in_thread(blocked.stop_stream)


async def test_a_large_message_passes_flow_control_in_both_directions(tmp_path: Path) -> None:
    models = tmp_path / "models"
    big = """
        backend: "identity"
        input { name: "IN", data_type: TYPE_INT64, dims: [ -1 ] }
        output { name: "OUT", data_type: TYPE_INT64, dims: [ -1 ] }
    """
    write_model(models, "big", big)
    async with serve_world(models) as (_server, address):
        data = np.arange(3_000_000, dtype=np.int64)

        def client() -> None:
            with open_stream(address) as (it, answers):
                it.async_stream_infer("big", [tensor("IN", data, "INT64")])
                result, error = answers.get(timeout=10)
                assert error is None
                np.testing.assert_array_equal(result.as_numpy("OUT"), data)
                it.stop_stream()

        await in_thread(client)
