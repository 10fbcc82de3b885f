"""``L0_request_cancellation/grpc_cancellation_test.py``, the C++ client's scenarios, and whatever else ends a call early.

The QA sleeps ten seconds in the model and counts lines of the server's log.  Here the test is the model, and what is counted
are the server's books: every request that was started has one outcome.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.parity.qa.world import LOCALLY, Callback, World, playing, tensor
from tests.parity.test_tritonclient_aio import in_asyncio
from tests.parity.world import eventually, in_thread
from triton_trio import Outcome
from triton_trio.testing import Execution, ScriptedBackend

pytestmark = pytest.mark.network

MODEL = "custom_identity_int32"
CONFIG = """
backend: "scripted"
max_batch_size: 1024
input [{ name: "INPUT0" data_type: TYPE_INT32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_INT32 dims: [ -1 ] }]
instance_group [{ kind: KIND_CPU }]
"""
QUEUE = "dynamic_batching { default_queue_policy { allow_timeout_override: true } }"


def inputs(value: int = 1) -> list[Any]:
    return [tensor("INPUT0", np.array([[value]], np.int32), "INT32")]


async def running(world: World, number: int = 0) -> Execution:
    return await world.backend.wait_execution(number)


async def books(world: World, **outcomes: int) -> None:
    """Nothing is in flight, and these are all of the outcomes there have been."""
    await eventually(lambda: world.server.statistics().in_flight == 0)
    await wait_all_tasks_blocked()
    assert {outcome.value: count for outcome, count in world.counters(MODEL).outcomes.items()} == outcomes
    assert world.counters(MODEL).started == sum(outcomes.values())


# grpc_cancellation_test.py


async def test_grpc_async_infer(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        call, execution = await world.executing(MODEL, inputs())
        call.cancel()
        assert await call.cancelled() == LOCALLY
        await execution.ended.wait()
        await books(world, cancelled=1)
        assert world.counters(MODEL).reasons == {("client_reset", "executing"): 1}


async def test_grpc_stream_infer(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        callback = Callback()
        world.client.start_stream(callback)
        world.client.async_stream_infer(MODEL, inputs())
        execution = await running(world)
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        assert await callback.cancelled() == LOCALLY
        await execution.ended.wait()
        await books(world, cancelled=1)


async def signal_when_running(world: World, held: threading.Event) -> None:
    await running(world)
    held.set()


async def test_aio_grpc_async_infer(tmp_path: Path) -> None:
    held = threading.Event()

    async def use(client: Any) -> None:
        call = asyncio.create_task(client.infer(MODEL, inputs()))
        await asyncio.to_thread(held.wait)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async with playing(tmp_path, {MODEL: CONFIG}) as world, trio.open_nursery() as nursery:
        nursery.start_soon(signal_when_running, world, held)
        await in_asyncio(world.address, use)
        await books(world, cancelled=1)


async def test_aio_grpc_stream_infer(tmp_path: Path) -> None:
    held = threading.Event()

    async def use(client: Any) -> None:
        async def requests() -> Any:
            for _ in range(1):
                yield {"model_name": MODEL, "inputs": inputs()}
            await asyncio.Event().wait()  # the QA's client does not close its half either

        responses = client.stream_infer(requests())
        reading = asyncio.ensure_future(anext(responses))
        await asyncio.to_thread(held.wait)
        assert responses.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    async with playing(tmp_path, {MODEL: CONFIG}) as world, trio.open_nursery() as nursery:
        nursery.start_soon(signal_when_running, world, held)
        await in_asyncio(world.address, use)
        await books(world, cancelled=1)


@pytest.mark.parametrize(
    "scenario",
    [
        "test_grpc_async_infer_response_complete_during_cancellation",
        "test_grpc_async_infer_cancellation_before_finish_0",
        "test_grpc_async_infer_cancellation_before_response_complete_and_process_after_final_response",
    ],
)
async def test_a_cancel_and_an_answer_that_meet(tmp_path: Path, scenario: str) -> None:
    """Over a socket, as near to each order as it lets us; ``test_grpc_cancellation_orders.py`` has them exactly."""
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        for number in range(8):
            call, execution = await world.executing(MODEL, inputs())
            if "during" in scenario:
                execution.finish()
                call.cancel()  # whoever is first
            elif "finish_0" in scenario:
                execution.finish()
                await execution.ended.wait()  # the answer is on its way
                call.cancel()
            else:
                call.cancel()
                await eventually(lambda number=number: world.failures(MODEL) == number + 1)
                execution.finish()
            await call.wait()
            assert len(call.results) + len(call.errors) == 1
        await eventually(lambda: world.server.statistics().in_flight == 0)
        counters = world.counters(MODEL)
        assert counters.started == sum(counters.outcomes.values()) == 8
        assert counters.execution_count == 8
        if "after_final" in scenario:
            assert counters.outcomes == {Outcome.CANCELLED: 8}


# The C++ client: one callback for each cancel, siblings undisturbed


async def test_CancelExecuting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        call, execution = await world.executing(MODEL, inputs(1))
        sibling = await world.queued(MODEL, inputs(2))
        call.cancel()
        assert await call.cancelled() == LOCALLY
        await execution.ended.wait()
        (await running(world, 1)).finish()
        assert (await sibling.result()).as_numpy("OUTPUT0").tolist() == [[2]]
        await books(world, ok=1, cancelled=1)
        assert [record.name for record in caplog.records].count("triton_trio.cancel") == 1


async def test_CancelQueued(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG + QUEUE}) as world:
        holder, execution = await world.executing(MODEL, inputs(1))
        first = await world.queued(MODEL, inputs(2))
        second = await world.queued(MODEL, inputs(3))
        first.cancel()
        assert await first.cancelled() == LOCALLY
        await world.wait_failures(MODEL, 1)
        assert not holder.responded and not second.responded
        execution.finish()
        (await running(world, 1)).finish()
        assert (await holder.result()).as_numpy("OUTPUT0").tolist() == [[1]]
        assert (await second.result()).as_numpy("OUTPUT0").tolist() == [[3]]
        await books(world, ok=2, cancelled=1)


async def test_CancelAfterCompletionIsNoOp(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG}, ScriptedBackend(automatic=True)) as world:
        call = world.call(MODEL, inputs())
        await call.result()
        call.cancel()
        assert await in_thread(world.client.is_server_live)  # the connection has brought whatever there was to bring
        assert (len(call.results), call.errors) == (1, [])
        await books(world, ok=1)


async def test_WithoutContext(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who keeps nothing to cancel by, cancels nothing: not even when the garbage is collected."""
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        callback = Callback()
        world.client.async_infer(MODEL, inputs(), callback)
        execution = await running(world)
        gc.collect()
        await in_thread(world.client.is_server_live)
        assert world.backend.running == [execution]
        execution.finish()
        assert (await callback.result()).as_numpy("OUTPUT0").tolist() == [[1]]
        await books(world, ok=1)
        assert "triton_trio.cancel" not in {record.name for record in caplog.records}


