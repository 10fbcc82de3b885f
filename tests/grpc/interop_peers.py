"""The same call through four clients, the same service on three servers.

asyncio and grpcio's blocking client live in threads of their own.  Nothing here sleeps: a cancel waits for the handler
to say that it is there, and everything has a time limit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import grpclib.client
import grpclib.server
import trio
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError
from multidict import MultiDict

from triton_trio.grpc.channel import ChannelOptions, open_channel
from triton_trio.grpc.codec import UpbCodec
from triton_trio.grpc.server import GrpcOptions, GrpcServer, open_grpc_listeners
from triton_trio.testing._pb.echo import EchoReply, EchoRequest

from .echo_service import PATH, BytesDetails, EchoService

LIMIT = 15.0  # seconds; for anything that should be over in a moment
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
KINDS = {
    "UnaryUnary": Cardinality.UNARY_UNARY,
    "UnaryStream": Cardinality.UNARY_STREAM,
    "StreamUnary": Cardinality.STREAM_UNARY,
    "StreamStream": Cardinality.STREAM_STREAM,
    "Nope": Cardinality.UNARY_UNARY,
}


@dataclass(frozen=True)
class Ask:
    """A call.  ``until`` blocks its thread until it is time to cancel; the requests are then not ended."""

    requests: tuple[EchoRequest, ...]
    kind: str = "UnaryUnary"
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout: float | None = LIMIT
    compress: bool = False
    until: Callable[[], None] | None = None

    @property
    def request(self) -> EchoRequest:
        (request,) = self.requests
        return request


@dataclass
class Got:
    """What the caller knows afterwards."""

    replies: list[EchoReply] = field(default_factory=list)
    status: Status = Status.OK
    message: str = ""
    details: bytes | None = None
    initial: dict[str, list[str | bytes]] = field(default_factory=dict)
    trailing: dict[str, list[str | bytes]] = field(default_factory=dict)


def _ours_of(pairs: Any) -> dict[str, list[str | bytes]]:
    """Metadata of the echo service, by key."""
    found: dict[str, list[str | bytes]] = {}
    for key, value in pairs.items() if isinstance(pairs, MultiDict) else pairs or ():
        if key.startswith("echo-"):
            found.setdefault(key, []).append(value)
    return found


# -- clients -----------------------------------------------------------------------------------------------------------

Client = Callable[[int, Ask], Awaitable[Got]]


async def _exchange(channel: Any, ask: Ask, got: Got) -> None:
    """With grpclib's channel, or with ours: they look the same."""
    kind = KINDS[ask.kind]
    path, metadata = PATH + ask.kind, list(ask.metadata)
    request = channel.request(path, kind, EchoRequest, EchoReply, timeout=ask.timeout, metadata=metadata)
    try:
        async with request as stream:
            if kind.client_streaming:
                await stream.send_request()
                for message in ask.requests:
                    await stream.send_message(message)
                if ask.until is None:
                    await stream.end()
            else:
                await stream.send_message(ask.request, end=True)
            if kind.server_streaming:
                async for reply in stream:
                    got.replies.append(reply)
            elif (reply := await stream.recv_message()) is not None:
                got.replies.append(reply)
    except GRPCError as exc:
        got.status, got.message, got.details = exc.status, exc.message or "", exc.details
    except TimeoutError:  # how grpclib's client says it
        got.status = Status.DEADLINE_EXCEEDED
    finally:
        got.initial, got.trailing = _ours_of(request.initial_metadata), _ours_of(request.trailing_metadata)


async def our_client(port: int, ask: Ask) -> Got:
    got = Got()
    options = ChannelOptions(request_compression="gzip" if ask.compress else "")
    async with open_channel("127.0.0.1", port, status_details_codec=BytesDetails(), options=options) as channel:
        async with trio.open_nursery() as nursery:

            async def cancel(until: Callable[[], None]) -> None:
                await trio.to_thread.run_sync(until)
                scope.cancel()

            if ask.until is not None:
                nursery.start_soon(cancel, ask.until)
            with trio.CancelScope() as scope:
                await _exchange(channel, ask, got)
            if scope.cancelled_caught:
                got.status = Status.CANCELLED
    return got


async def grpclib_client(port: int, ask: Ask) -> Got:
    async def main() -> Got:
        got = Got()
        codec = UpbCodec()
        async with grpclib.client.Channel(
            "127.0.0.1", port, codec=codec, status_details_codec=BytesDetails()
        ) as channel:
            call = asyncio.create_task(_exchange(channel, ask, got))
            if ask.until is not None:
                await asyncio.to_thread(ask.until)
                call.cancel()
            await asyncio.wait({call})
            if call.cancelled():
                got.status = Status.CANCELLED
            else:
                call.result()
        return got

    return await trio.to_thread.run_sync(asyncio.run, main())


