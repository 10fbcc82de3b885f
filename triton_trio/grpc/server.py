"""A gRPC server on Trio: any grpclib service, any Trio listener, one cancel scope per RPC.

::

    listeners = await open_grpc_listeners("127.0.0.1", 8001)
    server = GrpcServer([MyService()], codec=UpbCodec())
    await server.serve(listeners)
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from grpclib.const import Handler
from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase

from ..scopes import Reason
from .connection import Connection
from .server_options import ConnectionStatistics, GrpcStatistics
from .server_options import GrpcOptions as GrpcOptions
from .stream import Method

logger = logging.getLogger("triton_trio.grpc")


class Servable(Protocol):
    """A service as grpclib and its generators make it."""

    def __mapping__(self) -> Mapping[str, Handler]: ...


class GrpcServer:
    """Serves grpclib services on Trio listeners.

    Args:
        services: objects with grpclib's ``__mapping__()``.
        codec: encodes and decodes the messages of all of them.
        options: every limit.
        status_details_codec: for ``GRPCError.details`` that are not already bytes.
    """

    def __init__(
        self,
        services: Iterable[Servable],
        *,
        codec: CodecBase,
        options: GrpcOptions | None = None,
        status_details_codec: StatusDetailsCodecBase | None = None,
    ) -> None:
        self.options = options or GrpcOptions()
        self.codec = codec
        self.status_details_codec = status_details_codec
        self.content_type = b"application/grpc+" + codec.__content_subtype__.encode("ascii")
        self.content_types = {self.content_type}
        if codec.__content_subtype__ == "proto":
            self.content_types.add(b"application/grpc")
        self.methods: dict[bytes, Method] = {}
        for service in services:
            for path, handler in service.__mapping__().items():
                self.methods[path.encode("ascii")] = Method(path, handler, self.content_type)
        self._connections: set[Connection] = set()
        self._draining = False
        self._accept_scope = trio.CancelScope()
        self._finished = 0
        self._closed = _Totals()

    async def serve(
        self,
        listeners: Sequence[trio.abc.Listener[Any]],
        *,
        task_status: trio.TaskStatus[Sequence[trio.abc.Listener[Any]]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept connections and serve them until cancelled, or until :meth:`start_drain` and the last RPC's end.

        **Cancellation:** closes the listeners; every RPC is cancelled, answered UNAVAILABLE and flushed within
        ``flush_timeout``.  So a drain with a deadline is ``start_drain()`` and a deadline on the scope around this.
        """
        async with trio.open_nursery() as connections:
            task_status.started(listeners)
            with self._accept_scope:
                await trio.serve_listeners(self.serve_connection, list(listeners), handler_nursery=connections)

    async def serve_connection(self, transport: trio.abc.Stream) -> None:
        """Serve one client on ``transport`` (any Trio stream) until the connection ends.  Closes it.

        **Cancellation:** as :meth:`serve`, for this connection.
        """
        if self._draining or len(self._connections) >= self.options.max_connections:
            await trio.aclose_forcefully(transport)
            return
        connection = Connection(self, transport)
        trio.lowlevel.current_task().name = f"connection {connection.label}"
        self._connections.add(connection)
        try:
            await connection.http2.run()
        except Exception:
            # Handlers' errors end in their own RPC.  This is a bug of ours, and it costs one connection, not all.
            logger.exception("connection %s failed", connection.label)
        finally:
            self._connections.remove(connection)
            self._closed.add(connection.statistics())

    def start_drain(self) -> None:
        """Stop accepting, send GOAWAY on every connection, refuse new streams.  What runs goes on.

        :meth:`serve` returns when the last RPC has ended; the caller bounds that with a deadline around it.
        """
        self._draining = True
        self._accept_scope.cancel(reason=Reason.SERVER_DRAIN.value)
        for connection in list(self._connections):
            connection.http2.start_drain()

    def cancel_all(self, reason: Reason) -> None:
        """Cancel every RPC on every connection for ``reason``; the connections stay."""
        for connection in list(self._connections):
            connection.cancel_all(reason)

    def statistics(self) -> GrpcStatistics:
        """Gauges derived from the connections' tables, counters since the server was made."""
        totals = _Totals(**vars(self._closed))
        live = [connection.statistics() for connection in self._connections]
        for each in live:
            totals.add(each)
        return GrpcStatistics(
            connections=len(live),
            open_streams=sum(each.http2.open_streams for each in live),
            running=sum(each.running for each in live),
            queued=sum(each.queued for each in live),
            incomplete=sum(each.incomplete for each in live),
            finished=self._finished,
            **vars(totals),
        )

    def connection_statistics(self) -> list[ConnectionStatistics]:
        """One entry per open connection."""
        return [connection.statistics() for connection in self._connections]


@dataclass
class _Totals:
    started: int = 0
    refused: int = 0
    resets_received: int = 0
    resets_sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0

    def add(self, each: ConnectionStatistics) -> None:
        self.started += each.started
        self.refused += each.refused
        self.resets_received += each.http2.resets_received
        self.resets_sent += each.http2.resets_sent
        self.bytes_received += each.http2.bytes_received
        self.bytes_sent += each.http2.bytes_sent


async def open_grpc_listeners(
    host: str | None, port: int, *, ssl_context: ssl.SSLContext | None = None, backlog: int | None = None
) -> list[trio.abc.Listener[Any]]:
    """Listening sockets for :meth:`GrpcServer.serve`; with an ``ssl_context``, TLS with ALPN ``h2``.

    Args:
        host: address to bind; None for all interfaces.
        port: 0 lets the system choose.

    **Cancellation:** nothing stays open.
    """
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    if ssl_context is None:
        return list(listeners)
    ssl_context.set_alpn_protocols(["h2"])
    return [trio.SSLListener(listener, ssl_context) for listener in listeners]
