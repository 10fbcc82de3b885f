"""The response cache in a server: what is a hit, what is none, and what each caller gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.callers import calling
from tests.ensemble.world import ensemble_config, step
from triton_trio import InferenceResponse, InvalidArgument, Model, Outcome
from triton_trio.response_cache import executions
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

CACHED = "response_cache { enable: true }"
CONFIG = scripted_config(more=CACHED)
SIZE = 1 << 20
THREES = np.full(2, 3, np.float32)


async def share(model: Model, backend: ScriptedBackend, ids: str) -> list[InferenceResponse]:
    """The responses to equal requests that come at the same time."""
    responses: list[InferenceResponse] = []

    async def client(label: str) -> None:
        responses.append(await model.infer(model.request({"INPUT0": THREES}, request_id=label)))

    async with trio.open_nursery() as clients:
        for label in ids:
            clients.start_soon(client, label)
            await wait_all_tasks_blocked()
        for execution in backend.running:
            execution.finish()
    return sorted(responses, key=lambda response: response.request_id)  # who of one tick runs first is nobody's promise


@pytest.mark.parametrize("size", [SIZE, 1], ids=["kept", "too large to be kept"])
async def test_law_7_what_one_does_with_its_answer_nobody_else_sees(serve: Serve, size: int) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=size) as server:
        model = server.model("m")
        first, second = await share(model, backend, "ab")
        assert (first.request_id, second.request_id) == ("a", "b")
        with pytest.raises(ValueError, match="read-only"):
            first.outputs["OUTPUT0"][:] = 9
        first.outputs.clear()  # type: ignore[attr-defined]
        first.parameters["mine"] = 1  # type: ignore[index]
        (third,) = await share(model, backend, "c")
        for response in (second, third):
            assert (response.outputs["OUTPUT0"] == 3).all()
            assert response.parameters == {}
        assert third.request_id == "c"
        kept = size == SIZE
        assert len(backend.executions) == (1 if kept else 2)
        assert server.statistics().response_cache.entries == kept


async def test_an_answer_pushed_out_is_executed_again(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve({"m": CONFIG}, backend, cache_size=2000) as server:
        async with calling(server.model("m")) as callers:
            for value in (1, 2, 1, 3, 1, 2):  # two have room, and 1 is the one that is used
                await callers.call("", value=value)
        assert [call.output[0] for call in callers.calls if call.output is not None] == [1, 2, 1, 3, 1, 2]
        assert len(backend.executions) == 4
        statistics = server.statistics().response_cache
        assert (statistics.hits, statistics.misses, statistics.evictions) == (2, 4, 2)
        assert statistics.used <= statistics.capacity


async def test_law_16_hits_and_misses_are_the_requests_that_were_answered(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": CONFIG}, backend, cache_size=SIZE) as server:
        model = server.model("m")
        async with calling(model) as callers:
            first, *_ = await callers.call_all("abc", value=3)
            first.leave()
            (await backend.wait_execution()).finish()
            await wait_all_tasks_blocked()
            await callers.call("hit", value=3)
            late = callers.start("cancelled with its answer at hand", value=3)
            late.leave()
        counters = model.counters
        assert (counters.cache_miss.count, counters.cache_hit.count, counters.success.count) == (1, 2, 3)
        assert counters.queue.count == 3
        # As in Triton, a hit is no inference.
        assert (counters.inference_count, counters.execution_count, counters.compute_infer.count) == (1, 1, 1)


async def test_large_inputs_are_executed_without_a_look(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "LARGEST_INPUT", THREES.nbytes - 1)
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(instances=2, more=CACHED)}, backend, cache_size=SIZE) as server:
        await share(server.model("m"), backend, "ab")
        assert len(backend.executions) == 2
        assert server.statistics().response_cache.misses == 0


async def test_a_bug_ends_those_who_share_it_and_not_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve({"m": CONFIG}, cache_size=SIZE) as server:
        model = server.model("m")

        async def broken(request: object) -> None:
            raise ZeroDivisionError("division by zero")

        with monkeypatch.context() as patched:
            patched.setattr(model, "_serve", broken)
            async with calling(model) as callers:
                first, second = await callers.call_all("ab")
        assert [call.error.message for call in (first, second) if call.error] == [
            f"[request id: {label}] ZeroDivisionError: division by zero" for label in "ab"
        ]
        assert (await model.infer({"INPUT0": THREES})).outputs


# Ensembles

ENSEMBLE = ensemble_config(step("m", "INPUT0", "OUTPUT0"), more=CACHED)
OUTER = ensemble_config(step("e", "INPUT0", "OUTPUT0"), more=CACHED)


@pytest.mark.parametrize("asked", ["e", "outer"])
async def test_an_ensemble_does_not_answer_with_what_its_steps_said_before_they_were_loaded_anew(
    serve: Serve, tmp_path: Path, asked: str
) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve({"m": scripted_config(), "e": ENSEMBLE, "outer": OUTER}, backend, cache_size=SIZE) as server:
        ensemble = server.model(asked)
        before = await ensemble.infer({"INPUT0": THREES})
        backend.compute = lambda stacked: stacked + 1
        (tmp_path / "m" / "1" / "weights").write_text("new")
        await server.load_model("m")
        assert server.model(asked) is ensemble
        after = await ensemble.infer({"INPUT0": THREES})
    assert (before.outputs["OUTPUT0"][0], after.outputs["OUTPUT0"][0]) == (3, 4)


async def test_what_was_under_way_when_a_step_was_loaded_anew_is_not_kept(serve: Serve, tmp_path: Path) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(), "e": ENSEMBLE}, backend, cache_size=SIZE) as server:
        ensemble = server.model("e")
        async with calling(ensemble) as callers:
            old = await callers.call("old", value=3)
            (tmp_path / "m" / "1" / "weights").write_text("new")
            await server.load_model("m")
            new = await callers.call("new", value=3)
            assert [len(execution.scope) for execution in ensemble.shared or ()] == [1, 1]
            for execution in backend.running:
                execution.finish()
        assert old.outcome is new.outcome is Outcome.OK
        statistics = server.statistics().response_cache
        assert statistics.entries == 1
        assert (await ensemble.infer({"INPUT0": THREES})).outputs
        assert server.statistics().response_cache.hits == statistics.hits + 1


async def test_requests_of_a_sequence_are_never_the_same(serve: Serve) -> None:
    models = {"m": scripted_config(sequences="max_sequence_idle_microseconds: 1000000"), "e": ENSEMBLE}
    async with serve(models, cache_size=SIZE) as server:
        ensemble = server.model("e")
        for options in ({"sequence_start": True}, {}, {"sequence_end": True}):
            await ensemble.infer(ensemble.request({"INPUT0": THREES}, sequence_id=5, **options))
        assert server.model("m").counters.execution_count == 3
        assert server.statistics().response_cache.entries == 0


async def test_an_ensemble_that_its_steps_make_decoupled_cannot_be_cached(serve: Serve) -> None:
    async with serve(
        {"m": scripted_config(decoupled=True), "e": ENSEMBLE}, explicit=True, load_models=["m"], cache_size=SIZE
    ) as server:
        with pytest.raises(InvalidArgument, match="model e with 'decoupled' transaction policy"):
            await server.load_model("e")
