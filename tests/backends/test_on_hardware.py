"""What depends on the device, on each kind that is here: when a cancel lets go, and whether its memory comes back.

The bounds are loose, for a shared machine; the figures are the benchmarks' (``python -m bench curve``, ``leaving``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import trio
import trio.testing

import triton_trio
from triton_trio.backends.jax import JaxBackend
from triton_trio.backends.jax.device import WINDOW, Executor, Turn
from triton_trio.scheduled_model import ScheduledModel

from .generation.served import asks, write_language_model
from .world import until, write_model

#: 4 MiB of carry, and products that take a GPU some 20 µs and a CPU some 20 ms.
CHAIN = """
import jax.numpy as jnp

def load(context):
    return jnp.eye(1024)

def init(params, inputs):
    return {"x": params * inputs["X"][0], "left": inputs["X"][0]}

def step(params, carry):
    return {"x": jnp.tanh(carry["x"] @ params), "left": carry["left"] - 1}

def done(carry):
    return carry["left"] <= 0

def finish(params, carry):
    return {"Y": carry["x"][0, :1]}
"""
CHAIN_CONFIG = """
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [1] }]
instance_group [{ kind: %s }]
"""


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> jax.Device:
    try:
        return jax.local_devices(backend=request.param)[0]
    except RuntimeError:
        pytest.skip(f"JAX has no {request.param} here")


class Dispatches(Executor):
    """When programs went to the device."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def dispatch(self, turn: Turn) -> bool:
        self.at.append(time.perf_counter())
        return super().dispatch(turn)


@pytest.fixture
def released(caplog: pytest.LogCaptureFixture) -> Iterator[list[float]]:
    """Milliseconds from each cancel to the device's release, as the server's lines say."""
    found: list[float] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.__dict__["device_ms_after_cancel"])

    logger, listener = logging.getLogger("triton_trio.cancel"), Listener()
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    logger.addHandler(listener)
    yield found
    logger.removeHandler(listener)


def bytes_in_use(device: jax.Device) -> int:
    statistics = device.memory_stats()
    if statistics is not None:
        return int(statistics["bytes_in_use"])
    return sum(array.nbytes for array in jax.live_arrays() if device in array.devices())


async def test_law_6_C7_a_cancel_is_in_the_next_program_and_gives_its_memory_back(
    tmp_path: Path, device: jax.Device, released: list[float]
) -> None:
    write_model(
        tmp_path, CHAIN, CHAIN_CONFIG % f"KIND_{device.platform.upper()}", max_batch_size=1, ladder="1,2,4,8,16,32"
    )
    dispatches = Dispatches()
    backend = JaxBackend(executor=lambda name: dispatches)
    async with triton_trio.open_server(tmp_path, backends={"jax": lambda: backend}) as server:
        model = server.model("m")
        assert isinstance(model, ScheduledModel)
        await model.infer({"X": np.full((1, 1), 20, np.float32)})
        await until(lambda: model.instances[0].batch is None)
        idle = bytes_in_use(device)
        for number in range(5):
            dispatched = len(dispatches.at)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(model.infer, {"X": np.full((1, 1), 1e9, np.float32)}, name="client")
                await until(lambda dispatched=dispatched: len(dispatches.at) >= dispatched + 2 * WINDOW)
                nursery.cancel_scope.cancel()
            cancelled_at = time.perf_counter()
            await until(lambda number=number: len(released) == number + 1)
            # One may have been on its way while the scope was cancelled.
            assert sum(at > cancelled_at for at in dispatches.at) == 0
            assert bytes_in_use(device) <= idle
        (placed,) = model.instances[0].statistics().backend.buckets  # type: ignore[union-attr]
        chunk = max(placed.target_ms, (placed.step_ms or 0) * placed.k)
        assert min(released) < (WINDOW + 1) * chunk + 20


async def test_C7_texts_that_are_left_give_their_slots_back_and_no_memory_is_taken(
    tmp_path: Path, device: jax.Device, released: list[float]
) -> None:
    kind = f"instance_group [{{ kind: KIND_{device.platform.upper()} }}]"
    write_language_model(tmp_path, kind + " model_transaction_policy { decoupled: false }", slots=2)
    async with triton_trio.open_server(tmp_path) as server:
        model = server.model("llm")
        assert isinstance(model, ScheduledModel)
        await model.infer(asks([1, 2, 3], max_tokens=2, ignore_eos=True))
        await until(lambda: all(instance.batch is None for instance in model.instances))
        idle = bytes_in_use(device)
        for number in range(4):
            async with trio.open_nursery() as nursery:
                for seed in range(2):
                    inputs = asks(range(1, 40 + seed), max_tokens=50, ignore_eos=True)
                    nursery.start_soon(model.infer, inputs, name="client")
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await until(lambda number=number: len(released) == 2 * (number + 1))
            assert bytes_in_use(device) <= idle
        response = await model.infer(asks([1, 2, 3], max_tokens=5, ignore_eos=True))
        assert len(response.outputs["token_id"]) == 5
