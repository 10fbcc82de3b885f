"""The races of ``L0_request_cancellation/grpc_cancellation_test.py``, each in the order that its name says.

Triton slows down one of its threads (``TRITONSERVER_DELAY_GRPC_PROCESS``, ``_NOTIFICATION``, ``_ENQUEUE``, ...) until the cancel
probably falls where it should.  Here the client is made of frames, on streams in memory, and the order is that of the lines.
``New request handler`` counted in a log is a call that is served afterwards; one ``Cancellation notification`` and one
``StateRelease`` are one reset that was received, and as many handlers ended as began.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from hyperframe.frame import RstStreamFrame, SettingsFrame, WindowUpdateFrame
from trio.testing import MemoryReceiveStream, memory_stream_pair, wait_all_tasks_blocked

from tests.grpc.wire import CANCEL, RawClient
from tests.grpc.wire import World as Wire
from triton_trio import InferenceServer
from triton_trio._pb import inference as pb
from triton_trio.grpc import GrpcServer, UpbCodec
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.testing import Execution, ScriptedBackend, open_test_server

INFER = "/inference.GRPCInferenceService/ModelInfer"
Lines = Callable[[], int]
MODEL = "custom_identity_int32"
CONFIG = """
backend: "scripted"
max_batch_size: 1024
input [{ name: "INPUT0" data_type: TYPE_INT32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_INT32 dims: [ -1 ] }]
instance_group [{ kind: KIND_CPU }]
"""


def request(size: int = 1) -> bytes:
    tensor = pb.ModelInferRequestInferInputTensor(name="INPUT0", datatype="INT32", shape=[1, size])
    return UpbCodec().encode(
        pb.ModelInferRequest(
            model_name=MODEL, inputs=[tensor], raw_input_contents=[np.full(size, 10, np.int32).tobytes()]
        ),
        pb.ModelInferRequest,
    )


class Race:
    """One server, one client, and the call whose cancel meets its answer."""

    def __init__(
        self,
        server: InferenceServer,
        grpc: GrpcServer,
        backend: ScriptedBackend,
        client: RawClient,
        wire: MemoryReceiveStream,
    ) -> None:
        self.grpc = grpc
        self.backend = backend
        self.client = client
        self.cancels = 0
        self._server = server
        self._wire = wire

    @property
    def outcomes(self) -> dict[str, int]:
        return {outcome.value: count for outcome, count in self._server.model(MODEL).counters.outcomes.items()}

    async def executing(self, size: int = 1) -> tuple[int, Execution]:
        """The stream of a call that its model holds."""
        stream_id = await self.client.start(INFER, request(size))
        return stream_id, self.backend.running[-1]

    def cancel(self, stream_id: int) -> None:
        """The reset is there, and the server has yet to read it."""
        self.cancels += 1
        self._wire.put_data(RstStreamFrame(stream_id, error_code=CANCEL).serialize())

    def frames(self, stream_id: int) -> list[str]:
        """What the client has got of the answer."""
        return self.client.answers[stream_id].frames if stream_id in self.client.answers else []

    async def handlers(self) -> int:
        """How many there are, when everybody has done what there was to do."""
        await wait_all_tasks_blocked()
        return self.grpc.statistics().running


@asynccontextmanager
async def racing(root: Path, *, window: int = 65_535) -> AsyncIterator[Race]:
    """The client takes ``window`` bytes of each answer.  At the end nothing is left, and the next call is served."""
    backend = ScriptedBackend()
    async with open_test_server(root, {MODEL: CONFIG}, backend) as server, trio.open_nursery() as nursery:
        grpc = GrpcServer([GrpcInferenceService(server)], codec=UpbCodec())
        streams = memory_stream_pair()
        settings = {SettingsFrame.INITIAL_WINDOW_SIZE: window}
        client = await Wire(grpc, None, nursery).connect(settings=settings, streams=streams)  # type: ignore[arg-type]
        race = Race(server, grpc, backend, client, streams[1].receive_stream)
        yield race
        assert await race.handlers() == 0
        statistics = grpc.statistics()
        assert statistics.resets_received == race.cancels
        assert statistics.started == statistics.finished
        assert statistics.open_streams == 0
        stream_id, execution = await race.executing()
        execution.finish()
        await client.send(*[WindowUpdateFrame(each, window_increment=65_535) for each in (0, stream_id)])
        await wait_all_tasks_blocked()
        assert client.answers[stream_id].status == 0
        nursery.cancel_scope.cancel()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """How many lines of the log name a cancelled request."""
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    return lambda: sum(record.name == "triton_trio.cancel" for record in caplog.records)


async def test_grpc_async_infer_cancellation_at_step_start(tmp_path: Path, lines: Lines) -> None:
    async with racing(tmp_path) as race:
        call = race.client.call(INFER, request())
        await race.client.send(*call)  # it is there, and its handler has not begun
        race.cancel(call[0].stream_id)
        assert await race.handlers() == 0
        assert (race.outcomes, race.backend.executions, lines()) == ({}, [], 0)
        assert race.grpc.statistics().started == 0
        assert race.frames(call[0].stream_id) == []


@pytest.mark.parametrize("first", ["cancel", "answer"])
async def test_grpc_async_infer_response_complete_during_cancellation(tmp_path: Path, lines: Lines, first: str) -> None:
    async with racing(tmp_path) as race:
        for _ in range(8):
            stream_id, execution = await race.executing()
            batch = execution.batch
            assert batch is not None
            [member] = batch.members
            if first == "cancel":
                race.cancel(stream_id)
            batch.respond(member, execution.answer(member))
            if first == "answer":
                race.cancel(stream_id)
            # Now the reader of the connection and the handler with its answer can both run, in any order.
            execution.end()
            assert await race.handlers() == 0
        # Whoever was first, each has one outcome, and is told of at most once.
        cancelled = race.outcomes.get("cancelled", 0)
        assert race.outcomes.get("ok", 0) + cancelled == 8
        assert lines() == cancelled


async def test_grpc_async_infer_cancellation_before_finish_0(tmp_path: Path, lines: Lines) -> None:
    async with racing(tmp_path) as race:
        stream_id, execution = await race.executing(size=1 << 17)
        execution.finish()
        assert await race.handlers() == 1  # it writes 512 KiB, and the client takes 64
        before = list(race.frames(stream_id))
        race.cancel(stream_id)
        assert await race.handlers() == 0
        assert race.frames(stream_id) == before
        assert (race.outcomes, lines()) == ({"ok": 1}, 0)


async def test_grpc_async_infer_cancellation_before_finish_1(tmp_path: Path, lines: Lines) -> None:
    async with racing(tmp_path, window=0) as race:
        stream_id, execution = await race.executing()
        execution.finish()
        assert await race.handlers() == 0  # it has ended, and its answer waits for the client
        assert race.grpc.statistics().open_streams == 1
        race.cancel(stream_id)
        await wait_all_tasks_blocked()
        assert race.frames(stream_id) == ["HEADERS"]
        assert (race.outcomes, lines()) == ({"ok": 1}, 0)


async def test_grpc_async_infer_cancellation_before_response_complete_and_process_after_final_response(
    tmp_path: Path, lines: Lines
) -> None:
    async with racing(tmp_path) as race:
        race.backend.misbehaviour.ignore_release = race.backend.misbehaviour.swallow_cancelled = True
        stream_id, execution = await race.executing()
        race.cancel(stream_id)
        assert await race.handlers() == 0
        # The model has not noticed, and answers.
        assert (race.outcomes, lines()) == ({"cancelled": 1}, 0)
        execution.let_go()
        await execution.ended.wait()
        await wait_all_tasks_blocked()
        assert (race.outcomes, lines()) == ({"cancelled": 1}, 1)
        assert race.frames(stream_id) == []
