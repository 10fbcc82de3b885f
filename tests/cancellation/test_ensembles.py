"""Blocking place: the steps of an ensemble, in other models' queues and batches, and in ensembles of their own (A7, B3)."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call, calling
from tests.ensemble.world import FAMILY, Steps, ensemble_config, in_flight, join_config, outcomes, reasons, step
from triton_trio import (
    InferenceRequest,
    InferenceServer,
    InternalError,
    Model,
    Outcome,
    Reason,
    RequestCancelled,
    Unavailable,
)
from triton_trio.observe import tree
from triton_trio.testing import ScriptedBackend, Victim, open_test_server, orders, scripted_config, sweep
from triton_trio.testing.fixtures import Serve

#: Which models' steps run at each moment of FAMILY, and how to come there: what ends, one after the other.
MOMENTS = {
    "pre": ([], ["pre"]),
    "left and one": (["pre"], ["left", "one"]),
    "left and two": (["pre", "one"], ["left", "two"]),
    "two": (["pre", "left", "one"], ["two"]),
    "left": (["pre", "one", "two"], ["left"]),
    "join": (["pre", "left", "one", "two"], ["join"]),
}
AT_EVERY_MOMENT = pytest.mark.parametrize(("ends", "runs"), MOMENTS.values(), ids=MOMENTS)


@AT_EVERY_MOMENT
async def test_A7_a_cancel_stops_what_runs_and_nothing_follows(serve: Serve, ends: list[str], runs: list[str]) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("victim", rows=1)
            for model in ends:
                await steps.finish(model)
            assert steps.running == runs
            for execution in backend.running:
                execution.step(3)
            await wait_all_tasks_blocked()
            call.leave()
            # Before anybody else has run: parent, steps, and steps of the step that is an ensemble.
            assert call.outcome is Outcome.CANCELLED
            assert in_flight(server) == {}
            cancelled = backend.running
            await wait_all_tasks_blocked()
            assert [execution.cancelled_after for execution in cancelled] == [3] * len(runs)
            assert backend.running == []
            assert len(backend.executions) == len(ends) + len(runs)
        where = {"family", *runs} | ({"inner"} if {"one", "two"} & set(runs) else set())
        assert reasons(server) == {model: {("client_reset", "executing")} for model in where}
        assert outcomes(server, ends) == {model: {"ok": 1} for model in ends}


@AT_EVERY_MOMENT
async def test_A7_by_an_operator_the_caller_is_told_and_the_steps_have_his_reason(
    serve: Serve, ends: list[str], runs: list[str]
) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("victim", rows=1)
            for model in ends:
                await steps.finish(model)
            call.request.cancel(Reason.ADMIN)
            assert in_flight(server) == {}
        assert isinstance(call.error, RequestCancelled)
        assert call.error.message == "[request id: victim] request cancelled while executing: admin"
        assert set.union(*reasons(server).values()) == {("admin", "executing")}


async def test_A8_the_deadline_of_the_parent_is_that_of_its_steps(serve: Serve, mock_clock: MockClock) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("victim", rows=1)
            call.scope.deadline = trio.current_time() + 5
            mock_clock.jump(3)
            await steps.finish("pre")
            assert steps.running == ["left", "one"]
            mock_clock.jump(2)
            await wait_all_tasks_blocked()
            assert backend.running == []
        assert call.outcome is Outcome.DEADLINE
        models = ["family", "left", "inner", "one"]
        assert outcomes(server, models) == {model: {"deadline": 1} for model in models}


async def test_A3_a_step_in_the_queue_of_another_model_leaves_it_at_once(serve: Serve) -> None:
    backend = ScriptedBackend()
    one_place = scripted_config(batching="default_queue_policy { max_queue_size: 1 }", max_batch_size=1)
    models = {
        "slow": one_place,
        "e": ensemble_config(step("slow", "INPUT0", "OUTPUT0"), max_batch_size=1),
        "outer": ensemble_config(step("e", "INPUT0", "OUTPUT0"), max_batch_size=1),
    }
    async with serve(models, backend) as server:
        slow = server.model("slow")
        async with calling(slow) as direct, calling(server.model("outer")) as callers:
            await direct.call("busy", rows=1)
            call = await callers.call("victim", rows=1)
            assert len(slow.scheduler) == 1
            call.leave()
            assert len(slow.scheduler) == 0
            assert in_flight(server) == {"slow": 1}
            following = await callers.call("following", rows=1)  # its place is free, the instance is not
            backend.executions[0].finish()
            (await backend.wait_execution(1)).finish()
        assert following.outcome is Outcome.OK
        assert reasons(server)["slow"] == {("client_reset", "queued")}
        assert reasons(server)["outer"] == {("client_reset", "executing")}


async def test_law_7_a_step_in_a_batch_with_others_leaves_and_they_do_not_notice(serve: Serve) -> None:
    async def run(leaving: str) -> dict[str, bytes]:
        backend = ScriptedBackend(lambda stacked: np.sqrt(stacked + 0.1) * 3)
        batched = scripted_config(max_batch_size=8, batching="max_queue_delay_microseconds: 3600000000")
        models = {"m": batched, "e": ensemble_config(step("m", "INPUT0", "OUTPUT0"), max_batch_size=8)}
        async with serve(models, backend) as server:
            async with calling(server.model("e")) as ensembles, calling(server.model("m")) as direct:
                for label, value in (("a", 1.5), ("b", 2.5), ("c", 3.5)):
                    await ensembles.call(label, rows=2, value=value)
                await direct.call("d", rows=2, value=4.5)
                execution = await backend.wait_execution()
                assert execution.members == ("a", "b", "c", "d")
                execution.step()
                await wait_all_tasks_blocked()
                for call in ensembles.calls:
                    if call.request.request_id in leaving:
                        call.leave()
                execution.finish()
            calls = [*ensembles.calls, *direct.calls]
            return {call.request.request_id: call.output.tobytes() for call in calls if call.output is not None}

    calm = await run("")
    assert len(calm) == 4
    for leaving in ("a", "b", "ac"):
        assert await run(leaving) == {label: output for label, output in calm.items() if label not in leaving}


async def test_A7_a_step_that_would_begin_one_tick_after_the_cancel_does_no_work(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("victim", rows=1)
            answer_of("pre")(server, backend, call)  # now the tasks of the next steps are due
            call.leave()
            await wait_all_tasks_blocked()
            assert call.outcome is Outcome.CANCELLED
            assert [server.model(name).counters.started for name in FAMILY] == [1, 0, 0, 0, 0, 0, 1]
            backend.executions[0].end()
        assert len(backend.executions) == 1


# Sequences

SEQUENCE = {
    "s": scripted_config(max_batch_size=1, more="sequence_batching { oldest { max_candidate_sequences: 4 } }"),
    "e": ensemble_config(step("s", "INPUT0", "OUTPUT0"), max_batch_size=1),
}


@pytest.mark.parametrize("who", ["the ensemble's", "another one"])
async def test_A7_a_step_is_a_member_of_its_sequence(serve: Serve, who: str) -> None:
    """One request of a sequence comes through an ensemble, the next one does not: whoever is cancelled, both are."""
    backend = ScriptedBackend()
    async with serve(SEQUENCE, backend) as server:
        async with calling(server.model("e")) as ensembles, calling(server.model("s")) as direct:
            inside = await ensembles.call("inside", rows=1, sequence_id=7, sequence_start=True)
            outside = await direct.call("outside", rows=1, sequence_id=7)
            victim, mate = (inside, outside) if who == "the ensemble's" else (outside, inside)
            victim.leave()
            await wait_all_tasks_blocked()
            assert victim.request.reason is Reason.CLIENT_RESET
            assert mate.request.reason is Reason.SEQUENCE_CANCELLED
            assert mate.error is not None
            assert mate.error.message.startswith("in ensemble 'e', " if mate is inside else "[request id: outside]")
            assert "sequence 7 of model 's' was cancelled" in mate.error.message
            again = await direct.call("again", rows=1, sequence_id=7)
            assert again.error is not None
            assert "must specify the START flag" in again.error.message


async def test_a_whole_sequence_through_an_ensemble(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve(SEQUENCE, backend) as server:
        async with calling(server.model("e")) as callers:
            await callers.call("first", rows=1, sequence_id=7, sequence_start=True)
            await callers.call("second", rows=1, sequence_id=7)
            await callers.call("last", rows=1, sequence_id=7, sequence_end=True)
            late = await callers.call("late", rows=1, sequence_id=7)
        assert [call.outcome for call in callers.calls] == [Outcome.OK] * 3 + [Outcome.ERROR]
        assert late.error is not None
        assert "in ensemble 'e', inference request for sequence 7 to model 's' must specify" in late.error.message


# Failures


async def test_B3_a_full_queue_of_a_step_is_told_once_and_nothing_is_stuck(serve: Serve) -> None:
    """core#466: a step that could not be queued left the ensemble's count of steps in flight too high, for ever."""
    backend = ScriptedBackend()
    full = scripted_config(batching="default_queue_policy { max_queue_size: 1 }", max_batch_size=1)
    models = {
        "left": scripted_config(max_batch_size=1),
        "pre": scripted_config(max_batch_size=1),
        "full": full,
        "join": join_config(1),
        "e": ensemble_config(
            step("left", "INPUT0", "l"),
            step("pre", "INPUT0", "p"),
            step("full", "p", "r"),
            step("join", "l r=INPUT1", "OUTPUT0"),
            max_batch_size=1,
        ),
    }
    async with serve(models, backend) as server:
        async with calling(server.model("full")) as direct, calling(server.model("e")) as callers:
            await direct.call_all(["executing", "queued"], rows=1)
            call = await callers.call("7", rows=1)
            await Steps(backend).finish("pre")
            assert isinstance(call.error, Unavailable)
            assert call.error.message == "in ensemble 'e', [request id: 7] Exceeds maximum queue size"
            assert call.outcome is Outcome.REJECTED
            assert in_flight(server) == {"full": 2}
            for _ in range(2):
                await Steps(backend).finish("full")
            after = await callers.call("8", rows=1)
            await Steps(backend).finish("left", "pre")
            await Steps(backend).finish("full")
            await Steps(backend).finish("join")
            assert after.outcome is Outcome.OK
        assert server.model("e").counters.failures == {"REJECTED": 1}
        assert reasons(server) == {"left": {("sibling_failed", "executing")}}


