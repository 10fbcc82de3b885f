"""Blocking place: a load.  It lives as long as somebody waits for it, and is never stuck in LOADING (C8)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from triton_trio import InferenceServer, InternalError, InvalidArgument, NotFound, TritonError, Unavailable
from triton_trio.repository import IndexEntry
from triton_trio.testing import ScriptedBackend, Victim, model_repository, open_test_server, scripted_config, sweep
from triton_trio.testing.fixtures import Serve

CONFIG = scripted_config(instances=2)


class Hold:
    """Holds a load at one of its stages."""

    def __init__(self, backend: ScriptedBackend, stage: str) -> None:
        self.stage = stage
        self.reached = trio.Event()
        self.open = trio.Event()
        if stage == "model":
            backend.on_open_model = self._wait
        else:
            backend.on_open_instance = self._wait

    async def _wait(self, name: str) -> None:
        if self.stage in ("model", "first instance") or name.endswith("_1"):
            self.reached.set()
            await self.open.wait()


STAGES = ["model", "first instance", "second instance"]


async def index(server: InferenceServer) -> list[IndexEntry]:
    return await server.repository.index()


@pytest.mark.parametrize("stage", STAGES)
async def test_C8_the_only_waiter_leaves_and_the_load_is_cancelled_between_its_stages(serve: Serve, stage: str) -> None:
    backend = ScriptedBackend(automatic=True)
    hold = Hold(backend, stage)
    async with serve({"m": CONFIG}, backend, explicit=True) as server:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.load_model, "m")
                await hold.reached.wait()
                assert await index(server) == [IndexEntry("m", "1", "LOADING", "")]
                scope.cancel()
        await wait_all_tasks_blocked()
        assert await index(server) == [IndexEntry("m", "1", "UNAVAILABLE", "load failed for model 'm': load cancelled")]
        assert (backend.open_models, backend.open_instances) == (0, 0)
        with pytest.raises(Unavailable):
            server.model("m")
        hold.open.set()
        await server.load_model("m")
        assert await index(server) == [IndexEntry("m", "1", "READY", "")]


@pytest.mark.parametrize("stage", STAGES)
async def test_C8_one_of_two_waiters_leaves_and_the_other_gets_the_model(serve: Serve, stage: str) -> None:
    backend = ScriptedBackend(automatic=True)
    hold = Hold(backend, stage)
    opened = []
    async with serve({"m": CONFIG}, backend, explicit=True) as server:
        async with trio.open_nursery() as nursery:
            leaver = trio.CancelScope()

            async def leave() -> None:
                with leaver:
                    await server.load_model("m")
                    pytest.fail("cancelled")

            async def stay() -> None:
                await server.load_model("m")
                opened.append(server.model("m"))

            nursery.start_soon(leave)
            await hold.reached.wait()
            nursery.start_soon(stay)
            await wait_all_tasks_blocked()
            leaver.cancel()
            await wait_all_tasks_blocked()
            assert leaver.cancelled_caught
            hold.open.set()
        assert opened
        assert backend.open_models == 1  # one load, not two


@pytest.mark.parametrize("stage", STAGES)
async def test_C8_an_unload_during_a_load_wins_and_every_waiter_is_told(serve: Serve, stage: str) -> None:
    backend = ScriptedBackend(automatic=True)
    hold = Hold(backend, stage)
    async with serve({"m": CONFIG}, backend, explicit=True) as server:

        async def load() -> None:
            with pytest.raises(Unavailable, match="load cancelled"):
                await server.load_model("m")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            nursery.start_soon(load)
            await hold.reached.wait()
            await server.unload_model("m")
        assert (await index(server))[0].state == "UNAVAILABLE"
        assert (backend.open_models, backend.open_instances) == (0, 0)


async def test_C8_a_cancelled_reload_leaves_the_model_that_was_there(serve: Serve, tmp_path: Path) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve({"m": CONFIG}, backend, explicit=True, load_models=["m"]) as server:
        before = server.model("m")
        hold = Hold(backend, "second instance")
        model_repository(tmp_path, {"m": CONFIG + "\n# changed\n"})
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.load_model, "m")
                await hold.reached.wait()
                assert server.model("m") is before  # it serves on
                scope.cancel()
        await wait_all_tasks_blocked()
        assert server.model("m") is before
        assert await index(server) == [IndexEntry("m", "1", "READY", "")]
        assert (backend.open_models, backend.open_instances) == (1, 2)


async def test_a_failed_reload_leaves_it_too_and_a_good_one_replaces_it(serve: Serve, tmp_path: Path) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve({"m": CONFIG}, backend, explicit=True, load_models=["m"]) as server:
        before = server.model("m")
        model_repository(tmp_path, {"m": "nonsense: 1"})
        with pytest.raises(InvalidArgument, match=r"config\.pbtxt:1:1"):
            await server.load_model("m")
        assert server.model("m") is before
        model_repository(tmp_path, {"m": scripted_config(instances=1)})
        await server.load_model("m")
        after = server.model("m")
        assert after is not before
        await before.wait_stopped()
        assert backend.open_instances == 1
        await server.load_model("m")  # unchanged files: nothing to do
        assert server.model("m") is after


async def test_what_fails_in_a_load_is_told_and_released(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)

    async def out_of_memory(name: str) -> None:
        await trio.lowlevel.checkpoint()
        if name.endswith("_1"):
            raise MemoryError("the device is full")

    async with serve({"m": CONFIG}, backend, explicit=True) as server:
        backend.on_open_instance = out_of_memory
        with pytest.raises(InternalError, match="load failed for model 'm': MemoryError: the device is full"):
            await server.load_model("m")
        assert (backend.open_models, backend.open_instances) == (0, 0)
        (line,) = await index(server)
        assert (line.state, line.version) == ("UNAVAILABLE", "1")
        assert "the device is full" in line.reason
        backend.on_open_instance = None
        await server.load_model("m")


async def test_when_one_version_fails_none_of_the_others_stays_behind(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    opened = 0

    async def third_fails(name: str) -> None:
        nonlocal opened
        await trio.lowlevel.checkpoint()
        opened += 1
        if opened == 3:
            raise OSError("no such file")

    config = CONFIG + "version_policy { all {} }"
    async with serve({"m": config}, backend, explicit=True, versions=(1, 2, 5)) as server:
        backend.on_open_model = third_fails
        with pytest.raises(InternalError, match="no such file"):
            await server.load_model("m")
        await wait_all_tasks_blocked()
        assert backend.open_models == 0
        assert [(line.version, line.state) for line in await index(server)] == [
            ("1", "UNAVAILABLE"), ("2", "UNAVAILABLE"), ("5", "UNAVAILABLE")
        ]  # fmt: skip


async def test_a_load_of_other_contents_is_not_shared(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    hold = Hold(backend, "model")
    override = """{"backend": "scripted", "input": [{"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [1]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_INT32", "dims": [1]}]}"""
    async with serve({"m": CONFIG}, backend, explicit=True) as server:
        seen: list[str] = []

        async def load(config_json: str | None) -> None:
            await server.load_model("m", config_json=config_json)
            seen.append(server.model("m").config.inputs[0].datatype)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, override)
            await hold.reached.wait()
            nursery.start_soon(load, None)
            nursery.start_soon(load, None)
            await wait_all_tasks_blocked()
            hold.open.set()
        assert seen == ["INT32", "FP32", "FP32"]
        await wait_all_tasks_blocked()


@pytest.mark.parametrize("name", ["none", "../m", ""])
async def test_law_12_a_name_that_is_not_there_leaves_no_trace(serve: Serve, name: str) -> None:
    async with serve({"m": CONFIG}, explicit=True) as server:
        for _ in range(3):
            with pytest.raises(InvalidArgument, match="no directory"):
                await server.load_model(name)
        assert await index(server) == [IndexEntry("m", "", "", "")]
        assert not server.repository._entries
        with pytest.raises(NotFound):
            await server.unload_model(name)


async def test_a_model_that_cannot_be_loaded_is_in_the_index_with_the_reason(serve: Serve) -> None:
    async with serve({"m": 'backend: "unheard of"'}, explicit=True) as server:
        with pytest.raises(TritonError) as caught:
            await server.load_model("m")
        (line,) = await index(server)
        assert (line.version, line.state, line.reason) == ("", "UNAVAILABLE", caught.value.message)


async def test_A5_C8_a_load_is_cancelled_at_every_moment(tmp_path: Path) -> None:
    runs = 0

    async def scenario(victim: Victim) -> None:
        nonlocal runs
        runs += 1
        backend = ScriptedBackend(automatic=True)
        async with open_test_server(tmp_path / str(runs), {"m": CONFIG}, backend, explicit=True) as server:
            with victim:
                await server.load_model("m")
            entry = server.repository._entries.get("m")
            if entry is not None and entry.load is not None:
                await entry.load.done.wait()  # a thread that reads the repository comes to its end
            await wait_all_tasks_blocked()
            state = (await index(server))[0].state
            if state == "READY":
                assert (backend.open_models, backend.open_instances) == (1, 2)
            else:
                assert victim.cancelled
                assert state in ("", "UNAVAILABLE")
                assert (backend.open_models, backend.open_instances) == (0, 0)
            await server.load_model("m")
            assert server.model("m").ready

    assert await sweep(scenario) > 5
