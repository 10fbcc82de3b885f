"""``L0_iterative_sequence/iterative_sequence_e2e.py``: a request that comes back later than its sequence may be idle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.parity.qa.world import Callback, playing, tensor
from tests.parity.world import in_thread
from triton_trio.testing import ScriptedBackend

pytestmark = pytest.mark.network

ITERATIVE = """
backend: "scripted"
max_batch_size: 1
input [{ name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] }]
output [{ name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] }]
model_transaction_policy { decoupled: True }
sequence_batching { iterative_sequence: true }
instance_group [{ kind: KIND_CPU }]
"""
#: What the QA loads the model with, instead.
IMPATIENT = json.dumps(
    {
        "backend": "scripted",
        "max_batch_size": 1,
        "input": [{"name": "INPUT", "data_type": "TYPE_INT32", "dims": [1]}],
        "output": [{"name": "OUTPUT", "data_type": "TYPE_INT32", "dims": [1]}],
        "model_transaction_policy": {"decoupled": True},
        "sequence_batching": {"iterative_sequence": True, "max_sequence_idle_microseconds": 200000},
        "instance_group": [{"kind": "KIND_CPU"}],
    }
)


@pytest.mark.parametrize("config", [None, IMPATIENT], ids=["test_grpc_stream", "test_reschedule_error"])
async def test_reschedule_error(tmp_path: Path, mock_clock: MockClock, config: str | None) -> None:
    """With the model's own idle time, a second, the same requests are answered."""
    mock_clock.rate = 1.0  # real time, and for the backend's delay, half a second, a jump
    backend = ScriptedBackend(lambda left: left - 1)
    async with playing(tmp_path, {"iterative_sequence": ITERATIVE}, backend, explicit=True) as world:
        await in_thread(lambda: world.client.load_model("iterative_sequence", config=config))
        callback = Callback()
        world.client.start_stream(callback)
        world.client.async_stream_infer(
            "iterative_sequence", [tensor("INPUT", np.array([[2]], np.int32), "INT32")], sequence_id=0
        )
        execution = await backend.wait_execution()
        execution.emit()
        await callback.wait()
        assert callback.results[0].as_numpy("OUTPUT").tolist() == [[1]]
        mock_clock.jump(0.5)
        execution.reschedule()
        if config is None:
            (await backend.wait_execution(1)).emit(final=True)
            backend.executions[1].end()
            await callback.wait(2)
            assert callback.errors == []
        else:
            await callback.wait(2)
            (error,) = callback.errors
            assert "must specify the START flag on the first request of the sequence" in error.message()
        await in_thread(world.client.stop_stream)
        await wait_all_tasks_blocked()
        assert world.sequences("iterative_sequence") == (0, 0)
        statistics = await world.statistics("iterative_sequence")
        assert statistics.execution_count == (2 if config is None else 1)
        # What a request spends on the device before it comes back is not time in the queue.
        assert 0 <= statistics.inference_stats.queue.ns < 0.5e9 <= statistics.inference_stats.compute_infer.ns
        assert world.failures("iterative_sequence") == 0
