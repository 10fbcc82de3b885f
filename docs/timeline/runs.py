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
from triton_trio import InferenceRequest, InferenceServer, Model, Reason
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
    """Models with one instance each, clients that come one after another, and a lane for each client."""

    def __init__(
        self, recording: Recording, server: InferenceServer, device: ChunkBackend, nursery: trio.Nursery
    ) -> None:
        self.recording = recording
        self.server = server
        self.model = server.model("model")
        self._device = device
        self._nursery = nursery

    def client(self, name: str, *, model: str = "model", **options: object) -> InferenceRequest:
        """A client who asks now."""
        return self.recording.request(self._start(name, self.server.model(model), **options))

    def _start(self, name: str, model: Model, **options: object) -> InferenceRequest:
        row = np.zeros((1, 2) if model.config.max_batch_size else 2, np.float32)
        request = model.request({"INPUT0": row}, request_id=name, **options)  # type: ignore[arg-type]
        self._nursery.start_soon(self._ask, model, request, name=name)
        return request

    def ensemble(self, name: str) -> InferenceRequest:
        """A client who asks now; the lane is one of a scope, with the steps as members."""
        request = self._start(name, self.model)

        def look() -> ScopeState | None:
            if not request.model_name:
                return None
            if request.outcome is not None:
                return ScopeState(0, frozenset(), request.is_cancelled) if self._on_a_device(request) else None
            steps = frozenset(lane.name for lane in self.recording.lanes if lane.name.startswith("step "))
            return ScopeState(0, steps, cancelled=False)

        self.recording.scope(f"request of {name}", look, nests=True)
        return request

    def _on_a_device(self, parent: InferenceRequest) -> bool:
        instances = [
            instance for model in self.server.repository.loaded() for instance in getattr(model, "instances", ())
        ]
        batches = [instance.batch for instance in instances if instance.batch is not None]
        return any(member.request.parent is parent for batch in batches for member in batch.members)

    def step(self, parent: InferenceRequest, name: str) -> None:
        """A lane for the step of ``parent`` at the model ``name``."""
        model = self.server.model(name)

        def find() -> InferenceRequest | None:
            batch = model.instances[0].batch
            here = [*model.scheduler.queued(), *(member.request for member in batch.members)] if batch else []
            return next((request for request in here if request.parent is parent), None)

        self.recording.step(f"step {name}", find)

    async def clients(self, *names: str) -> list[InferenceRequest]:
        """Clients who ask one after another."""
        requests = []
        for name in names:
            requests.append(self.client(name))
            await trio.sleep(0.08)
        return requests

    async def _ask(self, model: Model, request: InferenceRequest) -> None:
        with suppress(triton_trio.TritonError):  # how it ended is in its lane
            await model.infer(request)

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

    def shared_execution(self) -> None:
        """A lane for the scope of an execution that identical requests share."""
        shared = self.model.shared

        def look() -> ScopeState | None:
            execution = next(iter(shared), None)
            if execution is None:
                return None
            members = frozenset(request.request_id for request in execution.scope)
            return ScopeState(0, members, execution.scope.cancel_scope.cancel_called)

        lane = self.recording.scope("shared execution", look)
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
async def stage(recording: Recording, config: str, *, cache_size: int = 0, **others: str) -> AsyncIterator[Stage]:
    device = ChunkBackend()
    models = {"model": config, **others}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_test_server(Path(folder), models, device, cache_size=cache_size) as server,
            trio.open_nursery() as nursery,
        ):
            yield Stage(recording, server, device, nursery)


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


CACHED = scripted_config(more="response_cache { enable: true }")


@run("Three ask the same. Who asked first leaves, the execution goes on for the second, and the third finds the answer")
async def first_leaves(recording: Recording) -> None:
    async with stage(recording, CACHED, cache_size=1 << 20) as it:
        it.shared_execution()
        ada, _ = await it.clients("Ada", "Ben")
        await trio.sleep(0.3)
        ada.cancel(Reason.CLIENT_RESET)
        await trio.sleep(0.8)
        it.client("Cho")
        await trio.sleep(0.2)


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


PAGE = """
platform: "ensemble"
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 2 ] }
output { name: "PICTURE" data_type: TYPE_FP32 dims: [ 2 ] }
output { name: "TEXT" data_type: TYPE_FP32 dims: [ 2 ] }
ensemble_scheduling {
  step {
    model_name: "draw"
    model_version: -1
    input_map { key: "INPUT0" value: "INPUT0" }
    output_map { key: "OUTPUT0" value: "PICTURE" }
  }
  step {
    model_name: "describe"
    model_version: -1
    input_map { key: "INPUT0" value: "INPUT0" }
    output_map { key: "OUTPUT0" value: "TEXT" }
  }
}
"""


@run("The client of an ensemble leaves, while one of its steps executes and another waits in the queue of a stranger")
async def parent_leaves(recording: Recording) -> None:
    async with stage(recording, PAGE, draw=scripted_config(), describe=scripted_config()) as it:
        it.client("a stranger, at draw", model="draw")
        await trio.sleep(0.15)
        page = it.ensemble("page")
        it.step(page, "draw")
        it.step(page, "describe")
        await trio.sleep(0.45)
        page.cancel(Reason.CLIENT_RESET)