async def test_the_first_step_that_fails_speaks_for_all_and_its_siblings_are_cancelled(serve: Serve) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("7", rows=1)
            await steps.finish("pre")
            steps.of("one")[0].fail(InternalError("the device is on fire"))
            await wait_all_tasks_blocked()
            assert isinstance(call.error, InternalError)
            assert call.error.message == "in ensemble 'family', in ensemble 'inner', the device is on fire"
            assert backend.running == []
            assert steps.of("left")[0].cancelled_after == 0
        assert reasons(server) == {"left": {("sibling_failed", "executing")}}
        for model in ("one", "inner", "family"):
            assert server.model(model).counters.failures == {"BACKEND": 1}
        assert server.model("left").counters.failures == {"CANCELED": 1}
        assert server.model("join").counters.started == 0


async def test_a_step_that_gets_what_it_cannot_take_is_not_the_backends_failure(serve: Serve) -> None:
    backend = ScriptedBackend(lambda stacked: np.zeros(5, np.float32), automatic=True)
    models = {
        "any": scripted_config(dims=[-1]),
        "two": scripted_config(),
        "e": ensemble_config(step("any", "INPUT0", "x"), step("two", "x", "OUTPUT0")),
    }
    async with serve(models, backend) as server:
        async with calling(server.model("e")) as callers:
            call = await callers.call("7")
        assert call.error is not None
        assert call.error.message.startswith(
            "in ensemble 'e', [request id: 7] unexpected shape for input 'INPUT0' for model 'two'. Expected [2], got [5]"
        )
        assert server.model("e").counters.failures == {"OTHER": 1}


