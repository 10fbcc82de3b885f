"""Models and servers for the tests of the inference service: a repository on disk, scripted backends, a stream in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import trio
import trio.testing

import triton_trio
from triton_trio._pb import inference as pb
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch
from triton_trio.grpc.frontend import serve_grpc
from triton_trio.grpc.server import GrpcServer
from triton_trio.tensor import DTYPES

T = TypeVar("T")
Script = Callable[[Batch], Awaitable[None]]

IDENTITY = """
backend: "identity"
max_batch_size: 8
input [{ name: "INPUT0", data_type: TYPE_FP32, dims: [ 4 ] }]
output [{ name: "OUTPUT0", data_type: TYPE_FP32, dims: [ 4 ], label_filename: "labels.txt" }]
"""

ALL_TYPES = 'backend: "identity"\n' + "".join(
    f'{kind} {{ name: "{prefix}_{name}", data_type: TYPE_{"STRING" if name == "BYTES" else name}, dims: [ -1 ] }}\n'
    for kind, prefix in (("input", "IN"), ("output", "OUT"))
    for name in DTYPES
)

SCRIPT = """
backend: "script"
input [{ name: "IN", data_type: TYPE_INT32, dims: [ 1 ] }]
output [{ name: "OUT", data_type: TYPE_INT32, dims: [ 1 ] }]
"""

DECOUPLED = SCRIPT + "model_transaction_policy { decoupled: true }\n"


def write_model(
    repository: Path, name: str, config: str, *, versions: Sequence[int] = (1,), files: Mapping[str, str] | None = None
) -> None:
    for version in versions:
        (repository / name / str(version)).mkdir(parents=True, exist_ok=True)
    (repository / name / "config.pbtxt").write_text(config)
    for path, text in (files or {}).items():
        (repository / name / path).write_text(text)


def write_repository(repository: Path) -> None:
    """``simple`` (batching, with labels), ``all_types``, and the scripted ``once`` and ``repeat`` (decoupled)."""
    write_model(repository, "simple", IDENTITY, files={"labels.txt": "zero\none\ntwo\nthree\n"})
    write_model(repository, "all_types", ALL_TYPES)
    write_model(repository, "once", SCRIPT)
    write_model(repository, "repeat", DECOUPLED)


class ScriptInstance(BackendInstance):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def execute(self, batch: Batch) -> None:
        await self._script(batch)


class ScriptModel(BackendModel):
    def __init__(self, script: Script) -> None:
        self._script = script

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[ScriptInstance]:
        yield ScriptInstance(self._script)


class ScriptBackend(Backend):
    """Runs ``scripts[model]`` for each batch; a model without one answers with its input."""

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self._scripts = scripts

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[ScriptModel]:
        yield ScriptModel(self._scripts.get(context.config.name, answer))


async def answer(batch: Batch) -> None:
    await batch.checkpoint()
    for member in batch.live():
        batch.respond(member, {"OUT": member.inputs["IN"]})


async def repeat(batch: Batch) -> None:
    """Send ``IN`` responses, 0, 1, 2, ..., and then a final one without outputs."""
    for member in batch.members:
        for index in range(int(member.inputs["IN"][0])):
            await batch.send(member, {"OUT": np.array([index], np.int32)})
        batch.finish(member)


class Gate:
    """A script that holds each execution until it is opened; ``waiting`` counts the executions it holds."""

    def __init__(self, then: Script = answer) -> None:
        self._then = then
        self._open = trio.Event()
        self._arrived = trio.Condition()
        self.waiting = 0

    def open(self) -> None:
        self._open.set()

    async def wait_held(self, count: int = 1) -> None:
        async with self._arrived:
            while self.waiting < count:
                await self._arrived.wait()

    async def __call__(self, batch: Batch) -> None:
        self.waiting += 1
        try:
            async with self._arrived:
                self._arrived.notify_all()
            await self._open.wait()
        finally:
            self.waiting -= 1
        await self._then(batch)


@asynccontextmanager
async def open_world(
    repository: Path, scripts: Mapping[str, Script] | None = None, **options: Any
) -> AsyncIterator[triton_trio.InferenceServer]:
    """A server on :func:`write_repository`'s models that ends quiescent, or the test fails."""
    await trio.to_thread.run_sync(write_repository, repository)
    scripts = {"repeat": repeat, **(scripts or {})}
    async with triton_trio.open_server(
        repository, backends={"script": lambda: ScriptBackend(scripts)}, **options
    ) as server:
        yield server
        await assert_settled(server)


