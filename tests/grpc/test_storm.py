"""E2: two thousand calls are cancelled at once, wherever they are.  What is left of them, and what each of them costs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import trio
from hyperframe.frame import RstStreamFrame, WindowUpdateFrame
from trio.testing import wait_all_tasks_blocked

from tests.grpc.wire import CANCEL, RawClient, World, message
from triton_trio import InferenceServer, Outcome
from triton_trio._pb import inference as pb
from triton_trio.grpc import GrpcOptions, GrpcServer, UpbCodec
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.testing import ScriptedBackend, open_test_server, scripted_config

INFER = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS = 20
ROWS, INSTANCES, DIMS = 8, 4, 256
WINDOW = 128 << 10  #: of each connection: a hundred calls, and hardly more
#: Full batches or none, so that it is known which calls share one.
BATCHING = f"preferred_batch_size: [ {ROWS} ] max_queue_delay_microseconds: 3600000000"


def request(seed: int) -> bytes:
    """A ModelInferRequest of one row, which nobody else has."""
    row = np.random.default_rng(seed).standard_normal((1, DIMS)).astype(np.float32)
    tensor = pb.ModelInferRequestInferInputTensor(name="INPUT0", datatype="FP32", shape=[1, DIMS])
    return UpbCodec().encode(
        pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[row.tobytes()]), pb.ModelInferRequest
    )


NEIGHBOURS = [request(seed) for seed in range(CONNECTIONS)]
DOOMED = [request(CONNECTIONS)] * CONNECTIONS


class Weather(World):
    """Twenty connections to a server whose model waits for the test."""

    def __init__(
        self, grpc: GrpcServer, nursery: trio.Nursery, server: InferenceServer, backend: ScriptedBackend
    ) -> None:
        super().__init__(grpc, None, nursery)  # type: ignore[arg-type]
        self.backend = backend
        self.clients: list[RawClient] = []
        self.model = server.model("m")
        self.calm = 0  #: tasks, when nothing is asked for

    @property
    def queued(self) -> int:
        scheduler = self.model.statistics().scheduler
        assert scheduler is not None
        return scheduler.queue.queued

    async def calls(self, payloads: list[bytes]) -> list[int]:
        """One on each connection; their stream ids, when they are where they have to wait."""
        ids = []
        for client, payload in zip(self.clients, payloads, strict=True):
            frames = client.call(INFER, payload)
            ids.append(frames[0].stream_id)
            await client.send(*frames)
        await wait_all_tasks_blocked()
        return ids

    def outputs(self, ids: list[int]) -> list[bytes]:
        """The tensors that were answered on these streams, one on each connection."""
        answers = [client.answers[stream_id] for client, stream_id in zip(self.clients, ids, strict=True)]
        assert {answer.status for answer in answers} == {0}
        replies = [UpbCodec().decode(answer.messages[0], pb.ModelInferResponse) for answer in answers]
        return [reply.raw_output_contents[0] for reply in replies]

    async def calm_outputs(self) -> list[bytes]:
        """What the neighbours' calls get when there is no storm."""
        self.backend.automatic = True
        ids = await self.calls(NEIGHBOURS)
        await self.calls(DOOMED)  # or the last batch would not be full
        return self.outputs(ids)

    def check_left(self, calls: int) -> None:
        """Of all there was, so many calls execute: no task, handler, row, queue entry or byte of a window belongs to more."""
        now = self.server.statistics()
        assert (now.open_streams, now.running, now.queued, now.incomplete) == (calls, calls, 0, 0)
        assert trio.lowlevel.current_statistics().tasks_living == self.calm + calls
        assert (self.queued, self.model.counters.in_flight) == (0, calls)
        assert sum(instance.live_members for instance in self.model.statistics().instances) == calls
        for connection in self.server.connection_statistics():
            assert connection.http2.unacknowledged_bytes == 0
            assert connection.http2.local_window >= WINDOW // 2, "all of it is free; updates go out in halves"


@asynccontextmanager
async def weather(root: Path, **options: Any) -> AsyncIterator[Weather]:
    backend = ScriptedBackend(lambda rows: np.sin(rows) * np.exp(rows))
    config = scripted_config(max_batch_size=ROWS, instances=INSTANCES, batching=BATCHING, dims=[DIMS])
    async with open_test_server(root, {"m": config}, backend) as server:
        limits = GrpcOptions(connection_window_size=WINDOW, initial_window_size=WINDOW, **options)
        grpc = GrpcServer([GrpcInferenceService(server)], codec=UpbCodec(), options=limits)
        async with trio.open_nursery() as nursery:
            world = Weather(grpc, nursery, server, backend)
            for _ in range(CONNECTIONS):
                world.clients.append(await world.connect())
            world.calm = trio.lowlevel.current_statistics().tasks_living
            yield world
            nursery.cancel_scope.cancel()
        assert grpc.statistics().started == grpc.statistics().finished


