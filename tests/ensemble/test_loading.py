"""An ensemble and the models it is made of: loaded along, looked up again, unloaded together, never in each other's way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from tests.ensemble.world import FAMILY, Steps, ensemble_config, step
from triton_trio import InferenceServer, InvalidArgument, Outcome, Reason, Unavailable, Unsupported
from triton_trio._pb import inference as pb
from triton_trio.ensemble.dependencies import find_dependents
from triton_trio.grpc.service_repository import unload
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

ONE = scripted_config()
ZERO = {"INPUT0": np.zeros(2, np.float32)}
PAIR = {"a": ONE, "b": ONE, "e": ensemble_config(step("a", "INPUT0", "x"), step("b", "x", "OUTPUT0"))}


def ready(server: InferenceServer) -> list[str]:
    return [model.name for model in server.repository.loaded() if model.ready]


async def index(server: InferenceServer) -> dict[str, tuple[str, str]]:
    return {line.name: (line.state, line.reason) for line in await server.repository.index()}


# Load


async def test_an_ensemble_is_loaded_with_all_it_is_made_of(serve: Serve) -> None:
    async with serve({**FAMILY, "other": ONE}, explicit=True, load_models=["family"]) as server:
        assert ready(server) == sorted(FAMILY)
        assert (await index(server))["other"] == ("", "")


@pytest.mark.parametrize("load_models", [["*"], ["e", "a", "b"], ["b", "e"]])
async def test_who_loads_what_first_does_not_matter(serve: Serve, load_models: list[str]) -> None:
    opened = []

    async def note(name: str) -> None:
        opened.append(name)

    backend = ScriptedBackend(automatic=True)
    backend.on_open_model = note
    async with serve(PAIR, backend, explicit=True, load_models=load_models) as server:
        assert sorted(opened) == ["a", "b"]
        assert ready(server) == ["a", "b", "e"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            {"e": ensemble_config(step("a", "INPUT0", "x"), step("b", "x", "OUTPUT0")), "a": ONE},
            "ensemble e contains models that are not available or ambiguous: b",
        ),
        (
            {"e": ensemble_config(step("a", "INPUT0", "OUTPUT0", version=7)), "a": ONE},
            "ensemble 'e' depends on 'a' whose required version 7 is not loaded.",
        ),
        (
            {"e": ensemble_config(step("a", "INPUT0", "OUTPUT0")), "a": "max_batch_size: -1"},
            "ensemble 'e' depends on 'a' which has no loaded version. Model 'a' loading failed with error: Invalid model "
            "name: Could not determine backend for model 'a' with no backend in model configuration. Expected model name "
            "of the form 'model.<backend_name>'.",
        ),
        (
            {"e": ensemble_config(step("a", "INPUT0", "OUTPUT0")), "a": scripted_config(dims=[3])},
            "in ensemble e, ensemble tensor INPUT0: inconsistent shape: [2] is inferred from model e while [3] is inferred "
            "from model a",
        ),
        (
            {"e": ensemble_config(step("e", "INPUT0", "OUTPUT0"))},
            "circular dependency between ensembles: e -> ... -> e -> e",
        ),
    ],
    ids=["missing", "version", "broken", "does not fit", "itself"],
)
async def test_what_cannot_be_loaded(serve: Serve, models: dict[str, str], message: str) -> None:
    async with serve(models, explicit=True) as server:
        with pytest.raises(InvalidArgument) as caught:
            await server.load_model("e")
        assert caught.value.message == message
        assert (await index(server))["e"][0] == "UNAVAILABLE"


@pytest.mark.parametrize("asked", [["one"], ["two"], ["one", "two", "three"], ["*"]])
async def test_a_circle_of_ensembles_is_an_error_and_not_a_deadlock(serve: Serve, asked: list[str]) -> None:
    circle = {
        "one": ensemble_config(step("two", "INPUT0", "OUTPUT0")),
        "two": ensemble_config(step("three", "INPUT0", "OUTPUT0")),
        "three": ensemble_config(step("one", "INPUT0", "OUTPUT0")),
    }
    async with serve({**circle, "a": ONE}, explicit=True, load_models=asked, exit_on_error=False) as server:
        states = await index(server)
        assert {states[name][0] for name in circle} == {"UNAVAILABLE"}
        for name in circle:
            assert "circular dependency between ensembles: " in states[name][1]


async def test_a_circle_that_a_reload_would_close(serve: Serve, tmp_path: Path) -> None:
    models = {
        "a": ONE,
        "inner": ensemble_config(step("a", "INPUT0", "OUTPUT0")),
        "outer": ensemble_config(step("inner", "INPUT0", "OUTPUT0")),
    }
    async with serve(models) as server:
        (tmp_path / "inner" / "config.pbtxt").write_text(ensemble_config(step("outer", "INPUT0", "OUTPUT0")))
        with pytest.raises(InvalidArgument, match="circular dependency"):
            await server.load_model("inner")
        assert (await server.model("outer").infer(ZERO)).outputs  # as before


async def test_a_circle_through_what_was_sent(serve: Serve) -> None:
    """What is on disk is no circle, and what is loaded would be."""
    models = {"a": ONE, "inner": ensemble_config(step("a", "INPUT0", "OUTPUT0"))}
    sent = """{"name": "outer", "platform": "ensemble", "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [2]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [2]}], "ensemble_scheduling": {"step":
        [{"model_name": "NAME", "model_version": -1, "input_map": {"INPUT0": "INPUT0"},
        "output_map": {"OUTPUT0": "OUTPUT0"}}]}}"""
    async with serve({**models, "outer": models["inner"]}) as server:
        await server.load_model("outer", config_json=sent.replace("NAME", "inner"))
        with pytest.raises(InvalidArgument, match="circular dependency"):
            await server.load_model("inner", config_json=sent.replace("outer", "inner").replace("NAME", "outer"))


async def test_a_namespace_is_refused(serve: Serve) -> None:
    config = PAIR["e"].replace("model_version", 'model_namespace: "n" model_version', 1)
    async with serve({**PAIR, "e": config}, explicit=True) as server:
        with pytest.raises(Unsupported, match="model_namespace of step 'a'"):
            await server.load_model("e")


async def test_B3_a_load_that_nobody_waits_for_takes_the_loads_of_its_steps_along(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)

    async def wait(name: str) -> None:
        await trio.sleep_forever()

    backend.on_open_model = wait
    async with serve(PAIR, backend, explicit=True) as server:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.load_model, "e")
                while backend.open_models < 2:
                    await wait_all_tasks_blocked(0.01)
                scope.cancel()
        await wait_all_tasks_blocked()
        assert backend.open_models == 0
        assert ready(server) == []


# Reload


async def test_a_step_is_loaded_anew_and_the_ensemble_goes_on(serve: Serve, tmp_path: Path) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(PAIR, backend) as server:
        ensemble = server.model("e")
        async with calling(ensemble) as callers:
            call = await callers.call("7")
            old = server.model("b")
            (tmp_path / "b" / "1" / "weights").write_text("new")
            await server.load_model("b")
            await old.wait_stopped()  # nothing was in flight there, and the ensemble has found the new one
            assert server.model("e") is ensemble
            await steps.finish("a")
            await steps.finish("b")
        assert call.outcome is Outcome.OK
        assert server.model("b").counters.started == 1


async def test_a_step_that_does_not_fit_any_more_is_told_before_any_request_meets_it(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve(PAIR) as server:
        ensemble = server.model("e")
        (tmp_path / "b" / "config.pbtxt").write_text(scripted_config(dims=[3]))
        await server.load_model("b")
        assert not ensemble.ready
        state, reason = (await index(server))["e"]
        assert state == "UNAVAILABLE"
        assert reason.startswith("ensemble 'e' is not ready: in ensemble e, ensemble tensor x: inconsistent shape")
        with pytest.raises(Unavailable, match="'e' has no available versions"):
            server.model("e")
        (tmp_path / "b" / "config.pbtxt").write_text(scripted_config(decoupled=True))
        await server.load_model("b")
        assert "transaction policy: load it again" in (await index(server))["e"][1]
        await server.load_model("e")
        assert server.model("e").config.decoupled


async def test_loading_an_ensemble_loads_what_has_changed_of_its_steps(serve: Serve, tmp_path: Path) -> None:
    async with serve(PAIR) as server:
        ensemble, a, b = server.model("e"), server.model("a"), server.model("b")
        (tmp_path / "b" / "1" / "weights").write_text("new")
        await server.load_model("e")
        assert server.model("b") is not b
        assert server.model("a") is a
        assert server.model("e") is ensemble


# Unload


async def test_an_ensemble_is_as_ready_as_its_steps(serve: Serve) -> None:
    async with serve(PAIR, explicit=True, load_models=["e"]) as server:
        ensemble = server.model("e")
        await server.unload_model("b")
        assert not ensemble.ready
        assert server.ready, "what is left can serve"
        assert (await index(server))["e"] == (
            "UNAVAILABLE",
            "ensemble 'e' is not ready: Request for unknown model: 'b' has no available versions",
        )
        with pytest.raises(Unavailable, match="ensemble 'e' is not ready"):
            await ensemble.infer(ZERO)
        await server.load_model("b")
        assert server.model("e") is ensemble
        assert (await ensemble.infer(ZERO)).outputs


async def test_E1_what_an_ensemble_has_in_flight_finds_its_later_steps_though_they_are_being_unloaded(
    serve: Serve,
) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(FAMILY, backend) as server:
        async with calling(server.model("family")) as callers, trio.open_nursery() as nursery:
            call = await callers.call("7", rows=1)
            two = server.model("two")  # two ensembles away
            nursery.start_soon(server.unload_model, "two")
            nursery.start_soon(server.unload_model, "join")
            await wait_all_tasks_blocked()
            late = await callers.call("late", rows=1)
            assert late.outcome is Outcome.REJECTED
            with pytest.raises(Unavailable):
                await two.infer({"INPUT0": np.zeros((1, 2), np.float32)})
            for model in ("pre", "left", "one", "two", "join"):
                await steps.finish(model)
        assert call.outcome is Outcome.OK
        assert (await index(server))["join"] == ("UNAVAILABLE", "unloaded")


async def test_E1_and_when_the_grace_is_over_everybody_is_told(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    async with serve(PAIR, backend, unload_grace=5) as server:
        async with calling(server.model("e")) as callers:
            call = await callers.call("7")
            before = trio.current_time()
            await server.unload_model("a")
            assert trio.current_time() - before == 5
            await wait_all_tasks_blocked()
            assert call.request.reason is Reason.MODEL_UNLOADING
            assert isinstance(call.error, Unavailable)
            assert call.error.message == (
                "in ensemble 'e', [request id: 7] request cancelled while executing: the model is being unloaded"
            )
        assert server.model("b").counters.started == 0


async def test_E1_an_ensemble_that_is_unloaded_ends_what_it_has(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(PAIR, backend, unload_grace=5) as server:
        async with calling(server.model("e")) as callers, trio.open_nursery() as nursery:
            (in_time, too_late) = await callers.call_all("il")
            nursery.start_soon(lambda: server.unload_model("e", dependents=True))
            await wait_all_tasks_blocked()
            await steps.finish("a")
            await steps.finish("b")
            assert in_time.outcome is Outcome.OK
            await trio.sleep(6)
            assert too_late.request.reason is Reason.MODEL_UNLOADING
            assert too_late.error is not None
            assert too_late.error.message == (
                "[request id: l] request cancelled while executing: the model is being unloaded"
            )


async def test_a_step_that_is_gone_is_an_error_of_the_ensembles_request(serve: Serve) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(PAIR, backend) as server:
        async with calling(server.model("e")) as callers:
            call = await callers.call("7")
            b = server.model("b")
            b.stop()
            await b.wait_stopped()
            await steps.finish("a")
        assert call.outcome is Outcome.REJECTED
        assert call.error is not None
        assert call.error.message.startswith("in ensemble 'e', [request id: 7] Server is stopping")


async def test_unload_dependents_takes_along_what_came_along(serve: Serve) -> None:
    models = {**PAIR, "f": ensemble_config(step("b", "INPUT0", "OUTPUT0")), "c": ONE}
    async with serve(models, explicit=True, load_models=["e", "c", "a"]) as server:
        await server.load_model("f")
        await server.unload_model("e", dependents=True)
        assert ready(server) == ["a", "b", "c", "f"], "a was asked for by name, and b is a step of f"
        await server.unload_model("f", dependents=True)
        assert ready(server) == ["a", "c"]


@pytest.mark.parametrize("dependents", [None, False, True])
async def test_unload_dependents_over_the_wire(serve: Serve, dependents: bool | None) -> None:
    async with serve(PAIR, explicit=True, load_models=["e"]) as server:
        parameter = (
            {} if dependents is None else {"unload_dependents": pb.ModelRepositoryParameter(bool_param=dependents)}
        )
        await unload(server, pb.RepositoryModelUnloadRequest(model_name="b", parameters=parameter))
        await wait_all_tasks_blocked()
        states = {name: state for name, (state, _) in (await index(server)).items()}
        assert states == {"a": "UNAVAILABLE" if dependents else "READY", "b": "UNAVAILABLE", "e": "UNAVAILABLE"}


def test_dependents_of_dependents() -> None:
    steps = {"outer": ["inner", "x"], "inner": ["a", "b"], "other": ["b"]}
    assert find_dependents("a", steps, {"outer"}) == ["inner", "outer", "x"]
    assert find_dependents("outer", steps, {"x"}) == ["inner", "a"]
    assert find_dependents("x", {}, set()) == []


async def test_E1_a_draining_server_lets_ensembles_take_their_later_steps(
    serve: Serve, autojump_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    outcomes = []

    class Clients:
        def start_drain(self) -> None:
            pass

        async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()
            await server.model("e").infer(ZERO)
            outcomes.append("ok")

    async with serve(PAIR, backend) as server:
        clients = Clients()
        await server.start_frontend(clients, clients.serve, name="clients")
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.drain, 5)
            await wait_all_tasks_blocked()
            await steps.finish("a")
            steps.of("b")[0].finish()
            await trio.sleep_forever()  # the drain ends this block
    assert outcomes == ["ok"]
