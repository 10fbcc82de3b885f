"""Cancelling rows and executions at every chunk boundary: neighbours, the device, and what is left behind."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
import trio

from triton_trio.backends.jax import DeviceState, JaxBackend, Turn
from triton_trio.errors import InternalError, RequestCancelled, Unavailable
from triton_trio.lifecycle import Outcome
from triton_trio.scopes import Reason
from triton_trio.testing.device import DeviceGate

from .world import (
    COUNTDOWN,
    COUNTDOWN_CONFIG,
    TICKER,
    TICKER_CONFIG,
    Run,
    World,
    countdown,
    open_world,
    ticks,
    until,
    write_model,
)

STEPS = 12
BATCH = [countdown(STEPS, seed) for seed in range(8)]


class Regate(DeviceGate):
    """A gate that can be closed again, so that one compiled model serves many gated batches."""

    def __init__(self) -> None:
        super().__init__()
        self._dispatched = threading.Condition()

    def dispatch(self, turn: Turn) -> bool:
        done = super().dispatch(turn)
        with self._dispatched:
            self._dispatched.notify_all()
        return done

    def block_until_dispatched(self, count: int) -> None:
        """Wait for the device thread without letting any task run."""
        with self._dispatched:
            assert self._dispatched.wait_for(lambda: self.dispatched >= count, timeout=30)

    def close(self) -> None:
        self._opened = False
        while self._permits.acquire(blocking=False):
            pass
        self.dispatched = self.ended = 0
        self.steps.clear()


@asynccontextmanager
async def gated(tmp_path: Path, **parameters: object) -> AsyncIterator[tuple[World, Regate]]:
    gate = Regate()
    context = write_model(
        tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2, **{"max_steps": STEPS, **parameters}
    )
    async with open_world(context, gate=gate) as world:
        yield world, gate


async def advance(run: Run, gate: Regate, chunks: int) -> None:
    """Let ``chunks`` chunks end, one after the other, until the server has heard of them and asked for more."""
    for _ in range(chunks):
        before = run.batch.device_seconds
        gate.let_end(1)
        await until(lambda before=before: run.batch.device_seconds != before)
        await trio.testing.wait_all_tasks_blocked()


async def test_b9_survivors_are_bit_equal_for_every_number_of_leavers_at_every_boundary(tmp_path: Path) -> None:
    chunks = STEPS // 2
    async with gated(tmp_path) as (world, gate):
        gate.open()
        expected = [response["Y"].tobytes() for (response,) in await world.execute(*BATCH)]
        for boundary in range(1, chunks + 1):
            for leavers in range(9):
                gate.close()
                leave = [(3 * index + boundary) % 8 for index in range(leavers)]
                async with world.running(BATCH) as run:
                    await advance(run, gate, boundary - 1)
                    # One chunk is running and, unless it is the last, one is queued behind it.
                    await gate.wait_dispatched(min(boundary + 1, chunks))
                    run.cancel(*leave)
                    dispatched = gate.dispatched
                    gate.open()
                survivors = [index for index in range(8) if index not in leave]
                assert [index for index in range(8) if run.responses[index]] == survivors
                for index in survivors:
                    assert run.responses[index][0]["Y"].tobytes() == expected[index]
                for index in leave:
                    assert run.requests[index].outcome is Outcome.CANCELLED
                    assert isinstance(run.errors[index], RequestCancelled)
                assert run.error is None
                if leavers == 8:
                    assert gate.dispatched == dispatched
                for member in run.batch.members:
                    in_chunks = 4 if member.left_at is not None else 0  # the running and the queued one
                    assert member.steps_after_cancel <= in_chunks
        assert world.placed.compiles_after_load == 0
        assert world.device.jobs == 0


async def test_c6_the_running_and_the_queued_chunk_still_run_and_no_other(tmp_path: Path) -> None:
    async with gated(tmp_path) as (world, gate):
        async with world.running(BATCH) as run:
            await gate.wait_dispatched(2)
            run.cancel(*range(8))
            assert all(request.outcome is Outcome.CANCELLED for request in run.requests)  # the clients are answered
            gate.let_end(1)
            await gate.wait_ended(1)
            await trio.testing.wait_all_tasks_blocked()
            assert not run.ended.is_set()  # the instance waits for the device
            assert not run.batch.members[0].released
            gate.let_end(1)
            await run.ended.wait()
        assert gate.steps == [2, 2]
        assert [member.steps_after_cancel for member in run.batch.members] == [4] * 8
        assert world.device.cancels == 1
        assert world.placed.cancels == 1


async def test_c6_a_leaver_is_in_no_chunk_that_is_dispatched_later(tmp_path: Path) -> None:
    async with gated(tmp_path) as (world, gate):
        async with world.running(BATCH) as run:
            await gate.wait_dispatched(2)
            run.cancel(3)
            member = run.batch.members[3]
            gate.let_end(1)
            await gate.wait_dispatched(3)
            await trio.testing.wait_all_tasks_blocked()
            assert not member.released  # the second chunk, dispatched before the cancel, still has its row
            gate.let_end(1)
            await until(lambda: member.released)
            await gate.wait_ended(2)
            gate.open()
        assert member.steps_after_cancel == 4
        assert sum(bool(responses) for responses in run.responses) == 7


async def test_a_chunk_that_had_ended_before_the_cancel_is_not_counted_as_after_it(tmp_path: Path) -> None:
    async with gated(tmp_path) as (world, gate):
        async with world.running(BATCH) as run:
            await gate.wait_dispatched(2)
            gate.let_end(1)
            # The third follows when the first has been accounted for.  Trio, held up here, has not heard of it.
            gate.block_until_dispatched(3)
            run.cancel(*range(8))
            gate.open()
        assert gate.steps[0] == 2
        assert [member.steps_after_cancel for member in run.batch.members] == [sum(gate.steps[1:])] * 8


async def test_c7_a_cancelled_execution_leaves_no_array_behind(tmp_path: Path) -> None:
    async with gated(tmp_path) as (world, gate):
        gate.open()
        await world.execute(*BATCH)
        gc.collect()
        gc.disable()
        try:
            before = len(jax.live_arrays())
            for boundary in range(1, 5):
                gate.close()
                async with world.running(BATCH) as run:
                    await advance(run, gate, boundary - 1)
                    await gate.wait_dispatched(boundary + 1)
                    run.cancel(*range(8))
                    gate.open()
                assert len(jax.live_arrays()) == before
        finally:
            gc.enable()


async def test_b4_a_late_program_cannot_touch_its_successor(tmp_path: Path) -> None:
    # Two instances on one device.  The first one's chunk is still running when it is cancelled and the second one's
    # batch is admitted; then it ends.
    gate = Regate()
    backend = JaxBackend(executor=gate.executor)
    first = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2, name="first")
    second = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2, name="second")
    async with (
        open_world(first, gate=gate, backend=backend) as old,
        open_world(second, gate=gate, backend=backend) as new,
    ):
        gate.open()
        expected = [response["Y"].tobytes() for (response,) in await new.execute(*BATCH)]
        gate.close()
        async with old.running(BATCH[::-1]) as cancelled:
            await gate.wait_dispatched(2)
            cancelled.cancel(*range(8))
            async with new.running(BATCH) as successor:
                assert not cancelled.ended.is_set()
                gate.open()
        assert [response["Y"].tobytes() for (response,) in successor.responses] == expected
        assert old.device.jobs == 0


async def test_unload_cancels_the_execution(tmp_path: Path) -> None:
    async with gated(tmp_path) as (world, gate):
        async with world.running(BATCH) as run:
            await gate.wait_dispatched(2)
            run.batch.scope.cancel_scope.cancel(reason=Reason.MODEL_UNLOADING.value)
            gate.open()
            await run.ended.wait()
            for request in run.requests:
                request.cancel(Reason.MODEL_UNLOADING)
        assert gate.dispatched == 2


async def test_a_cancel_while_the_batch_waits_for_the_device(tmp_path: Path) -> None:
    gate = Regate()
    backend = JaxBackend(executor=gate.executor)
    busy = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2, name="busy")
    code = "def apply(params, inputs):\n    return {'MADE': inputs['STEPS']}\n"
    config = TICKER_CONFIG.replace("true", "false")
    late = write_model(tmp_path, code, config, buckets=8, name="late")
    async with (
        open_world(busy, gate=gate, backend=backend) as first,
        open_world(late, gate=gate, backend=backend) as second,
    ):
        async with first.running(BATCH):
            await gate.wait_dispatched(2)
            async with second.running([ticks(1)]) as run:
                await trio.testing.wait_all_tasks_blocked()
                run.cancel(0)
                await run.ended.wait()  # at once: nothing of it is on the device
            assert gate.dispatched == 2
            assert run.batch.members[0].steps_after_cancel == 0
            gate.open()


async def test_an_apply_program_that_runs_is_waited_for(tmp_path: Path) -> None:
    gate = DeviceGate()
    code = "def apply(params, inputs):\n    return {'MADE': inputs['STEPS']}\n"
    context = write_model(tmp_path, code, TICKER_CONFIG.replace("true", "false"), buckets=8)
    async with open_world(context, gate=gate) as world:
        async with world.running([ticks(1), ticks(2)]) as run:
            await gate.wait_dispatched(1)
            run.cancel(0)
            gate.let_end(1)
        assert run.responses[1][0]["MADE"].tolist() == [[2]]
        assert [member.steps_after_cancel for member in run.batch.members] == [1, 0]
        async with world.running([ticks(1)]) as run:
            await gate.wait_dispatched(2)
            run.cancel(0)
            await trio.testing.wait_all_tasks_blocked()
            assert not run.ended.is_set()
            gate.open()


# Errors of the device


@pytest.mark.parametrize("program", [1, 2, 3])
async def test_a_device_error_is_its_batchs_and_the_next_one_works(tmp_path: Path, program: int) -> None:
    async with gated(tmp_path) as (world, gate):
        gate.open()
        expected = [response["Y"].tobytes() for (response,) in await world.execute(*BATCH)]
        gate.fail(gate.dispatched + program, "INTERNAL: a bit has flipped")
        async with world.running(BATCH) as run:
            pass
        assert len(run.errors) == 8
        for error in run.errors.values():
            assert isinstance(error, InternalError)
            assert str(error) == "model 'm' failed on device cpu:0: RuntimeError: INTERNAL: a bit has flipped"
        responses = await world.execute(*BATCH)
        assert [response["Y"].tobytes() for (response,) in responses] == expected
        assert world.device.failures == 1


async def test_b5_b6_a_device_that_does_not_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Regate()
    backend = JaxBackend(executor=gate.executor)
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2)
    async with open_world(context, gate=gate, backend=backend) as world:
        async with world.running(BATCH) as run:
            await gate.wait_dispatched(2)
            run.cancel(*range(8))
            await run.abandoned.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert not run.ended.is_set()
            world.instance.abandon()  # as the watchdog does
            await run.ended.wait()
        assert world.device.state is DeviceState.DEAD
        assert "is given up" in caplog.text
        with pytest.raises(Unavailable, match="reload the model"):
            await world.execute(*BATCH)
        dead = world.backend._devices._threads[jax.devices("cpu")[0]][0]
        # A reload gets a thread of its own, and the late answers disturb nobody.
        async with open_world(context, gate=gate, backend=backend) as reloaded:
            gate.open()
            await reloaded.execute(*BATCH)
            await until(lambda: dead.statistics().dropped >= 2)
            assert reloaded.device.state is DeviceState.READY
            await reloaded.execute(*BATCH)


# Decoupled


async def test_at_most_what_was_delivered_before_the_cancel(tmp_path: Path) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, TICKER, TICKER_CONFIG, buckets=8, ladder=2)
    async with open_world(context, gate=gate) as world:
        async with world.running([ticks(20), ticks(20)]) as run:
            gate.let_end(2)
            await until(lambda: len(run.responses[0]) >= 4)
            run.cancel(0)
            gate.open()
        assert [response["MADE"].item() for response in run.responses[0]] == [1, 2, 3, 4]
        assert [response["MADE"].item() for response in run.responses[1]] == list(range(1, 21))


async def test_a_cancel_while_every_row_is_parked(tmp_path: Path) -> None:
    context = write_model(tmp_path, TICKER, TICKER_CONFIG, buckets=8, ladder=2)
    async with open_world(context) as world:
        async with world.running([ticks(50), ticks(50)], read=False) as run, trio.open_nursery() as nursery:
            scopes = [trio.CancelScope(), trio.CancelScope()]

            async def hold(index: int) -> None:
                with scopes[index], run.requests[index]:
                    await trio.sleep_forever()

            for index in range(2):
                nursery.start_soon(hold, index)
            await until(lambda: not any(request.can_send for request in run.requests))
            await trio.testing.wait_all_tasks_blocked(0.01)
            scopes[0].cancel()
            await until(lambda: run.batch.members[0].released)
            assert not run.ended.is_set()
            scopes[1].cancel()
        assert run.ended.is_set()


# Explicit checkpoints

LOOP = """
import trio

