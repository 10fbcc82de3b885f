"""Law 16 for device time: what requests are charged is what the device thread has measured, whoever leaves when."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import triton_trio
from triton_trio.backends.jax import JaxBackend
from triton_trio.testing.device import DeviceGate

from .world import (
    COUNTDOWN,
    COUNTDOWN_CONFIG,
    TICKER,
    TICKER_CONFIG,
    Run,
    countdown,
    open_world,
    ticks,
    until,
    write_model,
)

#: The same arithmetic in each of the three forms.
APPLY = """
import jax.numpy as jnp

def apply(params, inputs):
    return {"Y": jnp.sin(inputs["X"]), "MADE": inputs["STEPS"]}
"""
EXPLICIT = """
import jax.numpy as jnp

def again(x):
    return jnp.sin(x) * 1.1

async def run(ctx, params, inputs):
    x = inputs["X"]
    for _ in range(int(inputs["STEPS"][0, 0])):
        x = await ctx.run(again, x)
        await ctx.checkpoint(x)
    return {"Y": x, "MADE": inputs["STEPS"]}
"""
FORMS = {"steps": COUNTDOWN, "apply": APPLY, "explicit": EXPLICIT}


def total(run: Run) -> float:
    return sum(member.useful_seconds + member.wasted_seconds for member in run.batch.members)


async def leave_at_random(run: Run, gate: DeviceGate, rng: random.Random) -> None:
    """Programs end one by one, and in between somebody may leave."""
    while not run.ended.is_set():
        ended = gate.ended
        gate.let_end(1)
        await until(lambda ended=ended: run.ended.is_set() or gate.ended > ended)
        if rng.random() < 0.5:
            run.cancel(rng.randrange(len(run.requests)))


@pytest.mark.parametrize("form", FORMS)
async def test_law_16_device_seconds_balance_whoever_leaves_when(tmp_path: Path, form: str) -> None:
    rng = random.Random(16)
    gate = DeviceGate()
    context = write_model(tmp_path, FORMS[form], COUNTDOWN_CONFIG, max_batch_size=4, buckets="2,4", ladder="1,2")
    async with open_world(context, gate=gate) as world:
        at_load = world.device.device_seconds
        wasted = 0.0
        for _ in range(25):
            rows = rng.randint(1, 4)
            async with world.running([countdown(rng.randint(1, 12), seed=row) for row in range(rows)]) as run:
                await leave_at_random(run, gate, rng)
            await until(lambda: world.device.jobs == 0)
            wasted += sum(member.wasted_seconds for member in run.batch.members)
            for member in run.batch.members:
                assert min(member.useful_seconds, member.wasted_seconds, member.saved_seconds) >= 0
                if member.left_at is None:
                    assert member.wasted_seconds == member.saved_seconds == 0
            assert total(run) == pytest.approx(run.batch.device_seconds)
            assert world.placed.device_seconds == pytest.approx(world.device.device_seconds - at_load)
        assert world.placed.device_seconds_wasted == pytest.approx(wasted)
        assert 0 < world.placed.device_seconds_wasted < world.placed.device_seconds
        if form != "apply":  # its one program is on the device before anybody can leave
            assert world.placed.device_seconds_saved > 0


async def test_a_chunk_is_charged_by_rows_and_wasted_for_those_who_left_before_its_end(tmp_path: Path) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=4, buckets=4, ladder=4, max_steps=4)
    async with open_world(context, gate=gate) as world:
        async with world.running([countdown(9, rows=2), countdown(9)]) as run:
            await gate.wait_dispatched(1)
            run.cancel(0)
            gate.open()
        two_rows, one_row = run.batch.members
        assert two_rows.useful_seconds == 0
        # The only chunk was for both; the finish, for the one that is left.
        assert one_row.wasted_seconds == 0
        assert 0 < two_rows.wasted_seconds < 2.001 * one_row.useful_seconds
        assert two_rows.saved_seconds == 0  # its last step was under way


async def test_steps_that_were_not_run_are_saved(tmp_path: Path) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=1, ladder=2, max_steps=12)
    async with open_world(context, gate=gate) as world:
        async with world.running([countdown(12)]) as run:
            await gate.wait_dispatched(2)
            run.cancel(0)
            gate.open()
        (member,) = run.batch.members
        # Of twelve steps, the running and the queued chunk of two were made: eight of the same kind were not.
        assert member.wasted_seconds == pytest.approx(world.placed.device_seconds)
        assert member.saved_seconds == pytest.approx(2 * member.wasted_seconds)


async def test_what_others_took_says_what_a_cancel_saves_where_nothing_limits_the_steps(tmp_path: Path) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=1, ladder=1)
    async with open_world(context, gate=gate) as world:
        saved = []
        for served_before in (False, True):
            async with world.running([countdown(50)]) as run:
                await gate.wait_dispatched(gate.ended + 2)
                run.cancel(0)
                gate.let_end(2)
            saved.append(run.batch.members[0].saved_seconds)
            if not served_before:
                async with world.running([countdown(20)]) as run:
                    await leave_never(run, gate)
        assert saved[0] == 0  # nobody knows
        assert saved[1] > 5 * run.batch.device_seconds / 20


async def leave_never(run: Run, gate: DeviceGate) -> None:
    while not run.ended.is_set():
        ended = gate.ended
        gate.let_end(1)
        await until(lambda ended=ended: run.ended.is_set() or gate.ended > ended)


@pytest.mark.parametrize("program", [1, 2, 3])
async def test_law_16_the_time_of_a_program_that_failed_is_charged_too(tmp_path: Path, program: int) -> None:
    gate = DeviceGate()
    gate.open()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=2, buckets=2, ladder=2)
    async with open_world(context, gate=gate) as world:
        at_load = world.device.device_seconds
        gate.fail(program, "INTERNAL: a bit has flipped")
        async with world.running([countdown(9), countdown(9)]) as run:
            pass
        assert run.responses == [[], []]
        assert total(run) == pytest.approx(world.device.device_seconds - at_load)


async def test_law_16_the_models_counters_have_the_same_sum(tmp_path: Path) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=4, ladder="1,2", max_steps=1000)
    gate = DeviceGate()
    backend = JaxBackend(executor=gate.executor)
    with trio.fail_after(30):
        async with triton_trio.open_server(tmp_path, backends={"jax": lambda: backend}) as server:
            model = server.model("m")
            (device,) = backend.statistics()
            at_load = device.device_seconds

            async def leave() -> None:
                async with model.open_responses(countdown(1000)) as responses:
                    await gate.wait_dispatched(2)
                    del responses

            await leave()
            gate.open()
            response = await model.infer(model.request(countdown(3)))
            assert response.outputs["MADE"].tolist() == [[3]]
            await until(lambda: model.counters.execution_count == 2)
            counters = model.counters
            (device,) = backend.statistics()
            assert counters.device_seconds_useful + counters.device_seconds_wasted == pytest.approx(
                device.device_seconds - at_load
            )
            assert (
                min(counters.device_seconds_useful, counters.device_seconds_wasted, counters.device_seconds_saved) > 0
            )


async def test_who_left_before_the_program_was_dispatched_has_had_no_step(tmp_path: Path) -> None:
    """Timeline: a program is on the device and another in line; a leaves that one, and then it runs for b."""
    gate = DeviceGate()
    context = write_model(tmp_path, APPLY, COUNTDOWN_CONFIG, max_batch_size=2, buckets=2)
    async with open_world(context, gate=gate) as world:
        async with world.running([countdown(1)]):
            await gate.wait_dispatched(1)
            async with world.running([countdown(1), countdown(1)]) as run:
                await trio.testing.wait_all_tasks_blocked()
                run.cancel(0)
                gate.open()
        a, b = run.batch.members
        assert (a.steps_after_cancel, b.steps_after_cancel) == (0, 0)
        assert a.wasted_seconds == 0 < b.useful_seconds


@pytest.mark.parametrize("form", FORMS)
async def test_law_16_a_cancelled_execution_is_counted_in_every_form(tmp_path: Path, form: str) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, FORMS[form], COUNTDOWN_CONFIG, max_batch_size=2, buckets=2, ladder=1)
    async with open_world(context, gate=gate) as world:
        async with world.running([countdown(9), countdown(9)]) as run:
            await gate.wait_dispatched(1)
            run.cancel(0, 1)
            gate.open()
        assert (world.placed.executions, world.placed.cancels) == (1, 1)


async def test_law_16_an_execution_that_is_cancelled_while_every_row_is_parked_is_counted(tmp_path: Path) -> None:
    context = write_model(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=1, ladder=2)
    async with open_world(context) as world:
        async with world.running([ticks(50)], read=False) as run:
            (request,) = run.requests
            with trio.CancelScope() as scope, request:
                await until(lambda: not request.can_send)
                await trio.testing.wait_all_tasks_blocked(0.01)
                scope.cancel()
                await trio.sleep_forever()
        assert (world.placed.executions, world.placed.cancels) == (1, 1)


OWN_LIMIT = """
import trio

