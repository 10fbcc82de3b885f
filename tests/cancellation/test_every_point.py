"""A cancel at every scheduling point of a request's life (A5, A6, B3, C7): nothing is left, neighbours are served."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from triton_trio import InferenceRequest, Model, Outcome, Reason, TritonError
from triton_trio.testing import ScriptedBackend, Victim, open_test_server, scripted_config, sweep

CONFIGS = {
    "default": scripted_config(max_batch_size=1),
    "batched": scripted_config(max_batch_size=4, batching=""),
    "delayed": scripted_config(max_batch_size=2, batching="max_queue_delay_microseconds: 3600000000"),
    "ordered": scripted_config(max_batch_size=1, batching="preserve_ordering: true", instances=2),
    "timed": scripted_config(
        max_batch_size=2, batching="default_queue_policy { default_timeout_microseconds: 9000000 }"
    ),
}


def row(value: float) -> dict[str, np.ndarray]:
    return {"INPUT0": np.full((1, 2), value, np.float32)}


def repositories(tmp_path: Path) -> Callable[[], Path]:
    """A new directory each time."""
    numbers = iter(range(10_000))
    return lambda: tmp_path / str(next(numbers))


async def drive(backend: ScriptedBackend) -> None:
    """Two steps for every execution, each when everybody waits."""
    number = 0
    while True:
        execution = await backend.wait_execution(number)
        for _ in range(2):
            await wait_all_tasks_blocked()
            execution.step()
        await wait_all_tasks_blocked()
        execution.finish()
        number += 1


@pytest.mark.parametrize("name", CONFIGS)
async def test_A6_B3_a_request_and_its_neighbours(tmp_path: Path, name: str) -> None:
    new_directory = repositories(tmp_path)
    seen = set()

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend()
        async with open_test_server(new_directory(), {"m": CONFIGS[name]}, backend) as server:
            model = server.model("m")
            outputs = {}

            async def neighbour(value: float) -> None:
                outputs[value] = (await model.infer(row(value))).outputs["OUTPUT0"]

            request = model.request(row(1), request_id="victim")
            async with trio.open_nursery() as drivers:
                drivers.start_soon(drive, backend)
                async with trio.open_nursery() as clients:
                    clients.start_soon(neighbour, 5.0)
                    await wait_all_tasks_blocked()
                    if name == "delayed":
                        clients.start_soon(neighbour, 6.0)
                    with victim:
                        await model.infer(request)
                    clients.start_soon(neighbour, 7.0)
                    await wait_all_tasks_blocked()
                    if name == "delayed" and len(model.scheduler) % 2:
                        clients.start_soon(neighbour, 8.0)  # an odd one would wait for company for an hour
                drivers.cancel_scope.cancel()
            for value, output in outputs.items():
                assert (output == value).all()
            assert {5.0, 7.0} <= set(outputs)
            assert request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)
            if victim.cancelled:
                assert request.reason is Reason.CLIENT_RESET
                seen.add(request.stage.value)
                steps = sum("victim" in live for execution in backend.executions for live in execution.live)
                assert steps <= 2

    assert await sweep(scenario) > 3
    assert {"queued", "executing"} <= seen or name == "default"


async def test_A6_a_stream(tmp_path: Path) -> None:
    new_directory = repositories(tmp_path)

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend()
        config = scripted_config(max_batch_size=1, decoupled=True)
        async with open_test_server(new_directory(), {"m": config}, backend) as server:
            model = server.model("m")
            request = model.request(row(1))
            received = 0

            async def emit() -> None:
                execution = await backend.wait_execution()
                for _ in range(3):
                    await wait_all_tasks_blocked()
                    execution.emit()
                execution.end()

            async with trio.open_nursery() as drivers:
                drivers.start_soon(emit)
                with victim:
                    async with model.open_responses(request) as responses:
                        async for _ in responses:
                            received += 1
                drivers.cancel_scope.cancel()
            assert request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)
            assert victim.cancelled or received == 4

    assert await sweep(scenario) > 5


async def test_A6_the_work_of_a_cancelled_caller_stops(tmp_path: Path) -> None:
    """No execution takes a step once its last member has left, wherever it was."""
    new_directory = repositories(tmp_path)

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend()
        async with open_test_server(new_directory(), {"m": CONFIGS["batched"]}, backend) as server:
            model = server.model("m")
            async with trio.open_nursery() as drivers:
                drivers.start_soon(drive, backend)
                with victim:
                    async with trio.open_nursery() as clients:
                        for value in range(6):
                            clients.start_soon(model.infer, row(value))
                steps = sum(execution.steps for execution in backend.executions)
                await wait_all_tasks_blocked()
                assert sum(execution.steps for execution in backend.executions) == steps
                drivers.cancel_scope.cancel()
            assert model.statistics().in_flight == 0
            assert model.counters.in_flight == 0

    assert await sweep(scenario) > 10


@pytest.mark.parametrize("name", ["default", "batched", "timed"])
async def test_C7_after_a_cancel_at_any_point_every_array_dies(tmp_path: Path, name: str) -> None:
    new_directory = repositories(tmp_path)

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend(lambda stacked: stacked + 1)
        async with open_test_server(new_directory(), {"m": CONFIGS[name]}, backend) as server:
            gc.disable()  # a cycle would keep them until some later day
            try:
                async with trio.open_nursery() as drivers:
                    drivers.start_soon(drive, backend)
                    await wait_all_tasks_blocked()
                    alive = await call_and_forget(server.model("m"), victim)
                    await wait_all_tasks_blocked()
                    await trio.lowlevel.checkpoint()
                    assert [what for what, array in alive.items() if array() is not None] == []
                    drivers.cancel_scope.cancel()
            finally:
                gc.enable()

    assert await sweep(scenario) > 3


async def call_and_forget(model: Model, victim: Victim) -> dict[str, weakref.ref[object]]:
    inputs = row(1)
    request: InferenceRequest = model.request(inputs)
    alive: dict[str, weakref.ref[object]] = {
        "input": weakref.ref(inputs["INPUT0"]),
        "inputs of the request": weakref.ref(request.inputs["INPUT0"]),
    }
    with victim:
        response = await model.infer(request)
        alive["output"] = weakref.ref(response.outputs["OUTPUT0"])
    return alive


async def test_B3_cancelling_everybody_at_every_point_of_an_unload(tmp_path: Path) -> None:
    new_directory = repositories(tmp_path)

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend(automatic=True)
        async with open_test_server(new_directory(), {"m": CONFIGS["batched"]}, backend) as server:
            model = server.model("m")
            ended: list[str] = []
            with victim:
                async with trio.open_nursery() as nursery:
                    for value in range(3):
                        nursery.start_soon(outcome_of, model, value, ended)
                    nursery.start_soon(server.unload_model, "m")
            if not victim.cancelled:
                assert len(ended) == 3
            if server.repository._entries["m"].models:
                await server.unload_model("m")  # cancelled before it began
            await model.wait_stopped()
            assert backend.open_models == 0
            assert model.counters.in_flight == 0

    assert await sweep(scenario) > 3


async def outcome_of(model: Model, value: float, ended: list[str]) -> None:
    request = model.request(row(value))
    try:
        await model.infer(request)
    except TritonError as exc:
        ended.append(type(exc).__name__)
    else:
        ended.append("ok")
    assert request.outcome is not None
