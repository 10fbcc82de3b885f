"""``L0_request_cancellation/scheduler_test.py``: a cancel in each of the schedulers, while the instance is busy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.parity.qa.world import LOCALLY, NARROW, Callback, World, playing, tensor
from tests.parity.world import eventually, in_thread
from triton_trio import Outcome

pytestmark = pytest.mark.network

IDENTITY = """
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
"""
SCRIPTED = 'backend: "scripted" instance_group [{ count: 1 kind: KIND_CPU }]' + IDENTITY
DYNAMIC = SCRIPTED + "max_batch_size: 2 dynamic_batching { max_queue_delay_microseconds: 600000 }"
SEQUENCE = SCRIPTED + "max_batch_size: 1 "
DIRECT = SEQUENCE + "sequence_batching { direct { } max_sequence_idle_microseconds: 6000000 }"
OLDEST = SEQUENCE + (
    "sequence_batching { oldest { max_candidate_sequences: 1 } max_sequence_idle_microseconds: 6000000 }"
)
ENSEMBLE = (
    'platform: "ensemble" max_batch_size: 1'
    + IDENTITY
    + """
ensemble_scheduling { step [
  { model_name: "dynamic_batch" model_version: -1
    input_map { key: "INPUT0" value: "INPUT0" } output_map { key: "OUTPUT0" value: "out" } },
  { model_name: "dynamic_batch" model_version: -1
    input_map { key: "INPUT0" value: "out" } output_map { key: "OUTPUT0" value: "OUTPUT0" } }
] }"""
)
NO_BATCHER = SCRIPTED + "max_batch_size: 1"


def inputs(value: float = 1.0) -> list[Any]:
    return [tensor("INPUT0", np.full((1, 8), value, np.float32), "FP32")]


ONES = inputs()


async def test_dynamic_batch_scheduler_request_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {"dynamic_batch": DYNAMIC}) as world:
        saturating = [world.call("dynamic_batch", ONES) for _ in range(2)]
        holder = await world.backend.wait_execution()
        assert holder.rows == 2
        queued = await world.queued("dynamic_batch", ONES)
        assert not queued.responded
        queued.cancel()
        assert await queued.cancelled() == LOCALLY
        # Triton looks when it forms the next batch.  Here the instance has not moved.
        await world.wait_failures("dynamic_batch", 1)
        assert (world.backend.running, world.pending("dynamic_batch")) == ([holder], 0)
        assert world.counters("dynamic_batch").reasons == {("client_reset", "queued"): 1}
        holder.finish()
        for call in saturating:
            np.testing.assert_array_equal((await call.result()).as_numpy("OUTPUT0"), np.ones((1, 8)))
        assert await world.execution_count("dynamic_batch") == 1


async def test_sequence_batch_scheduler_backlog_request_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {"sequence_direct": DIRECT}) as world:
        saturating, holder = await world.executing("sequence_direct", ONES, sequence_id=1, sequence_start=True)
        first = await world.queued("sequence_direct", ONES, sequence_id=2, sequence_start=True)
        mate = await world.queued("sequence_direct", ONES, sequence_id=2)
        assert world.sequences("sequence_direct") == (1, 1)
        first.cancel()
        assert await first.cancelled() == LOCALLY
        # Triton answers the backlog when a slot comes free; here the only one is still held by sequence 1.
        assert "sequence 2 of model 'sequence_direct' was cancelled" in await mate.cancelled()
        assert world.backend.running == [holder]
        assert world.sequences("sequence_direct") == (1, 0)
        assert world.failures("sequence_direct") == 2
        holder.finish()
        await saturating.result()
        statistics = await world.statistics("sequence_direct")
        assert (statistics.execution_count, statistics.inference_stats.fail.count) == (1, 2)
        assert world.failures("sequence_direct") == 2


async def _queued_request_cancellation(world: World, model: str, *, first_is_answered: bool) -> None:
    first, holder = await world.executing(model, ONES, sequence_id=1, sequence_start=True)
    queued = await world.queued(model, ONES, sequence_id=1)
    mate = await world.queued(model, ONES, sequence_id=1)
    queued.cancel()
    assert await queued.cancelled() == LOCALLY
    # Triton: when the batcher's thread looks again, which the execution of the first keeps from looking.
    assert "sequence 1 of model" in await mate.cancelled()
    assert world.pending(model) == 0
    if first_is_answered:
        assert world.backend.running == [holder]
        assert not first.responded
        assert world.failures(model) == 2
        holder.finish()
        await first.result()
    else:
        # A sequence is one scope, and so what executes is told at once, too; the device lets go at its next checkpoint.
        assert "sequence 1 of model" in await first.cancelled()
        await holder.ended.wait()
        assert world.failures(model) == 3
    await wait_all_tasks_blocked()
    assert world.sequences(model) == (0, 0)
    assert await world.execution_count(model) == 1
    # The ID is forgotten, and the slot is free: START begins another sequence.
    refused = world.call(model, ONES, sequence_id=1)
    await refused.wait()
    assert refused.errors[0].message() == (
        f"inference request for sequence 1 to model '{model}' must specify the START flag on the first request of the sequence"
    )
    again, execution = await world.executing(model, ONES, sequence_id=1, sequence_start=True)
    execution.finish()
    await again.result()


async def test_direct_sequence_batch_scheduler_request_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {"sequence_direct": DIRECT}) as world:
        await _queued_request_cancellation(world, "sequence_direct", first_is_answered=False)


async def test_direct_sequence_batch_scheduler_request_cancellation_by_tritons_rule(tmp_path: Path) -> None:
    async with playing(tmp_path, {"sequence_direct": DIRECT + NARROW}) as world:
        await _queued_request_cancellation(world, "sequence_direct", first_is_answered=True)


async def test_oldest_sequence_batch_scheduler_request_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {"sequence_oldest": OLDEST}) as world:
        await _queued_request_cancellation(world, "sequence_oldest", first_is_answered=False)


async def test_oldest_sequence_batch_scheduler_request_cancellation_by_tritons_rule(tmp_path: Path) -> None:
    async with playing(tmp_path, {"sequence_oldest": OLDEST + NARROW}) as world:
        await _queued_request_cancellation(world, "sequence_oldest", first_is_answered=True)


async def test_ensemble_scheduler_request_cancellation(tmp_path: Path, mock_clock: MockClock) -> None:
    mock_clock.rate = 1.0  # real time, and where the QA's model waits for company, a jump
    async with playing(tmp_path, {"dynamic_batch": DYNAMIC, "ensemble_model": ENSEMBLE}) as world:
        call = world.call("ensemble_model", ONES)
        await eventually(lambda: world.pending("dynamic_batch") == 1)
        mock_clock.jump(0.6)
        step = await world.backend.wait_execution()
        assert not call.responded
        call.cancel()
        assert await call.cancelled() == LOCALLY
        # Triton lets the step run, and drops its result; here it stops, and the one after it is never made.
        await step.ended.wait()
        await world.wait_failures("ensemble_model", 1)
        assert step.cancelled_after == 0
        assert (world.backend.executions, world.failures("dynamic_batch")) == ([step], 1)
        # Triton counts the ensemble's under OTHER.
        assert world.failures("ensemble_model", "OTHER") == 0
        assert (await world.statistics("dynamic_batch")).inference_stats.fail.count == 1


async def test_scheduler_streaming_request_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {"sequence_oldest": OLDEST}) as world:
        callback = Callback()
        world.client.start_stream(callback)
        for sequence_id in (1, 2):
            for number in range(16):
                world.client.async_stream_infer(
                    "sequence_oldest", ONES, sequence_id=sequence_id, sequence_start=number == 0
                )
        holder = await world.backend.wait_execution()
        await eventually(lambda: world.pending("sequence_oldest") == 31)
        assert world.sequences("sequence_oldest") == (1, 1)
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        assert await callback.cancelled() == LOCALLY  # exactly once
        await holder.ended.wait()
        await world.wait_failures("sequence_oldest", 32)
        assert world.counters("sequence_oldest").outcomes == {Outcome.CANCELLED: 32}
        assert (world.pending("sequence_oldest"), world.sequences("sequence_oldest")) == (0, (0, 0))
        assert world.backend.executions == [holder]
        assert len(callback.errors) == 1


async def test_no_batcher_queued_request_cancellation(tmp_path: Path) -> None:
    async with playing(tmp_path, {"no_batching": NO_BATCHER}) as world:
        first, holder = await world.executing("no_batching", ONES)
        second = await world.queued("no_batching", ONES)
        queued = await world.queued("no_batching", ONES)
        assert world.pending("no_batching") == 2
        assert not queued.responded
        queued.cancel()
        assert await queued.cancelled() == LOCALLY
        await world.wait_failures("no_batching", 1)
        assert (world.backend.running, world.pending("no_batching")) == ([holder], 1)
        holder.finish()
        await first.result()
        (await world.backend.wait_execution(1)).finish()
        await second.result()
        assert await world.execution_count("no_batching") == 2
        assert world.failures("no_batching") == 1


async def test_no_batcher_cancelled_request_is_not_executed_or_cached(tmp_path: Path) -> None:
    models = {"no_batching_cache": NO_BATCHER + " response_cache { enable: true }"}
    async with playing(tmp_path, models, cache_size=1 << 20) as world:
        first, holder = await world.executing("no_batching_cache", inputs(10))
        second = await world.queued("no_batching_cache", inputs(11))
        queued = await world.queued("no_batching_cache", inputs(2))
        queued.cancel()
        assert await queued.cancelled() == LOCALLY
        await world.wait_failures("no_batching_cache", 1)
        assert (world.backend.running, world.pending("no_batching_cache")) == ([holder], 1)
        holder.finish()
        (await world.backend.wait_execution(1)).finish()
        for call in (first, second):
            await call.result()
        assert await world.execution_count("no_batching_cache") == 2
        # Nothing is known of the cancelled one: the same inputs are executed, and then they are.
        again, execution = await world.executing("no_batching_cache", inputs(2))
        execution.finish()
        for call in (again, world.call("no_batching_cache", inputs(2))):
            np.testing.assert_array_equal((await call.result()).as_numpy("OUTPUT0"), np.full((1, 8), 2.0))
        statistics = await world.statistics("no_batching_cache")
        assert (statistics.execution_count, statistics.inference_stats.cache_hit.count) == (3, 1)
        assert world.failures("no_batching_cache") == 1
