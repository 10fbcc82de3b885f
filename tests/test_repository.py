"""Finding models: names, versions, states, and the index.  (What can be cancelled is in tests/cancellation.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triton_trio import InvalidArgument, NotFound, Unavailable, open_server
from triton_trio.repository import IndexEntry
from triton_trio.testing import model_repository, open_test_server, scripted_config
from triton_trio.testing.fixtures import Serve

CONFIG = scripted_config()
ALL = CONFIG + "version_policy { all {} }"


async def test_the_latest_version_is_the_one_meant(serve: Serve) -> None:
    async with serve({"m": ALL}, versions=(1, 3, 20)) as server:
        assert server.model("m").version == 20
        assert server.model("m", 3).version == 3
        assert [(model.name, model.version) for model in server.repository.loaded()] == [("m", 1), ("m", 3), ("m", 20)]
        response = await server.model("m", 3).infer({"INPUT0": np.zeros(2, np.float32)})
        assert (response.model_name, response.model_version) == ("m", 3)


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", [20]),
        ("version_policy { latest { num_versions: 2 } }", [3, 20]),
        ("version_policy { specific { versions: [1, 3] } }", [1, 3]),
        ("version_policy { all {} }", [1, 3, 20]),
    ],
)
async def test_the_version_policy_chooses(serve: Serve, policy: str, served: list[int]) -> None:
    async with serve({"m": CONFIG + policy}, versions=(1, 3, 20)) as server:
        assert [model.version for model in server.repository.loaded()] == served


async def test_what_is_not_there_and_what_is_not_ready_are_different_things(serve: Serve) -> None:
    async with serve({"m": CONFIG, "cold": CONFIG}, explicit=True, load_models=["m"]) as server:
        with pytest.raises(NotFound, match="Request for unknown model: 'x' is not found"):
            server.model("x")
        with pytest.raises(NotFound, match="Request for unknown model: 'cold' is not found"):
            server.model("cold")
        with pytest.raises(NotFound, match="'m' version 7 is not found"):
            server.model("m", 7)
        await server.unload_model("m")
        with pytest.raises(Unavailable, match="'m' has no available versions"):
            server.model("m")
        with pytest.raises(Unavailable, match="'m' version 1 is not at ready state"):
            server.model("m", 1)


async def test_the_index_has_a_line_for_each_version_and_each_model_on_disk(serve: Serve) -> None:
    models = {"a": ALL, "b": CONFIG, "c": CONFIG}
    async with serve(models, versions=(1, 2), explicit=True, load_models=["a", "b"]) as server:
        await server.unload_model("b")
        ready = [IndexEntry("a", "1", "READY", ""), IndexEntry("a", "2", "READY", "")]
        assert await server.repository.index() == [
            *ready,
            IndexEntry("b", "2", "UNAVAILABLE", "unloaded"),
            IndexEntry("c", "", "", ""),
        ]
        assert await server.repository.index(ready_only=True) == ready


async def test_directories_that_are_no_models(tmp_path: Path) -> None:
    model_repository(tmp_path, {"m": CONFIG})
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("")
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "0").mkdir()
    async with open_test_server(tmp_path, {}) as server:
        assert [line.name for line in await server.repository.index()] == ["m"]
        assert server.model("m").version == 1


async def test_two_repositories_must_not_have_the_same_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model_repository(tmp_path / name, {"m": CONFIG})
    with pytest.raises(InvalidArgument, match="model 'm' is in two repositories"):
        async with open_server([tmp_path / "one", tmp_path / "two"]):
            pytest.fail("it cannot know which one is meant")


async def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a directory; check --model-repository"):
        async with open_server(tmp_path / "nowhere"):
            pytest.fail("there is nothing to serve")


async def test_a_model_without_a_version_says_what_is_missing(tmp_path: Path) -> None:
    model_repository(tmp_path, {"m": CONFIG}, versions=())
    async with open_test_server(tmp_path, {}, explicit=True) as server:
        with pytest.raises(InvalidArgument, match="no version directory, such as 1/"):
            await server.load_model("m")


async def test_a_model_is_loaded_again_when_its_files_have_changed_and_only_then(serve: Serve, tmp_path: Path) -> None:
    async with serve({"m": CONFIG}) as server:
        first = server.model("m")
        await server.load_model("m")
        assert server.model("m") is first
        (tmp_path / "m" / "1" / "weights").write_text("new")
        await server.load_model("m")
        second = server.model("m")
        assert second is not first
        await first.wait_stopped()
        (tmp_path / "m" / "2").mkdir()
        (tmp_path / "m" / "2" / "weights").write_text("newer")
        await server.load_model("m")
        assert server.model("m").version == 2
        await second.wait_stopped()
        with pytest.raises(NotFound):
            server.model("m", 1)
