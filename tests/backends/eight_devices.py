"""What needs eight devices: ``test_several_devices.py`` runs this file in a process that has them.

They are virtual: XLA's CPU, eight times (``XLA_FLAGS=--xla_force_host_platform_device_count=8``).
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trio
import trio.testing

import triton_trio
from triton_trio.backends.jax import JaxBackend
from triton_trio.backends.jax.generation.engine import EngineStatistics
from triton_trio.errors import InvalidArgument, RequestCancelled
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.testing import assert_quiescent
from triton_trio.testing.device import DeviceGate

from .generation.served import Served, Text, drawn, open_served, write_language_model
from .generation.test_sharded import WIDE
from .generation.test_weights import write_directory
from .generation.tiny import random_tensors
from .test_device_states import answer, refused, wave
from .test_served_sequences import WAVE, WAVE_CONFIG
from .world import COUNTDOWN, COUNTDOWN_CONFIG, until, write_model

SETTINGS: dict[str, Any] = {"buckets": 1, "ladder": 1, "max_batch_size": 1, "warmup": "false"}


@pytest.fixture(autouse=True)
def _nothing_stays_on_the_devices() -> Iterator[None]:
    gc.collect()
    before = len(jax.live_arrays())
    yield
    gc.collect()
    assert len(jax.live_arrays()) == before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's CPUs, where JAX is asked for its GPUs."""
    local_devices = jax.local_devices
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: local_devices(backend="cpu"))


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


# Step models, and sequences


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
            answers: dict[int, bytes] = {}

            async def read(steps: int, request: triton_trio.InferenceRequest) -> None:
                with suppress(triton_trio.TritonError):
                    async with model.open_responses(request) as responses:
                        async for response in responses:
                            answers[steps] = response.outputs["Y"].tobytes()

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
            assert one.dispatched == 2
            one.open()
            # Alone, on either device.
            for _ in range(2):
                assert answers == {7: (await model.infer(model.request(inputs(7)))).outputs["Y"].tobytes()}
            assert sorted(thread.cancels for thread in backend.statistics()) == [0, 1]
            await until(lambda: model.scheduler.idle_instances == 2)
            assert_quiescent(server)
    assert backend.statistics() == ()


async def test_a_sequences_state_stays_on_its_device_and_a_cancel_on_the_other_changes_no_bit(
    tmp_path: Path, gpus: None
) -> None:
    """Timeline: a sequence on each of two GPUs; one is left while its program runs; the other goes on; two more, with nobody
    else, have the same bits on either GPU.
    """
    group = "direct { } } instance_group { kind: KIND_GPU gpus: [2, 5] }"
    write_model(tmp_path, WAVE, WAVE_CONFIG + group, max_batch_size=1, buckets=1)
    gates: dict[str, DeviceGate] = defaultdict(DeviceGate)
    backend = JaxBackend(executor=gates.__getitem__)
    with trio.fail_after(20):
        async with triton_trio.open_server(tmp_path, backends={"jax": lambda: backend}) as server:
            model = server.model("m")
            assert sorted(gates) == ["cpu:2", "cpu:5"]
            kept = sorted(
                device.id for array in jax.live_arrays() if array.shape == (2, 1) for device in array.devices()
            )
            assert kept == [2, 5]
            async with trio.open_nursery() as clients:
                clients.start_soon(answer, model, 1, 0.1, "start")
                await until(lambda: any(gate.dispatched for gate in gates.values()))
                other, one = sorted(gates.values(), key=lambda gate: gate.dispatched)
                other.open()
                made = [await answer(model, 2, 0.2, "start")]
                one.let_end()
            leaves = wave(model, 1, 0.3)
            async with trio.open_nursery() as clients:
                clients.start_soon(refused, model, leaves)
                await one.wait_dispatched(2)
                leaves.cancel()
                made += [await answer(model, 2, 0.3), await answer(model, 2, 0.4, "end")]
                one.open()
            assert (one.dispatched, other.dispatched) == (2, 3)
            again: dict[int, list[float]] = {3: [], 4: []}
            for value, flags in ((0.2, "start"), (0.3, ""), (0.4, "end")):
                for sequence, found in again.items():
                    found.append(await answer(model, sequence, value, flags))
            assert again == {3: made, 4: made}
            assert (one.dispatched, other.dispatched) == (5, 6)
            await trio.testing.wait_all_tasks_blocked()
            assert_quiescent(server)
    assert backend.statistics() == ()


