"""Blocking place: the rate limiter.  It is the instance that waits there; its requests are in their queue, and leave it."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InferenceServer, InvalidArgument, Outcome, Reason
from triton_trio.observe import tree
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.scheduling import Resource
from triton_trio.testing import ScriptedBackend, Victim, assert_quiescent, orders, scripted_config, sweep
from triton_trio.testing.fixtures import Serve

SHARED = 'resources { name: "SHARED" global: true count: 1 }'


def limited(limits: str = SHARED, **options: object) -> str:
    config = scripted_config(**options)  # type: ignore[arg-type]
    return config.replace("kind: KIND_CPU", f"kind: KIND_CPU, rate_limiter {{ {limits} }}")


def serving(
    serve: Serve, models: dict[str, str], backend: ScriptedBackend, *resources: Resource, **options: object
) -> AbstractAsyncContextManager[InferenceServer]:
    return serve(models, backend, rate_limit="execution_count", resources=resources, **options)


def out(server: InferenceServer) -> dict[str, int]:
    limiter = server.statistics().rate_limiter
    assert limiter is not None
    return {pool.name: pool.in_use for pool in limiter.resources}


def in_line(server: InferenceServer) -> int:
    limiter = server.statistics().rate_limiter
    assert limiter is not None
    return limiter.waiters


def queued(server: InferenceServer, name: str) -> int:
    scheduler = server.model(name).statistics().scheduler
    assert scheduler is not None
    return scheduler.queue.queued


def executed(backend: ScriptedBackend) -> list[str]:
    return ["".join(execution.members) for execution in backend.executions]


@pytest.mark.parametrize("how", ["leaves its scope", "is cancelled", "its deadline passes"])
async def test_A4_trt_queued_request_cancellation_skips_execution(
    serve: Serve, how: str, autojump_clock: MockClock
) -> None:
    """Triton's scenario: two models, one global resource; who waits for it is cancelled, and is not executed."""
    backend = ScriptedBackend()
    async with serving(serve, {"holder": limited(), "waiter": limited()}, backend) as server:
        async with calling(server.model("holder")) as holders, calling(server.model("waiter")) as waiters:
            (holder,) = await holders.call_all("h")
            (waiter,) = await waiters.call_all("w")
            assert (executed(backend), out(server), in_line(server)) == (["h"], {"SHARED": 1}, 1)
            if how == "leaves its scope":
                waiter.leave(Reason.CONNECTION_LOST)
            elif how == "is cancelled":
                waiter.request.cancel(Reason.ADMIN)
            else:
                waiter.scope.deadline = trio.current_time() + 1
                await trio.sleep(1)
            # No task of the server has run: it is settled, out of the queue, out of the line, and nothing else has changed.
            assert waiter.outcome in (Outcome.CANCELLED, Outcome.DEADLINE)
            assert queued(server, "waiter") == 0
            assert (out(server), in_line(server)) == ({"SHARED": 1}, 0)
            assert holder.outcome is None
            backend.executions[0].finish()
        assert server.model("waiter").counters.execution_count == 0
        assert server.model("waiter").counters.failures == {"CANCELED": 1}
        assert out(server) == {"SHARED": 0}
    assert executed(backend) == ["h"]
    assert holder.outcome is Outcome.OK