async def test_a_step_that_somebody_else_cancels_cancels_its_parent_with_the_same_reason(serve: Serve) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("7", rows=1)
            await steps.finish("pre")
            (child,) = server.model("one")._live
            child.cancel(Reason.ADMIN)
            await wait_all_tasks_blocked()
        assert isinstance(call.error, RequestCancelled)
        assert call.error.message == (
            "in ensemble 'family', in ensemble 'inner', [request id: 7] request cancelled while executing: admin"
        )
        assert reasons(server) == {model: {("admin", "executing")} for model in ("family", "inner", "one", "left")}
        assert server.model("family").counters.failures == {"CANCELED": 1}


# In one and the same tick


def leave(server: InferenceServer, backend: ScriptedBackend, call: Call) -> None:
    call.leave()


def admin(server: InferenceServer, backend: ScriptedBackend, call: Call) -> None:
    call.request.cancel(Reason.ADMIN)


def deadline(server: InferenceServer, backend: ScriptedBackend, call: Call) -> None:
    call.scope.deadline = trio.current_time()
    assert call.scope.cancel_called  # to look is to make Trio notice that it has passed, now


def answer_of(model: str) -> Callable[[InferenceServer, ScriptedBackend, Call], None]:
    def act(server: InferenceServer, backend: ScriptedBackend, call: Call) -> None:
        batch = server.model(model).instances[0].batch
        for member in batch.members if batch is not None else ():
            batch.respond(member, {"OUTPUT0": member.inputs["INPUT0"]})

    return act


