"""The runs whose pictures are in docs/concepts: a few clients of a small server, on the simulated clock."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

import triton_trio
from triton_trio import InferenceRequest, Model, Reason
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch
from triton_trio.testing.models import open_test_server, scripted_config

from .record import Recording, ScopeState

Play = Callable[[Recording], Awaitable[None]]

#: An execution is so many chunks of so many seconds.
CHUNKS, CHUNK = 4, 0.25


class ChunkBackend(Backend, BackendModel, BackendInstance):
    """Executes in chunks, as a device does: nothing interrupts a chunk, and a cancel is seen between two."""

    def __init__(self) -> None:
        self.on_checkpoint: Callable[[], None] = lambda: None

    def open_model(self, context: ModelContext) -> AbstractAsyncContextManager[BackendModel]:
        return self._opened()

    def open_instance(self, placement: Placement) -> AbstractAsyncContextManager[BackendInstance]:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[ChunkBackend]:
        yield self

    async def execute(self, batch: Batch) -> None:
        for _ in range(CHUNKS):
            with trio.CancelScope(shield=True):  # what a device does; it ends by itself
                await trio.sleep(CHUNK)
            self.on_checkpoint()
            await batch.checkpoint()
        for member in batch.live():
            batch.respond(member, {"OUTPUT0": member.inputs["INPUT0"]})


class Stage:
    """One model with one instance, clients that come one after another, and a lane for each."""

    def __init__(self, recording: Recording, model: Model, device: ChunkBackend, nursery: trio.Nursery) -> None:
        self.recording = recording
        self.model = model
        self._device = device
        self._nursery = nursery

    def client(self, name: str, **options: object) -> InferenceRequest:
        """A client who asks now."""
        row = np.zeros((1, 2) if self.model.config.max_batch_size else 2, np.float32)
        request = self.recording.request(self.model.request({"INPUT0": row}, request_id=name, **options))  # type: ignore[arg-type]
        self._nursery.start_soon(self._ask, request, name=name)
        return request

    async def clients(self, *names: str) -> list[InferenceRequest]:
        """Clients who ask one after another."""
        requests = []
        for name in names:
            requests.append(self.client(name))
            await trio.sleep(0.08)
        return requests

    async def _ask(self, request: InferenceRequest) -> None:
        with suppress(triton_trio.TritonError):  # how it ended is in its lane
            await self.model.infer(request)

    def execution(self) -> None:
        """A lane for the scope of what the instance executes."""
        instance = self.model.instances[0]

        def look() -> ScopeState | None:
            if (batch := instance.batch) is None:
                return None
            members = frozenset(request.request_id for request in batch.scope)
            return ScopeState(instance.executions, members, batch.scope.cancel_scope.cancel_called)

        lane = self.recording.scope("execution", look)
        self._device.on_checkpoint = lambda: lane.checkpoints.append(self.recording.now)

    def sequence(self, sequence_id: str) -> None:
        """A lane for the scopes of the sequences with this correlation ID, which are not there at the same time."""
        scheduler = self.model.scheduler

        def look() -> ScopeState | None:
            for sequence in scheduler.sequences():
                if sequence.sequence_id == sequence_id:
                    members = frozenset(request.request_id for request in sequence.scope)
                    return ScopeState(sequence.generation, members, sequence.scope.cancel_scope.cancel_called)
            return None

        self.recording.scope(f"sequence {sequence_id}", look, spreads=True)


@asynccontextmanager
async def stage(recording: Recording, config: str) -> AsyncIterator[Stage]:
    device = ChunkBackend()
    with tempfile.TemporaryDirectory() as folder:
        async with open_test_server(Path(folder), {"model": config}, device) as server, trio.open_nursery() as nursery:
            yield Stage(recording, server.model("model"), device, nursery)


BATCHED = scripted_config(max_batch_size=4, batching="max_queue_delay_microseconds: 300000")


@dataclass(frozen=True)
class Run:
    title: str
    play: Play


#: By name; the picture is docs/images/NAME.svg.
RUNS: dict[str, Run] = {}


def run(title: str) -> Callable[[Play], Play]:
    def register(play: Play) -> Play:
        RUNS[play.__name__.replace("_", "-")] = Run(title, play)
        return play

    return register


@run("Two of four leave their batch: the execution goes on for the others")
async def some_leave(recording: Recording) -> None:
    async with stage(recording, BATCHED) as it:
        it.execution()
        requests = await it.clients("Ada", "Ben", "Cho", "Dag")
        await trio.sleep(0.4)
        requests[1].cancel(Reason.CLIENT_RESET)
        await trio.sleep(0.2)
        requests[2].cancel(Reason.CONNECTION_LOST)


@run(
    "All four leave their batch: with the last one the execution is cancelled, and the device lets go at its checkpoint"
)
async def all_leave(recording: Recording) -> None:
    async with stage(recording, BATCHED) as it:
        it.execution()
        requests = await it.clients("Ada", "Ben", "Cho", "Dag", "Eve")
        for request in requests[:4]:
            await trio.sleep(0.15)
            request.cancel(Reason.CLIENT_RESET)


SEQUENCES = scripted_config(max_batch_size=1, more="sequence_batching { direct { } }")


@run("One of three requests of sequence A is cancelled: the scope is, and with it the others; sequence B gets the slot")
async def any_leaves(recording: Recording) -> None:
    async with stage(recording, SEQUENCES) as it:
        it.sequence("A")
        it.sequence("B")
        it.execution()
        requests = []
        for number in (1, 2, 3):
            requests.append(it.client(f"A, request {number}", sequence_id="A", sequence_start=number == 1))
            await trio.sleep(0.08)
        it.client("B, request 1", sequence_id="B", sequence_start=True, sequence_end=True)
        await trio.sleep(0.36)
        requests[1].cancel(Reason.CLIENT_RESET)
