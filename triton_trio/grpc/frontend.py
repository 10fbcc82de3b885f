"""The gRPC frontend of an :class:`~triton_trio.InferenceServer`: its services on a :class:`GrpcServer`."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any

import trio

from ..server import InferenceServer
from .codec import UpbCodec
from .health import Health
from .server import GrpcOptions, GrpcServer, Servable, open_grpc_listeners
from .service import GrpcInferenceService


async def serve_grpc(
    server: InferenceServer,
    *,
    host: str | None = "0.0.0.0",
    port: int = 8001,
    options: GrpcOptions | None = None,
    tls: ssl.SSLContext | None = None,
    listeners: Sequence[trio.abc.Listener[Any]] | None = None,
) -> list[str]:
    """Start to serve ``server`` over gRPC, as one of its frontends; returns the addresses, as ``host:port``.

    Args:
      host: to listen on; None for all interfaces.
      port: 0 lets the system choose one.
      tls: for TLS; ALPN is set here.
      listeners: instead of host, port and tls; closed with the frontend.

    Raises:
      OSError: nobody can listen there.

    **Cancellation:** until it returns, nothing stays open.  Then the frontend belongs to ``server``: it ends with it,
    or by :meth:`InferenceServer.drain`.
    """
    if listeners is None:
        listeners = await open_grpc_listeners(host, port, ssl_context=tls)
    services: list[Servable] = [GrpcInferenceService(server), Health(server)]
    codec = UpbCodec()
    for service in services:
        for handler in service.__mapping__().values():
            codec.prepare(handler.request_type, handler.reply_type)  # now, not under the first request's eyes
    frontend = GrpcServer(services, codec=codec, options=options)
    # Before it is started: a short-lived server may have closed its sockets when start_frontend returns.
    addresses = [_address(listener) for listener in listeners]
    await server.start_frontend(frontend, frontend.serve, listeners, name="grpc frontend")
    return addresses


def _address(listener: trio.abc.Listener[Any]) -> str:
    if isinstance(listener, trio.SSLListener):
        listener = listener.transport_listener
    if not isinstance(listener, trio.SocketListener):
        return repr(listener)
    host, port = listener.socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
