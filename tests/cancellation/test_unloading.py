"""Blocking place: a model that is being unloaded.  What is in flight has a grace; then everybody is told."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import NotFound, Outcome, Reason, Unavailable
from triton_trio.model import ModelState
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve


async def test_what_is_in_flight_ends_and_nothing_new_is_taken(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server:
        model = server.model("m")
        async with calling(model) as callers, trio.open_nursery() as nursery:
            executing, queued = await callers.call_all("eq")
            nursery.start_soon(server.unload_model, "m")
            await wait_all_tasks_blocked()
            assert model.state is ModelState.UNLOADING
            (line,) = await server.repository.index()
            assert (line.state, line.version) == ("UNLOADING", "1")
            late = await callers.call("late")
            assert late.outcome is Outcome.REJECTED
            assert isinstance(late.error, Unavailable)
            with pytest.raises(Unavailable):
                server.model("m")
            backend.executions[0].finish()
            (await backend.wait_execution(1)).finish()
        assert (executing.outcome, queued.outcome) == (Outcome.OK, Outcome.OK)
        (line,) = await server.repository.index()
        assert (line.state, line.reason) == ("UNAVAILABLE", "unloaded")
        assert (backend.open_models, backend.open_instances) == (0, 0)


async def test_after_its_grace_everybody_is_told_whether_queued_or_executing(
    serve: Serve, autojump_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend, unload_grace=5) as server:
        async with calling(server.model("m")) as callers:
            executing, queued = await callers.call_all("eq")
            before = trio.current_time()
            await server.unload_model("m")
            assert trio.current_time() - before == 5
            for call, stage in ((executing, "executing"), (queued, "queued")):
                assert call.request.reason is Reason.MODEL_UNLOADING
                assert isinstance(call.error, Unavailable)
                assert f"cancelled while {stage}: the model is being unloaded" in call.error.message


async def test_the_waiter_may_leave_and_the_unload_goes_on(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend, limit=math.inf, unload_grace=5) as server:
        async with calling(server.model("m")) as callers:
            await callers.call("a")
            with trio.move_on_after(1) as scope:
                await server.unload_model("m")
            assert scope.cancelled_caught
            await trio.sleep(5)
            assert backend.open_models == 0
            assert (await server.repository.index())[0].state == "UNAVAILABLE"


async def test_a_model_is_loaded_again_while_the_old_one_drains(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server:
        old = server.model("m")
        async with calling(old) as callers, trio.open_nursery() as nursery:
            await callers.call("old")
            nursery.start_soon(server.unload_model, "m")
            await wait_all_tasks_blocked()
            await server.load_model("m")
            new = server.model("m")
            assert new is not old
            async with calling(new) as others:
                other = await others.call("new")
                backend.executions[1].finish()
            assert other.outcome is Outcome.OK
            assert backend.open_models == 2
            backend.executions[0].finish()
        await wait_all_tasks_blocked()
        assert server.model("m") is new
        assert backend.open_models == 1


async def test_two_unloads_at_once_are_one(serve: Serve) -> None:
    async with serve({"m": scripted_config()}) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.unload_model, "m")
            nursery.start_soon(server.unload_model, "m")
        (line,) = await server.repository.index()
        assert line.state == "UNAVAILABLE"
        await server.unload_model("m")
        with pytest.raises(NotFound):
            await server.unload_model("another")