def bump(x):
    return x + 1

async def run(ctx, params, inputs):
    made = inputs["STEPS"] * 0
    steps = inputs["STEPS"].item()
    if steps == 99:
        await trio.sleep_forever()
    while steps:
        try:
            made = await ctx.run(bump, made)
            await ctx.checkpoint(made)
        except trio.Cancelled:
            if steps != 77:
                raise
        steps -= 1
    return {"MADE": made}
"""


@asynccontextmanager
async def looping(tmp_path: Path) -> AsyncIterator[tuple[World, Regate]]:
    gate = Regate()
    gate.open()
    context = write_model(tmp_path, LOOP, TICKER_CONFIG.replace("true", "false"))
    async with open_world(context, gate=gate) as world:
        await world.execute(ticks(1))
        gate.close()
        yield world, gate


async def test_a_checkpoint_returns_when_one_program_is_left(tmp_path: Path) -> None:
    code = LOOP.replace("        steps -= 1\n", "        steps -= 1\n        ctx.parameters['made'].append(steps)\n")
    gate = DeviceGate()
    context = write_model(tmp_path, code, TICKER_CONFIG.replace("true", "false"), warmup="false")
    async with open_world(context, gate=gate) as world:
        made: list[int] = []
        async with world.running([ticks(3)], parameters={"made": made}) as run:
            await gate.wait_dispatched(2)
            await trio.testing.wait_all_tasks_blocked()
            assert made == [2]  # the first checkpoint had nothing to wait for, the second one has
            gate.let_end(1)
            await gate.wait_dispatched(3)
            assert made == [2, 1]
            gate.open()
        assert run.responses[0][0]["MADE"].tolist() == [[3]]


async def test_who_waits_for_a_checkpoint_hears_that_an_earlier_program_failed(tmp_path: Path) -> None:
    """It was answered when it was dispatched, so what is dropped with it must say so: nothing else comes."""
    async with looping(tmp_path) as (world, gate):
        before = gate.dispatched
        async with world.running([ticks(50)]) as run:
            await gate.wait_dispatched(before + 2)
            await trio.testing.wait_all_tasks_blocked()
            gate.fail(gate.ended + 1, "the fan stood still")
            gate.open()
        assert "RuntimeError: the fan stood still" in run.errors[0].message
        assert (await world.execute(ticks(3)))[0][0]["MADE"].tolist() == [[3]]


async def test_an_explicit_members_cancel_is_its_own(tmp_path: Path) -> None:
    async with looping(tmp_path) as (world, gate):
        async with world.running([ticks(50), ticks(8), ticks(99)]) as run:
            await gate.wait_dispatched(2)
            run.cancel(0, 2)
            gate.let_end(2)
            await until(lambda: run.batch.members[0].released and run.batch.members[2].released)
            assert not run.ended.is_set()
            gate.open()
        assert run.responses[1][0]["MADE"].tolist() == [[8]]
        assert run.batch.members[0].steps_after_cancel <= 2
        assert not run.errors.keys() - {0, 2}


async def test_an_explicit_execution_ends_when_the_last_has_left_and_the_device_is_idle(tmp_path: Path) -> None:
    async with looping(tmp_path) as (world, gate):
        async with world.running([ticks(50), ticks(60)]) as run:
            await gate.wait_dispatched(2)
            run.cancel(0, 1)
            gate.let_end(1)
            await gate.wait_ended(1)
            await trio.testing.wait_all_tasks_blocked()
            assert not run.ended.is_set()
            gate.let_end(1)
        assert gate.dispatched == 2


@pytest.mark.parametrize("how", ["swallows", "shields"])
async def test_c1_a_model_that_goes_on_after_its_cancel_gets_nothing_onto_the_device(tmp_path: Path, how: str) -> None:
    """Law 9: whatever it catches or returns."""
    code = {
        "swallows": LOOP.replace("            if steps != 77:\n                raise\n", "            pass\n"),
        "shields": LOOP.replace(
            "        except trio.Cancelled:\n            if steps != 77:\n                raise\n",
            """
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                try:
                    await ctx.fetch(bump, made)
                except Exception as exc:
                    ctx.parameters["errors"].append(f"{type(exc).__name__}: {exc}")
                else:
                    ctx.parameters["errors"].append("it ran")