def _multicallable(channel: Any, kind: str) -> Any:
    make = {
        Cardinality.UNARY_UNARY: channel.unary_unary,
        Cardinality.UNARY_STREAM: channel.unary_stream,
        Cardinality.STREAM_UNARY: channel.stream_unary,
        Cardinality.STREAM_STREAM: channel.stream_stream,
    }[KINDS[kind]]
    return make(PATH + kind, request_serializer=bytes, response_deserializer=EchoReply.parse)


def _settle(got: Got, code: grpc.StatusCode, details: str | None, initial: Any, trailing: Any) -> None:
    got.status, got.message = Status(code.value[0]), details or ""
    got.initial, got.trailing = _ours_of(initial), _ours_of(trailing)
    got.details = dict(trailing or ()).get("grpc-status-details-bin")


async def grpcio_client(port: int, ask: Ask) -> Got:
    def main() -> Got:
        got = Got()
        over = threading.Event()

        def requests() -> Iterator[EchoRequest]:
            yield from ask.requests
            if ask.until is not None:
                over.wait(LIMIT)

        with grpc.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED) as channel:
            method = _multicallable(channel, ask.kind)
            streaming, streamed = KINDS[ask.kind].value
            start = method if streamed else method.future
            call = start(
                requests() if streaming else ask.request,
                timeout=ask.timeout,
                metadata=ask.metadata,
                compression=grpc.Compression.Gzip if ask.compress else None,
            )
            canceller = threading.Thread(target=lambda: (ask.until() if ask.until else None, call.cancel()))
            if ask.until is not None:
                canceller.start()
            with suppress(grpc.RpcError, grpc.FutureCancelledError):
                got.replies.extend(call if streamed else [call.result()])
            over.set()
            _settle(got, call.code(), call.details(), call.initial_metadata(), call.trailing_metadata())
            if ask.until is not None:
                canceller.join()
        return got

    return await trio.to_thread.run_sync(main)


async def grpcio_aio_client(port: int, ask: Ask) -> Got:
    async def main() -> Got:
        got = Got()
        over = asyncio.Event()

        async def requests() -> AsyncIterator[EchoRequest]:
            for request in ask.requests:
                yield request
            if ask.until is not None:
                await over.wait()

        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED) as channel:
            streaming, streamed = KINDS[ask.kind].value
            call = _multicallable(channel, ask.kind)(
                requests() if streaming else ask.request,
                timeout=ask.timeout,
                metadata=ask.metadata,
                compression=grpc.Compression.Gzip if ask.compress else None,
            )

            async def receive() -> None:
                if streamed:
                    async for reply in call:
                        got.replies.append(reply)
                else:
                    got.replies.append(await call)

            receiving = asyncio.create_task(receive())
            if ask.until is not None:
                await asyncio.to_thread(ask.until)
                call.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                receiving.exception()  # an RpcError; the call says the same
            over.set()
            _settle(
                got,
                await call.code(),
                await call.details(),
                await call.initial_metadata(),
                await call.trailing_metadata(),
            )
        return got

    return await trio.to_thread.run_sync(asyncio.run, main())


CLIENTS: Mapping[str, Client] = {
    "ours": our_client,
    "grpclib": grpclib_client,
    "grpcio": grpcio_client,
    "grpcio-aio": grpcio_aio_client,
}