def failure_of(model: str) -> Callable[[InferenceServer, ScriptedBackend, Call], None]:
    def act(server: InferenceServer, backend: ScriptedBackend, call: Call) -> None:
        batch = server.model(model).instances[0].batch
        for member in batch.members if batch is not None else ():
            batch.fail(member, InternalError(f"{model} failed"))

    return act


def child_cancelled(server: InferenceServer, backend: ScriptedBackend, call: Call) -> None:
    for child in tuple(server.model("b")._live):
        child.cancel(Reason.ADMIN)


ACTS = {
    "leave": leave,
    "admin": admin,
    "deadline": deadline,
    "a answers": answer_of("a"),
    "b answers": answer_of("b"),
    "a fails": failure_of("a"),
    "b fails": failure_of("b"),
    "b is cancelled": child_cancelled,
}
#: An act on the parent decides at once; a step's end is only known when its task has run, and a cancel may still win.
AT_ONCE = {"leave": Outcome.CANCELLED, "admin": Outcome.CANCELLED, "deadline": Outcome.DEADLINE}


@pytest.mark.parametrize("order", orders(ACTS), ids="-".join)
async def test_B1_two_things_at_once(serve: Serve, mock_clock: MockClock, order: tuple[str, ...]) -> None:
    backend = ScriptedBackend()
    models = {
        "a": scripted_config(),
        "b": scripted_config(),
        "e": ensemble_config(step("a", "INPUT0", "OUTPUT0"), step("b", "INPUT0", "P"), outputs="OUTPUT0 P"),
    }
    async with serve(models, backend) as server:
        async with calling(server.model("e")) as callers:
            call = await callers.call("victim")
            for act in order:
                ACTS[act](server, backend, call)
            decided = [AT_ONCE[act] for act in order if act in AT_ONCE]
            if decided:
                assert call.outcome is decided[0]
            await wait_all_tasks_blocked()
            if not decided:
                failed = [act for act in order if act in ("a fails", "b fails", "b is cancelled")]
                if set(order) == {"a answers", "b answers"}:
                    assert call.outcome is Outcome.OK
                elif failed == ["b is cancelled"] * len(failed) and failed and "b answers" not in order:
                    assert call.outcome is Outcome.CANCELLED
                elif failed and order != ("b answers", "b fails") and order != ("a answers", "a fails"):
                    assert call.outcome in (Outcome.ERROR, Outcome.CANCELLED)
                else:
                    assert call.outcome in (None, Outcome.CANCELLED)
            call.leave()
            for execution in backend.running:
                execution.end()
        await wait_all_tasks_blocked()
        for name in ("a", "b", "e"):
            counters = server.model(name).counters
            assert sum(counters.outcomes.values()) == counters.started == 1


# Everywhere


async def drive(backend: ScriptedBackend) -> None:
    """Two steps for every execution, each when everybody waits."""
    async with trio.open_nursery() as nursery:
        number = 0
        while True:
            execution = await backend.wait_execution(number)

            async def run(execution: object = execution) -> None:
                for _ in range(2):
                    await wait_all_tasks_blocked()
                    execution.step()  # type: ignore[attr-defined]
                await wait_all_tasks_blocked()
                execution.finish()  # type: ignore[attr-defined]

            nursery.start_soon(run)
            number += 1