async def test_A4_without_cancellation_still_executes(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": limited()}, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("x")
            call = await b.call("y", value=3)
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            assert (executed(backend), out(server)) == (["x", "y"], {"SHARED": 1})
            backend.executions[1].finish()
        assert call.output is not None and call.output.tolist() == [3, 3]


@pytest.mark.parametrize("order", orders(["cancel", "finish", "other"], 3))
async def test_A4_cancelled_in_the_tick_in_which_the_resource_comes_free(serve: Serve, order: tuple[str, ...]) -> None:
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": limited(), "c": limited()}, backend) as server:
        async with (
            calling(server.model("a")) as a,
            calling(server.model("b")) as b,
            calling(server.model("c")) as c,
        ):
            await a.call("a")
            cancelled = await b.call("b")
            acts = {
                "cancel": cancelled.leave,
                "finish": backend.executions[0].finish,
                "other": lambda: c.start("c"),
            }
            for act in order:
                acts[act]()  # type: ignore[no-untyped-call]
            await wait_all_tasks_blocked()
            # With every act in one tick, in any order: what is left is served, and nobody holds what he does not use.
            wanted = [name for name, act in (("a", None), ("b", None), ("c", "other")) if act is None or act in order]
            if "cancel" in order:
                wanted.remove("b")
            backend.automatic = True
            for execution in backend.running:
                execution.finish()
            await wait_all_tasks_blocked()
            assert sorted({*executed(backend)}) == wanted
            assert_quiescent(server)


async def test_A4_a_cancel_between_the_grant_and_the_look(serve: Serve) -> None:
    """The resource is free and the instance has been woken; its request goes before the instance has run."""
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": limited(), "c": limited()}, backend) as server:
        async with (
            calling(server.model("a")) as a,
            calling(server.model("b")) as b,
            calling(server.model("c")) as c,
        ):
            await a.call("a")
            second = await b.call("b")
            await c.call("c")

            class Instrument(trio.abc.Instrument):
                def before_task_step(self, task: trio.lowlevel.Task) -> None:
                    if task.name == "instance b_0_0" and second.outcome is None:
                        assert out(server) == {"SHARED": 0}
                        second.leave()

            trio.lowlevel.add_instrument(instrument := Instrument())
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            trio.lowlevel.remove_instrument(instrument)
            assert second.outcome is Outcome.CANCELLED
            assert (executed(backend), out(server), in_line(server)) == (["a", "c"], {"SHARED": 1}, 0)
            backend.executions[1].finish()


async def test_A4_cancelled_at_every_scheduling_point(serve: Serve) -> None:
    backend = ScriptedBackend()
    models = {"a": limited(max_batch_size=4, batching=""), "b": limited(max_batch_size=4, batching="")}
    async with serving(serve, models, backend) as server:

        async def scenario(victim: Victim) -> None:
            before = len(backend.executions)
            async with calling(server.model("a")) as a, calling(server.model("b")) as b:
                await a.call("a", rows=1)
                with victim:
                    waiter = b.start("v", rows=1)
                    try:
                        await wait_all_tasks_blocked()
                        backend.executions[before].finish()
                        await wait_all_tasks_blocked()
                        for execution in backend.running:
                            execution.step()
                            execution.finish()
                        await waiter.ended.wait()
                    finally:
                        waiter.leave()
                await wait_all_tasks_blocked()
                for execution in backend.running:
                    execution.finish()
                await wait_all_tasks_blocked()
                assert waiter.outcome in (Outcome.OK, Outcome.CANCELLED)
                assert_quiescent(server)
                # And the next one is served.
                after = await b.call("n", rows=1)
                backend.executions[-1].finish()
                await after.ended.wait()
                assert after.outcome is Outcome.OK

        assert await sweep(scenario) > 10


async def test_A4_a_batch_has_who_is_there_when_the_resource_comes_free(serve: Serve) -> None:
    backend = ScriptedBackend()
    models = {"a": limited(), "b": limited(max_batch_size=8, batching="")}
    async with serving(serve, models, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            calls = await b.call_all("uvwx", rows=1)
            calls[1].leave()
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            assert executed(backend) == ["a", "uwx"]
            backend.executions[1].finish()


async def test_L0_rate_limiter_limited_resource_two_models_never_execute_at_once(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": limited()}, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            calls = [caller.start(f"{number}") for number in range(10) for caller in (a, b)]
            for _ in calls:
                await wait_all_tasks_blocked()
                assert len(backend.running) == 1
                backend.running[0].finish()
    assert all(call.outcome is Outcome.OK for call in calls)


async def test_L0_rate_limiter_plenty_resource_several_execute_at_once(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": limited()}, backend, Resource("SHARED", 2)) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            await b.call("b")
            assert out(server) == {"SHARED": 2}
            for execution in backend.running:
                execution.finish()


async def test_L0_rate_limiter_cross_model_prioritization(serve: Serve) -> None:
    backend = ScriptedBackend()
    models = {"first": limited(), "second": limited(SHARED + " priority: 2")}
    async with serving(serve, models, backend) as server:
        async with calling(server.model("first")) as a, calling(server.model("second")) as b:
            for number in range(30):
                a.start(f"a{number}")
                b.start(f"b{number}")
            for _ in range(30):
                await wait_all_tasks_blocked()
                backend.running[0].finish()
            counts = [server.model(name).counters.execution_count for name in models]
            await wait_all_tasks_blocked()
            backend.automatic = True
            backend.running[0].finish()
    assert sum(counts) in (29, 30)
    assert abs(counts[0] - 2 * counts[1]) <= 2


async def test_L0_rate_limiter_single_model_per_instance(serve: Serve) -> None:
    """Two instances, of which one's resource is out: the other one serves, whichever was woken."""
    backend = ScriptedBackend()
    one = limited('resources { name: "R" count: 1 }').replace("kind:", 'name: "r", kind:')
    two = one.replace("instance_group [", 'instance_group [{ name: "s", kind: KIND_CPU },')
    async with serving(serve, {"holder": one, "m": two}, backend) as server:
        async with calling(server.model("holder")) as holders, calling(server.model("m")) as callers:
            await holders.call("h")
            await callers.call_all("ab")
            assert [execution.instance for execution in backend.running] == ["r_0", "s_0"]
            assert in_line(server) == 1
            backend.executions[1].finish()
            await wait_all_tasks_blocked()
            # The instance that was in line has nothing to execute any more, and does not stand there.
            assert [execution.members for execution in backend.running] == [("h",), ("b",)]
            assert in_line(server) == 0
            for execution in backend.running:
                execution.finish()


async def test_an_instance_that_must_wait_passes_the_wake_up_on(serve: Serve) -> None:
    """The instance that is woken cannot execute: the other one does, and the first leaves the line."""
    one = limited('resources { name: "R" count: 1 }').replace("kind:", 'name: "r", kind:')
    two = one.replace("} }]", '} }, { name: "s", kind: KIND_CPU }]')
    backend = ScriptedBackend()
    async with serving(serve, {"holder": one, "m": two}, backend) as server:
        async with calling(server.model("holder")) as holders, calling(server.model("m")) as callers:
            await holders.call("h")
            await callers.call("a")
            backend.executions[1].finish()
            await callers.call("b")
            # Whoever was woken first for a, it is r for b: it has been idle longer.
            assert [execution.instance for execution in backend.executions] == ["r_0", "s_0", "s_0"]
            assert in_line(server) == 0
            for execution in backend.running:
                execution.finish()


async def test_A4_one_who_goes_lets_the_next_model_have_it(serve: Serve) -> None:
    """b needs two and stands before c, who needs one; one is free.  b's request goes: c executes at once."""
    one, two = 'resources { name: "R" count: 1 }', 'resources { name: "R" count: 2 }'
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(one), "b": limited(two), "c": limited(one)}, backend) as server:
        async with (
            calling(server.model("a")) as a,
            calling(server.model("b")) as b,
            calling(server.model("c")) as c,
        ):
            await a.call("a")
            big = await b.call("b")
            await c.call("c")
            assert executed(backend) == ["a"]
            big.leave()
            await wait_all_tasks_blocked()
            assert executed(backend) == ["a", "c"]
            for execution in backend.running:
                execution.finish()


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { max_candidate_sequences: 4 }"])
async def test_A4_a_sequence_is_cancelled_while_its_instance_waits(serve: Serve, strategy: str) -> None:
    backend = ScriptedBackend()
    models = {"a": limited(), "s": limited(max_batch_size=1, sequences=strategy)}
    async with serving(serve, models, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("s")) as s:
            await a.call("a")
            (first,) = await s.call_all("1", rows=1, sequence_id=7, sequence_start=True)
            (second,) = await s.call_all("2", rows=1, sequence_id=7)
            assert (executed(backend), in_line(server)) == (["a"], 1)
            second.leave()
            # Nothing has run since; the other request of the sequence is told, and the line is empty.
            assert (second.outcome, in_line(server)) == (Outcome.CANCELLED, 0)
            await first.ended.wait()
            assert first.request.reason is Reason.SEQUENCE_CANCELLED
            third = await s.call("3", rows=1, sequence_id=7, sequence_start=True, sequence_end=True)
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            assert executed(backend) == ["a", "3"]
            backend.executions[1].finish()
        assert third.outcome is Outcome.OK


async def test_a_queue_timeout_passes_while_resources_are_awaited(serve: Serve, autojump_clock: MockClock) -> None:
    timed = limited(max_batch_size=1, batching="default_queue_policy { default_timeout_microseconds: 5000000 }")
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": timed}, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            call = await b.call("b", rows=1)
            await call.ended.wait()
            assert call.outcome is Outcome.REJECTED
            assert in_line(server) == 0
            backend.executions[0].finish()


async def test_a_batch_that_waits_for_company_holds_nothing(serve: Serve, autojump_clock: MockClock) -> None:
    delayed = limited(max_batch_size=4, batching="max_queue_delay_microseconds: 1000000")
    backend = ScriptedBackend(automatic=True)
    async with serving(serve, {"a": limited(), "b": delayed}, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            call = await b.call("b", rows=1)
            assert (out(server), in_line(server)) == ({"SHARED": 0}, 0)
            await a.call("a")
            assert executed(backend) == ["a"]
            await call.ended.wait()
            assert trio.current_time() - call.request.received_at == 1


async def test_unload_while_waiting_for_resources(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serving(
        serve, {"a": limited(), "b": limited()}, backend, explicit=True, load_models=["*"], unload_grace=0.0
    ) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            call = await b.call("b")
            await server.unload_model("b")
            assert call.outcome is Outcome.CANCELLED
            assert (out(server), in_line(server)) == ({"SHARED": 1}, 0)
            backend.executions[0].finish()
    assert executed(backend) == ["a"]


async def test_unload_of_the_one_who_holds_them(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serving(
        serve, {"a": limited(), "b": limited()}, backend, explicit=True, load_models=["*"], unload_grace=0.0
    ) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            await b.call("b")
            await server.unload_model("a")
            await wait_all_tasks_blocked()
            assert (executed(backend), out(server)) == (["a", "b"], {"SHARED": 1})
            backend.executions[1].finish()


async def test_B5_a_quarantined_instance_holds_until_its_device_has_let_go(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    held: list[dict[str, int]] = []
    async with serving(
        serve, {"a": limited(), "b": limited()}, backend, release_limit=2.0, strict_readiness=False
    ) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            stuck = await a.call("a")
            waiting = await b.call("b")
            stuck.leave()
            await trio.sleep(1.9)
            # The client has its answer; the device has not let go, and what it uses is not free.
            assert stuck.outcome is Outcome.CANCELLED
            held.append(out(server))
            assert executed(backend) == ["a"]
            backend.misbehaviour.ignore_release = False
            await trio.sleep(0.2)
            await wait_all_tasks_blocked()
            assert server.model("b").ready
            assert executed(backend) == ["a", "b"]
            backend.executions[1].finish()
    assert held == [{"SHARED": 1}]
    assert waiting.outcome is Outcome.OK


async def test_L0_rate_limiter_too_little_is_an_error_at_load(serve: Serve) -> None:
    text = 'Resource count for "R" is limited to 3 which will prevent scheduling of one or more model instances, the'
    backend = ScriptedBackend()
    with pytest.raises(InvalidArgument, match=text):
        async with serving(serve, {"m": limited('resources { name: "R" count: 4 }')}, backend, Resource("R", 3)):
            pytest.fail("it cannot be loaded")
    assert (backend.open_models, backend.open_instances) == (0, 0)


async def test_a_load_that_fails_gives_its_pools_back(serve: Serve) -> None:
    backend = ScriptedBackend()
    models = {"good": limited('resources { name: "R" count: 1 }'), "bad": limited('resources { name: "R" count: 9 }')}

    async def fail(name: str) -> None:
        if name == "bad":
            raise OSError("no such weights")

    backend.on_open_model = fail
    async with serving(serve, models, backend, exit_on_error=False) as server:
        limiter = server.statistics().rate_limiter
        assert limiter is not None
        assert [pool.capacity for pool in limiter.resources] == [1]


async def test_a_reload_keeps_within_what_there_is(serve: Serve, tmp_path: Path) -> None:
    backend = ScriptedBackend()
    async with serving(serve, {"m": limited()}, backend, explicit=True, load_models=["m"]) as server:
        old = server.model("m")
        async with calling(old) as callers:
            await callers.call("old")
            (tmp_path / "m" / "config.pbtxt").write_text(limited() + "\n# changed")
            await server.load_model("m")
            assert server.model("m") is not old
            async with calling(server.model("m")) as others:
                await others.call("new")
                assert (executed(backend), out(server)) == (["old"], {"SHARED": 1})
                backend.executions[0].finish()
                await wait_all_tasks_blocked()
                assert executed(backend) == ["old", "new"]
                backend.executions[1].finish()


async def test_without_the_flag_nothing_is_limited(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"a": limited(), "b": limited()}, backend) as server:
        assert server.statistics().rate_limiter is None
        for model in server.repository.loaded():
            assert isinstance(model, ScheduledModel)
            assert [instance.seat.permit for instance in model.instances] == [None]
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            await b.call("b")
            for execution in backend.running:
                execution.finish()
    assert executed(backend) == ["a", "b"]


async def test_the_tree_says_what_an_instance_waits_for(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serving(serve, {"a": limited(), "b": limited()}, backend) as server:
        async with calling(server.model("a")) as a, calling(server.model("b")) as b:
            await a.call("a")
            call = await b.call("b")
            assert "waits for 1 of 'SHARED' (0 free)" in tree()
            call.leave()
            assert "waits for" not in tree()
            backend.executions[0].finish()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate_limit": "some"}, "'off' or 'execution_count', not 'some'"),
        ({"resources": [Resource("R", 1)]}, "no effect without rate_limit='execution_count'"),
    ],
)
async def test_what_means_nothing_is_refused(serve: Serve, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        async with serve({}, **options):
            pytest.fail("refused")
