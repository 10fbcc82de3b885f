"""The server as a library: what opening, calling and closing it is like."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import triton_trio
from tests.callers import calling
from triton_trio import InvalidArgument, NotFound, Outcome, RequestCancelled, Unsupported
from triton_trio.testing import ScriptedBackend, assert_quiescent, model_repository, open_test_server, scripted_config
from triton_trio.testing.fixtures import Serve

CONFIG = scripted_config()


def one() -> dict[str, np.ndarray]:
    return {"INPUT0": np.ones(2, np.float32)}


async def test_a_call(serve: Serve) -> None:
    async with serve({"m": CONFIG}, ScriptedBackend(lambda stacked: stacked * 3, automatic=True)) as server:
        assert server.ready and server.live
        response = await server.model("m").infer(one())
        assert response.outputs["OUTPUT0"].tolist() == [3, 3]
        request = server.model("m").request(one(), request_id="mine", outputs=("OUTPUT0",))
        assert (await server.model("m").infer(request)).request_id == "mine"
        with pytest.raises(ValueError, match="make a new request"):
            await server.model("m").infer(request)
    assert not server.ready


async def test_the_identity_backend(serve: Serve) -> None:
    config = CONFIG.replace('"scripted"', '"identity"')
    async with serve({"m": config}) as server:
        inputs = one()
        response = await server.model("m").infer(inputs)
        assert response.outputs["OUTPUT0"] is inputs["INPUT0"]


async def test_a_decoupled_model_is_not_called_with_infer(serve: Serve) -> None:
    async with serve({"m": scripted_config(decoupled=True)}) as server:
        with pytest.raises(Unsupported, match="use open_responses"):
            await server.model("m").infer(one())
        assert server.model("m").counters.started == 0


async def test_any_model_has_responses(serve: Serve) -> None:
    async with serve({"m": CONFIG}) as server:
        async with server.model("m").open_responses(one()) as responses:
            received = [response async for response in responses]
        assert len(received) == 1
        assert responses.request.outcome is Outcome.OK


async def test_what_is_wrong_with_a_model_comes_out_as_it_is(tmp_path: Path) -> None:
    model_repository(tmp_path, {"m": "no_such_field: 1"})
    # Not a group in a group in a group: that there are nurseries is none of the caller's business.
    with pytest.raises(InvalidArgument, match="no_such_field"):
        async with triton_trio.open_server(tmp_path):
            pytest.fail("a model failed to load")


async def test_unless_the_others_are_to_be_served(serve: Serve) -> None:
    async with serve({"bad": "no_such_field: 1", "good": CONFIG}, exit_on_error=False) as server:
        assert server.model("good").ready
        with pytest.raises(triton_trio.Unavailable):
            server.model("bad")


async def test_what_the_block_raises_comes_out_as_it_is(tmp_path: Path) -> None:
    error = NotFound("mine")
    with pytest.raises(NotFound) as caught:
        async with triton_trio.open_server(model_repository(tmp_path, {})):
            raise error
    assert caught.value is error
    assert not isinstance(error.__context__, BaseExceptionGroup)


async def test_and_the_caller_s_own_groups_stay_groups(tmp_path: Path) -> None:
    group = ExceptionGroup("mine", [ValueError()])
    with pytest.RaisesGroup(ValueError) as caught:
        async with triton_trio.open_server(model_repository(tmp_path, {})):
            raise group
    assert caught.value.message == "mine"


async def test_names_to_load_at_the_start(serve: Serve) -> None:
    async with serve({"a": CONFIG, "b": CONFIG}, explicit=True, load_models=["b"]) as server:
        assert [model.name for model in server.repository.loaded()] == ["b"]
    async with serve({}, explicit=True, load_models=["*"]) as server:
        assert [model.name for model in server.repository.loaded()] == ["a", "b"]
    async with serve({}, explicit=True) as server:
        assert not list(server.repository.loaded())
        assert server.ready


async def test_cancelling_the_scope_around_the_server_ends_everything(tmp_path: Path) -> None:
    backend = ScriptedBackend()
    outside: list[Outcome | None] = []

    async def client(model: triton_trio.Model) -> None:
        request = model.request(one())
        with pytest.raises(triton_trio.Unavailable):
            await model.infer(request)
        outside.append(request.outcome)

    async with trio.open_nursery() as elsewhere:
        with trio.CancelScope() as scope:
            async with open_test_server(tmp_path, {"m": CONFIG}, backend) as server:
                for name in ("executing", "queued"):
                    elsewhere.start_soon(client, server.model("m"), name=name)  # noqa: ASYNC111 - it outlives the server
                await wait_all_tasks_blocked()
                scope.cancel()
                await trio.sleep_forever()
    assert outside == [Outcome.CANCELLED] * 2
    assert (backend.open_models, backend.open_instances) == (0, 0)


async def test_statistics_are_derived_from_what_is_there(serve: Serve) -> None:
    backend = ScriptedBackend()
    config = scripted_config(max_batch_size=4, batching="", instances=1)
    async with serve({"m": config}, backend) as server, calling(server.model("m")) as callers:
        await callers.call_all("abc", rows=1)
        statistics = server.statistics()
        assert (statistics.in_flight, statistics.ready, statistics.draining) == (3, True, False)
        (model,) = statistics.models
        assert (model.in_flight, model.scheduler.queue.queued, model.scheduler.idle_instances) == (3, 2, 0)
        (instance,) = model.instances
        assert (instance.state, instance.members, instance.live_members, instance.executions) == ("executing", 1, 1, 0)
        with pytest.raises(AttributeError):
            instance.members = 0  # type: ignore[misc]
        backend.automatic = True
        backend.executions[0].finish()
    counters = callers.model.counters
    assert (counters.execution_count, counters.inference_count) == (2, 3)
    assert {size: durations.compute_infer.count for size, durations in counters.by_batch_size.items()} == {1: 1, 2: 1}
    assert counters.queue.count == counters.success.count == 3


async def test_what_fails_in_the_model_counts_as_failed_and_as_nothing_else(serve: Serve) -> None:
    """As Triton counts: who takes a mean of queue or compute times divides by what succeeded."""
    backend = ScriptedBackend()
    async with serve({"m": scripted_config()}, backend) as server, calling(server.model("m")) as callers:
        await callers.call_all("ab")
        backend.executions[0].fail(triton_trio.InternalError("no"))
        (await backend.wait_execution(1)).finish()
    counters = callers.model.counters
    assert (counters.success.count, counters.fail.count) == (1, 1)
    assert counters.queue.count == counters.compute_infer.count == counters.compute_output.count == 1


async def test_the_quiescence_check_names_what_is_left(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend) as server, calling(server.model("m")) as callers:
        calls = await callers.call_all("ab")
        with pytest.raises(AssertionError) as caught:
            assert_quiescent(server)
        text = str(caught.value)
        for what in ("live request", "queued request", "instance m_0_0 executes", "started 2 requests", "└── "):
            assert what in text
        for call in calls:
            call.leave()
        await wait_all_tasks_blocked()
        assert_quiescent(server)


async def test_a_server_that_has_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    async def life() -> weakref.ref[triton_trio.InferenceServer]:
        async with open_test_server(tmp_path, {"m": CONFIG}) as server:
            await server.model("m").infer(one())
            return weakref.ref(server)

    alive = await life()
    await trio.lowlevel.checkpoint()
    gc.collect()
    assert alive() is None


async def test_an_execution_is_nobody_s_child(serve: Serve) -> None:
    seen = []

    def look(stacked: np.ndarray) -> np.ndarray:
        seen.append(trio.current_effective_deadline())
        return stacked

    async with serve({"m": CONFIG}, ScriptedBackend(look, automatic=True)) as server:
        with trio.move_on_after(5) as scope:
            await server.model("m").infer(one())
    assert seen[0] > scope.deadline  # one client's deadline is not the batch's


async def test_somebody_else_s_cancel_is_an_error_here_and_our_own_is_not(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend) as server:
        model = server.model("m")
        request = model.request(one())
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(RequestCancelled):
                    await model.infer(request)

            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            request.cancel()
        with trio.move_on_after(0) as scope:
            await model.infer(one())
        assert scope.cancelled_caught
