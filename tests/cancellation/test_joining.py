"""Blocking place: the queue of a model whose execution under way takes requests in.  Who has joined is a member like the
others; who has not waits, and for no longer than without anybody joining."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call, Callers, calling
from triton_trio import Model, Outcome, Reason
from triton_trio.batch import Batch
from triton_trio.lifecycle import Stage
from triton_trio.testing import ScriptedBackend, Victim, assert_quiescent, scripted_config, sweep
from triton_trio.testing.fixtures import Serve

EIGHT = scripted_config(max_batch_size=8, batching="")


def queued(model: Model) -> list[str]:
    return [request.request_id for request in model.scheduler.queued()]


def batch_of(model: Model) -> Batch:
    batch = model.instances[0].batch
    assert batch is not None
    return batch


async def test_who_joins_is_a_member_like_the_others(serve: Serve) -> None:
    """Timeline: a is executed; b and c come, and join; b leaves, in the execution; a and c are answered."""
    backend = ScriptedBackend()
    async with serve({"m": EIGHT}, backend) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        a, b, c = [await callers.call(label, value=value, rows=2) for value, label in enumerate("abc", 1)]
        (execution,) = backend.executions
        assert queued(model) == ["b", "c"]
        execution.join(6)
        await wait_all_tasks_blocked()
        assert execution.members == ("a", "b", "c")
        assert (queued(model), b.request.stage) == ([], Stage.EXECUTING)
        b.leave()
        execution.step()
        execution.finish()
        await execution.ended.wait()
    assert execution.live == [("a", "c")]
    assert [None if call.output is None else call.output.tolist() for call in (a, b, c)] == [
        [[1, 1], [1, 1]],
        None,
        [[3, 3], [3, 3]],
    ]
    counters = model.counters
    assert counters.reasons == {("client_reset", "executing"): 1}
    # Those who join together are counted as an execution of their own, so that rows and executions add up.
    assert counters.execution_count == 2
    assert {rows: times.compute_infer.count for rows, times in counters.by_batch_size.items()} == {2: 1, 4: 1}
    assert (counters.inference_count, counters.queue.count, counters.success.count) == (4, 2, 2)


async def test_A2_the_last_to_leave_cancels_the_execution_whether_it_began_or_joined(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": EIGHT}, backend) as server, calling(server.model("m")) as callers:
        a, b = await callers.call_all("ab", rows=1)
        (execution,) = backend.executions
        execution.join(1)
        await wait_all_tasks_blocked()
        a.leave()
        await wait_all_tasks_blocked()
        assert not execution.ended.is_set()
        b.leave()
        await execution.ended.wait()
        assert execution.cancelled_after == 0


@pytest.mark.parametrize(
    ("order", "joined"),
    [
        ("a leaves, one joins, b leaves", ""),
        ("a leaves, b leaves, one joins", ""),
        ("one joins, a leaves, b leaves", "b"),
        ("one joins, b leaves, a leaves", "b"),
        ("b leaves, a leaves, one joins", ""),
        ("b leaves, one joins, a leaves", "c"),
    ],
)
async def test_B1_a_join_and_cancels_in_one_tick(serve: Serve, order: str, joined: str) -> None:
    """An execution that was cancelled takes nobody, and nobody who has left its queue is taken."""
    backend = ScriptedBackend()
    async with serve({"m": EIGHT}, backend) as server, calling(server.model("m")) as callers:
        a, b, c = await callers.call_all("abc", rows=1)
        batch = batch_of(server.model("m"))
        taken: list[str] = []
        acts: dict[str, Callable[[], object]] = {
            "a leaves": a.request.cancel,
            "one joins": lambda: taken.extend(member.request.request_id for member in batch.join(1)),
            "b leaves": b.request.cancel,
        }
        for name in order.split(", "):
            acts[name]()
        assert taken == list(joined)
        assert batch.scope.cancel_scope.cancel_called == (joined != "c")
        await wait_all_tasks_blocked()
        backend.running[-1].finish()
        await c.ended.wait()
    assert [call.outcome for call in (a, b, c)] == [Outcome.CANCELLED, Outcome.CANCELLED, Outcome.OK]


@pytest.mark.parametrize("victim_is", ["a", "b", "c"])
async def test_every_point_at_which_one_of_three_leaves(serve: Serve, victim_is: str) -> None:
    """a begins, b joins, c joins after a's answer."""

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend()
        async with serve({"m": EIGHT}, backend) as server:
            async with trio.open_nursery() as nursery:
                calls = {label: Call(server.model("m"), label, rows=1) for label in "abc"}

                async def run(call: Call) -> None:
                    if call.request.request_id == victim_is:
                        with victim:
                            await call.run()
                    else:
                        await call.run()

                for label, call in calls.items():
                    nursery.start_soon(run, call, name=f"client {label}")
                    await wait_all_tasks_blocked()
                    if backend.running:
                        backend.running[-1].join(1)
                        await wait_all_tasks_blocked()
                    if label == "b" and backend.running:
                        backend.running[-1].step()
                while backend.running:
                    backend.running[-1].finish()
                    await wait_all_tasks_blocked()
            for label, call in calls.items():
                if label != victim_is or not victim.fired:
                    assert call.outcome is Outcome.OK
            await wait_all_tasks_blocked()
            assert_quiescent(server)

    assert await sweep(scenario) > 5


