"""A client made of raw frames: it can say everything HTTP/2 forbids, and it hears every frame the server sends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import hpack
import trio
import trio.testing
from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import CodecBase
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from triton_trio.grpc.server import GrpcOptions, GrpcServer
from triton_trio.grpc.stream import Stream

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_TYPES = {0: "DATA", 1: "HEADERS", 3: "RST_STREAM", 4: "SETTINGS", 6: "PING", 7: "GOAWAY", 8: "WINDOW_UPDATE"}
NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0, 1, 7, 8, 11


def message(payload: bytes, flag: int = 0) -> bytes:
    """``payload`` behind gRPC's prefix."""
    return bytes([flag]) + len(payload).to_bytes(4, "big") + payload


class BytesCodec(CodecBase):
    """Messages are their bytes; ``b"malformed"`` is none."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        assert isinstance(message, bytes)
        return message

    def decode(self, data: bytes, message_type: Any) -> bytes:
        if data == b"malformed":
            raise ValueError("these bytes are no message")
        return data


BytesStream = Stream[bytes, bytes]
HandlerFunction = Callable[[BytesStream], Awaitable[None]]


class Service:
    """Handlers by name, as ``/test.Service/<name>``; ``echo``, ``hold`` and ``bidi`` are always there."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.cancelled: list[tuple[str | None, str]] = []  # (reason, source) of the Cancelled that hold() saw
        self.entered = 0
        self.release = trio.Event()
        self._changed = trio.lowlevel.ParkingLot()
        self.add("echo", self.echo)
        self.add("hold", self.hold)
        self.add("bidi", self.bidi, Cardinality.STREAM_STREAM)

    def add(self, name: str, func: HandlerFunction, cardinality: Cardinality = Cardinality.UNARY_UNARY) -> None:
        self.handlers[name] = Handler(func, cardinality, bytes, bytes)

    def __mapping__(self) -> dict[str, Handler]:
        return {f"/test.Service/{name}": handler for name, handler in self.handlers.items()}

    async def wait_entered(self, count: int) -> None:
        """Wait until ``hold`` and ``bidi`` have been called so often."""
        while self.entered < count:
            await self._changed.park()

    async def wait_cancelled(self, count: int) -> None:
        """Wait until so many of them have seen their cancel."""
        while len(self.cancelled) < count:
            await self._changed.park()

    async def echo(self, stream: BytesStream) -> None:
        request = await stream.recv_message()
        assert request is not None
        await stream.send_message(request)

    async def hold(self, stream: BytesStream) -> None:
        """Answers when released; records how it was cancelled."""
        self.entered += 1
        self._changed.unpark_all()
        await stream.recv_message()
        try:
            await self.release.wait()
        except trio.Cancelled as exc:
            self.cancelled.append((exc.reason, exc.source))
            self._changed.unpark_all()
            raise
        await stream.send_message(b"released")

    async def bidi(self, stream: BytesStream) -> None:
        self.entered += 1
        self._changed.unpark_all()
        try:
            async for request in stream:
                await stream.send_message(request)
        except trio.Cancelled as exc:
            self.cancelled.append((exc.reason, exc.source))
            self._changed.unpark_all()
            raise