class Work(trio.abc.Instrument):
    """What is done, in steps of tasks and in lines of Python: a clock would measure the machine, too."""

    def __init__(self) -> None:
        self.steps = 0
        self.lines = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1

    def trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        self.lines += event == "line"
        return self.trace


@contextmanager
def counting() -> Iterator[Work]:
    work, before = Work(), sys.gettrace()
    trio.lowlevel.add_instrument(work)
    sys.settrace(work.trace)
    try:
        yield work
    finally:
        sys.settrace(before)
        trio.lowlevel.remove_instrument(work)


async def storm(world: Weather, each: int) -> Work:
    """``each`` calls of every connection are reset at once, and what that takes is counted; one more call is not."""
    neighbours = await world.calls(NEIGHBOURS)
    doomed = [await world.calls(DOOMED) for _ in range(each - 1)]
    doomed.append([])
    for client, payload in zip(world.clients, DOOMED, strict=True):
        upload = client.headers(INFER)
        doomed[-1].append(upload.stream_id)
        await client.send(upload, client.data(upload.stream_id, message(payload)[:600]))
    await wait_all_tasks_blocked()

    # They are on the devices, in the queue, before a handler's slot, and in the middle of an upload.
    grpc = world.server.statistics()
    assert grpc.running == CONNECTIONS * min(each, world.server.options.max_concurrent_streams)
    assert (grpc.running + grpc.queued, grpc.incomplete) == (CONNECTIONS * each, CONNECTIONS)
    assert [execution.rows for execution in world.backend.running] == [ROWS] * INSTANCES
    assert world.queued == grpc.running - ROWS * INSTANCES

    with counting() as work:
        async with trio.open_nursery() as nursery:
            for client, *ids in zip(world.clients, *doomed, strict=True):
                nursery.start_soon(client.send, *[RstStreamFrame(each, error_code=CANCEL) for each in ids])
        await wait_all_tasks_blocked()

    # No device was told to do anything.  One had nobody else's rows, and has let go; three are still wanted.
    world.check_left(CONNECTIONS)
    assert len(world.backend.running) == INSTANCES - 1
    executed = ROWS * INSTANCES - CONNECTIONS
    assert world.model.counters.outcomes == {Outcome.CANCELLED: grpc.running - CONNECTIONS}
    assert world.model.counters.reasons == {
        ("client_reset", "executing"): executed,
        ("client_reset", "queued"): grpc.running - CONNECTIONS - executed,
    }
    for execution in world.backend.running:
        execution.finish()
    await wait_all_tasks_blocked()
    assert world.outputs(neighbours) == await world.calm_outputs()
    assert [client.goaways for client in world.clients] == [[]] * CONNECTIONS, "a cancel is no attack"
    world.check_left(0)
    return work


async def test_E2_law_7_two_thousand_resets_leave_nothing_and_disturb_nobody(tmp_path: Path) -> None:
    async with weather(tmp_path, max_concurrent_streams=80) as world:
        await storm(world, 100)


async def test_E2_a_cancel_costs_the_same_however_many_there_are(tmp_path: Path) -> None:
    async with weather(tmp_path / "few") as world:
        few = await storm(world, 10)
    async with weather(tmp_path / "many") as world:
        many = await storm(world, 100)
    more = CONNECTIONS * (100 - 10)
    assert many.steps - few.steps == more, "the task of each call runs once, to its end"
    assert (many.lines - few.lines) / more <= 1.02 * few.lines / (CONNECTIONS * 10)


async def test_E2_nineteen_of_twenty_connections_are_lost_at_once(tmp_path: Path) -> None:
    """With a hundred calls on each: those of the twentieth move up, and are answered with the bits of a calm day."""
    async with weather(tmp_path) as world:
        survivor, *lost = world.clients
        await survivor.send(WindowUpdateFrame(0, window_increment=1 << 20))
        rounds = [await world.calls(NEIGHBOURS) for _ in range(100)]
        assert world.queued == CONNECTIONS * 100 - ROWS * INSTANCES
        before = world.backend.running
        async with trio.open_nursery() as nursery:
            for client in lost:
                nursery.start_soon(trio.aclose_forcefully, client.stream)
        await wait_all_tasks_blocked()
        now = world.server.statistics()
        assert (now.connections, now.open_streams, now.running, now.queued) == (1, 100, 100, 0)
        assert {reason for reason, _ in world.model.counters.reasons} == {"connection_lost"}
        assert world.model.counters.in_flight == 100
        # Two of the four devices execute a row of its, as before; the two others have full batches of its queue.
        assert [execution in before for execution in world.backend.running] == [True, True, False, False]
        assert world.queued == 100 - 2 - 2 * ROWS
        world.backend.automatic = True
        for execution in world.backend.running:
            execution.finish()
        # Two are left for the last batch.
        fresh = [await survivor.start(INFER, NEIGHBOURS[0]) for _ in range(ROWS - 2)]
        answers = [survivor.answers[stream_id] for stream_id in [*(ids[0] for ids in rounds), *fresh]]
        assert {(answer.status, *answer.messages) for answer in answers} == {(0, answers[0].messages[0])}