# Nobody waits for ever


async def test_a_request_that_does_not_fit_is_not_overtaken(serve: Serve) -> None:
    """Timeline: a runs; b wants 8 rows and does not fit; c would, and waits behind b until the execution has run dry."""
    backend = ScriptedBackend()
    async with serve({"m": EIGHT}, backend) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        await callers.call("a", rows=1)
        b = await callers.call("b", rows=8)
        await callers.call("c", rows=1)
        backend.executions[0].join(7)
        await wait_all_tasks_blocked()
        assert queued(model) == ["b", "c"]
        b.leave()
        await wait_all_tasks_blocked()
        backend.executions[0].join(7)
        await wait_all_tasks_blocked()
        assert queued(model) == []
        backend.executions[0].finish()


async def test_priorities_hold_for_those_who_join(serve: Serve) -> None:
    backend = ScriptedBackend()
    config = scripted_config(max_batch_size=8, batching="priority_levels: 2, default_priority_level: 2")
    async with serve({"m": config}, backend) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        for label, priority in (("a", 2), ("b", 2), ("c", 1), ("d", 2)):
            await callers.call(label, rows=1, priority=priority)
        backend.executions[0].join(2)
        await wait_all_tasks_blocked()
        assert backend.executions[0].members == ("a", "c", "b")
        assert queued(model) == ["d"]
        backend.executions[0].join(1)
        backend.executions[0].finish()


async def test_a_queue_timeout_ends_with_the_wait_in_the_queue(serve: Serve, autojump_clock: MockClock) -> None:
    """Timeline: b and c may wait one second; b joins at once; c has no row, and is turned away while the others run."""
    backend = ScriptedBackend()
    config = scripted_config(
        max_batch_size=8, batching="default_queue_policy { default_timeout_microseconds: 1000000 }"
    )
    async with serve({"m": config}, backend) as server, calling(server.model("m")) as callers:
        a, b, c = await callers.call_all("abc", rows=1)
        backend.executions[0].join(1)
        await c.ended.wait()
        assert trio.current_time() == pytest.approx(1, abs=0.01)
        await trio.sleep(5)
        assert c.outcome is Outcome.REJECTED
        backend.executions[0].finish()
        await b.ended.wait()
    assert a.outcome is b.outcome is Outcome.OK


@pytest.mark.parametrize("a_is", ["answered", "cancelled"])
async def test_answers_keep_their_order(serve: Serve, a_is: str) -> None:
    """With preserve_ordering, b joins and is done before a; its answer waits for a's, or for a's end without one."""
    backend = ScriptedBackend()
    config = scripted_config(max_batch_size=8, batching="preserve_ordering: true")
    async with serve({"m": config}, backend) as server, calling(server.model("m")) as callers:
        a, b = await callers.call_all("ab", rows=1)
        (execution,) = backend.executions
        execution.join(1)
        await wait_all_tasks_blocked()
        batch = batch_of(server.model("m"))
        first, second = batch.members
        batch.respond(second, execution.answer(second))
        await wait_all_tasks_blocked()
        assert not b.ended.is_set()
        if a_is == "answered":
            batch.respond(first, execution.answer(first))
        else:
            a.leave()
        await b.ended.wait()
        execution.end()
    assert b.outcome is Outcome.OK


