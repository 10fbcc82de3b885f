"""Two small backends for the lessons.  A backend is three classes, one for each thing with a life of its own: the backend,
a model that it has loaded, an instance of the model.  Here one class can be all three.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import triton_trio
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch


class _Simple(Backend, BackendModel, BackendInstance):
    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[BackendModel]:
        yield self

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[BackendInstance]:
        yield self


class RunningTotal(_Simple):
    """TOTAL is BEFORE + VALUE.  BEFORE is a state: the sequence's last TOTAL, or zero."""

    async def execute(self, batch: Batch) -> None:
        await trio.sleep(1)
        for member in batch.live():
            batch.respond(member, {"TOTAL": member.inputs["BEFORE"] + member.inputs["VALUE"]})


class Fails(_Simple):
    async def execute(self, batch: Batch) -> None:
        await trio.sleep(0.25)
        raise triton_trio.InvalidArgument("no such word")
