"""``L0_grpc_state_cleanup/cleanup_test.py`` and ``L0_decoupled/decoupled_test.py``: a model with many responses, and its books.

Triton counts ``StateNew`` and ``StateRelease`` in its log.  Here as many handlers have ended as began, and every request that was
started has one outcome.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import tritonclient.grpc as triton
from trio.testing import wait_all_tasks_blocked

from tests.parity.qa.world import LOCALLY, Callback, World, playing, tensor
from tests.parity.world import eventually, in_thread
from triton_trio import Outcome
from triton_trio.batch import Batch, Member
from triton_trio.testing import Execution, ScriptedBackend

pytestmark = pytest.mark.network

MODEL = "repeat_int32"
NOT_DECOUPLED = """
backend: "scripted"
max_batch_size: 0
input [
  { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "DELAY" data_type: TYPE_UINT32 dims: [ -1 ] },
  { name: "WAIT" data_type: TYPE_UINT32 dims: [ 1 ] }
]
output [
  { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "IDX" data_type: TYPE_UINT32 dims: [ 1 ] }
]
instance_group [{ kind: KIND_CPU }]
"""
DECOUPLED = NOT_DECOUPLED + "model_transaction_policy { decoupled: true }"
OUTPUTS = [triton.InferRequestedOutput(name) for name in ("OUT", "IDX")]
VALUES = list(range(100, 110))
PARAMS = pytest.mark.parametrize("empty_final", [False, True], ids=["", "with_params"])


class RepeatInt32(ScriptedBackend):
    """A response for each value of ``IN``, and its index; in the place of ``DELAY`` and ``WAIT`` there is the test."""

    def __init__(self) -> None:
        super().__init__()
        self._sent = Counter[int]()

    def answer(self, batch: Batch, member: Member) -> dict[str, np.ndarray]:
        index = self._sent[member.request.generation]
        self._sent[member.request.generation] += 1
        return {"OUT": member.inputs["IN"][index : index + 1], "IDX": np.array([index], np.uint32)}


def repeat(execution: Execution, count: int = len(VALUES)) -> None:
    for _ in range(count):
        execution.emit()


def complete(execution: Execution) -> None:
    """All of its responses, and the end."""

    def finish() -> None:
        assert execution.batch is not None
        [member] = execution.batch.members
        execution.batch.finish(member)

    repeat(execution)
    execution.call(finish)
    execution.end()


def inputs(values: list[int]) -> list[Any]:
    return [
        tensor("IN", np.array(values, np.int32), "INT32"),
        tensor("DELAY", np.full(len(values), 1000, np.uint32), "UINT32"),
        tensor("WAIT", np.array([500], np.uint32), "UINT32"),
    ]


def infer(world: World, *labels: int, empty_final: bool = False) -> None:
    for label in labels:
        world.client.async_stream_infer(
            MODEL, inputs(VALUES), request_id=str(label), outputs=OUTPUTS, enable_empty_final_response=empty_final
        )


def responses(callback: Callback) -> dict[int, list[tuple[int, int]]]:
    """The values and indices that each request has got."""
    got: dict[int, list[tuple[int, int]]] = {}
    for result in callback.results:
        response = result.get_response()
        if response.outputs:
            value = result.as_numpy("OUT").item(), result.as_numpy("IDX").item()
            got.setdefault(int(response.id), []).append(value)
    return got


EVERYTHING = [(value, index) for index, value in enumerate(VALUES)]


@PARAMS
async def test_decoupled_infer(tmp_path: Path, empty_final: bool) -> None:
    async with playing(tmp_path, {MODEL: DECOUPLED}, RepeatInt32()) as world:
        callback = Callback()
        world.client.start_stream(callback)
        infer(world, *range(10), empty_final=empty_final)
        for number in range(10):
            complete(await world.backend.wait_execution(number))
        await callback.wait(100 + 10 * empty_final)
        await in_thread(world.client.stop_stream)
        assert responses(callback) == dict.fromkeys(range(10), EVERYTHING)
        assert callback.errors == []
        await eventually(lambda: world.counters(MODEL).outcomes == {Outcome.OK: 10})


@PARAMS
async def test_decoupled_cancellation(tmp_path: Path, empty_final: bool) -> None:
    async with playing(tmp_path, {MODEL: DECOUPLED}, RepeatInt32()) as world:
        callback = Callback()
        world.client.start_stream(callback)
        infer(world, *range(10), empty_final=empty_final)
        execution = await world.backend.wait_execution()
        repeat(execution, 5)
        await callback.wait(5)
        await eventually(lambda: world.pending(MODEL) == 9)
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        await callback.wait(6)
        assert [error.message() for error in callback.errors] == [LOCALLY]
        await execution.ended.wait()
        await world.wait_failures(MODEL, 10)
        assert world.counters(MODEL).outcomes == {Outcome.CANCELLED: 10}
        assert world.counters(MODEL).reasons == {("client_reset", "responding"): 1, ("client_reset", "queued"): 9}
        assert world.backend.executions == [execution]
        assert responses(callback) == {0: EVERYTHING[:5]}


@PARAMS
async def test_decoupled_timeout(tmp_path: Path, empty_final: bool) -> None:
    async with playing(tmp_path, {MODEL: DECOUPLED}, RepeatInt32()) as world:
        callback = Callback()
        world.client.start_stream(callback, stream_timeout=0.2)
        infer(world, *range(10), empty_final=empty_final)
        execution = await world.backend.wait_execution()
        repeat(execution, 2)
        await callback.wait(3)
        [error] = callback.errors
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert "Deadline Exceeded" in error.message()
        await execution.ended.wait()
        await world.wait_failures(MODEL, 10)
        # Two clocks: either the server's deadline is first, or the reset of the client's.  For all of the stream.
        assert list(world.counters(MODEL).outcomes.values()) == [10]
        assert Outcome.OK not in world.counters(MODEL).outcomes
        assert world.backend.executions == [execution]


@PARAMS
async def test_decoupled_infer_shutdownserver(tmp_path: Path, empty_final: bool) -> None:
    async with playing(tmp_path, {MODEL: DECOUPLED}, RepeatInt32()) as world, trio.open_nursery() as nursery:
        counters = world.counters(MODEL)
        callback = Callback()
        world.client.start_stream(callback)
        infer(world, *range(5), empty_final=empty_final)
        await eventually(lambda: world.pending(MODEL) == 4)
        nursery.start_soon(world.server.drain, 5.0)
        await wait_all_tasks_blocked()
        infer(world, *range(5, 10), empty_final=empty_final)
        await callback.wait(5)
        # Triton unloads its models first, and says that it does not know them.
        assert {error.message() for error in callback.errors} == {
            "GRPC server is shutting down and has stopped accepting new requests."
        }
        # What it had accepted, it does.
        for number in range(5):
            complete(await world.backend.wait_execution(number))
        await callback.wait(5 + 50 + 5 * empty_final)
        nursery.start_soon(in_thread, world.client.stop_stream)  # with the last stream, the server ends
        await trio.sleep_forever()
    assert responses(callback) == dict.fromkeys(range(5), EVERYTHING)
    assert (len(callback.errors), counters.outcomes, counters.in_flight) == (5, {Outcome.OK: 5}, 0)


@pytest.mark.parametrize("answers_all_the_same", [False, True])
async def test_grpc_async_cancel(tmp_path: Path, answers_all_the_same: bool) -> None:
    """``NonDecoupledTest``.  The model notices the cancel, or does not and answers a request that is gone."""
    async with playing(tmp_path, {MODEL: NOT_DECOUPLED}, RepeatInt32()) as world:
        misbehaviour = world.backend.misbehaviour
        misbehaviour.ignore_release = misbehaviour.swallow_cancelled = answers_all_the_same
        call, execution = await world.executing(MODEL, inputs([1]))
        call.cancel()
        assert await call.cancelled() == LOCALLY
        await world.wait_failures(MODEL, 1)
        assert execution.ended.is_set() is not answers_all_the_same
        execution.let_go()
        await execution.ended.wait()
        await wait_all_tasks_blocked()
        assert world.counters(MODEL).outcomes == {Outcome.CANCELLED: 1}
        assert await in_thread(lambda: world.client.is_model_ready(MODEL))
        assert len(call.errors) == 1