@pytest.mark.parametrize("whose", ["of its own", "the caller's"])
async def test_A7_B3_a_cancel_at_every_scheduling_point(tmp_path: Path, whose: str) -> None:
    """The request has a scope of its own, or that of its caller, as in a unary RPC."""
    directories = (tmp_path / str(number) for number in range(10_000))
    stages = set()

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend(lambda stacked: stacked + 1)
        async with open_test_server(next(directories), FAMILY, backend) as server:
            family = server.model("family")
            scope = None if whose == "of its own" else victim.scope
            request = InferenceRequest({"INPUT0": np.zeros((1, 2), np.float32)}, request_id="victim", scope=scope)
            async with trio.open_nursery() as drivers:
                drivers.start_soon(drive, backend)
                with victim:
                    response = await family.infer(request)
                    assert (response.outputs["OUTPUT1"] == 4).all()
                done = len(backend.executions)
                await wait_all_tasks_blocked()
                assert len(backend.executions) == done, "no step begins after the cancel"
                drivers.cancel_scope.cancel()
            assert request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)
            for model in server.repository.loaded():
                assert model.counters.started == sum(model.counters.outcomes.values()) <= 1
                if victim.cancelled:
                    assert model.counters.outcomes.keys() <= {Outcome.OK, Outcome.CANCELLED}
                    assert {reason for reason, _ in model.counters.reasons} <= {"client_reset"}
                    stages.update(model.counters.reasons)

    assert await sweep(scenario) > 30
    assert {("client_reset", "queued"), ("client_reset", "executing")} <= stages


async def test_C7_after_a_cancel_at_any_point_every_array_dies(tmp_path: Path) -> None:
    directories = (tmp_path / str(number) for number in range(10_000))

    async def call_and_forget(model: Model, victim: Victim) -> dict[str, weakref.ref[object]]:
        inputs = {"INPUT0": np.zeros((1, 2), np.float32)}
        request = model.request(inputs)
        alive: dict[str, weakref.ref[object]] = {
            "input": weakref.ref(inputs["INPUT0"]),
            "request": weakref.ref(request.inputs["INPUT0"]),
        }
        with victim:
            response = await model.infer(request)
            alive["output"] = weakref.ref(response.outputs["OUTPUT0"])
        return alive

    async def scenario(victim: Victim) -> None:
        made: list[weakref.ref[object]] = []

        def compute(stacked: np.ndarray) -> np.ndarray:
            result = stacked + 1
            made.append(weakref.ref(result))
            return result

        backend = ScriptedBackend(compute)
        models = {name: config for name, config in FAMILY.items() if name in ("one", "two", "inner")}
        async with open_test_server(next(directories), models, backend) as server:
            gc.disable()  # a cycle would keep them until some later day
            try:
                async with trio.open_nursery() as drivers:
                    drivers.start_soon(drive, backend)
                    await wait_all_tasks_blocked()
                    alive = await call_and_forget(server.model("inner"), victim)
                    await wait_all_tasks_blocked()
                    drivers.cancel_scope.cancel()
                await wait_all_tasks_blocked()
                assert [what for what, array in alive.items() if array() is not None] == []
                assert [array for array in made if array() is not None] == []
            finally:
                gc.enable()

    assert await sweep(scenario) > 10


# Seen


async def test_the_tree_and_the_log_name_the_steps(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers:
            call = await callers.call("7", rows=1)
            await steps.finish("pre")
            lines = tree().splitlines()
            depths = {line.strip("│├└─ ").split(" (")[0]: len(line) - len(line.lstrip("│├└─ ")) for line in lines}
            assert depths["client 7"] < depths["step left of family"] == depths["step inner of family"]
            assert depths["step inner of family"] < depths["step one of inner"]
            assert any("'7' of family:1, executing" in line for line in lines)
            call.leave()
        lines = [(record.model, record.reason) for record in caplog.records]  # type: ignore[attr-defined]
        assert sorted(lines) == [(model, "client_reset") for model in ("family", "inner", "left", "one")]
