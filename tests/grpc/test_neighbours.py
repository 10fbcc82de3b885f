"""Whatever one client sends, it gets a clear status or a clean close, and its neighbour gets its answer."""

from __future__ import annotations

import gzip
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.grpc.wire import RawClient, World, message
from triton_trio import open_server
from triton_trio._pb import inference as pb
from triton_trio.grpc import GrpcOptions, GrpcServer, UpbCodec
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.testing import assert_quiescent

INFER = "/inference.GRPCInferenceService/ModelInfer"
CONFIG = """backend: "identity" max_batch_size: 2
input { name: "IN" data_type: TYPE_FP32 dims: [ 4 ] } output { name: "OUT" data_type: TYPE_FP32 dims: [ 4 ] }
parameters { key: "execute_delay_ms" value { string_value: "1000" } }
"""
LIMIT = 1000


def request(
    model: str = "m", *, version: str = "", shape: tuple[int, ...] = (1, 4), datatype: str = "FP32", size: int = 16
) -> bytes:
    tensor = pb.ModelInferRequestInferInputTensor(name="IN", datatype=datatype, shape=list(shape))
    return UpbCodec().encode(
        pb.ModelInferRequest(
            model_name=model, model_version=version, id="bad", inputs=[tensor], raw_input_contents=[bytes(size)]
        ),
        pb.ModelInferRequest,
    )


@asynccontextmanager
async def open_full(root: Path) -> AsyncIterator[World]:
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(CONFIG)
    async with open_server(root) as server:
        options = GrpcOptions(max_receive_message_size=LIMIT)
        grpc = GrpcServer([GrpcInferenceService(server)], codec=UpbCodec(), options=options)
        async with trio.open_nursery() as nursery:
            yield World(grpc, None, nursery)  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()
        end = grpc.statistics()
        assert (end.connections, end.open_streams, end.running, end.incomplete) == (0, 0, 0, 0)
        assert_quiescent(server)


@asynccontextmanager
async def with_a_neighbour(world: World, client: RawClient, clock: trio.testing.MockClock) -> AsyncIterator[None]:
    """A request on ``client``'s own connection that executes meanwhile, and is answered."""
    neighbour = await client.start(INFER, request())
    yield
    await wait_all_tasks_blocked()
    clock.jump(1.0)
    await wait_all_tasks_blocked()
    answer = client.answers[neighbour]
    assert answer.status == 0
    response = UpbCodec().decode(answer.messages[0], pb.ModelInferResponse)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("payload", "status", "text"),
    [
        (b"\xff\xff\xff", 13, "ModelInferRequest"),
        (request()[:-3], 13, "ModelInferRequest"),
        (request("nobody"), 5, "Request for unknown model: 'nobody' is not found"),
        (request(version="9"), 5, "version 9 is not found"),
        (request(version="x"), 3, "version should be an integral value"),
        (
            request(shape=(1, 5), size=20),
            3,
            "unexpected shape for input 'IN' for model 'm'. Expected [-1,4], got [1,5]",
        ),
        (request(shape=(3, 4), size=48), 3, "inference request batch-size must be <= 2 for 'm'"),
        (request(datatype="INT32"), 3, "inference input 'IN' data-type is 'INT32', but model 'm' expects 'FP32'"),
        (request(datatype="FP31"), 3, "FP31"),
        (request(size=15), 3, "input byte size mismatch for input 'IN' for model 'm'. Expected 16, got 15"),
        (request(shape=(2**40, 2**40), size=16), 3, "IN"),
        (request(size=LIMIT), 8, "1000"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_bad_request_gets_a_clear_status(
    payload: bytes, status: int, text: str, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with open_full(tmp_path) as world:
        client = await world.connect()
        async with with_a_neighbour(world, client, mock_clock):
            answer = client.answers[await client.start(INFER, payload)]
            assert answer.status == status
            assert text in dict(answer.trailers or answer.headers)["grpc-message"].replace("%0A", "\n")


BOMB = gzip.compress(bytes(10_000_000))


@pytest.mark.parametrize(
    ("body", "extra", "status"),
    [
        (struct.pack(">BI", 1, 3) + b"abc", [], 13),  # says compressed, names no encoding
        (struct.pack(">BI", 7, 3) + b"abc", [], 13),  # no such flag
        (struct.pack(">BI", 1, len(BOMB[:900])) + BOMB[:900], [("grpc-encoding", "gzip")], None),  # a bomb
        (message(request()), [("grpc-timeout", "soon")], None),
    ],
    ids=["compressed with nothing", "unknown flag", "gzip bomb", "bad timeout"],
)
async def test_a_badly_framed_request_gets_a_status(
    body: bytes, extra: list[tuple[str, str]], status: int | None, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with open_full(tmp_path) as world:
        client = await world.connect()
        async with with_a_neighbour(world, client, mock_clock):
            head = client.headers(INFER, extra=extra)
            await client.send(head, client.data(head.stream_id, body, end=True))
            await wait_all_tasks_blocked()
        answer = client.answers[head.stream_id]
        assert answer.status
        assert status is None or answer.status == status
        assert dict(answer.trailers or answer.headers)["grpc-message"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of a TLS hello
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 50,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x10\x04",  # a frame that never ends
        b"P",
        b"",
    ],
    ids=["HTTP/1.1", "zeros", "TLS", "bad frames", "truncated frame", "one byte", "nothing"],
)
async def test_garbage_on_the_port_is_closed_and_nobody_else_notices(
    garbage: bytes, tmp_path: Path, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_full(tmp_path) as world:
        client = await world.connect()
        async with with_a_neighbour(world, client, mock_clock):
            stranger = await world.connect(handshake=False)
            if garbage:
                await stranger.send(garbage)
            await stranger.stream.send_eof()
            await wait_all_tasks_blocked()
            assert stranger.closed
            assert world.server.statistics().connections == 1
        assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
