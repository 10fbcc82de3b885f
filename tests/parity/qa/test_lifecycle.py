"""``L0_backend_python/lifecycle`` and ``.../decoupled``: what a model does about a cancel, and errors that end a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from trio.testing import wait_all_tasks_blocked
from tritonclient.utils import InferenceServerException

from tests.parity.qa.world import LOCALLY, Callback, World, playing, tensor
from tests.parity.world import eventually, in_thread
from triton_trio import Outcome, errors
from triton_trio.testing import Execution

pytestmark = pytest.mark.network

EXECUTE_CANCEL = """
backend: "scripted"
max_batch_size: 1
input [{ name: "EXECUTE_DELAY" data_type: TYPE_FP32 dims: [ 1 ] }]
output [{ name: "DUMMY_OUT" data_type: TYPE_FP32 dims: [ 1 ] }]
instance_group [{ kind: KIND_CPU }]
"""
DECOUPLED = EXECUTE_CANCEL + "model_transaction_policy { decoupled: true }"
DELAY = [tensor("EXECUTE_DELAY", np.array([[4]], np.float32), "FP32")]

EXECUTE_GRPC_ERROR = """
backend: "scripted"
max_batch_size: 8
input [{ name: "IN" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }]
instance_group [{ kind: KIND_CPU }]
"""
ERRORS_END_STREAM = {"triton_grpc_error": "true"}
MODEL = "execute_grpc_error"
INPUTS = [tensor("IN", np.ones((2, 2), np.float32), "FP32")]


STUBBORN = pytest.mark.parametrize("stubborn", [False, True], ids=["", "ignores it"])


@STUBBORN
async def test_execute_cancel(tmp_path: Path, stubborn: bool) -> None:
    async with playing(tmp_path, {"execute_cancel": EXECUTE_CANCEL}) as world:
        call, execution = await world.executing("execute_cancel", DELAY, request_id="it")
        await is_told(world, execution, stubborn, call.cancel)
        assert await call.cancelled() == LOCALLY


@STUBBORN
async def test_decoupled_execute_cancel(tmp_path: Path, stubborn: bool) -> None:
    async with playing(tmp_path, {"execute_cancel": DECOUPLED}) as world:
        callback = Callback()
        world.client.start_stream(callback)
        world.client.async_stream_infer("execute_cancel", DELAY, request_id="it")
        execution = await world.backend.wait_execution()
        await is_told(world, execution, stubborn, lambda: world.client.stop_stream(cancel_requests=True))
        assert await callback.cancelled() == LOCALLY


async def is_told(world: World, execution: Execution, stubborn: bool, cancel: Callable[[], None]) -> None:
    """What the QA's model writes into the log.  It asks; here it is told, and if it does not listen, nobody waits for it."""
    misbehaviour = world.backend.misbehaviour
    misbehaviour.ignore_release = misbehaviour.swallow_cancelled = stubborn
    execution.step()
    await wait_all_tasks_blocked()
    assert execution.live == [("it",)]  # "Request not cancelled at 1.0 s"
    await in_thread(cancel)
    await world.wait_failures("execute_cancel", 1)
    assert execution.cancelled_after == 1  # "Request cancelled at"
    assert execution.ended.is_set() is not stubborn
    execution.let_go()
    await execution.ended.wait()
    await wait_all_tasks_blocked()
    assert world.counters("execute_cancel").outcomes == {Outcome.CANCELLED: 1}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.TritonError("error code: UNKNOWN"), "UNKNOWN"),
        (errors.InternalError("error code: INTERNAL"), "INTERNAL"),
        (errors.NotFound("error code: NOT_FOUND"), "NOT_FOUND"),
        (errors.InvalidArgument("error code: INVALID_ARG"), "INVALID_ARGUMENT"),
        (errors.Unavailable("error code: UNAVAILABLE"), "UNAVAILABLE"),
        (errors.Unsupported("error code: UNSUPPORTED"), "UNIMPLEMENTED"),
        (errors.AlreadyExists("error code: ALREADY_EXISTS"), "ALREADY_EXISTS"),
        (errors.RequestCancelled("error code: CANCELLED", "model"), "CANCELLED"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_error_code(tmp_path: Path, error: errors.TritonError, status: str) -> None:
    async with playing(tmp_path, {MODEL: EXECUTE_GRPC_ERROR}) as world:
        call, execution = await world.executing(MODEL, INPUTS)
        fail(execution, error)
        await call.wait()
        assert [str(each) for each in call.errors] == [f"[StatusCode.{status}] {error.message}"]
        # A model that answers CANCELLED has failed; nobody has cancelled anything.
        assert world.counters(MODEL).outcomes == {Outcome.ERROR: 1}
        assert world.failures(MODEL, "BACKEND") == 1


def fail(execution: Execution, error: errors.TritonError) -> None:
    """Its one member gets an error, which is not one of the execution."""

    def answer() -> None:
        assert execution.batch is not None
        [member] = execution.batch.members
        execution.batch.fail(member, error)

    execution.call(answer)
    execution.end()


class Stream:
    """A client with a stream, whose requests are answered and failed in turn, as the QA's model does."""

    def __init__(self, world: World, **options: Any) -> None:
        self.client = triton.InferenceServerClient(world.address)
        self.callback = Callback()
        self._world = world
        self._requests = 0
        self.client.start_stream(self.callback, **options)

    async def infer(self) -> None:
        number = len(self._world.backend.executions)
        self.client.async_stream_infer(MODEL, INPUTS)
        execution = await self._world.backend.wait_execution(number)
        self._requests += 1
        if self._requests % 2:
            execution.finish()
        else:
            fail(execution, errors.InternalError("An Error Occurred"))
        await self.callback.wait(self._requests)

    async def close(self, *, cancel: bool = False) -> None:
        if cancel:
            await in_thread(lambda: self.client.stop_stream(cancel_requests=True))
        await in_thread(self.client.close)

    @property
    def statuses(self) -> list[str | None]:
        return [error.status() for error in self.callback.errors]


async def test_triton_grpc_error_error_on(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: EXECUTE_GRPC_ERROR}) as world:
        stream = Stream(world, headers=ERRORS_END_STREAM)
        await stream.infer()
        await stream.infer()
        assert (len(stream.callback.results), stream.statuses) == (1, ["StatusCode.INTERNAL"])
        assert stream.callback.errors[0].message() == "An Error Occurred"
        # The stream has ended, and the client says so.
        with pytest.raises(InferenceServerException, match="The stream is no longer in valid state"):
            await stream.infer()
        await stream.close()


