"""Channels on memory streams: to our server, and to a server made of raw frames that can say anything."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import hpack
import trio
import trio.testing
from grpclib.const import Cardinality, Status
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from triton_trio.grpc.call import Call
from triton_trio.grpc.channel import Channel, ChannelOptions, open_channel
from triton_trio.grpc.server import GrpcOptions, GrpcServer

from .wire import PREFACE, BytesCodec, Service, message

settle = trio.testing.wait_all_tasks_blocked

UNARY = Cardinality.UNARY_UNARY
BIDI = Cardinality.STREAM_STREAM
Fields = Iterable[tuple[str, str]]


def call(channel: Channel, name: str = "echo", kind: Cardinality = UNARY, **options: Any) -> Call[bytes, bytes]:
    """A call to a method of :class:`Service`."""
    return channel.request(f"/test.Service/{name}", kind, bytes, bytes, **options)


async def ask(channel: Channel, name: str = "echo", payload: bytes = b"hi", **options: Any) -> bytes | None:
    """A whole unary call."""
    async with call(channel, name, **options) as rpc:
        await rpc.send_message(payload, end=True)
        return await rpc.recv_message()


class Line:
    """Memory streams that a channel dials; each dial is a connection that ``answer`` serves."""

    def __init__(self, nursery: trio.Nursery, answer: Callable[[trio.abc.HalfCloseableStream], Awaitable[Any]]) -> None:
        self.nursery = nursery
        self.answer = answer
        self.refuse: OSError | None = None
        self.client_ends: list[trio.StapledStream[Any, Any]] = []

    async def dial(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if self.refuse is not None:
            raise self.refuse
        ours, theirs = trio.testing.memory_stream_pair()
        self.client_ends.append(ours)
        self.nursery.start_soon(self.answer, theirs)  # ends with the connection; open_* cancels it
        return ours


class World:
    """Our server at one end, our channel at the other."""

    def __init__(self, server: GrpcServer, service: Service, line: Line, channel: Channel) -> None:
        self.server = server
        self.service = service
        self.line = line
        self.channel = channel


@asynccontextmanager
async def open_world(
    service: Service | None = None, *, server_options: GrpcOptions | None = None, **options: Any
) -> AsyncIterator[World]:
    """Fails the test unless everything is over, and every count is balanced, when it closes."""
    service = service or Service()
    server = GrpcServer([service], codec=BytesCodec(), options=server_options)
    async with trio.open_nursery() as nursery:
        line = Line(nursery, server.serve_connection)
        settings = ChannelOptions(**options)
        async with open_channel("test", 1, codec=BytesCodec(), connect=line.dial, options=settings) as channel:
            yield World(server, service, line, channel)
            await settle()
            for each in channel.statistics().connections:
                assert (each.open_streams, each.unacknowledged_bytes, each.queued_bytes) == (0, 0, 0)
                assert each.local_window >= settings.connection_window_size // 2, "unread bytes were given back"
        assert_over(channel)
        await settle()
        end = server.statistics()
        assert (end.connections, end.open_streams, end.running, end.queued) == (0, 0, 0, 0)
        nursery.cancel_scope.cancel()


def assert_over(channel: Channel) -> None:
    end = channel.statistics()
    assert (end.in_flight, end.waiting, end.connections) == (0, 0, ())
    assert end.started == sum(end.finished.values())


def finished(channel: Channel) -> dict[str, int]:
    return {status.name: count for status, count in channel.statistics().finished.items()}


class RawServer:
    """Sends the frames it is told to send, hears every frame the client sends, decides nothing."""

    OK_HEADERS = ((":status", "200"), ("content-type", "application/grpc"))

    def __init__(self, settings: dict[int, int]) -> None:
        self.settings = settings
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.heard: list[str] = []
        self.headers: dict[int, dict[str, str]] = {}
        self.resets: list[tuple[int, int]] = []
        self.received: dict[int, bytes] = {}
        self.updates: dict[int, int] = {}
        self.stream: trio.abc.HalfCloseableStream
        self.greets = True

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        buffer = b""
        try:
            if self.greets:
                await self.greet()
            while data := await stream.receive_some(1 << 20):
                buffer = (buffer + data).removeprefix(PREFACE)
                while len(buffer) >= 9:
                    frame, length = Frame.parse_frame_header(memoryview(buffer[:9]))
                    if len(buffer) < 9 + length:
                        break
                    frame.parse_body(memoryview(buffer[9 : 9 + length]))
                    buffer = buffer[9 + length :]
                    self._hear(frame)
                    if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags and self.greets:
                        await stream.send_all(SettingsFrame(0, flags=["ACK"]).serialize())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    def _hear(self, frame: Frame) -> None:
        number = frame.stream_id
        if number:
            flag = "+END" if "END_STREAM" in frame.flags else ""
            self.heard.append(f"{type(frame).__name__.removesuffix('Frame')}{flag} {number}")
        if isinstance(frame, HeadersFrame):
            self.headers[number] = {str(name): str(value) for name, value in self.decoder.decode(frame.data)}
        elif isinstance(frame, DataFrame):
            self.received[number] = self.received.get(number, b"") + frame.data
        elif isinstance(frame, RstStreamFrame):
            self.resets.append((number, frame.error_code))
        elif isinstance(frame, WindowUpdateFrame):
            self.updates[number] = self.updates.get(number, 0) + frame.window_increment

    async def greet(self) -> None:
        await self.stream.send_all(SettingsFrame(0, settings=self.settings).serialize())

    async def send(self, *frames: Frame | bytes) -> None:
        """All of it in one segment; then everybody who can run has run."""
        await self.stream.send_all(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames))
        await settle()

    def head(self, number: int, fields: Fields = OK_HEADERS, *, end: bool = False) -> HeadersFrame:
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        return HeadersFrame(number, data=self.encoder.encode(list(fields)), flags=flags)

    def data(self, number: int, payload: bytes, flag: int = 0, *, end: bool = False) -> DataFrame:
        return DataFrame(number, data=message(payload, flag), flags=["END_STREAM"] if end else [])

    def trailers(self, number: int, status: int = 0, *fields: tuple[str, str]) -> HeadersFrame:
        return self.head(number, [("grpc-status", str(status)), *fields], end=True)

    def trailers_only(self, number: int, status: int = 5, *fields: tuple[str, str]) -> HeadersFrame:
        return self.head(number, [*self.OK_HEADERS, ("grpc-status", str(status)), *fields], end=True)

    def whole(self, number: int, payload: bytes = b"answer") -> list[Frame]:
        """The frames of a unary answer."""
        return [self.head(number), self.data(number, payload), self.trailers(number)]

    def reset(self, number: int, code: int) -> RstStreamFrame:
        return RstStreamFrame(number, error_code=code)

    def goaway(self, last: int, code: int = 0) -> GoAwayFrame:
        return GoAwayFrame(0, last_stream_id=last, error_code=code)


@asynccontextmanager
async def open_raw(
    settings: dict[int, int] | None = None, *, greets: bool = True, **options: Any
) -> AsyncIterator[tuple[Channel, RawServer, trio.Nursery]]:
    """A channel, what it talks to, and a nursery for calls that go on meanwhile."""
    server = RawServer(settings or {})
    server.greets = greets
    async with trio.open_nursery() as servers:
        line = Line(servers, server.serve)
        settings_ = ChannelOptions(**options)
        async with open_channel("test", 1, codec=BytesCodec(), connect=line.dial, options=settings_) as channel:
            async with trio.open_nursery() as nursery:
                yield channel, server, nursery
        assert_over(channel)
        servers.cancel_scope.cancel()


class Outcome:
    """What became of a call that another task makes."""

    def __init__(self) -> None:
        self.reply: bytes | None = None
        self.error: Exception | None = None
        self.scope = trio.CancelScope()
        self.done = False

    @property
    def status(self) -> Status | None:
        return getattr(self.error, "status", None)

    @property
    def text(self) -> str:
        return str(getattr(self.error, "message", ""))


def start(
    nursery: trio.Nursery, channel: Channel, name: str = "echo", payload: bytes = b"hi", **options: Any
) -> Outcome:
    """A unary call in a task of its own."""
    result = Outcome()

    async def run() -> None:
        with result.scope:
            try:
                result.reply = await ask(channel, name, payload, **options)
            except Exception as exc:  # noqa: BLE001  # tests look at it
                result.error = exc
        result.done = True

    nursery.start_soon(run, name=f"call {name}")
    return result
