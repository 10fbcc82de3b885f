"""Blocking place: a device that does not let go.  Nobody waits for it longer than the release limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import Model, Outcome, Unavailable
from triton_trio.instance import InstanceState
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve
from triton_trio.testing.scripted import ScriptedInstance


def stuck() -> ScriptedBackend:
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    return backend


async def test_B5_the_request_is_answered_at_its_cancel_and_the_instance_quarantined_at_the_limit(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    backend = stuck()
    async with serve({"m": scripted_config(instances=2)}, backend, release_limit=5) as server:
        model = server.model("m")
        async with calling(model) as callers:
            call = await callers.call("a")
            call.leave()
            await call.ended.wait()
            assert trio.current_time() == call.request.received_at
            # No new traffic from here: the watchdog needs none.
            await trio.sleep(4.9)
            assert [instance.state for instance in model.instances].count(InstanceState.EXECUTING) == 1
            await trio.sleep(0.2)
            assert backend.executions[0].abandoned
            states = sorted(instance.state.value for instance in model.instances)
            assert states == ["idle", "quarantined"]
            assert f"instance {backend.executions[0].instance} quarantined" in caplog.text
            # One is left: the model serves.
            assert model.ready and server.ready
            backend.misbehaviour.ignore_release = False
            b, c = await callers.call_all("bc")
            for number in (1, 2):
                (await backend.wait_execution(number)).finish()
                await wait_all_tasks_blocked()
            assert (b.outcome, c.outcome) == (Outcome.OK, Outcome.OK)
            assert {execution.instance for execution in backend.executions[1:]} != {backend.executions[0].instance}


async def test_B5_when_the_last_instance_is_quarantined_whoever_waits_is_told_and_readiness_turns_false(
    serve: Serve, autojump_clock: MockClock
) -> None:
    backend = stuck()
    async with serve({"m": scripted_config()}, backend, limit=math.inf, release_limit=5) as server:
        model = server.model("m")
        async with calling(model) as callers:
            a, b, c = await callers.call_all("abc")
            a.leave()
            c.leave()
            await b.ended.wait()
            assert trio.current_time() - a.request.received_at == 5
            assert b.outcome is Outcome.REJECTED
            assert isinstance(b.error, Unavailable)
            assert "model 'm' has no instance left: all are quarantined; reload it" in b.error.message
            assert not model.ready
            assert not server.ready
            late = await callers.call("d")
            assert isinstance(late.error, Unavailable)
        with pytest.raises(Unavailable, match="has no available versions"):
            server.model("m")
        # What it says to do helps.
        backend.misbehaviour.ignore_release = False
        await server.load_model("m")
        assert server.ready
        async with calling(server.model("m")) as callers:
            again = await callers.call("e")
            (await backend.wait_execution()).finish()
        assert again.outcome is Outcome.OK


async def test_a_device_that_lets_go_in_time_is_not_quarantined(serve: Serve, autojump_clock: MockClock) -> None:
    backend = stuck()
    async with serve({"m": scripted_config()}, backend, release_limit=5) as server:
        model = server.model("m")
        async with calling(model) as callers:
            for number in range(3):
                call = await callers.call(str(number))
                call.leave()
                await trio.sleep(4)
                backend.executions[number].let_go()
                await trio.sleep(20)
                assert model.instances[0].state is InstanceState.IDLE


async def test_a_device_that_lets_go_in_the_tick_of_the_limit_goes_on(serve: Serve, autojump_clock: MockClock) -> None:
    backend = stuck()
    async with serve({"m": scripted_config()}, backend, release_limit=5) as server:
        model = server.model("m")
        async with calling(model) as callers:
            call = await callers.call("a")
            call.leave()
            await trio.sleep(5)
            # Everybody whose time has come is awake now, and the watchdog may or may not have run before us.
            backend.executions[0].let_go()
            await wait_all_tasks_blocked()
            quarantined = model.instances[0].state is InstanceState.QUARANTINED
            assert quarantined is backend.executions[0].abandoned
            assert model.statistics().scheduler.idle_instances == (0 if quarantined else 1)


async def test_time_in_which_nobody_could_run_is_not_the_devices(serve: Serve, mock_clock: MockClock) -> None:
    """A stopped process, or a library that holds the GIL: when it was over, the limit had passed, and the device was lost."""
    backend = stuck()
    async with serve({"m": scripted_config()}, backend, limit=math.inf, release_limit=8) as server:
        (instance,) = server.model("m").instances
        async with calling(server.model("m")) as callers:
            for number in range(2):
                (await callers.call("a")).leave()
                await wait_all_tasks_blocked()
                mock_clock.jump(1000)
                await wait_all_tasks_blocked()
                assert instance.state is InstanceState.EXECUTING
                if number == 0:
                    backend.executions[0].let_go()
                    await wait_all_tasks_blocked()
                    assert instance.state is InstanceState.IDLE
            # An eighth of the limit has passed with it, and the rest is bounded as ever.
            for _ in range(6):
                mock_clock.jump(1)
                await wait_all_tasks_blocked()
            assert instance.state is InstanceState.EXECUTING
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
            assert instance.state is InstanceState.QUARANTINED


async def test_a_backend_that_knows_its_device_has_the_last_word(
    serve: Serve, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stuck()
    asked: list[float] = []
    answers = [3.0, 2.0, 0.0]

    def time_left(self: ScriptedInstance, limit: float, unseen: float) -> float:
        asked.append(trio.current_time())
        assert limit == 5
        return answers[len(asked) - 1]

    monkeypatch.setattr(ScriptedInstance, "time_left", time_left)
    async with serve({"m": scripted_config()}, backend, limit=math.inf, release_limit=5) as server:
        (instance,) = server.model("m").instances
        async with calling(server.model("m")) as callers:
            (await callers.call("a")).leave()
            began = trio.current_time()
            await trio.sleep(9.9)
            assert instance.state is InstanceState.EXECUTING
            await trio.sleep(0.2)
            assert instance.state is InstanceState.QUARANTINED
    assert asked == [began + 5, began + 8, began + 10]


async def test_a_row_that_is_kept_takes_what_it_takes_until_its_model_ends(
    serve: Serve, autojump_clock: MockClock
) -> None:
    """Nobody waits for it, and it is computed to its end for its sequence's state; but not beyond an unload's limit."""
    narrow = 'parameters { key: "executing_cancel_ends_sequence" value { string_value: "false" } }'
    backend = stuck()
    config = scripted_config(max_batch_size=1, sequences="max_sequence_idle_microseconds: 1000000000", more=narrow)
    async with serve({"m": config}, backend, limit=math.inf, release_limit=5, unload_grace=0) as server:
        model = server.model("m")
        (instance,) = model.instances
        async with calling(model) as callers:
            call = await callers.call("a", rows=1, sequence_id=1, sequence_start=True)
            call.leave()
            await call.ended.wait()
            await trio.sleep(100)
            assert instance.state is InstanceState.EXECUTING
            before = trio.current_time()
            await server.unload_model("m")
            assert trio.current_time() - before <= 2 * 5


async def test_C3_an_unload_ends_although_the_device_does_not(serve: Serve, autojump_clock: MockClock) -> None:
    backend = stuck()
    async with serve({"m": scripted_config()}, backend, release_limit=5, unload_grace=3) as server:
        async with calling(server.model("m")) as callers:
            call = await callers.call("a")
            before = trio.current_time()
            await server.unload_model("m")
            assert trio.current_time() - before == 3 + 5
            assert call.request.ended_at - before == 3
            assert isinstance(call.error, Unavailable)
            assert (backend.open_models, backend.open_instances) == (0, 0)


async def test_C3_and_so_does_the_server(serve: Serve, autojump_clock: MockClock) -> None:
    backend = stuck()
    async with trio.open_nursery() as clients:
        with trio.CancelScope() as server_scope:
            async with serve({"m": scripted_config(instances=2)}, backend, release_limit=5) as server:
                model = server.model("m")
                for name in "abc":
                    clients.start_soon(expect_unavailable, model, name=name)
                await wait_all_tasks_blocked()
                before = trio.current_time()
                server_scope.cancel()
                await trio.sleep_forever()
        # Not quiescent, as it was cut short; but bounded, and everybody has been told, whether queued or executing.
        assert trio.current_time() - before == 5
        assert model.counters.reasons == {("model_unloading", "executing"): 2, ("model_unloading", "queued"): 1}
        assert backend.open_models == 0


async def expect_unavailable(model: Model) -> None:
    began = trio.current_time()
    with pytest.raises(Unavailable, match="the model is being unloaded"):
        await model.infer({"INPUT0": np.zeros(2, np.float32)})
    assert trio.current_time() == began  # at once, and not when the devices have let go
