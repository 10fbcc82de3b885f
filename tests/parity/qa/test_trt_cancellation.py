"""``L0_request_cancellation/trt_cancellation_test.py``: a request that waits for a resource which another model holds.

TensorRT is beside the point: the model has no batcher, so in Triton its requests go straight to the rate limiter, which
does not look whether they are cancelled.  Here they wait in their queue, and the *instance* waits for the resource.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.parity.qa.world import LOCALLY, World, playing, tensor
from triton_trio.batch import Batch, Member
from triton_trio.scheduling import RateLimiterStatistics
from triton_trio.testing import ScriptedBackend

pytestmark = pytest.mark.network

SHARED = """
backend: "scripted"
instance_group [{
  count: 1 kind: KIND_CPU
  rate_limiter { resources [{ name: "SHARED" global: true count: 1 }] }
}]
"""
HOLDER = (
    SHARED
    + """
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
max_batch_size: 1
"""
)
PLAN = (
    SHARED
    + """
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] }, { name: "INPUT1" data_type: TYPE_FP32 dims: [ 16 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] }, { name: "OUTPUT1" data_type: TYPE_FP32 dims: [ 16 ] }]
max_batch_size: 8
"""
)
ONES = [tensor("INPUT0", np.ones((1, 8), np.float32), "FP32")]


class SumAndDifference(ScriptedBackend):
    """What the QA's plan model computes; of one input, the input."""

    def answer(self, batch: Batch, member: Member) -> dict[str, np.ndarray]:
        if len(member.inputs) == 1:
            return super().answer(batch, member)
        a, b = (member.inputs[name] for name in ("INPUT0", "INPUT1"))
        return {"OUTPUT0": a + b, "OUTPUT1": a - b}


def both(value: float) -> list[object]:
    return [tensor(name, np.full((1, 16), value, np.float32), "FP32") for name in ("INPUT0", "INPUT1")]


def resource(world: World) -> tuple[int, int]:
    """How much of it is out, and how many instances wait for it."""
    limiter = world.server.statistics().rate_limiter
    assert isinstance(limiter, RateLimiterStatistics)
    (shared,) = limiter.resources
    return shared.in_use, limiter.waiters


@asynccontextmanager
async def sharing(root: Path) -> AsyncIterator[World]:
    models = {"resource_holder": HOLDER, "plan_no_batching": PLAN}
    async with playing(root, models, SumAndDifference(), rate_limit="execution_count") as world:
        yield world
        assert resource(world) == (0, 0)


async def test_trt_queued_request_cancellation_skips_execution(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        holder, holding = await world.executing("resource_holder", ONES)
        queued = await world.queued("plan_no_batching", both(1))
        assert resource(world) == (1, 1)
        assert not queued.responded
        queued.cancel()
        assert await queued.cancelled() == LOCALLY
        await world.wait_failures("plan_no_batching", 1)
        # While the resource is held: it has left the queue, and with it its instance the line.
        assert world.backend.running == [holding]
        assert (world.pending("plan_no_batching"), resource(world)) == (0, (1, 0))
        holding.finish()
        await holder.result()
        assert await world.execution_count("plan_no_batching") == 0
        assert world.failures("plan_no_batching") == 1
        assert world.counters("plan_no_batching").reasons == {("client_reset", "queued"): 1}


async def test_trt_queued_request_without_cancellation_still_executes(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        holder, holding = await world.executing("resource_holder", ONES)
        queued = await world.queued("plan_no_batching", both(2))
        assert not queued.responded
        holding.finish()
        await holder.result()
        (await world.backend.wait_execution(1)).finish()
        np.testing.assert_array_equal((await queued.result()).as_numpy("OUTPUT0"), np.full((1, 16), 4.0))
        assert await world.execution_count("plan_no_batching") == 1


async def test_trt_request_is_unaffected(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        call, execution = await world.executing("plan_no_batching", both(3))
        execution.finish()
        result = await call.result()
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), np.full((1, 16), 6.0))
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), np.zeros((1, 16)))