@dataclass
class Answer:
    """What has arrived for one stream."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    trailers: list[tuple[str, str]] = field(default_factory=list)
    data: bytes = b""
    reset: int | None = None
    ended: bool = False
    frames: list[str] = field(default_factory=list)

    @property
    def status(self) -> int | None:
        value = dict(self.trailers or self.headers).get("grpc-status")
        return None if value is None else int(value)

    @property
    def text(self) -> str:
        return dict(self.trailers or self.headers).get("grpc-message", "")

    @property
    def messages(self) -> list[bytes]:
        found, rest = [], self.data
        while rest:
            length = int.from_bytes(rest[1:5], "big")
            found.append(rest[5 : 5 + length])
            rest = rest[5 + length :]
        return found


class RawClient:
    """One connection.  Frames are sent as they are named; nothing is checked, nothing is answered by itself."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.answers: dict[int, Answer] = {}
        self.settings: dict[int, int] = {}
        self.frames: list[Frame] = []
        self.goaways: list[tuple[int, bytes]] = []
        self.pings: list[bytes] = []
        self.updates: dict[int, int] = {}
        self.closed = False
        self.answer_pings = True
        self.answer_settings = True
        self._buffer = b""
        self._next_id = 1

    async def listen(self) -> None:
        try:
            while data := await self.stream.receive_some(1 << 20):
                self._buffer += data
                while len(self._buffer) >= 9:
                    frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
                    if len(self._buffer) < 9 + length:
                        break
                    frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
                    self._buffer = self._buffer[9 + length :]
                    await self._hear(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self.stream)
        self.closed = True

    async def _hear(self, frame: Frame) -> None:
        self.frames.append(frame)
        answer = self.answers.setdefault(frame.stream_id, Answer())
        answer.frames.append(FRAME_TYPES.get(frame.type or 0, "?"))
        if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.settings.update(frame.settings)
            if self.answer_settings:
                await self.send(SettingsFrame(0, flags=["ACK"]))
        elif isinstance(frame, HeadersFrame):
            fields = [(str(name), str(value)) for name, value in self.decoder.decode(frame.data)]
            if answer.headers:
                answer.trailers = fields
            else:
                answer.headers = fields
        elif isinstance(frame, DataFrame):
            answer.data += frame.data
        elif isinstance(frame, RstStreamFrame):
            answer.reset = frame.error_code
        elif isinstance(frame, GoAwayFrame):
            self.goaways.append((frame.error_code, frame.additional_data))
        elif isinstance(frame, WindowUpdateFrame):
            self.updates[frame.stream_id] = self.updates.get(frame.stream_id, 0) + frame.window_increment
        elif isinstance(frame, PingFrame) and "ACK" not in frame.flags:
            self.pings.append(frame.opaque_data)
            if self.answer_pings:
                await self.send(PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]))
        if "END_STREAM" in frame.flags:
            answer.ended = True

    # -- saying things ---------------------------------------------------------------------------------------------

    async def send(self, *frames: Frame | bytes) -> None:
        """All of it in one segment."""
        await self.stream.send_all(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames))

    async def handshake(self, settings: dict[int, int] | None = None) -> None:
        await self.send(PREFACE, SettingsFrame(0, settings=settings or {}))
        await trio.testing.wait_all_tasks_blocked()

    def headers(
        self,
        path: str = "echo",
        *,
        end: bool = False,
        extra: Iterable[tuple[str, str]] = (),
        without: Iterable[str] = (),
        stream_id: int | None = None,
    ) -> HeadersFrame:
        """HEADERS of a call; its id is in ``frame.stream_id``."""
        if stream_id is None:
            stream_id = self._next_id
            self._next_id += 2
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path if path.startswith("/") else f"/test.Service/{path}"),
            (":authority", "test"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        fields = [pair for pair in fields if pair[0] not in without] + list(extra)
        frame = HeadersFrame(stream_id, data=self.encoder.encode(fields), flags=["END_HEADERS"])
        if end:
            frame.flags.add("END_STREAM")
        return frame

    def data(self, stream_id: int, payload: bytes = b"", *, end: bool = False) -> DataFrame:
        return DataFrame(stream_id, data=payload, flags=["END_STREAM"] if end else [])

    def call(self, path: str = "echo", payload: bytes = b"hi", *, extra: Iterable[tuple[str, str]] = ()) -> list[Frame]:
        """The frames of a whole unary request."""
        head = self.headers(path, extra=extra)
        return [head, self.data(head.stream_id, message(payload), end=True)]

    async def start(self, path: str = "echo", payload: bytes = b"hi", *, extra: Iterable[tuple[str, str]] = ()) -> int:
        """Send a whole unary request; returns its stream id when the server has nothing more to do at once."""
        frames = self.call(path, payload, extra=extra)
        await self.send(*frames)
        await trio.testing.wait_all_tasks_blocked()
        return frames[0].stream_id

    async def reset(self, stream_id: int, code: int = CANCEL) -> None:
        await self.send(RstStreamFrame(stream_id, error_code=code))
        await trio.testing.wait_all_tasks_blocked()

    async def assert_serves(self) -> None:
        """The connection still answers a call."""
        stream_id = await self.start("echo", b"still here")
        answer = self.answers[stream_id]
        assert (answer.status, answer.messages) == (0, [b"still here"]), answer


class World:
    """A server and its raw clients."""

    def __init__(self, server: GrpcServer, service: Service, nursery: trio.Nursery) -> None:
        self.server = server
        self.service = service
        self.nursery = nursery

    async def connect(
        self,
        *,
        settings: dict[int, int] | None = None,
        handshake: bool = True,
        streams: tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream] | None = None,
    ) -> RawClient:
        ours, theirs = streams or trio.testing.memory_stream_pair()
        client = RawClient(ours)
        client.answer_settings = handshake  # or it would complete what a test leaves incomplete
        # Both end with the connection; the world's end cancels them.
        self.nursery.start_soon(self.server.serve_connection, theirs)
        self.nursery.start_soon(client.listen)
        if handshake:
            await client.handshake(settings)
        return client

    def only_connection(self) -> Any:
        (statistics,) = self.server.connection_statistics()
        return statistics


@asynccontextmanager
async def open_world(service: Service | None = None, **options: Any) -> AsyncIterator[World]:
    """Everything is over and every gauge is at zero when it closes, or the test fails."""
    service = service or Service()
    server = GrpcServer([service], codec=BytesCodec(), options=GrpcOptions(**options))
    async with trio.open_nursery() as nursery:
        yield World(server, service, nursery)
        nursery.cancel_scope.cancel()
    end = server.statistics()
    assert (end.connections, end.open_streams, end.running, end.queued, end.incomplete) == (0, 0, 0, 0, 0)
    assert end.started == end.finished
