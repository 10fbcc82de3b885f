"""The whole path: bytes of a client, HTTP/2, RPC scope, queue, batch, JAX program.  However the client leaves, at every stage.

Everything is in memory and nothing sleeps: the device ends a program when the test lets it (:class:`DeviceGate`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from hyperframe.frame import RstStreamFrame
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.backends.world import COUNTDOWN, COUNTDOWN_CONFIG, TICKER, TICKER_CONFIG, write_model
from tests.grpc.wire import CANCEL, RawClient, World, message
from triton_trio import InferenceServer, Outcome, open_server
from triton_trio._pb import inference as pb
from triton_trio.backends.jax import JaxBackend
from triton_trio.grpc import GrpcOptions, GrpcServer, UpbCodec
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.model import Model
from triton_trio.testing import assert_quiescent
from triton_trio.testing.device import DeviceGate

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
QUEUE_OF_ONE = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }"
WINDOW = "dynamic_batching { max_queue_delay_microseconds: 3600000000 }"
LONG = 1_000_000


class Full(World):
    """The full server, with raw clients and a device that waits for the test."""

    def __init__(self, grpc: GrpcServer, nursery: trio.Nursery, server: InferenceServer, gate: DeviceGate) -> None:
        super().__init__(grpc, None, nursery)  # type: ignore[arg-type]
        self.inference = server
        self.gate = gate

    @property
    def model(self) -> Model:
        return self.inference.model("m")

    async def dispatched_and_quiet(self, count: int) -> None:
        await self.gate.wait_dispatched(count)
        await wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def open_full(root: Path, code: str, config: str, **parameters: object) -> AsyncIterator[Full]:
    write_model(root, code, config, ladder="2", **parameters)  # type: ignore[arg-type]
    gate = DeviceGate()
    async with open_server(root, backends={"jax": lambda: JaxBackend(executor=gate.executor)}) as server:
        grpc = GrpcServer([GrpcInferenceService(server)], codec=UpbCodec(), options=GrpcOptions())
        async with trio.open_nursery() as nursery:
            yield Full(grpc, nursery, server, gate)
            gate.open()
            await wait_all_tasks_blocked(0.01)
            await until(lambda: not server.statistics().in_flight and server.model("m").instances[0].batch is None)
            await wait_all_tasks_blocked(0.01)
            assert_quiescent(server)
            end = grpc.statistics()
            assert (end.open_streams, end.running, end.queued, end.incomplete) == (0, 0, 0, 0)
            nursery.cancel_scope.cancel()


def infer(steps: int, *, request_id: str = "", seed: float = 0.0) -> bytes:
    """An encoded ModelInferRequest for the countdown or the ticker."""
    steps_tensor = pb.ModelInferRequestInferInputTensor(name="STEPS", datatype="INT32", shape=[1, 1])
    x = pb.ModelInferRequestInferInputTensor(name="X", datatype="FP32", shape=[1, 3])
    return UpbCodec().encode(
        pb.ModelInferRequest(
            model_name="m",
            id=request_id,
            inputs=[x, steps_tensor],
            raw_input_contents=[np.full((1, 3), seed, np.float32).tobytes(), np.array([[steps]], np.int32).tobytes()],
        ),
        pb.ModelInferRequest,
    )


def ticks(steps: int) -> bytes:
    steps_tensor = pb.ModelInferRequestInferInputTensor(name="STEPS", datatype="INT32", shape=[1, 1])
    raw = [np.array([[steps]], np.int32).tobytes()]
    message = pb.ModelInferRequest(model_name="m", inputs=[steps_tensor], raw_input_contents=raw)
    return UpbCodec().encode(message, pb.ModelInferRequest)


async def until(holds: Callable[[], object]) -> None:
    """Let everybody run until it is so.  The device's thread is real, so this is not a matter of Trio's tasks alone."""
    for _ in range(200_000):
        if holds():
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError("it never became so")


def status(client: RawClient, stream_id: int) -> int | None:
    return client.answers[stream_id].status if stream_id in client.answers else None


Leave = Callable[[RawClient, int, MockClock], Awaitable[None]]


async def by_reset(client: RawClient, stream_id: int, clock: MockClock) -> None:
    await client.send(RstStreamFrame(stream_id, error_code=CANCEL))


async def by_fin(client: RawClient, stream_id: int, clock: MockClock) -> None:
    await client.stream.send_eof()


async def by_closing(client: RawClient, stream_id: int, clock: MockClock) -> None:
    await trio.aclose_forcefully(client.stream)


async def by_deadline(client: RawClient, stream_id: int, clock: MockClock) -> None:
    clock.jump(5.0)


LEAVING = pytest.mark.parametrize(
    ("leave", "reason", "outcome"),
    [
        (by_reset, "client_reset", Outcome.CANCELLED),
        (by_fin, "connection_lost", Outcome.CANCELLED),
        (by_closing, "connection_lost", Outcome.CANCELLED),
        (by_deadline, "deadline", Outcome.DEADLINE),
    ],
    ids=["RST", "FIN", "closed", "deadline"],
)
TIMEOUT = [("grpc-timeout", "5S")]


def cancel_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "triton_trio.cancel"]


@LEAVING
async def test_A1_A3_while_queued_with_the_instance_busy(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    async with open_full(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + QUEUE_OF_ONE, max_batch_size=1) as world:
        holder, client = await world.connect(), await world.connect()
        busy = await holder.start(INFER, infer(LONG, request_id="busy"))
        await world.dispatched_and_quiet(2)
        waiting = await client.start(INFER, infer(1, request_id="waiting"), extra=TIMEOUT)
        assert len(world.model.scheduler) == 1
        await leave(client, waiting, mock_clock)
        await wait_all_tasks_blocked(0.01)
        # The device has not moved: nothing but the client's bytes has done this.
        assert len(world.model.scheduler) == 0
        assert world.model.counters.outcomes == {outcome: 1}
        assert world.model.counters.reasons == {(reason, "queued"): 1}
        assert [line.request_id for line in cancel_lines(caplog)] == ["waiting"]  # type: ignore[attr-defined]
        # Its place is free: the next one is taken in.
        following = await holder.start(INFER, infer(1, request_id="following"))
        assert len(world.model.scheduler) == 1
        await holder.reset(busy)
        world.gate.open()
        await until(lambda: status(holder, following) is not None)
        assert status(holder, following) == 0


@LEAVING
async def test_A1_A5_in_the_batching_window(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_full(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + WINDOW) as world:
        client = await world.connect()
        stream_id = await client.start(INFER, infer(1), extra=TIMEOUT)
        assert len(world.model.scheduler) == 1  # the instance is idle, and waits for company
        await leave(client, stream_id, mock_clock)
        await wait_all_tasks_blocked(0.01)
        assert world.model.counters.reasons == {(reason, "queued"): 1}
        assert world.gate.dispatched == 0


@LEAVING
async def test_law_6_while_executing(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    async with open_full(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=1) as world:
        holder, client = await world.connect(), await world.connect()
        stream_id = await client.start(INFER, infer(LONG, request_id="gone"), extra=TIMEOUT)
        await world.dispatched_and_quiet(2)
        following = await holder.start(INFER, infer(1))
        on_the_device = world.gate.dispatched - world.gate.ended
        assert on_the_device <= 2
        dispatched = world.gate.dispatched
        await leave(client, stream_id, mock_clock)
        await wait_all_tasks_blocked(0.01)
        # The client is done with; the device is not, and says so: nothing is logged or begun before it lets go.
        assert world.model.counters.outcomes == {outcome: 1}
        assert world.model.counters.reasons == {(reason, "executing"): 1}
        assert world.model.instances[0].batch is not None
        assert not cancel_lines(caplog)
        if leave is by_deadline:
            assert client.answers[stream_id].status == 4
        world.gate.let_end(on_the_device)
        await until(lambda: cancel_lines(caplog))
        assert world.gate.dispatched <= dispatched + 2, "only the following request's programs came after the cancel"
        [line] = cancel_lines(caplog)
        assert line.request_id == "gone"  # type: ignore[attr-defined]
        assert line.device_steps_after_cancel <= 2 * 2  # type: ignore[attr-defined]
        world.gate.open()
        await until(lambda: status(holder, following) is not None)
        assert status(holder, following) == 0


@LEAVING
async def test_law_10_while_streaming_responses(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_full(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=1) as world:
        client = await world.connect()
        head = client.headers(STREAM, extra=TIMEOUT)
        await client.send(head, client.data(head.stream_id, message(ticks(LONG))))
        await world.gate.wait_dispatched(2)
        world.gate.let_end(2)
        await until(lambda: head.stream_id in client.answers and client.answers[head.stream_id].messages)
        await wait_all_tasks_blocked(0.01)
        await leave(client, head.stream_id, mock_clock)
        await wait_all_tasks_blocked(0.01)
        received = len(client.answers[head.stream_id].messages)
        assert world.model.counters.reasons == {(reason, "responding"): 1}
        world.gate.open()
        await until(lambda: world.model.instances[0].batch is None)
        await wait_all_tasks_blocked(0.01)
        assert len(client.answers[head.stream_id].messages) == received, "nothing follows the cancel"


@LEAVING
async def test_A5_before_the_message_is_complete(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with open_full(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG) as world:
        client = await world.connect()
        head = client.headers(INFER, extra=TIMEOUT)
        await client.send(head, client.data(head.stream_id, message(infer(1))[:20]))
        await wait_all_tasks_blocked(0.01)
        await leave(client, head.stream_id, mock_clock)
        await wait_all_tasks_blocked(0.01)
        assert world.model.counters.started == 0
        assert world.server.statistics().started == 0


async def test_A5_a_reset_in_the_same_bytes_as_the_request(tmp_path: Path) -> None:
    async with open_full(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG) as world:
        client = await world.connect()
        frames = client.call(INFER, infer(1))
        await client.send(*frames, RstStreamFrame(frames[0].stream_id, error_code=CANCEL))
        await wait_all_tasks_blocked(0.01)
        assert world.model.counters.started == 0
        assert world.gate.dispatched == 0


@pytest.mark.parametrize("gone", [(), (0,), (1, 4, 6), tuple(range(7))], ids=["nobody", "one", "three", "seven"])
async def test_B9_law_7_rows_of_one_batch_over_the_wire(gone: tuple[int, ...], tmp_path: Path) -> None:
    """Eight calls share an execution; some are reset while it runs; the others' bytes are those of a calm run."""
    calm = await eight_rows(tmp_path / "calm", ())
    assert await eight_rows(tmp_path / "left", gone) == [each for i, each in enumerate(calm) if i not in gone]
    assert all(len(messages) == 1 for messages in calm)


async def eight_rows(root: Path, leaving: tuple[int, ...]) -> list[list[bytes]]:
    """The messages that each of the calls that stay gets."""
    async with open_full(root, COUNTDOWN, COUNTDOWN_CONFIG + WINDOW, buckets="8") as world:
        client = await world.connect()
        calls = [await client.start(INFER, infer(40, seed=0.1 * i)) for i in range(8)]
        await world.dispatched_and_quiet(2)
        batch = world.model.instances[0].batch
        assert batch is not None
        assert len(batch.members) == 8
        for i in leaving:
            await client.reset(calls[i])
        assert len(batch.scope) == 8 - len(leaving)
        world.gate.open()
        staying = [call for i, call in enumerate(calls) if i not in leaving]
        await until(lambda: all(status(client, call) is not None for call in staying))
        return [client.answers[call].messages for call in staying]
