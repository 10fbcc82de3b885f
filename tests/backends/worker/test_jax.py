"""JAX models in a worker: the same answers, bit for bit.  Few processes in all, for each takes seconds to begin."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest
import trio

import triton_trio
from tests.backends.generation.served import drawn, write_language_model
from tests.backends.world import COUNTDOWN, COUNTDOWN_CONFIG, countdown, until, write_model
from triton_trio import Model, Outcome, TritonError, Unavailable
from triton_trio.backends import BackendModel, ModelContext
from triton_trio.backends.jax import JaxBackend, backend
from triton_trio.backends.worker import launch, open_worker_model
from triton_trio.testing import assert_quiescent
from triton_trio.testing.device import DeviceGate

from . import broken

#: The kind, too, for otherwise a process is asked which devices there are.
BATCHING = """
dynamic_batching { max_queue_delay_microseconds: 50000 preferred_batch_size: 4 }
instance_group [{ count: 1 kind: KIND_CPU }]
"""


async def test_law_7_survivors_in_a_worker_are_bit_equal_to_those_in_the_server(tmp_path: Path) -> None:
    for name, worker in (("here", "false"), ("there", "true")):
        write_model(
            tmp_path,
            COUNTDOWN,
            COUNTDOWN_CONFIG + BATCHING,
            name=name,
            max_batch_size=4,
            buckets=4,
            ladder="1,2,4",
            worker_process=worker,
        )
    with trio.fail_after(60):
        async with triton_trio.open_server(tmp_path) as server:
            here, there = server.model("here"), server.model("there")
            answers: dict[tuple[str, int], bytes] = {}

            async def client(model: Model, seed: int) -> None:
                response = await model.infer(countdown(100 + seed, seed))
                answers[model.name, seed] = b"".join(array.tobytes() for _, array in sorted(response.outputs.items()))

            async with trio.open_nursery() as clients:
                for seed in range(4):
                    clients.start_soon(client, here, seed)
            leaving = there.request(countdown(1_000_000))
            async with trio.open_nursery() as clients:
                for seed in range(3):
                    clients.start_soon(client, there, seed)
                async with trio.open_nursery() as impatient:
                    impatient.start_soon(there.infer, leaving)
                    # Its batch is formed when all four are there, and ends long before these steps do.
                    await until(lambda: (batch := there.instances[0].batch) is not None and leaving.place is batch)
                    impatient.cancel_scope.cancel()
            for seed in range(3):
                assert answers["here", seed] == answers["there", seed]
            assert leaving.outcome is Outcome.CANCELLED
            async with trio.open_nursery() as last:
                # The last one of a batch leaves: the device is idle for it soon, and serves others.
                last.start_soon(there.infer, countdown(1_000_000_000))
                await until(lambda: there.instances[0].batch is not None)
                last.cancel_scope.cancel()
            await client(there, 3)
            assert answers["here", 3] == answers["there", 3]
            await until(lambda: there.instances[0].batch is None)
            await trio.testing.wait_all_tasks_blocked()
            assert_quiescent(server)
            assert there.counters.device_seconds_useful > 0


async def test_a_language_model_in_a_worker_writes_the_same_text_whoever_leaves(tmp_path: Path) -> None:
    write_language_model(tmp_path, worker_process="true")

    async def read(model: Model, most: int | None = None) -> list[int]:
        tokens: list[int] = []
        async with model.open_responses(drawn(1)) as responses:
            async for response in responses:
                tokens += response.outputs["token_id"].tolist() if response.outputs else []
                if most is not None and len(tokens) >= most:
                    break
        return tokens

    with trio.fail_after(60):
        async with triton_trio.open_server(tmp_path) as server:
            model = server.model("llm")
            assert [instance.name for instance in model.instances] == ["llm_0_0", "llm_0_1", "llm_0_2"]
            alone = await read(model)
            async with trio.open_nursery() as readers:
                for _ in range(2):
                    readers.start_soon(read, model, 5)  # leaves in the middle
                assert await read(model) == alone
            assert len(alone) == 30
            await until(lambda: all(instance.batch is None for instance in model.instances))
            await trio.testing.wait_all_tasks_blocked()
            assert_quiescent(server)


async def test_a_device_that_is_broken_for_the_process_is_given_up_there_and_then(tmp_path: Path) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=1, ladder=1)
    gate = DeviceGate()
    gate.open()
    gate.fail(1, "INTERNAL: CUDA error: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
    with trio.fail_after(30):
        async with triton_trio.open_server(
            tmp_path, backends={"jax": lambda: JaxBackend(executor=gate.executor)}
        ) as server:
            model = server.model("m")
            with pytest.raises(Unavailable, match="after CUDA_ERROR_ILLEGAL_ADDRESS no program can run there"):
                await model.infer(countdown(3))
            await until(lambda: not model.ready)


async def test_a_device_that_is_broken_for_its_worker_is_had_again_in_the_next_one(tmp_path: Path) -> None:
    config = COUNTDOWN_CONFIG + "instance_group [{ count: 1 kind: KIND_CPU }]"
    write_model(tmp_path / "models", COUNTDOWN, config, max_batch_size=1, ladder=1, worker_process="true")
    to_break = tmp_path / "to_break"
    to_break.touch()

    class InWorkers(JaxBackend):
        def open_model(self, context: ModelContext) -> AbstractAsyncContextManager[BackendModel]:
            start = partial(launch, f"{broken.__name__}:{broken.breaking.__name__}", {broken.TO_BREAK: str(to_break)})
            return open_worker_model(context, start)

    with trio.fail_after(60):
        async with triton_trio.open_server(tmp_path / "models", backends={"jax": InWorkers}) as server:
            model = server.model("m")
            (instance,) = model.instances
            first = instance.statistics().backend.pid
            with pytest.raises(TritonError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
                await model.infer(countdown(3))
            await until(lambda: instance.statistics().backend.restarts)
            assert not to_break.exists()
            response = await model.infer(countdown(3))  # waits in its queue meanwhile
            assert response.outputs["MADE"].tolist() == [[3]]
            statistics = instance.statistics().backend
            assert statistics.pid != first
            assert "was killed: " in statistics.last_end and "no program can run there" in statistics.last_end
            await until(lambda: instance.batch is None)
    assert statistics.restarts == 1


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        (
            60,
            "ended with exit code 1: RuntimeError: Unable to initialize backend 'nowhere': .*; make JAX find its devices",
        ),
        (0, "has not ended within 0 s; make JAX find its devices"),
    ],
)
def test_devices_that_no_process_can_find_are_an_error_with_jaxs_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, why: str
) -> None:
    config = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, worker_process="true").config
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    monkeypatch.setattr(backend, "FIND_SECONDS", seconds)
    with pytest.raises(Unavailable, match=f"no devices for worker_process: the process that looks for them {why}"):
        JaxBackend().place(config.instance_groups[0], config)