@asynccontextmanager
async def serve_world(
    repository: Path, scripts: Mapping[str, Script] | None = None, **options: Any
) -> AsyncIterator[tuple[triton_trio.InferenceServer, str]]:
    """:func:`open_world` on a loopback socket: the server and its address; at the end no connection may be left."""
    async with open_world(repository, scripts, **options) as server:
        [address] = await serve_grpc(server, host="127.0.0.1", port=0)
        [frontend] = server._serving
        assert isinstance(frontend, GrpcServer)
        yield server, address
        await eventually(lambda: server.statistics().in_flight == 0)
        await eventually(lambda: frontend.statistics().connections == 0)
        statistics = frontend.statistics()
        assert statistics.running == statistics.queued == statistics.incomplete == 0
        assert statistics.started == statistics.finished


async def eventually(condition: Callable[[], bool], limit: float = 5.0) -> None:
    """Wait for what another thread's client causes over a real socket; there is no event for that."""
    with trio.fail_after(limit):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.002)


async def in_thread(client: Callable[[], T]) -> T:
    """Run a client's blocking code beside the server."""
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(client, abandon_on_cancel=True)


async def assert_settled(server: triton_trio.InferenceServer) -> None:
    """Everything has an outcome and holds nothing: requests, queues, instances."""
    await trio.testing.wait_all_tasks_blocked()
    for model in server.repository.loaded():
        statistics = model.statistics()
        assert statistics.in_flight == 0
        assert statistics.scheduler.queue.queued == 0
        assert all(instance.live_members == 0 for instance in statistics.instances)
        assert model.counters.in_flight == 0


class MemoryStream:
    """A bidi RPC as its service sees it; ``send`` and ``half_close`` are the client's side, ``replies`` what it gets."""

    def __init__(self, metadata: Mapping[str, str | bytes] | None = None) -> None:
        self.metadata = metadata
        self.replies: list[pb.ModelStreamInferResponse] = []
        self.taken = 0
        self._sending = False
        self.writable = trio.Event()
        self.writable.set()
        self._write, self._read = trio.open_memory_channel[pb.ModelInferRequest](1000)

    def send(self, *messages: pb.ModelInferRequest) -> None:
        for message in messages:
            self._write.send_nowait(message)

    def half_close(self) -> None:
        self._write.close()

    async def recv_message(self) -> pb.ModelInferRequest | None:
        try:
            message = await self._read.receive()
        except trio.EndOfChannel:
            return None
        self.taken += 1
        return message

    async def send_message(self, message: pb.ModelStreamInferResponse) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self.replies.append(message)
        self._sending = True
        try:
            await self.writable.wait()
        finally:
            self._sending = False

    def __aiter__(self) -> AsyncIterator[pb.ModelInferRequest]:
        raise AssertionError("the service reads with recv_message")


def infer_message(
    model: str,
    inputs: Mapping[str, np.ndarray] | int = 0,
    *,
    id: str = "",
    version: str = "",
    outputs: Sequence[str] = (),
    **parameters: pb.InferParameter,
) -> pb.ModelInferRequest:
    """A request message; an int is the input of the scripted models."""
    if isinstance(inputs, int):
        inputs = {"IN": np.array([inputs], np.int32)}
    return pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        id=id,
        inputs=[
            pb.ModelInferRequestInferInputTensor(
                name=name, datatype=triton_trio.tensor.datatype_of(array), shape=list(array.shape)
            )
            for name, array in inputs.items()
        ],
        outputs=[pb.ModelInferRequestInferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[triton_trio.tensor.to_raw(array) for array in inputs.values()],
        parameters=parameters,
    )
