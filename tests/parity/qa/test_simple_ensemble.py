"""``L0_simple_ensemble/ensemble_backpressure_test.py``: a stream of an ensemble whose second step is behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from trio.testing import wait_all_tasks_blocked

from tests.ensemble.world import Steps
from tests.parity.qa.world import LOCALLY, Callback, playing, tensor
from tests.parity.world import eventually, in_thread
from triton_trio import Outcome
from triton_trio.batch import Batch, Member
from triton_trio.testing import ScriptedBackend

pytestmark = pytest.mark.network

PRODUCER = """
backend: "scripted"
max_batch_size: 1
input [{ name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }]
output [{ name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }]
instance_group [{ count: 1 kind: KIND_CPU }]
model_transaction_policy { decoupled: true }
"""
CONSUMER = """
backend: "scripted"
max_batch_size: 1
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] }]
instance_group [{ count: 1 kind: KIND_CPU }]
"""
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 1
input [{ name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }]
output [{ name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }]
ensemble_scheduling {
  max_inflight_requests: 4
  step [
    { model_name: "decoupled_producer" model_version: -1
      input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "intermediate" } },
    { model_name: "slow_consumer" model_version: -1
      input_map { key: "INPUT0" value: "intermediate" } output_map { key: "OUTPUT0" value: "OUT" } }
  ]
}
"""
MODELS = {"decoupled_producer": PRODUCER, "slow_consumer": CONSUMER, "ensemble_limit_4": ENSEMBLE}


class Halves(ScriptedBackend):
    """The producer's responses are 0.5, and the consumer's what it gets."""

    def answer(self, batch: Batch, member: Member) -> dict[str, np.ndarray]:
        if "IN" in member.inputs:
            return {"OUT": np.full((1, 1), 0.5, np.float32)}
        return super().answer(batch, member)


async def test_request_cancellation_under_backpressure(tmp_path: Path) -> None:
    backend = Halves()
    steps = Steps(backend)
    async with playing(tmp_path, MODELS, backend) as world:
        callback = Callback()
        world.client.start_stream(callback)
        world.client.async_stream_infer(
            model_name="ensemble_limit_4",
            inputs=[tensor("IN", np.array([[32]], np.int32), "INT32")],
            outputs=[triton.InferRequestedOutput("OUT")],
        )
        producer = await backend.wait_execution()
        sent: list[int] = []
        for number in range(32):
            producer.emit()
            producer.call(lambda number=number: sent.append(number))
        await backend.wait_execution(1)
        await steps.finish_first("slow_consumer")
        await callback.wait()
        assert callback.results[0].as_numpy("OUT").tolist() == [[0.5]]
        await eventually(lambda: world.counters("slow_consumer").in_flight == 4)
        await wait_all_tasks_blocked()
        # The second response is on the device, three are behind it: the limit.  The producer waits, and not for nothing.
        assert world.counters("slow_consumer").in_flight == 4
        assert world.pending("slow_consumer") == 3
        assert len(sent) < 31

        await in_thread(lambda: world.client.stop_stream(cancel_requests=True))
        await callback.wait(2)
        assert [(error.status(), error.message()) for error in callback.errors] == [("StatusCode.CANCELLED", LOCALLY)]
        # Triton: its steps do not hear of it, and who waits for the limit is not woken.  Here nothing is left of it.
        await world.wait_failures("ensemble_limit_4", 1)
        assert backend.running == []
        assert len(steps.of("slow_consumer")) == 2
        assert 0 < len(callback.results) < 32
        assert world.failures("decoupled_producer") == 1
        assert world.counters("slow_consumer").outcomes == {Outcome.OK: 1, Outcome.CANCELLED: 4}
        assert world.failures("ensemble_limit_4", "OTHER") == 0
