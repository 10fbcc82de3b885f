"""``L0_batcher/queue_timeout_test.py``: a request that is still queued when its time is over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from trio.testing import MockClock

from tests.parity.qa.world import playing, tensor
from triton_trio import Outcome

pytestmark = pytest.mark.network

DYNAMIC_BATCH = """
backend: "scripted"
max_batch_size: 1
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
instance_group [{ count: 1 kind: KIND_CPU }]
dynamic_batching { default_queue_policy { default_timeout_microseconds: 1000000 } }
"""
ONES = [tensor("INPUT0", np.ones((1, 8), np.float32), "FP32")]


async def test_default_queue_policy_timeout_prompt_response(tmp_path: Path, mock_clock: MockClock) -> None:
    mock_clock.rate = 1.0  # real time, and where the QA sleeps, a jump
    async with playing(tmp_path, {"dynamic_batch": DYNAMIC_BATCH}) as world:
        saturating, execution = await world.executing("dynamic_batch", ONES)
        late = await world.queued("dynamic_batch", ONES)
        assert not late.responded
        mock_clock.jump(1)
        await late.wait()  # when it is due, and the instance has not moved
        [error] = late.errors
        assert (error.status(), error.message()) == ("StatusCode.UNAVAILABLE", "Request timeout expired")
        assert world.backend.running == [execution]
        assert (world.pending("dynamic_batch"), world.failures("dynamic_batch", "REJECTED")) == (0, 1)
        execution.finish()
        await saturating.result()
        assert world.counters("dynamic_batch").outcomes == {Outcome.OK: 1, Outcome.REJECTED: 1}