async def test_MultiCancelExecuting(tmp_path: Path) -> None:
    config = CONFIG.replace("kind: KIND_CPU", "kind: KIND_CPU count: 3")
    async with playing(tmp_path, {MODEL: config}) as world:
        (one, _), (other, execution), (third, _) = [await world.executing(MODEL, inputs(n)) for n in range(3)]
        one.cancel()
        third.cancel()
        assert [await call.cancelled() for call in (one, third)] == [LOCALLY] * 2
        await world.wait_failures(MODEL, 2)
        assert world.backend.running == [execution]
        execution.finish()
        assert (await other.result()).as_numpy("OUTPUT0").tolist() == [[1]]
        await books(world, ok=1, cancelled=2)


async def test_MultiCancelQueued(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG + QUEUE}) as world:
        holder, execution = await world.executing(MODEL, inputs())
        waiting = [await world.queued(MODEL, inputs(n)) for n in range(4)]
        for call in waiting[:2]:
            call.cancel()
            assert await call.cancelled() == LOCALLY
        await world.wait_failures(MODEL, 2)
        assert world.pending(MODEL) == 2
        execution.finish()
        (await running(world, 1)).finish()  # one batch of the two that are left
        assert [(await call.result()).as_numpy("OUTPUT0").tolist() for call in waiting[2:]] == [[[2]], [[3]]]
        await holder.result()
        await books(world, ok=3, cancelled=2)


@pytest.mark.parametrize("scenario", ["StreamCancelExecuting", "StreamCancelQueued"])
async def test_a_cancelled_stream_has_one_callback(tmp_path: Path, scenario: str) -> None:
    async with playing(tmp_path, {MODEL: CONFIG + QUEUE}) as world:
        holder = None
        if scenario == "StreamCancelQueued":
            holder, execution = await world.executing(MODEL, inputs())
        callback = Callback()
        world.client.start_stream(callback)
        for number in range(3):
            world.client.async_stream_infer(MODEL, inputs(number))
        await eventually(lambda: world.server.statistics().in_flight == 3 + (holder is not None))
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        assert await callback.cancelled() == LOCALLY
        await world.wait_failures(MODEL, 3)
        if holder is not None:
            assert not holder.responded
            execution.finish()
            await holder.result()
        await books(world, cancelled=3, **({} if holder is None else {"ok": 1}))


async def test_StreamCancelWithoutInfer(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        callback = Callback()
        world.client.start_stream(callback)
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        assert await callback.cancelled() == LOCALLY
        await books(world)


async def test_StreamCancelThenRestart(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        before, after = Callback(), Callback()
        world.client.start_stream(before)
        world.client.async_stream_infer(MODEL, inputs(1))
        await running(world)
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        world.client.start_stream(after)
        world.client.async_stream_infer(MODEL, inputs(2))
        (await running(world, 1)).finish()
        assert (await after.result()).as_numpy("OUTPUT0").tolist() == [[2]]
        await in_thread(world.client.stop_stream)
        assert await before.cancelled() == LOCALLY
        await books(world, ok=1, cancelled=1)


# L0_grpc_state_cleanup: as many ends as beginnings


async def test_simple_infer_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG + QUEUE}) as world:
        first, execution = await world.executing(MODEL, inputs(0))
        calls = [first, *[await world.queued(MODEL, inputs(number)) for number in range(1, 10)]]
        calls[5].cancel()
        assert await calls[5].cancelled() == LOCALLY
        await world.wait_failures(MODEL, 1)
        execution.finish()
        (await running(world, 1)).finish()
        for number, call in enumerate(calls):
            if number != 5:
                assert (await call.result()).as_numpy("OUTPUT0").tolist() == [[number]]
        await books(world, ok=9, cancelled=1)


async def test_simple_infer_timeout(tmp_path: Path) -> None:
    async with playing(tmp_path, {MODEL: CONFIG}) as world:
        call = world.call(MODEL, inputs(), client_timeout=0.1)
        execution = await running(world)
        await call.wait()
        assert call.errors[0].status() == "StatusCode.DEADLINE_EXCEEDED"
        await execution.ended.wait()
        await eventually(lambda: world.server.statistics().in_flight == 0)
        # Two clocks: either the server's deadline is first, or the reset of the client's.
        assert sum(world.counters(MODEL).outcomes.values()) == 1
        assert Outcome.OK not in world.counters(MODEL).outcomes
