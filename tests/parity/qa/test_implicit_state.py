"""``L0_request_cancellation/implicit_state_test.py``: who has a slot after a cancel *and* an idle time.

In Triton both once released it, and two sequences shared the slot and its state (core#341).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.parity.qa.world import LOCALLY, NARROW, Callback, World, playing, tensor
from tests.parity.world import eventually, in_thread
from triton_trio import Outcome
from triton_trio.batch import Batch, Member
from triton_trio.testing import ScriptedBackend

pytestmark = pytest.mark.network

SEQUENCE_STATE = """
backend: "scripted"
max_batch_size: 1
input { name: "DELAY_ITRS__0" data_type: TYPE_INT64 dims: [ 1 ] }
output { name: "DUMMY_OUT__0" data_type: TYPE_INT64 dims: [ 1 ] }
sequence_batching {
  max_sequence_idle_microseconds: 6000000
  oldest { max_candidate_sequences: 1 }
  control_input [
    { name: "SEQ_START__1" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } },
    { name: "SEQ_ID__2" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } }
  ]
  state {
    input_name: "SEQ_STATE_IN__3" output_name: "SEQ_STATE_OUT__1" data_type: TYPE_INT64 dims: 1
    initial_state { name: "initial_state" data_type: TYPE_INT64 dims: 1 zero_data: true }
  }
}
instance_group { kind: KIND_CPU count: 1 }
"""
INPUTS = [tensor("DELAY_ITRS__0", np.zeros((1, 1), np.int64), "INT64")]


class StateModel(ScriptedBackend):
    """A sequence's state is its ID, set by its first request; the QA's model prints ``Invalid sequence state``."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[tuple[int, int]] = []  #: the ID that was expected, and the one that was found

    def answer(self, batch: Batch, member: Member) -> dict[str, np.ndarray]:
        start, own, found = (int(batch.stack(name).item()) for name in ("SEQ_START__1", "SEQ_ID__2", "SEQ_STATE_IN__3"))
        if not start and own != found:
            self.mixed.append((own, found))
        state = np.full((1, 1), own if start else found, np.int64)
        return {"DUMMY_OUT__0": state, "SEQ_STATE_OUT__1": state}


def infer(world: World, requests: int, *sequence_ids: int) -> Callback:
    callback = Callback()
    world.client.start_stream(callback)
    for number in range(requests):
        for sequence_id in sequence_ids:
            world.client.async_stream_infer(
                "sequence_state", INPUTS, sequence_id=sequence_id, sequence_start=number == 0
            )
    return callback


@pytest.mark.parametrize("rule", ["", NARROW], ids=["ours", "triton's"])
async def test_state_reset_after_cancel(tmp_path: Path, mock_clock: MockClock, rule: str) -> None:
    mock_clock.rate = 1.0  # real time, and where the QA sleeps for a sequence's idle time, a jump
    backend = StateModel()
    async with playing(tmp_path, {"sequence_state": SEQUENCE_STATE + rule}, backend, limit=30) as world:
        outcomes = world.counters("sequence_state").outcomes
        cancelled = infer(world, 10, 1)
        for number in range(2):
            (await backend.wait_execution(number)).finish()
        executing = await backend.wait_execution(2)
        await eventually(lambda: world.pending("sequence_state") == 7)
        await cancelled.wait(2)
        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        await cancelled.wait(3)
        assert [error.message() for error in cancelled.errors] == [LOCALLY]
        await world.wait_failures("sequence_state", 8)
        if rule:
            # What executes is computed to its end, for the state; until then the slot is taken.
            assert (backend.running, world.sequences("sequence_state")) == ([executing], (1, 0))
            executing.finish()
        await executing.ended.wait()
        await wait_all_tasks_blocked()
        assert outcomes == {Outcome.OK: 2, Outcome.CANCELLED: 8}
        assert world.sequences("sequence_state") == (0, 0)
        mock_clock.jump(6 + 2)
        await wait_all_tasks_blocked()
        # Now one of two sequences has the only slot, and the other waits: without END, for its idle time.
        backend.automatic = True
        both = infer(world, 4, 2, 3)
        await eventually(lambda: outcomes[Outcome.OK] == 2 + 4 and world.pending("sequence_state") == 4)
        await wait_all_tasks_blocked()
        assert world.sequences("sequence_state") == (1, 1)
        mock_clock.jump(6)
        await both.wait(8)
        await in_thread(world.client.stop_stream)
        assert both.errors == []
        assert [result.as_numpy("DUMMY_OUT__0").item() for result in both.results] == [2, 3] * 4
        assert backend.mixed == []
        assert [(end.sequence_id, end.cause.value) for _, end in backend.sequence_ends] == [
            (1, "cancelled"),
            (2, "idle"),
        ]
        assert await world.execution_count("sequence_state") == 2 + 1 + 8
