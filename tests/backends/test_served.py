"""JAX models behind the server: dynamic batching, cancels, a device that hangs, unload."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import trio

import triton_trio
from triton_trio import Outcome, Reason, Unavailable
from triton_trio.backends.jax import JaxBackend
from triton_trio.testing.device import DeviceGate

from .world import COUNTDOWN, COUNTDOWN_CONFIG, TICKER, TICKER_CONFIG, countdown, ticks, until, write_model

BATCHING = "dynamic_batching { max_queue_delay_microseconds: 50000 }"


async def test_requests_share_a_batch_and_leave_it_one_by_one(tmp_path: Path) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + BATCHING, max_batch_size=4, buckets=4, ladder="1,2")
    gate = DeviceGate()
    made: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}

    with trio.fail_after(30):
        async with triton_trio.open_server(
            tmp_path, backends={"jax": lambda: JaxBackend(executor=gate.executor)}
        ) as server:
            model = server.model("m")
            requests = [model.request(countdown(6, seed)) for seed in range(4)]

            async def client(index: int) -> None:
                try:
                    response = await model.infer(requests[index])
                except triton_trio.RequestCancelled as exc:
                    reasons[index] = exc.reason
                else:
                    made[index] = response.outputs["MADE"].tolist()

            async with trio.open_nursery() as clients:
                for index in range(4):
                    clients.start_soon(client, index)
                await gate.wait_dispatched(2)
                requests[1].cancel(Reason.ADMIN)
                requests[2].cancel(Reason.ADMIN)
                gate.open()
            assert made == {0: [[6]], 3: [[6]]}
            assert reasons == {1: "admin", 2: "admin"}
            assert [request.outcome for request in requests] == [
                Outcome.OK,
                Outcome.CANCELLED,
                Outcome.CANCELLED,
                Outcome.OK,
            ]
            await until(lambda: model.counters.execution_count == 1)
            assert server.ready


async def test_equal_requests_share_an_execution_on_the_device_until_the_last_has_left(tmp_path: Path) -> None:
    config = COUNTDOWN_CONFIG + "dynamic_batching {} response_cache { enable: true }"
    write_model(tmp_path, COUNTDOWN, config, max_batch_size=1, ladder=1)
    gate = DeviceGate()
    with trio.fail_after(30):
        async with triton_trio.open_server(
            tmp_path, backends={"jax": lambda: JaxBackend(executor=gate.executor)}, cache_size=1 << 20
        ) as server:
            model = server.model("m")
            first, second, *others = [model.request(countdown(6)) for _ in range(4)]
            made: list[bytes] = []

            async def client(request: triton_trio.InferenceRequest) -> None:
                with suppress(triton_trio.RequestCancelled):
                    made.append((await model.infer(request)).outputs["Y"].tobytes())

            async with trio.open_nursery() as clients:
                clients.start_soon(client, first)
                clients.start_soon(client, second)
                await gate.wait_dispatched(2)
                first.cancel(Reason.ADMIN)
                gate.let_end()
                await gate.wait_dispatched(3)  # for the one that is left
                second.cancel(Reason.ADMIN)
                gate.let_end(2)
            await until(lambda: model.counters.execution_count == 1)
            assert gate.dispatched == 3
            async with trio.open_nursery() as clients:
                for request in others:
                    clients.start_soon(client, request)
                await gate.wait_dispatched(5)
                others[0].cancel(Reason.ADMIN)
                gate.open()
            await client(model.request(countdown(6)))
            assert len(made) == 2 and made[0] == made[1]
            assert (model.counters.cache_miss.count, model.counters.cache_hit.count) == (1, 1)


async def test_a_stream_of_steps_is_left_early(tmp_path: Path) -> None:
    write_model(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=1, ladder="1,2,4")
    with trio.fail_after(30):
        async with triton_trio.open_server(tmp_path) as server:
            model = server.model("m")
            async with model.open_responses(ticks(1_000_000)) as responses:
                first = [(await anext(responses)).outputs["MADE"].item() for _ in range(20)]
            assert first == list(range(1, 21))
            async with model.open_responses(ticks(3)) as responses:
                rest = [response.outputs["MADE"].item() async for response in responses if response.outputs]
            assert rest == [1, 2, 3]


async def test_b5_a_device_that_hangs_quarantines_its_instances_of_every_model(tmp_path: Path) -> None:
    for name in "mn":
        write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, name=name, max_batch_size=1, ladder=2)
    gate = DeviceGate()
    with trio.fail_after(30):
        async with triton_trio.open_server(
            tmp_path, backends={"jax": lambda: JaxBackend(executor=gate.executor)}, release_limit=0.05
        ) as server:
            model, idle = server.model("m"), server.model("n")
            async with trio.open_nursery() as client:
                client.start_soon(model.infer, countdown(6))
                await gate.wait_dispatched(2)
                client.cancel_scope.cancel()  # the client goes at once, the device never comes back
            await until(lambda: not model.ready and not idle.ready)
            for each in (model, idle):
                with pytest.raises(Unavailable, match="no instance left: device cpu:0 was given up"):
                    await each.infer(countdown(6))
        gate.open()


async def test_b5_a_device_that_hangs_behind_the_last_answer_quarantines_its_instance(tmp_path: Path) -> None:
    """That all are done is known when the next chunk is on the device already; no cancel will come for it."""
    write_model(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=1, ladder=1)
    gate = DeviceGate()
    with trio.fail_after(30):
        async with triton_trio.open_server(
            tmp_path, backends={"jax": lambda: JaxBackend(executor=gate.executor)}, release_limit=0.05
        ) as server:
            model = server.model("m")
            async with model.open_responses(ticks(1)) as responses:
                await gate.wait_dispatched(2)
                gate.let_end()
                assert [r.outputs["MADE"].item() async for r in responses if r.outputs] == [1]
            assert gate.ended < gate.dispatched
            await until(lambda: not model.ready)
        gate.open()


async def test_steps_and_their_answers_are_right_for_many_clients(tmp_path: Path) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + BATCHING, max_batch_size=4, ladder="1,2,4,8")
    with trio.fail_after(30):
        async with triton_trio.open_server(tmp_path) as server:
            model = server.model("m")
            rng = np.random.default_rng(7)
            steps = [int(n) for n in rng.integers(0, 40, size=40)]
            impatient = set(rng.choice(40, size=12, replace=False).tolist())
            made: dict[int, int] = {}

            async def client(index: int) -> None:
                patience = 1e-3 * (index % 7) if index in impatient else 30.0
                with trio.move_on_after(patience):
                    made[index] = (await model.infer(countdown(steps[index], index))).outputs["MADE"].item()

            async with trio.open_nursery() as clients:
                for index in range(40):
                    clients.start_soon(client, index)
            assert all(made[index] == steps[index] for index in made)
            assert set(made) >= set(range(40)) - impatient
            assert model.counters.in_flight == 0