""",
        ),
    }[how]
    gate = Regate()
    gate.open()
    context = write_model(tmp_path, code, TICKER_CONFIG.replace("true", "false"))
    errors: list[str] = []
    async with open_world(context, gate=gate) as world:
        await world.execute(ticks(1))
        gate.close()
        before = gate.dispatched
        async with world.running([ticks(40)], parameters={"errors": errors}) as run:
            await gate.wait_dispatched(before + 2)
            run.cancel(0)
            gate.open()
        assert run.requests[0].outcome is Outcome.CANCELLED
        assert not run.responses[0]
        assert gate.dispatched == before + 2
        assert run.batch.members[0].steps_after_cancel == 2
        told = "Unavailable: model 'm': the request is over; nothing of it gets onto the device any more"
        assert set(errors) == ({told} if how == "shields" else set())


async def test_what_a_scope_of_the_models_own_has_cancelled_is_no_waste(tmp_path: Path) -> None:
    """A limit on one part of the work is the author's business: the request was served, and its time was of use."""
    code = """
        import trio

        def bump(x):
            return x + 1

        async def run(ctx, params, inputs):
            with trio.CancelScope() as scope:
                scope.cancel()
                await ctx.fetch(bump, inputs["STEPS"])
            made = inputs["STEPS"] * 0
            with trio.move_on_after(0.001):
                for _ in range(10_000):
                    made = await ctx.run(bump, made)
                    await ctx.checkpoint(made)
            for _ in range(3):
                made = await ctx.run(bump, made)
            return {"MADE": made * 0}
    """
    context = write_model(tmp_path, code, TICKER_CONFIG.replace("true", "false"))
    async with open_world(context) as world:
        async with world.running([ticks(5)]) as run:
            pass
        assert run.responses[0][0]["MADE"].tolist() == [[0]]
        (member,) = run.batch.members
        assert (member.wasted_seconds, member.saved_seconds, member.steps_after_cancel) == (0, 0, 0)
        assert member.useful_seconds > 0
        assert world.placed.device_seconds_wasted == 0


async def test_a_model_whose_step_is_longer_than_the_target_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with gated(tmp_path, target_chunk_ms=1e-6) as (world, gate):
        gate.open()
        with caplog.at_level(logging.WARNING):
            for _ in range(4):
                await world.execute(*BATCH)
        (record,) = [record for record in caplog.records if "cancel latency" in record.message]
        assert record.message.startswith("model 'm': 2 calls of step() take")
        assert np.isfinite(world.placed.buckets[0].step_ms)