def again(x):
    return x + 1

async def run(ctx, params, inputs):
    with trio.move_on_after(1):
        await ctx.fetch(again, inputs["X"])
    await trio.sleep(100)
    return {"Y": inputs["X"], "MADE": inputs["STEPS"]}
"""


async def test_law_16_what_an_authors_own_limit_stopped_was_wanted_though_the_client_leaves_later(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, OWN_LIMIT, COUNTDOWN_CONFIG, max_batch_size=1, warmup="false")
    async with open_world(context, gate=gate) as world, world.running([countdown(1)]) as run:
        await gate.wait_dispatched(1)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2)
        await trio.testing.wait_all_tasks_blocked()
        gate.let_end()
        await until(lambda: world.device.cancels == 1)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2)
        run.cancel(0)
        await run.ended.wait()
        (member,) = run.batch.members
        assert member.useful_seconds > 0
        assert member.wasted_seconds == 0


async def test_what_an_apply_takes_is_known_after_the_first(tmp_path: Path) -> None:
    """As of a step: the watchdog allows for it."""
    context = write_model(tmp_path, APPLY, COUNTDOWN_CONFIG, max_batch_size=1)
    async with open_world(context) as world:
        assert world.placed.buckets[0].step_ms is None
        await world.execute(countdown(1))
        assert world.placed.buckets[0].step_ms
