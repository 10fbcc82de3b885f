"""Blocking place: a device that several instances share, and that does not let go.  It is lost for all of them."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InferenceRequest, Outcome, Unavailable
from triton_trio.instance import InstanceState
from triton_trio.scheduling import Seat
from triton_trio.scheduling.default import DefaultScheduler
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

LOST = "model 'm' has no instance left: the device that all instances are on was given up; reload the model"


async def test_B5_whoever_executes_waits_or_is_idle_there_is_told_and_readiness_turns_false(
    serve: Serve, autojump_clock: MockClock
) -> None:
    backend = ScriptedBackend(one_device=True)
    backend.misbehaviour.ignore_release = True
    async with serve({"m": scripted_config(instances=2)}, backend, limit=math.inf, release_limit=5) as server:
        model = server.model("m")
        async with calling(model) as callers:
            stuck, beside, queued = await callers.call_all("abc")
            stuck.leave()
            await beside.ended.wait()
            assert trio.current_time() - stuck.request.received_at == 5
            assert isinstance(beside.error, Unavailable)
            await queued.ended.wait()
            assert queued.outcome is Outcome.REJECTED
            assert queued.error is not None and LOST in queued.error.message
            assert [instance.state for instance in model.instances] == [InstanceState.QUARANTINED] * 2
            assert not model.ready and not server.ready
            late = await callers.call("d")
            assert late.error is not None and LOST in late.error.message
        assert [execution.members for execution in backend.executions] == [("a",), ("b",)]


async def test_B5_an_idle_instance_there_takes_nothing_more(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend(one_device=True)
    backend.misbehaviour.ignore_release = True
    async with serve({"m": scripted_config(instances=3)}, backend, limit=math.inf, release_limit=5) as server:
        model = server.model("m")
        async with calling(model) as callers:
            stuck = await callers.call("a")
            stuck.leave()
            await trio.sleep(5.1)
            assert [instance.state for instance in model.instances] == [InstanceState.QUARANTINED] * 3
            assert model.scheduler.idle_instances == 0
            late = await callers.call("b")
            assert isinstance(late.error, Unavailable)
        assert len(backend.executions) == 1


async def test_A6_a_wake_up_that_meets_the_loss_of_the_device_is_passed_on() -> None:
    """The instance that was woken for a request leaves in the same tick: one that is on another device takes it."""
    scheduler = DefaultScheduler()
    request = InferenceRequest({})
    taken = []
    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def instance(index: int) -> None:
        with scopes[index]:
            taken.append((index, await scheduler.next_batch(Seat(index))))

    async with trio.open_nursery() as nursery:
        for index in range(2):
            nursery.start_soon(instance, index)
            await wait_all_tasks_blocked()
        scheduler.enqueue(request)
        scopes[0].cancel()
    assert taken == [(1, (request,))]
