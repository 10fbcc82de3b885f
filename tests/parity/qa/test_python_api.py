"""``L0_python_api``: a request that is executing when its frontend is stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio
import tritonclient.grpc as triton
from trio.testing import wait_all_tasks_blocked
from tritonclient.utils import InferenceServerException

from tests.parity.qa.world import playing, tensor
from tests.parity.world import in_thread
from triton_trio import Outcome

pytestmark = pytest.mark.network

DELAYED_IDENTITY = """
backend: "scripted"
max_batch_size: 64
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
instance_group [{ kind: KIND_CPU }]
"""
INPUTS = [tensor("INPUT0", np.array([[2]], np.float32), "FP32")]


async def test_grpc_req_during_shutdown(tmp_path: Path) -> None:
    async with playing(tmp_path, {"delayed_identity": DELAYED_IDENTITY}) as world:
        counters = world.counters("delayed_identity")
        call, execution = await world.executing("delayed_identity", INPUTS)
        await world.server.drain(0)
        with trio.fail_after(5, shield=True):  # the server ends, and with it this block
            await call.wait()
        await trio.sleep_forever()
    # In Triton, CANCELLED without a word; the client has not cancelled anything, and may ask another server.
    assert [error.status() for error in call.errors] == ["StatusCode.UNAVAILABLE"]
    assert "the server is shutting down" in call.errors[0].message()
    assert (execution.cancelled_after, counters.outcomes) == (0, {Outcome.CANCELLED: 1})
    assert counters.reasons == {("server_drain", "executing"): 1}

    def another() -> None:
        with triton.InferenceServerClient(world.address) as client:
            client.infer("delayed_identity", INPUTS)

    with pytest.raises(InferenceServerException, match=r"StatusCode.UNAVAILABLE.* failed to connect to all addresses"):
        await in_thread(another)


async def test_grpc_req_during_shutdown_within_its_grace(tmp_path: Path) -> None:
    async with playing(tmp_path, {"delayed_identity": DELAYED_IDENTITY}) as world, trio.open_nursery() as nursery:
        call, execution = await world.executing("delayed_identity", INPUTS)
        nursery.start_soon(world.server.drain, 5.0)
        await wait_all_tasks_blocked()
        assert not call.responded
        execution.finish()
        with trio.fail_after(5, shield=True):
            await call.wait()
        await trio.sleep_forever()
    assert (await call.result()).as_numpy("OUTPUT0").tolist() == [[2]]
