"""Blocking place: the device.  The client is free at once; the device is, at its next checkpoint; neighbours notice nothing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import DeadlineExceeded, InternalError, InvalidArgument, Outcome, Reason, RequestCancelled, Stage
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

BATCHED = scripted_config(max_batch_size=8, batching="")


def blur(stacked: np.ndarray) -> np.ndarray:
    """Something in which the last bit matters."""
    return np.sin(stacked * np.float32(1.1)) / np.float32(3)


async def test_law_6_the_client_is_free_at_once_and_the_device_at_its_next_checkpoint(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        call = await callers.call("a")
        execution = backend.executions[0]
        execution.step(3)
        await wait_all_tasks_blocked()
        execution.step(100)  # dispatched, not begun
        call.leave()
        assert call.outcome is Outcome.CANCELLED
        assert server.model("m").instances[0].batch is not None
        await wait_all_tasks_blocked()
        assert execution.ended.is_set()
        assert (execution.steps, execution.cancelled_after) == (3, 3)
        assert call.request.stage is Stage.EXECUTING


@pytest.mark.parametrize("cancelled", range(9))
@pytest.mark.parametrize("phase", ["queued", "before the first step", "between steps", "with the answer"])
async def test_B9_any_number_of_eight_leave_at_any_phase_and_the_others_get_the_same_bits(
    serve: Serve, phase: str, cancelled: int
) -> None:
    backend = ScriptedBackend(blur)
    values = np.random.default_rng(cancelled).normal(size=8)
    async with serve({"m": BATCHED}, backend) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        blocker = await callers.call("x", rows=8)
        calls = [await callers.call(str(i), value=value, rows=1) for i, value in enumerate(values)]
        leaving = [call for i, call in enumerate(calls) if i * 5 % 8 < cancelled]  # not just a prefix
        staying = [call for call in calls if call not in leaving]

        def leave() -> None:
            for call in leaving:
                call.leave()

        if phase == "queued":
            leave()
        backend.executions[0].finish()
        await blocker.ended.wait()
        await wait_all_tasks_blocked()
        if len(backend.executions) == 2:
            execution = backend.executions[1]
            if phase == "before the first step":
                leave()
            execution.step()
            await wait_all_tasks_blocked()
            if phase == "between steps":
                leave()
            execution.step()
            execution.finish()
            if phase == "with the answer":
                leave()
            await wait_all_tasks_blocked()
            if execution.steps:
                expected = [str(i) for i in range(8) if calls[i] in (calls if phase != "queued" else staying)]
                assert list(execution.members) == expected
        else:
            assert (phase, cancelled) == ("queued", 8)
        assert model.instances[0].batch is None
    assert all(call.outcome is Outcome.CANCELLED for call in leaving)
    for call in staying:
        reference = blur(call.request.inputs["INPUT0"])
        assert call.output is not None
        assert call.output.tobytes() == reference.tobytes()
    assert model.counters.inference_count == len(staying) + 8


async def test_A6_a_member_who_has_left_gets_no_further_step(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": BATCHED}, backend) as server, calling(server.model("m")) as callers:
        blocker = await callers.call("x", rows=8)
        a, b = await callers.call_all("ab", rows=1)
        blocker.leave()
        execution = await backend.wait_execution(1)
        execution.step()
        await wait_all_tasks_blocked()
        a.leave()
        execution.step(2)
        await wait_all_tasks_blocked()
        assert execution.live == [("a", "b"), ("b",), ("b",)]
        execution.finish()
    assert b.outcome is Outcome.OK


async def test_the_instance_takes_the_next_batch_as_soon_as_the_device_has_let_go(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        first, second = await callers.call_all("ab")
        first.leave()
        execution = await backend.wait_execution(1)
        assert execution.members == ("b",)
        execution.finish()
    assert second.outcome is Outcome.OK


async def test_A8_a_deadline_passes_while_executing(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        call = await callers.call("a")
        call.request.scope.deadline = trio.current_time() + 3
        await call.ended.wait()
        assert isinstance(call.error, DeadlineExceeded)
        assert call.error.message == "[request id: a] Deadline Exceeded while executing"
        assert (call.outcome, trio.current_time() - call.request.received_at) == (Outcome.DEADLINE, 3)
        await wait_all_tasks_blocked()
        assert backend.executions[0].cancelled_after == 0


async def test_D1_law_9_a_model_that_swallows_the_cancel_and_answers_changes_nothing(serve: Serve) -> None:
    backend = ScriptedBackend()
    backend.misbehaviour.swallow_cancelled = True
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        call = await callers.call("a")
        call.request.cancel(Reason.ADMIN)
        await wait_all_tasks_blocked()
        assert isinstance(call.error, RequestCancelled)
        assert call.outcome is Outcome.CANCELLED
        assert backend.executions[0].ended.is_set()
        # And it is as good as new.
        backend.misbehaviour.swallow_cancelled = False
        again = await callers.call("b")
        backend.executions[1].finish()
        await again.ended.wait()
        assert again.outcome is Outcome.OK


async def test_C2_an_error_in_the_tick_of_the_cancel_is_in_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        call = await callers.call("a")
        backend.executions[0].fail(ValueError("device on fire"))
        call.leave()  # the error is on its way, and the cancel comes first
        await wait_all_tasks_blocked()
        assert call.outcome is Outcome.CANCELLED
        other = await callers.call("b")
        backend.executions[1].fail(ValueError("device on fire"))
        await wait_all_tasks_blocked()
        other.leave()  # here it is second
        assert other.outcome is Outcome.ERROR
    assert "model m version 1 failed in execute" in caplog.text
    assert "device on fire" in caplog.text


async def test_a_failing_execution_fails_its_members_and_the_instance_goes_on(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": BATCHED}, backend) as server, calling(server.model("m")) as callers:
        blocker = await callers.call("x", rows=8)
        a, b = await callers.call_all("ab", rows=1)
        blocker.leave()
        execution = await backend.wait_execution(1)
        execution.fail(ZeroDivisionError("no"))
        await wait_all_tasks_blocked()
        for call in (a, b):
            assert type(call.error) is InternalError
            assert call.error.message == "model 'm' failed: ZeroDivisionError: no"
        c = await callers.call("c", rows=1)
        backend.executions[2].fail(InvalidArgument("not this"))
        await c.ended.wait()
        assert type(c.error) is InvalidArgument
        d = await callers.call("d", rows=1)
        backend.executions[3].end()
        await d.ended.wait()
        assert d.error is not None
        assert d.error.message == "[request id: d] model 'm' returned without a response"
        e = await callers.call("e", rows=1)
        backend.executions[4].finish()
        await e.ended.wait()
        assert e.outcome is Outcome.OK


async def test_B10_a_malformed_request_never_comes_near_a_batch(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": BATCHED}, backend) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        blocker = await callers.call("x", rows=8)
        good = await callers.call("good", rows=1)
        for inputs in ({}, {"INPUT0": np.zeros((1, 3), np.float32)}, {"INPUT0": np.zeros((9, 2), np.float32)}):
            with pytest.raises(InvalidArgument):
                await model.infer(inputs)
        blocker.leave()
        execution = await backend.wait_execution(1)
        assert execution.members == ("good",)
        execution.finish()
    assert good.outcome is Outcome.OK
    assert model.counters.outcomes == {Outcome.CANCELLED: 1, Outcome.OK: 1, Outcome.ERROR: 3}


async def test_B6_late_completions_are_dropped_and_the_next_request_is_fine(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        call = await callers.call("a")
        batch = model.instances[0].batch
        assert batch is not None
        (member,) = batch.members
        call.leave()
        await wait_all_tasks_blocked()
        # Such as from a thread that comes back after everybody has gone.
        batch.respond(member, {"OUTPUT0": np.zeros(2, np.float32)})
        batch.fail(member, InternalError("late"))
        member.release()
        again = await callers.call("b")
        backend.executions[1].finish()
        await again.ended.wait()
    assert again.outcome is Outcome.OK
    assert model.counters.outcomes == {Outcome.CANCELLED: 1, Outcome.OK: 1}


async def test_several_instances_are_independent(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(instances=3)}, backend) as server, calling(server.model("m")) as callers:
        calls = await callers.call_all("abcd")
        assert [execution.members for execution in backend.executions] == [("a",), ("b",), ("c",)]
        assert len({execution.instance for execution in backend.executions}) == 3
        calls[1].leave()
        execution = await backend.wait_execution(3)
        assert execution.members == ("d",)
        assert execution.instance == backend.executions[1].instance
        for execution in backend.running:
            execution.finish()
    assert [call.outcome for call in calls] == [Outcome.OK, Outcome.CANCELLED, Outcome.OK, Outcome.OK]


async def test_law_16_time_between_cancel_and_release_is_in_the_books(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        call = await callers.call("a")
        call.leave()
        await trio.sleep(2)
        backend.executions[0].let_go()
        await wait_all_tasks_blocked()
        assert server.model("m").counters.device_seconds_after_cancel == 2


def cancel_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "triton_trio.cancel"]


async def test_E4_one_line_for_each_cancelled_request_with_what_it_cost(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    await trio.sleep(100)
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        executing, queued = await callers.call_all(["e", "q"])
        await trio.sleep(2)
        queued.leave(Reason.CONNECTION_LOST)
        executing.leave(Reason.CLIENT_RESET)
        assert [line.request_id for line in cancel_lines(caplog)] == ["q"]  # the other still holds its device
        await trio.sleep(1.5)
        backend.executions[0].let_go()
    lines = cancel_lines(caplog)
    assert [line.levelno for line in lines] == [logging.INFO] * 2
    assert not any(line.exc_info for line in caplog.records)
    fields = ("model", "reason", "stage", "queued_ms", "device_ms_after_cancel")
    assert [tuple(getattr(line, field) for field in fields) for line in lines] == [
        ("m", "connection_lost", "queued", 2000, 0),
        ("m", "client_reset", "executing", 0, 1500),
    ]
    assert lines[1].getMessage() == (
        "cancelled request id='e' model=m version=1 reason=client_reset stage=executing queued_ms=0.000 "
        f"device_ms_after_cancel=1500.000 device_steps_after_cancel=0 generation={executing.request.generation}"
    )
