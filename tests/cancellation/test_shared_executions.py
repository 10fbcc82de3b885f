"""Requests that share an execution through the response cache: each may leave, and none takes it away from the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call, calling
from tests.ensemble.world import ensemble_config, step
from triton_trio import InferenceServer, InternalError, Model, Outcome, Reason, Stage
from triton_trio.observe import tree
from triton_trio.observe.statistics import FailureReason
from triton_trio.testing import ScriptedBackend, Victim, open_test_server, orders, scripted_config, sweep
from triton_trio.testing.fixtures import Serve

CACHED = "response_cache { enable: true }"
CONFIG = scripted_config(more=CACHED)
#: ``m`` twice, one after the other.
ENSEMBLE = ensemble_config(step("m", "INPUT0", "half"), step("m", "half", "OUTPUT0"), more=CACHED)
SIZE = 1 << 20


async def test_two_that_ask_the_same_share_one_execution_and_a_third_hits(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        model = server.model("m")
        async with calling(model) as callers:
            calls = await callers.call_all("ab", value=3)
            assert [call.request.stage for call in calls] == [Stage.EXECUTING] * 2
            execution = await backend.wait_execution()
            execution.finish()
            await wait_all_tasks_blocked()
            assert [call.outcome for call in calls] == [Outcome.OK] * 2
            third = await callers.call("c", value=3)
            assert third.outcome is Outcome.OK
        assert [(call.output == 3).all() for call in (*calls, third)] == [True] * 3
        assert len(backend.executions) == 1
        counters = model.counters
        assert (counters.execution_count, counters.inference_count, counters.started) == (1, 1, 3)
        assert (counters.cache_miss.count, counters.cache_hit.count) == (1, 2)


async def test_B9_who_leaves_does_not_take_the_execution_away(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        async with calling(server.model("m")) as callers:
            first, second, third = await callers.call_all("abc", value=3)
            execution = await backend.wait_execution()
            first.leave()
            assert first.outcome is Outcome.CANCELLED  # at that instant, though it is the one that came first
            third.request.cancel(Reason.ADMIN)
            execution.step()
            await wait_all_tasks_blocked()
            assert execution.cancelled_after is None
            execution.finish()
        assert (second.output == 3).all()
        assert first.output is None and third.output is None
        counters = server.model("m").counters
        assert (counters.inference_count, counters.cache_miss.count, counters.cache_hit.count) == (1, 1, 0)


async def test_B9_who_has_left_may_use_its_arrays_for_something_else(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        async with calling(server.model("m")) as callers:
            first, second = await callers.call_all("ab", value=3)
            first.leave()
            first.request.inputs["INPUT0"][...] = 9  # type: ignore[index]
            (await backend.wait_execution()).finish()
        assert (second.output == 3).all()


@pytest.mark.parametrize("where", ["queued", "executing"])
async def test_A4_with_the_last_one_the_execution_is_cancelled_wherever_it_is(serve: Serve, where: str) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        model = server.model("m")
        async with calling(model) as callers:
            if where == "queued":
                await callers.call("busy", value=1)
            first, second = await callers.call_all("ab", value=3)
            assert first.request.stage.value == second.request.stage.value == where
            first.leave()
            assert len(model.scheduler) == (where == "queued")
            second.leave()
            assert len(model.scheduler) == 0  # at that instant
            if where == "queued":
                (await backend.wait_execution()).finish()
        # Nothing of it was kept: whoever comes next is executed, and only the one after that is a hit.
        async with calling(model) as callers:
            again = await callers.call("again", value=3)
            execution = await backend.wait_execution()
            execution.finish()
            await wait_all_tasks_blocked()
            hit = await callers.call("hit", value=3)
        assert again.outcome is hit.outcome is Outcome.OK
        assert len(backend.executions) == 2
        assert model.counters.failures[FailureReason.CANCELED] == 2


async def test_each_cancel_is_logged_once_the_last_with_what_it_cost(
    serve: Serve, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    with caplog.at_level("INFO", "triton_trio.cancel"):
        async with serve({"m": CONFIG}, backend, cache_size=SIZE, limit=float("inf")) as server:
            async with calling(server.model("m")) as callers:
                first, second = await callers.call_all("ab", value=3)
                first.leave()
                second.leave()
                execution = await backend.wait_execution()
            await trio.sleep(0.25)
            execution.let_go()
    logged = [
        (record.request_id, record.device_ms_after_cancel)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "triton_trio.cancel"
    ]
    assert logged == [("a", 0), ("b", pytest.approx(250))]


async def test_who_comes_when_the_last_one_has_just_left_gets_an_execution_of_its_own(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        async with calling(server.model("m")) as callers:
            first = await callers.call("a", value=3)
            first.leave()
            second = callers.start("b", value=3)  # in the same tick
            await wait_all_tasks_blocked()
            (await backend.wait_execution(1)).finish()
        assert (first.outcome, second.outcome) == (Outcome.CANCELLED, Outcome.OK)
        assert backend.executions[0].cancelled_after == 0


async def test_an_error_reaches_each_once_in_its_own_name_and_is_not_kept(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        model = server.model("m")
        async with calling(model) as callers:
            calls = await callers.call_all("ab", value=3)
            (await backend.wait_execution()).end()  # without an answer
        messages = [call.error.message for call in calls if call.error]
        assert messages == [f"[request id: {label}] model 'm' returned without a response" for label in "ab"]
        assert model.counters.failures[FailureReason.BACKEND] == 2
        async with calling(model) as callers:
            await callers.call("c", value=3)
            (await backend.wait_execution()).fail(InternalError("again"))
        assert len(backend.executions) == 2


async def test_a_queue_that_turns_the_execution_away_turns_its_members_away(
    serve: Serve, autojump_clock: MockClock
) -> None:
    policy = "default_queue_policy { max_queue_size: 1, default_timeout_microseconds: 1000000 }"
    config = scripted_config(max_batch_size=1, batching=policy, more=CACHED)
    backend = ScriptedBackend()
    async with serve({"m": config}, backend, cache_size=SIZE, limit=float("inf")) as server:
        async with calling(server.model("m")) as callers:
            await callers.call("busy", value=1, rows=1)
            waiting = await callers.call_all("ab", value=3, rows=1)  # one execution, one place
            full = await callers.call_all("cd", value=4, rows=1)
            assert [call.outcome for call in (*waiting, *full)] == [None, None, Outcome.REJECTED, Outcome.REJECTED]
            await trio.sleep(1)
            await wait_all_tasks_blocked()
            assert [call.outcome for call in waiting] == [Outcome.REJECTED] * 2
            (await backend.wait_execution()).finish()
        assert {call.error.message for call in waiting if call.error} == {"Request timeout expired"}
        assert [call.error.message for call in full if call.error] == [
            f"[request id: {label}] Exceeds maximum queue size" for label in "cd"
        ]


async def test_only_those_share_that_would_wait_alike(serve: Serve) -> None:
    config = scripted_config(max_batch_size=1, batching="priority_levels: 2 default_priority_level: 2", more=CACHED)
    backend = ScriptedBackend()
    async with serve({"m": config}, backend, cache_size=SIZE) as server:
        model = server.model("m")
        async with calling(model) as callers:
            await callers.call("busy", value=1, rows=1)
            slow = await callers.call("slow", value=3, rows=1)
            urgent = await callers.call("urgent", value=3, rows=1, priority=1)
            assert [request.request_id for request in model.scheduler.queued()] == ["urgent", "slow"]
            for number in range(3):
                (await backend.wait_execution(number)).finish()
        assert urgent.outcome is slow.outcome is Outcome.OK


async def test_B1_unload_tells_every_member_and_forgets_every_answer(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(
        {"m": CONFIG}, backend, cache_size=SIZE, explicit=True, load_models=["m"], unload_grace=0
    ) as server:
        model = server.model("m")
        async with calling(model) as callers:
            await callers.call("kept", value=1)
            (await backend.wait_execution()).finish()
            await wait_all_tasks_blocked()
            calls = await callers.call_all("ab", value=3)
            await server.unload_model("m")
        assert {call.request.reason for call in calls} == {Reason.MODEL_UNLOADING}
        assert server.statistics().response_cache.entries == 0
        await server.load_model("m")
        async with calling(server.model("m")) as callers:
            again = await callers.call("again", value=1)
            assert again.request.stage is Stage.EXECUTING
            (await backend.wait_execution()).finish()


async def test_an_ensemble_is_cached_as_a_whole_and_shared_as_a_whole(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(), "e": ENSEMBLE}, backend, cache_size=SIZE) as server:
        ensemble = server.model("e")
        async with calling(ensemble) as callers:
            first, second = await callers.call_all("ab", value=3)
            first.leave()
            for number in range(2):
                (await backend.wait_execution(number)).finish()
            await wait_all_tasks_blocked()
            third = await callers.call("c", value=3)
        assert (first.outcome, second.outcome, third.outcome) == (Outcome.CANCELLED, Outcome.OK, Outcome.OK)
        assert len(backend.executions) == 2
        assert ensemble.counters.execution_count == 1


async def test_an_error_of_a_step_names_each_ones_own_request(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(), "e": ENSEMBLE}, backend, cache_size=SIZE) as server:
        async with calling(server.model("e")) as callers:
            calls = await callers.call_all("ab", value=3)
            (await backend.wait_execution()).end()
        assert [call.error.message for call in calls if call.error] == [
            f"in ensemble 'e', [request id: {label}] model 'm' returned without a response" for label in "ab"
        ]


async def test_B5_a_device_that_hangs_is_quarantined_and_those_who_share_the_next_execution_are_told(
    serve: Serve, autojump_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    async with serve(
        {"m": CONFIG}, backend, cache_size=SIZE, release_limit=1, strict_readiness=False, limit=float("inf")
    ) as server:
        model = server.model("m")
        async with calling(model) as callers:
            hangs = await callers.call("hangs", value=1)
            waiting = await callers.call_all("ab", value=3)
            hangs.leave()
            await trio.sleep(2)
        assert [call.outcome for call in waiting] == [Outcome.REJECTED] * 2
        assert [call.error.message for call in waiting if call.error] == [
            f"[request id: {label}] model 'm' has no instance left: all are quarantined; reload it" for label in "ab"
        ]


async def test_the_tree_says_how_many_share_it(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        async with calling(server.model("m")) as callers:
            first, *_ = await callers.call_all("abc", value=3)
            first.leave()
            drawn = [line.strip("│ ") for line in tree().splitlines()]
            assert drawn[drawn.index("└── shared execution of m") + 1] == "└── requests that share it: 2"
            (await backend.wait_execution()).finish()


async def test_without_a_cache_on_the_server_a_model_is_only_told_so(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve({"m": CONFIG}) as server:
        assert "response_cache has no effect: the server has none (see --cache-config)" in caplog.text
        assert server.model("m").shared is None
        assert server.statistics().response_cache is None


# Everything in one tick


def finish(server: InferenceServer, model: Model, calls: list[Call]) -> None:
    batch = model.instances[0].batch
    if batch is not None:
        for member in batch.members:
            batch.respond(member, {"OUTPUT0": np.full(2, 3, np.float32)})


def first_leaves(server: InferenceServer, model: Model, calls: list[Call]) -> None:
    calls[0].leave()


def second_is_cancelled(server: InferenceServer, model: Model, calls: list[Call]) -> None:
    calls[1].request.cancel(Reason.ADMIN)


def unload(server: InferenceServer, model: Model, calls: list[Call]) -> None:
    model.begin_unload()
    model.stop()


ACTS: dict[str, Callable[[InferenceServer, Model, list[Call]], None]] = {
    act.__name__: act for act in (finish, first_leaves, second_is_cancelled, unload)
}


@pytest.mark.parametrize("names", orders(ACTS, 3), ids="+".join)
async def test_B1_in_one_tick(serve: Serve, names: tuple[str, ...]) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        model = server.model("m")
        async with calling(model) as callers:
            calls = await callers.call_all("ab", value=3)
            for name in names:
                ACTS[name](server, model, calls)
            await wait_all_tasks_blocked()
            if backend.running:
                backend.running[0].finish()
        kept = server.statistics().response_cache.entries
        if "unload" not in names:
            gone = {name for name in names if name != "finish"}
            assert kept == (len(gone) < 2)
            assert [call.outcome is Outcome.OK for call in calls].count(True) == 2 - len(gone)
            async with calling(model) as callers:
                again = await callers.call("again", value=3)
                if again.outcome is None:
                    (await backend.wait_execution()).finish()
            assert (again.output == 3).all()
        else:
            assert all(call.outcome is not None for call in calls)


MODELS = {
    "default": {"shared": CONFIG},
    "batching": {"shared": scripted_config(max_batch_size=4, batching="", more=CACHED)},
    "ensemble": {"m": scripted_config(), "shared": ENSEMBLE},
}


@pytest.mark.parametrize("kind", MODELS)
async def test_A6_B3_a_cancel_at_every_point_beside_one_that_shares(tmp_path: Path, kind: str) -> None:
    numbers = iter(range(10_000))
    rows = 1 if kind == "batching" else None
    shape = (2,) if rows is None else (1, 2)

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend(automatic=True)
        directory = tmp_path / str(next(numbers))
        async with open_test_server(directory, MODELS[kind], backend, cache_size=SIZE) as server:
            model = server.model("shared")
            request = model.request({"INPUT0": np.full(shape, 5, np.float32)}, request_id="victim")
            async with calling(model) as callers:
                before = callers.start("before", value=5, rows=rows)
                with victim:
                    await model.infer(request)
                after = callers.start("after", value=5, rows=rows)
            assert (before.output == 5).all() and (after.output == 5).all()
            assert request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)

    assert await sweep(scenario) > 3
