"""What needs eight devices: ``test_several_devices.py`` runs this file in a process that has them.

They are virtual: XLA's CPU, eight times (``XLA_FLAGS=--xla_force_host_platform_device_count=8``).
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import trio

import triton_trio
from triton_trio.backends.jax import JaxBackend
from triton_trio.errors import InvalidArgument
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.testing import assert_quiescent
from triton_trio.testing.device import DeviceGate

from .generation.served import Served, Text, drawn, open_served, write_language_model
from .generation.test_sharded import WIDE
from .generation.test_weights import write_directory
from .generation.tiny import random_tensors
from .world import COUNTDOWN, COUNTDOWN_CONFIG, until, write_model

SETTINGS = {"buckets": 1, "ladder": 1, "max_batch_size": 1, "warmup": "false"}


def write_wide_model(root: Path, config: str = "", **parameters: object) -> Path:
    """With eight key/value heads."""
    write_language_model(root, config, **parameters)
    write_directory(
        root / "llm" / "1",
        random_tensors(WIDE),
        hidden_size=WIDE.width,
        num_hidden_layers=WIDE.layers,
        num_attention_heads=WIDE.heads,
        num_key_value_heads=WIDE.kv_heads,
        head_dim=WIDE.head_dim,
        intermediate_size=WIDE.hidden,
        max_position_embeddings=WIDE.context,
        rope_theta=WIDE.rope_theta,
    )
    return root


def inputs(steps: int) -> dict[str, np.ndarray]:
    return {"X": np.array([[1, 2, 3]], np.float32), "STEPS": np.array([[steps]], np.int32)}


async def test_two_instances_on_two_devices_and_a_cancel_on_one_is_nothing_to_the_other(tmp_path: Path) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + "instance_group { kind: KIND_CPU count: 2 }", **SETTINGS)
    gates: dict[str, DeviceGate] = defaultdict(DeviceGate)
    backend = JaxBackend(executor=gates.__getitem__)
    with trio.fail_after(20):
        async with triton_trio.open_server(tmp_path, backends={"jax": lambda: backend}) as server:
            model = server.model("m")
            assert isinstance(model, ScheduledModel)
            assert sorted(gates) == ["cpu:0", "cpu:1"]
            assert len({thread.name for thread in backend.statistics()}) == 2
            answers: dict[int, float] = {}

            async def read(steps: int, request: triton_trio.InferenceRequest) -> None:
                with suppress(triton_trio.TritonError):
                    async with model.open_responses(request) as responses:
                        async for response in responses:
                            answers[steps] = float(response.outputs["MADE"][0, 0])

            async with trio.open_nursery() as readers:
                leaves, stays = (model.request(inputs(steps)) for steps in (40, 7))
                readers.start_soon(read, 40, leaves)
                await until(lambda: any(gate.dispatched == 2 for gate in gates.values()))
                readers.start_soon(read, 7, stays)
                await until(lambda: all(gate.dispatched == 2 for gate in gates.values()))
                # Both devices are at work at the same time.
                one, other = (gates[name] for name in ("cpu:0", "cpu:1"))
                if model.instances[0].batch is not None and model.instances[0].batch.members[0].request is stays:
                    one, other = other, one
                leaves.cancel()
                one.let_end(2)
                await until(lambda: model.scheduler.idle_instances == 1)
                assert (one.ended, other.ended) == (2, 0)
                other.open()
            assert answers == {7: 7}
            assert one.dispatched == 2
            assert sorted(thread.cancels for thread in backend.statistics()) == [0, 1]
            await until(lambda: model.scheduler.idle_instances == 2)
            assert_quiescent(server)
    assert backend.statistics() == ()


async def texts(served: Served) -> list[list[int]]:
    """Three texts, one of which is left, and a fourth in its slot."""
    requests = [served.model.request(drawn(number)) for number in range(4)]
    found = [Text() for _ in requests]
    async with trio.open_nursery() as readers:
        await served.start(readers, *zip(requests, found, strict=True))
        await until(lambda: len(found[1].ids) >= 3)
        requests[1].cancel()
    await served.stands_still()  # no device waits for another
    assert len(found[1].ids) < 30
    return [text.ids for text in (found[0], found[2], found[3])]


async def test_a_model_on_eight_devices_says_what_it_says_on_one_and_a_cancel_leaves_no_device_waiting(
    tmp_path: Path,
) -> None:
    async with open_served(write_wide_model(tmp_path / "one", context=64)) as served:
        one = await texts(served)
    write_wide_model(tmp_path / "eight", context=64, tensor_parallel=8, warmup="true")
    # Beside it a model on two of its devices: on the first it shares the thread, on the second it has its own.
    write_model(
        tmp_path / "eight", COUNTDOWN, COUNTDOWN_CONFIG + "instance_group { kind: KIND_CPU count: 2 }", **SETTINGS
    )
    async with open_served(tmp_path / "eight") as served:
        beside = served.server.model("m")
        async with trio.open_nursery() as others:
            for steps in (50, 60, 70):
                others.start_soon(beside.infer, beside.request(inputs(steps)))
            assert await texts(served) == one
            assert await texts(served) == one
        assert sorted(thread.name for thread in served.backend.statistics()) == ["cpu:0", "cpu:1"]
        load = served.engine.load
        assert load is not None
        assert load.devices == tuple(f"cpu:{number}" for number in range(8))
        assert load.cache_bytes < served.engine.cache_bytes / 7
        assert load.step_ms is not None
    assert served.backend.statistics() == ()


async def test_two_instances_on_four_devices_each(tmp_path: Path) -> None:
    group = "instance_group { kind: KIND_CPU count: 2 }"
    async with open_served(write_wide_model(tmp_path, group, context=64, tensor_parallel=4, slots=1)) as served:
        engines = [instance.statistics().backend for instance in served.model.instances]
        assert [engine.load.devices[0] for engine in engines] == ["cpu:0", "cpu:4"]  # type: ignore[union-attr]
        first, second, third = await gather(served, 0, 1, 0)
        assert first == third != second
        assert all(engine.statistics().backend.schedule.generations for engine in served.model.instances)  # type: ignore[union-attr]
    assert served.backend.statistics() == ()


async def gather(served: Served, *numbers: int) -> list[list[int]]:
    requests = [(served.model.request(drawn(number)), Text()) for number in numbers]
    async with trio.open_nursery() as readers:
        for request, text in requests:
            readers.start_soon(served.read, request, text)
    return [text.ids for _, text in requests]


async def test_more_than_there_are(tmp_path: Path) -> None:
    write_wide_model(tmp_path, context=64, tensor_parallel=9)
    with pytest.raises(InvalidArgument, match=r"wants 9 devices \(its tensor_parallel\), JAX has 8: cpu:0, "):
        async with open_served(tmp_path):
            pass