async def test_triton_grpc_error_multithreaded(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: EXECUTE_GRPC_ERROR}) as world:
        one, other = (Stream(world, headers=ERRORS_END_STREAM) for _ in range(2))
        await one.infer()
        await other.infer()
        await one.infer()
        assert (one.statuses, other.statuses) == (["StatusCode.INTERNAL"], [])
        # The error ended its own stream, and no other.
        await other.infer()
        assert (len(other.callback.results), other.statuses) == (1, ["StatusCode.INTERNAL"])
        await one.close()
        await other.close()


async def test_triton_grpc_error_cancel(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: EXECUTE_GRPC_ERROR}) as world:
        stream = Stream(world, headers=ERRORS_END_STREAM)
        await stream.infer()
        await stream.close(cancel=True)
        await stream.callback.wait(2)
        assert [error.message() for error in stream.callback.errors] == [LOCALLY]
        # And one that is cancelled after an error has ended it, with another request in flight.
        stream = Stream(world, headers=ERRORS_END_STREAM)
        stream.client.async_stream_infer(MODEL, INPUTS)
        stream.client.async_stream_infer(MODEL, INPUTS)
        execution = await world.backend.wait_execution(1)
        await eventually(lambda: world.pending(MODEL) == 1)
        fail(execution, errors.InternalError("An Error Occurred"))
        await stream.callback.wait()
        await stream.close(cancel=True)
        assert stream.statuses == ["StatusCode.INTERNAL"]
        await eventually(lambda: world.server.statistics().in_flight == 0)
        assert world.counters(MODEL).outcomes == {Outcome.OK: 1, Outcome.ERROR: 1, Outcome.CANCELLED: 1}
        assert {reason for reason, _ in world.counters(MODEL).reasons} == {"sibling_failed"}


async def test_triton_grpc_error_error_off(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: EXECUTE_GRPC_ERROR}) as world:
        stream = Stream(world)
        for _ in range(4):
            await stream.infer()
        assert len(stream.callback.results) == 2
        assert [error.message() for error in stream.callback.errors] == ["An Error Occurred"] * 2
        await stream.close()
