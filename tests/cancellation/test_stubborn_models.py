"""Models that do not cooperate: they cannot keep a request alive, and they cannot keep the loop to themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock

import triton_trio
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch

CONFIG = """backend: "%s"
input { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] } output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }
"""
INPUTS = {"IN": np.zeros(1, np.float32)}


class Stubborn(BackendInstance, BackendModel, Backend):
    """Catches the cancel, goes on for five seconds, and answers as if nothing had happened."""

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[BackendModel]:
        yield self

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[BackendInstance]:
        yield self

    async def execute(self, batch: Batch) -> None:
        try:
            await trio.sleep(1)
        except trio.Cancelled:  # noqa: ASYNC103 - the mistake that this model makes
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
        for member in batch.members:
            batch.respond(member, {"OUT": member.inputs["IN"]})


def write(root: Path, backend: str) -> Path:
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(CONFIG % backend)
    return root


async def test_C1_law_9_a_model_that_swallows_cancels_is_named_in_the_log(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with triton_trio.open_server(write(tmp_path, "stubborn"), backends={"stubborn": Stubborn}) as server:
        model = server.model("m")
        request = model.request(INPUTS)
        with trio.move_on_after(0.5):
            await model.infer(request)
        assert request.outcome is triton_trio.Outcome.DEADLINE
        assert trio.current_time() - request.received_at == 0.5
        await trio.sleep(10)
        assert model.instances[0].batch is None
        [line] = [record.getMessage() for record in caplog.records if record.name == "triton_trio.instance"]
        assert line.startswith("model m went on for 5.0 s after its execution was cancelled")
        # One that is served says nothing.
        caplog.clear()
        await model.infer(INPUTS)
        assert not [record for record in caplog.records if record.name == "triton_trio.instance"]


async def test_a_backend_that_never_waits_leaves_turns_to_others(tmp_path: Path) -> None:
    async with triton_trio.open_server(write(tmp_path, "identity")) as server:
        model = server.model("m")
        answered = 0
        seen: list[int] = []

        async def ask() -> None:
            nonlocal answered
            await model.infer(INPUTS)
            answered += 1

        async def neighbour() -> None:
            while answered < 300:
                seen.append(model.instances[0].executions)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            for _ in range(300):
                nursery.start_soon(ask)
        steps = np.diff(seen)
        assert steps.max() <= 16, "executions between two looks of a neighbour"
