"""E2: two thousand requests are reset at once, wherever they are.  What it costs for each, and what is left: nothing."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import trio
from hyperframe.frame import Frame, RstStreamFrame
from trio.testing import wait_all_tasks_blocked

from tests.grpc.wire import CANCEL, RawClient, World, message
from triton_trio import InferenceServer, Outcome
from triton_trio._pb import inference as pb
from triton_trio.grpc import GrpcOptions, GrpcServer, UpbCodec
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.model import Model
from triton_trio.testing import ScriptedBackend, open_test_server, scripted_config

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
CONNECTIONS = 20
ROWS, INSTANCES, DIMS = 8, 4, 256
WINDOW = 256 << 10  #: what a hundred requests of a connection need, and not twice that
#: Full batches or none, so that it is known which requests share one.
BATCHING = f"preferred_batch_size: [ {ROWS} ] max_queue_delay_microseconds: 3600000000"


def request(seed: int) -> bytes:
    """A ModelInferRequest of one row, which nobody else has."""
    row = np.random.default_rng(seed).standard_normal((1, DIMS)).astype(np.float32)
    tensor = pb.ModelInferRequestInferInputTensor(name="INPUT0", datatype="FP32", shape=[1, DIMS])
    return UpbCodec().encode(
        pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[row.tobytes()]), pb.ModelInferRequest
    )


#: The storm's requests look the same; it is the others whose bits count.
DOOMED = request(1_000_000)


class Weather(World):
    """A server whose model waits for the test, and twenty connections."""

    def __init__(self, grpc: GrpcServer, nursery: trio.Nursery, server: InferenceServer, backend: ScriptedBackend) -> None:
        super().__init__(grpc, None, nursery)  # type: ignore[arg-type]
        self.backend = backend
        self.clients: list[RawClient] = []
        self.model: Model = server.model("m")
        self.calm = 0  #: tasks, when nothing was asked for

    @property
    def queued(self) -> int:
        scheduler = self.model.statistics().scheduler
        assert scheduler is not None
        return scheduler.queue.queued

    async def each(self, path: str, payloads: list[bytes]) -> list[int]:
        """One request on each connection; their stream ids, when they are where they have to wait."""
        ids = []
        for client, payload in zip(self.clients, payloads, strict=True):
            frames = client.call(path, payload)
            ids.append(frames[0].stream_id)
            await client.send(*frames)
        await wait_all_tasks_blocked()
        return ids

    async def at_once(self, frames: list[list[Frame]]) -> None:
        """To each connection its frames, in one segment."""
        async with trio.open_nursery() as nursery:
            for client, each in zip(self.clients, frames, strict=True):
                nursery.start_soon(client.send, *each)
        await wait_all_tasks_blocked()

    def outputs(self, ids: list[int]) -> list[bytes]:
        """The tensors that were answered on these streams, one on each connection."""
        answers = [client.answers[stream_id] for client, stream_id in zip(self.clients, ids, strict=True)]
        assert {answer.status for answer in answers} == {0}
        replies = [UpbCodec().decode(answer.messages[0], pb.ModelInferResponse) for answer in answers]
        return [reply.raw_output_contents[0] for reply in replies]

    async def serves(self) -> None:
        """Two more requests on each connection, which are answered."""
        self.backend.automatic = True
        ids = [await self.each(INFER, [request(each) for each in range(CONNECTIONS)]) for _ in range(2)]
        assert self.outputs(ids[0]) == self.outputs(ids[1])

    def check_nothing_is_left(self, streams: int = 0) -> None:
        """But ``streams`` of the twenty connections: no task, handler, queue entry or row, and every byte of the windows."""
        end = self.server.statistics()
        assert (end.open_streams, end.running, end.queued, end.incomplete) == (streams, streams, 0, 0)
        assert trio.lowlevel.current_statistics().tasks_living == self.calm + streams
        assert self.queued == 0
        assert self.model.counters.in_flight == streams
        assert sum(instance.live_members for instance in self.model.statistics().instances) == streams
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
            assert [client.goaways for client in world.clients] == [[]] * CONNECTIONS, "a cancel is no attack"
            nursery.cancel_scope.cancel()
        assert grpc.statistics().started == grpc.statistics().finished


class Work:
    """What was done: steps of tasks, and lines of Python."""

    def __init__(self) -> None:
        self.steps = 0
        self.lines = 0


class Steps(trio.abc.Instrument):
    def __init__(self, work: Work) -> None:
        self._work = work

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._work.steps += 1


@contextmanager
def counting() -> Iterator[Work]:
    """Count what the loop does in this block: a clock would measure the machine, too."""
    work, before = Work(), sys.gettrace()
    instrument = Steps(work)

    def line(frame: FrameType, event: str, arg: object) -> Any:
        work.lines += event == "line"
        return line

    def trace_from_now_on() -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:  # those that have begun already, the loop's among them
            frame.f_trace = line
            frame = frame.f_back

    trio.lowlevel.add_instrument(instrument)
    trace_from_now_on()
    sys.settrace(line)
    try:
        yield work
    finally:
        sys.settrace(before)
        trio.lowlevel.remove_instrument(instrument)


async def storm_of_calls(world: Weather, each: int) -> Work:
    """``each`` calls on every connection, and all but one are reset: on a device, in the queue, before a handler's slot,
    in the middle of their upload.  The one of each connection that stays is answered as if nothing had happened."""
    neighbours = await world.each(INFER, [request(number) for number in range(CONNECTIONS)])
    doomed: list[list[int]] = [[] for _ in world.clients]
    for _ in range(each):
        for ids, stream_id in zip(doomed, await world.each(INFER, [DOOMED] * CONNECTIONS), strict=True):
            ids.append(stream_id)
    halves = [[client.headers(INFER) for _ in range(2)] for client in world.clients]
    for client, heads in zip(world.clients, halves, strict=True):
        for head in heads:
            await client.send(head, client.data(head.stream_id, message(DOOMED)[:600]))
    await wait_all_tasks_blocked()

    assert [execution.rows for execution in world.backend.running] == [ROWS] * INSTANCES
    before = world.server.statistics()
    slots = world.server.options.max_concurrent_streams
    assert before.running == CONNECTIONS * min(each + 1, slots)
    assert before.queued == CONNECTIONS * (each + 1) - before.running
    assert before.incomplete == 2 * CONNECTIONS
    assert world.queued == before.running - ROWS * INSTANCES

    gone = [[*ids, *[head.stream_id for head in heads]] for ids, heads in zip(doomed, halves, strict=True)]
    resets: list[list[Frame]] = [[RstStreamFrame(each, error_code=CANCEL) for each in ids] for ids in gone]
    with counting() as work:
        await world.at_once(resets)

    # The devices have not moved: three have rows that are still wanted, the fourth has let go.
    world.check_nothing_is_left(streams=CONNECTIONS)
    assert len(world.backend.running) == INSTANCES - 1
    on_devices = ROWS * INSTANCES - CONNECTIONS
    assert world.model.counters.outcomes == {Outcome.CANCELLED: before.running - CONNECTIONS}
    assert world.model.counters.reasons == {("client_reset", "executing"): on_devices, ("client_reset", "queued"): world.model.counters.outcomes[Outcome.CANCELLED] - on_devices}
    for execution in world.backend.running:
        execution.finish()
    await wait_all_tasks_blocked()
    assert world.outputs(neighbours) == await calm_outputs(world)
    world.check_nothing_is_left()
    return work


async def calm_outputs(world: Weather) -> list[bytes]:
    """What the neighbours' requests get when they are alone."""
    world.backend.automatic = True
    ids = await world.each(INFER, [request(number) for number in range(CONNECTIONS)])
    rest = await world.each(INFER, [DOOMED] * CONNECTIONS)  # batches are full or wait
    assert len(rest) == CONNECTIONS
    return world.outputs(ids)


async def test_E2_two_thousand_calls_are_reset_at_once(tmp_path: Path) -> None:
    async with weather(tmp_path, max_concurrent_streams=80) as world:
        await storm_of_calls(world, 98)
        await world.serves()
        world.check_nothing_is_left()
