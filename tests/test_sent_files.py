"""A model sent with its load request: its files exist as long as a version needs them, and not longer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trio

import triton_trio
from triton_trio.sent_files import SentFiles

TENSOR = {"data_type": "TYPE_FP32", "dims": [-1]}
CONFIG = json.dumps({"backend": "identity", "input": [{"name": "IN", **TENSOR}], "output": [{"name": "OUT", **TENSOR}]})


def folders(tmp: Path) -> list[Path]:
    return sorted(tmp.glob("triton_trio-*"))


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


async def test_sent_model_is_served_and_its_files_go_with_it(tmp: Path) -> None:
    async with triton_trio.open_server(explicit=True) as server:
        await server.repository.load("sent", config_json=CONFIG, files={"1/weights": b"w", "2/weights": b"w"})
        model = server.model("sent")
        assert model.version == 2
        assert (model.context.version_directory / "weights").read_bytes() == b"w"
        response = await model.infer({"IN": np.ones(3, np.float32)})
        assert response.outputs["OUT"].tolist() == [1, 1, 1]
        await server.unload_model("sent")
        assert folders(tmp) == []


async def test_replacing_a_sent_model_keeps_only_the_new_files(tmp: Path) -> None:
    async with triton_trio.open_server(explicit=True) as server:
        for content in (b"old", b"new"):
            await server.repository.load("sent", config_json=CONFIG, files={"1/weights": content})
            await trio.testing.wait_all_tasks_blocked()
        [folder] = folders(tmp)
        assert (folder / "sent" / "1" / "weights").read_bytes() == b"new"
    assert folders(tmp) == []


async def test_failed_load_of_sent_files_leaves_none(tmp: Path) -> None:
    async with triton_trio.open_server(explicit=True) as server:
        with pytest.raises(triton_trio.InvalidArgument, match="no version is available"):
            await server.repository.load("sent", config_json=CONFIG, files={"weights": b""})
        assert folders(tmp) == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "1/../../x", ""])
def test_files_stay_below_the_models_directory(path: str, tmp: Path) -> None:
    with pytest.raises(triton_trio.InvalidArgument, match="below the model's directory"):
        SentFiles.write("sent", {path: b""})
    assert folders(tmp) == []


async def test_files_need_a_configuration() -> None:
    async with triton_trio.open_server(explicit=True) as server:
        with pytest.raises(triton_trio.InvalidArgument, match="parameter 'config'"):
            await server.repository.load("sent", files={"1/weights": b""})