# -- servers -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def our_server() -> AsyncIterator[tuple[EchoService, int]]:
    service = EchoService(trio.sleep_forever)
    options = GrpcOptions(flush_timeout=0.5)
    server = GrpcServer([service], codec=UpbCodec(), status_details_codec=BytesDetails(), options=options)
    listeners = await open_grpc_listeners("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        yield service, listeners[0].socket.getsockname()[1]  # type: ignore[attr-defined]
        server.start_drain()
    end = server.statistics()
    assert (end.connections, end.open_streams, end.running) == (0, 0, 0)
    assert end.started == end.finished


@asynccontextmanager
async def _in_thread(
    serve: Callable[[EchoService], AbstractAsyncContextManager[int]],
) -> AsyncIterator[tuple[EchoService, int]]:
    """An asyncio server with a loop and a thread of its own."""
    service = EchoService(lambda: asyncio.Event().wait())
    started: queue.SimpleQueue[tuple[int, Callable[[], Any]]] = queue.SimpleQueue()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serve(service) as port:
            started.put((port, lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, lambda: asyncio.run(main()))
        port, stop = await trio.to_thread.run_sync(lambda: started.get(timeout=LIMIT))
        try:
            yield service, port
        finally:
            stop()


class TidyServer(grpclib.server.Server):
    """Closes its connections; grpclib's leaves that to its clients, and grpcio's to the garbage collector."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._open: dict[Any, asyncio.Event] = {}

    def _protocol_factory(self) -> Any:
        protocol = super()._protocol_factory()
        made, lost, gone = protocol.connection_made, protocol.connection_lost, asyncio.Event()

        def connection_made(transport: asyncio.BaseTransport) -> None:
            made(transport)
            self._open[transport] = gone

        def connection_lost(exc: Exception | None) -> None:
            lost(exc)
            gone.set()

        protocol.connection_made = connection_made  # type: ignore[method-assign]
        protocol.connection_lost = connection_lost  # type: ignore[method-assign]
        return protocol

    async def close_connections(self) -> None:
        for transport, gone in self._open.items():
            transport.abort()
            await gone.wait()


@asynccontextmanager
async def _serve_grpclib(service: EchoService) -> AsyncIterator[int]:
    server = TidyServer([service], codec=UpbCodec(), status_details_codec=BytesDetails())
    await server.start("127.0.0.1", 0)
    listening = server._server
    assert isinstance(listening, asyncio.Server)
    yield listening.sockets[0].getsockname()[1]
    server.close()
    await server.close_connections()
    await server.wait_closed()


class GrpcioStream:
    """What the echo service needs of grpclib's stream, on grpcio's context."""

    def __init__(self, context: Any, requests: AsyncIterator[EchoRequest]) -> None:
        self._context = context
        self._requests = requests
        self.metadata = MultiDict(list(context.invocation_metadata()))
        self.replies: list[EchoReply] = []
        self.streams = False

    @property
    def deadline(self) -> Any:
        left = self._context.time_remaining()

        class Deadline:
            def time_remaining(self) -> float:
                return float(left)

        return None if left is None else Deadline()

    def __aiter__(self) -> AsyncIterator[EchoRequest]:
        return self._requests

    async def recv_message(self) -> EchoRequest | None:
        return await anext(self._requests, None)

    async def send_message(self, message: EchoReply) -> None:
        if self.streams:
            await self._context.write(message)
        else:
            self.replies.append(message)

    async def send_initial_metadata(self, *, metadata: Any) -> None:
        await self._context.send_initial_metadata(metadata)

    async def send_trailing_metadata(self, *, metadata: Any) -> None:
        self._context.set_trailing_metadata(metadata)


class GrpcioHandler(grpc.GenericRpcHandler):
    """Any grpclib service, as grpcio wants it."""

    def __init__(self, service: EchoService) -> None:
        self._mapping = service.__mapping__()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        handler = self._mapping.get(details.method)  # type: ignore[attr-defined]
        if handler is None:
            return None
        streaming, streamed = handler.cardinality.value

        async def only(request: EchoRequest) -> AsyncIterator[EchoRequest]:
            yield request

        async def handle(request: Any, context: Any) -> Any:
            stream = GrpcioStream(context, aiter(request) if streaming else only(request))
            stream.streams = streamed
            try:
                await handler.func(stream)
            except GRPCError as exc:
                trailing = (("grpc-status-details-bin", exc.details),) if exc.details else ()
                code = next(code for code in grpc.StatusCode if code.value[0] == exc.status.value)
                await context.abort(code, exc.message or "", trailing)
            return None if streamed else stream.replies[0]

        make = getattr(
            grpc, f"{'stream' if streaming else 'unary'}_{'stream' if streamed else 'unary'}_rpc_method_handler"
        )
        return make(handle, request_deserializer=EchoRequest.parse, response_serializer=bytes)


@asynccontextmanager
async def _serve_grpcio(service: EchoService) -> AsyncIterator[int]:
    server = grpc.aio.server(options=UNLIMITED, compression=grpc.Compression.Gzip)
    server.add_generic_rpc_handlers([GrpcioHandler(service)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(grace=0)


SERVERS: Mapping[str, Callable[[], AbstractAsyncContextManager[tuple[EchoService, int]]]] = {
    "ours": our_server,
    "grpclib": lambda: _in_thread(_serve_grpclib),
    "grpcio": lambda: _in_thread(_serve_grpcio),
}