LIMITED = 'rate_limiter { resources { name: "R" global: true count: 1 } }'


def limited(instances: int = 1) -> str:
    config = scripted_config(max_batch_size=8, batching="", instances=instances)
    return config.replace("kind: KIND_CPU", f"kind: KIND_CPU, {LIMITED}")


async def test_nobody_joins_while_another_model_waits_for_the_resources(serve: Serve) -> None:
    """Timeline: m holds R; b joins; a request of another model comes; c does not join, and the other model is next."""
    backend = ScriptedBackend()
    async with serve({"m": limited(), "other": limited()}, backend, rate_limit="execution_count") as server:
        async with calling(server.model("m")) as callers, calling(server.model("other")) as others:
            await callers.call_all("ab", rows=1)
            backend.executions[0].join(7)
            await wait_all_tasks_blocked()
            x = await others.call("x", rows=1)
            await callers.call("c", rows=1)
            backend.executions[0].join(7)
            await wait_all_tasks_blocked()
            assert backend.executions[0].members == ("a", "b")
            x.leave()  # and when nobody waits any more:
            backend.executions[0].join(7)
            await wait_all_tasks_blocked()
            assert backend.executions[0].members == ("a", "b", "c")
            await others.call("y", rows=1)
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            assert backend.executions[1].members == ("y",)
            backend.executions[1].finish()


async def test_the_models_other_instance_is_no_reason_to_wait(serve: Serve) -> None:
    # It stands in the line for the same requests, and leaves it when they have joined.
    backend = ScriptedBackend()
    async with serve({"m": limited(instances=2)}, backend, rate_limit="execution_count") as server:
        async with calling(server.model("m")) as callers:
            await callers.call_all("ab", rows=1)
            limiter = server.statistics().rate_limiter
            assert limiter is not None and limiter.waiters == 1
            backend.executions[0].join(7)
            await wait_all_tasks_blocked()
            limiter = server.statistics().rate_limiter
            assert limiter is not None and limiter.waiters == 0
            assert backend.executions[0].members == ("a", "b")
            backend.executions[0].finish()


@pytest.mark.parametrize("patient", [True, False])
async def test_E1_an_unload_drains_those_who_joined_and_those_who_will(serve: Serve, patient: bool) -> None:
    backend = ScriptedBackend()
    async with serve({"m": EIGHT}, backend) as server:
        async with calling(server.model("m")) as callers:
            model = server.model("m")
            a, b, c = await callers.call_all("abc", rows=1)
            backend.executions[0].join(1)
            await wait_all_tasks_blocked()
            model.begin_unload()
            backend.executions[0].join(1)
            await wait_all_tasks_blocked()
            assert backend.executions[0].members == ("a", "b", "c")
            if patient:
                backend.executions[0].finish()
            else:
                model.stop()
    assert [call.outcome for call in (a, b, c)] == [Outcome.OK if patient else Outcome.CANCELLED] * 3
    if not patient:
        assert {call.request.reason for call in (a, b, c)} == {Reason.MODEL_UNLOADING}


@pytest.mark.parametrize(
    "config", [scripted_config(max_batch_size=8), scripted_config(max_batch_size=8, sequences="direct { }")]
)
async def test_nobody_joins_where_nothing_is_batched_and_where_rows_are_slots(serve: Serve, config: str) -> None:
    async with serve({"m": config}, ScriptedBackend()) as server:
        model = server.model("m")
        assert model.scheduler.joining(model.instances[0].seat) is None


async def test_an_error_of_the_device_is_everybodys(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": EIGHT}, backend) as server, calling(server.model("m")) as callers:
        a, b = await callers.call_all("ab", rows=1)
        backend.executions[0].join(1)
        backend.executions[0].fail(RuntimeError("the device failed"))
        await b.ended.wait()
        assert a.outcome is b.outcome is Outcome.ERROR
        again = await start_and_finish(callers, backend)
        assert again.outcome is Outcome.OK


async def start_and_finish(callers: Callers, backend: ScriptedBackend) -> Call:
    call = await callers.call("again", rows=1)
    backend.running[-1].finish()
    await call.ended.wait()
    return call
