"""The thin second layer: real sockets and grpcio's client, which shares no code with us."""

from __future__ import annotations

import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import trio
import trio.testing
import trustme
from grpclib.const import Cardinality
from grpclib.const import Status as GrpclibStatus
from grpclib.exceptions import GRPCError

from triton_trio.grpc.server import GrpcOptions, GrpcServer, open_grpc_listeners
from triton_trio.grpc.socket_transport import SocketTransport

from .wire import BytesCodec, BytesStream, Service

pytestmark = pytest.mark.network


def everything() -> Service:
    """A service as one would write it for grpclib."""

    async def repeat(stream: BytesStream) -> None:
        request = await stream.recv_message()
        assert request is not None
        for _ in range(3):
            await stream.send_message(request)

    async def join(stream: BytesStream) -> None:
        await stream.send_message(b"+".join([part async for part in stream]))

    async def fail(stream: BytesStream) -> None:
        await stream.recv_message()
        raise GRPCError(GrpclibStatus.NOT_FOUND, "nö such thing")

    async def meta(stream: BytesStream) -> None:
        await stream.recv_message()
        await stream.send_initial_metadata(metadata={"seen-bin": stream.metadata["ask-bin"]})
        await stream.send_message(b"")
        await stream.send_trailing_metadata(metadata={"late": "yes"})

    service = Service()
    service.add("repeat", repeat, Cardinality.UNARY_STREAM)
    service.add("join", join, Cardinality.STREAM_UNARY)
    service.add("fail", fail)
    service.add("meta", meta)
    return service


@asynccontextmanager
async def open_server(service: Service, context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[GrpcServer, int]]:
    server = GrpcServer([service], codec=BytesCodec(), options=GrpcOptions(flush_timeout=0.5))
    listeners = await open_grpc_listeners("127.0.0.1", 0, ssl_context=context)
    socket_listener: Any = listeners[0] if context is None else listeners[0].transport_listener  # type: ignore[attr-defined]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners)
            yield server, socket_listener.socket.getsockname()[1]
            server.start_drain()
    end = server.statistics()
    assert (end.connections, end.open_streams, end.running) == (0, 0, 0)


async def in_thread(function: Callable[[], None]) -> None:
    """grpcio's client blocks; ours is the server's thread."""
    await trio.to_thread.run_sync(function)


def drive(channel: grpc.Channel) -> None:
    path = "/test.Service/"
    assert channel.unary_unary(path + "echo")(b"one", timeout=5) == b"one"
    assert list(channel.unary_stream(path + "repeat")(b"three", timeout=5)) == [b"three"] * 3
    assert channel.stream_unary(path + "join")(iter([b"a", b"b", b"c"]), timeout=5) == b"a+b+c"
    assert list(channel.stream_stream(path + "bidi")(iter([b"x", b"y"]), timeout=5)) == [b"x", b"y"]
    large = bytes(3 << 20)
    assert channel.unary_unary(path + "echo")(large, timeout=10) == large
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert channel.unary_unary(path + "echo")(b"z" * 9999, timeout=5, compression=compression) == b"z" * 9999

    with pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary(path + "fail")(b"", timeout=5)
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.NOT_FOUND, "nö such thing")
    with pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary(path + "nope")(b"", timeout=5)
    assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary(path + "hold")(b"", timeout=0.2)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    _, call = channel.unary_unary(path + "meta").with_call(b"", timeout=5, metadata=[("ask-bin", b"\0\xff")])
    assert ("seen-bin", b"\0\xff") in call.initial_metadata()
    assert ("late", "yes") in call.trailing_metadata()


async def test_grpcio_client_four_kinds_errors_metadata_compression() -> None:
    async with open_server(everything()) as (_, port):

        def client() -> None:
            limits = [("grpc.max_receive_message_length", -1)]
            with grpc.insecure_channel(f"127.0.0.1:{port}", options=limits) as channel:
                drive(channel)

        await in_thread(client)


async def test_grpcio_client_over_tls_with_alpn() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    async with open_server(everything(), context) as (_, port):

        def client() -> None:
            credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
            limits = [("grpc.max_receive_message_length", -1), ("grpc.ssl_target_name_override", "localhost")]
            with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=limits) as channel:
                drive(channel)

        await in_thread(client)


async def test_grpcio_client_cancel_reaches_the_handler() -> None:
    service = Service()
    done = threading.Event()
    async with open_server(service) as (server, port):

        def client() -> None:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                future = channel.unary_unary("/test.Service/hold").future(b"x")
                requests: Iterator[bytes] = iter([b"ping"])
                stream = channel.stream_stream("/test.Service/bidi")(endless(requests))
                assert next(stream) == b"ping"
                trio.from_thread.run(service.wait_entered, 2)
                future.cancel()
                stream.cancel()

        def endless(first: Iterator[bytes]) -> Iterator[bytes]:
            yield from first
            done.wait(10)  # in a thread of grpcio's

        await in_thread(client)
        await service.wait_cancelled(2)
        done.set()
        assert sorted(service.cancelled) == [("client_reset", "explicit")] * 2
        assert server.statistics().running == 0


async def test_socket_transport_reads_writes_and_closes() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        ours, theirs = SocketTransport(client), SocketTransport(await listener.accept())
    large = bytes(20_000_000)  # more than the kernel takes at once
    received = bytearray()

    async def receive() -> None:
        while chunk := await theirs.receive_some(100_000):
            received.extend(chunk)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await ours.send_all(large)
            await ours.send_eof()
        assert received == large
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_under_reader, ours)
            await trio.testing.wait_all_tasks_blocked()
            await ours.aclose()
        for closed in (ours.receive_some(1), ours.send_all(b"x")):
            with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
                await closed
        await theirs.aclose()


async def close_under_reader(transport: SocketTransport) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await transport.receive_some(1)


async def test_connections_over_the_limit_are_closed_at_once() -> None:
    async with open_server(Service()) as (server, port):
        server.options = GrpcOptions(max_connections=1, flush_timeout=0.5)
        first = await trio.open_tcp_stream("127.0.0.1", port)
        assert await first.receive_some(10)
        second = await trio.open_tcp_stream("127.0.0.1", port)
        assert await second.receive_some(10) == b""
        await first.aclose()
        await second.aclose()


async def test_grpcio_client_sees_its_call_through_a_drain() -> None:
    service = Service()
    async with open_server(service) as (server, port):

        def client() -> None:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                future = channel.unary_unary("/test.Service/hold").future(b"x")
                trio.from_thread.run(drain)
                assert future.result(timeout=5) == b"released"

        async def drain() -> None:
            await service.wait_entered(1)
            server.start_drain()
            await trio.testing.wait_all_tasks_blocked()
            service.release.set()

        await in_thread(client)