# Language models


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
    gate = DeviceGate()
    async with open_served(tmp_path / "eight", gate=gate) as served:
        # Left in the middle of a prompt, and of a text: what was on the devices ends, and that is all.
        for length, ended, programs in ((50, 0, [0, 0]), (10, 2, [0, 1, 1, 1])):
            request, text, before = served.model.request(drawn(5, length, 30)), Text(), gate.dispatched
            async with trio.open_nursery() as readers:
                readers.start_soon(served.read, request, text)
                await gate.wait_dispatched(before + 2)
                await served.advance(ended)
                request.cancel()
                gate.let_end(2)
            assert isinstance(text.error, RequestCancelled)
            await served.idle()
            assert gate.steps[before:] == programs
        gate.open()
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


async def test_two_instances_on_two_devices_each(tmp_path: Path, gpus: None) -> None:
    group = "instance_group { kind: KIND_GPU gpus: [0, 2] }"
    write_wide_model(tmp_path, group, context=64, tensor_parallel=2, slots=1)
    write_overlapping_model(tmp_path)
    async with open_served(tmp_path, explicit=True, load_models=["llm"]) as served:
        assert [engine.device for engine in engines(served)] == ["cpu:0", "cpu:2"]
        with pytest.raises(
            InvalidArgument, match=r"devices cpu:1 to cpu:2 cannot share a model while .* both have cpu:[12]"
        ):
            await served.server.load_model("overlapping")
        alone = await served.make(drawn(0))
        stays, leaves = (served.model.request(drawn(number)) for number in (0, 1))
        kept, left = Text(), Text()
        async with trio.open_nursery() as readers:
            await served.start(readers, (stays, kept), (leaves, left))
            await until(lambda: len(left.ids) >= 3)
            leaves.cancel()
        assert kept.bits == alone.bits
        assert 3 <= len(left.ids) < 30
        assert all(engine.schedule.generations for engine in engines(served))
    assert served.backend.statistics() == ()


def engines(served: Served) -> list[EngineStatistics]:
    backends = [instance.statistics().backend for instance in served.model.instances]
    return [backend for backend in backends if isinstance(backend, EngineStatistics)]


def write_overlapping_model(root: Path) -> None:
    """``overlapping``, on the GPUs 1 and 2."""
    write_wide_model(root / "aside", "instance_group { kind: KIND_GPU gpus: 1 }", context=64, tensor_parallel=2)
    overlapping = (root / "aside" / "llm").rename(root / "overlapping")
    config = overlapping / "config.pbtxt"
    config.write_text(config.read_text().replace('"llm"', '"overlapping"', 1))


@pytest.mark.parametrize(
    ("group", "devices", "words"),
    [
        ("", 9, r"wants 9 devices \(its tensor_parallel\), JAX has 8: cpu:0, "),
        ("kind: KIND_GPU gpus: 6", 4, r"wants 4 devices \(its tensor_parallel\) from 6 on, JAX has 8: cpu:0, "),
        ("", 3, "3 devices cannot share a model whose kv_heads is 8"),
        (
            "kind: KIND_GPU gpus: [0, 1]",
            2,
            r"gpus \[0, 1\] in instance_group .* has 2 of them, counted from the one listed; list 0 and leave out 1",
        ),
    ],
)
async def test_devices_that_cannot_share_it(tmp_path: Path, gpus: None, group: str, devices: int, words: str) -> None:
    write_wide_model(tmp_path, f"instance_group {{ {group} }}" if group else "", context=64, tensor_parallel=devices)
    with pytest.raises(InvalidArgument, match=words):
        async with open_served(tmp_path):
            pass
