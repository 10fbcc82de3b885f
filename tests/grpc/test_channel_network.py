"""The thin second layer: real sockets, TLS, and nobody at home."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trustme
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from triton_trio.grpc.channel import open_channel
from triton_trio.grpc.server import GrpcServer, open_grpc_listeners

from .channel_world import ask, call
from .wire import BytesCodec, Service

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


def client_context(authority: trustme.CA | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if authority is not None:
        authority.configure_trust(context)
    return context


@asynccontextmanager
async def open_server(host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    server = GrpcServer([Service()], codec=BytesCodec())
    listeners = await open_grpc_listeners(host, 0, ssl_context=context)
    socket_listener: Any = listeners[0] if context is None else listeners[0].transport_listener  # type: ignore[attr-defined]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners)
            yield socket_listener.socket.getsockname()[1]
            server.start_drain()


async def failure(host: str, port: int, context: ssl.SSLContext | None = None) -> GRPCError:
    with pytest.raises(GRPCError) as failed:
        async with open_channel(host, port, codec=BytesCodec(), ssl_context=context) as channel:
            await ask(channel)
    assert failed.value.status is Status.UNAVAILABLE
    return failed.value


async def test_tcp() -> None:
    async with open_server() as port, open_channel("127.0.0.1", port, codec=BytesCodec()) as channel:
        async with call(channel) as rpc:
            await rpc.send_message(b"hi", end=True)
            assert await rpc.recv_message() == b"hi"
            peer = rpc.peer
            assert peer is not None
            assert peer.addr() == ("127.0.0.1", port)


async def test_ipv6() -> None:
    try:
        probe = await trio.open_tcp_listeners(0, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    await probe[0].aclose()
    async with open_server("::1") as port, open_channel("::1", port, codec=BytesCodec()) as channel:
        assert channel.target == f"[::1]:{port}"
        assert await ask(channel) == b"hi"


async def test_tls_with_alpn(authority: trustme.CA) -> None:
    async with open_server(context=server_context(authority)) as port:
        context = client_context(authority)
        async with open_channel("localhost", port, codec=BytesCodec(), ssl_context=context) as channel:
            async with call(channel) as rpc:
                await rpc.send_message(bytes(2 << 20), end=True)
                assert await rpc.recv_message() == bytes(2 << 20)
                peer = rpc.peer
                assert peer is not None
                assert ("DNS", "localhost") in (peer.cert() or {})["subjectAltName"]


async def test_nobody_listens() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    error = await failure("127.0.0.1", port)
    assert error.message is not None
    assert error.message.startswith(f"No connection to 127.0.0.1:{port}: [Errno ")
    assert error.message.endswith("Connection refused")


async def test_a_certificate_that_nobody_we_trust_has_signed(authority: trustme.CA) -> None:
    async with open_server(context=server_context(authority)) as port:
        error = await failure("localhost", port, client_context(None))
        assert f"No connection to localhost:{port}: " in (error.message or "")
        assert "certificate verify failed" in (error.message or "")


async def test_tls_without_http2(authority: trustme.CA) -> None:
    context = server_context(authority)  # no ALPN
    (listener,) = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")

    async def handshake(stream: trio.SSLStream[trio.SocketStream]) -> None:
        async with stream:
            await stream.do_handshake()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handshake, [listener])
        port = listener.transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
        error = await failure("localhost", port, client_context(authority))
        assert error.message is not None
        assert error.message.endswith("the server does not speak HTTP/2: it did not choose h2 in ALPN")
        nursery.cancel_scope.cancel()


async def test_a_plain_client_at_a_tls_port(authority: trustme.CA) -> None:
    async with open_server(context=server_context(authority)) as port:
        error = await failure("localhost", port)
        assert error.message is not None
        assert error.message.startswith(f"No connection to localhost:{port}: ")
        assert error.message.endswith("(is that an HTTP/2 server?)")
