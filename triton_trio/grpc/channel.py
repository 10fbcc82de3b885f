"""A gRPC client channel on Trio: calls are scopes, and leaving one cancels the server's side of it.

::

    async with open_channel("localhost", 8001) as channel:
        with trio.move_on_after(2):  # travels as grpc-timeout
            reply = await GrpcInferenceServiceStub(channel).model_infer(request)
"""

from __future__ import annotations

import logging
import platform
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import outcome
import trio
from grpclib.const import Cardinality, Status
from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline, encode_metadata

from .._version import __version__
from ..groups import WithoutGroups
from .call import Call, ReplyT, RequestT
from .channel_options import ChannelOptions as ChannelOptions
from .channel_options import ChannelStatistics as ChannelStatistics
from .codec import UpbCodec
from .connection import Peer
from .framing import ACCEPT_ENCODING
from .http2 import Http2Connection
from .http2_stream import RawHeaders

logger = logging.getLogger("triton_trio.grpc")

Connect = Callable[[], Awaitable[trio.abc.Stream]]

_USER_AGENT = f"grpc-python-triton-trio/{__version__} ({platform.system()}; {platform.python_version()})".lower()


class Channel:
    """Makes calls to one server, over one connection at a time.  Made by :func:`open_channel`.

    The connection is dialled when the first call needs it, and again when a call finds that it has ended or takes no
    new streams; calls on the old one go on.  Calls that wait for the same dial share its failure, and the next call
    dials again: how often to retry is the caller's to say.
    """

    def __init__(
        self,
        target: str,
        connect: Connect,
        nursery: trio.Nursery,
        *,
        scheme: str,
        codec: CodecBase,
        status_details_codec: StatusDetailsCodecBase | None,
        options: ChannelOptions,
    ) -> None:
        self.target = target
        self.codec = codec
        self.status_details_codec = status_details_codec
        self.options = options
        subtype = codec.__content_subtype__
        self.content_type = b"application/grpc" if subtype == "proto" else f"application/grpc+{subtype}".encode("ascii")
        headers = [
            (b":scheme", scheme.encode("ascii")),
            (b":authority", target.encode("ascii")),
            (b"te", b"trailers"),
            (b"content-type", self.content_type),
            (b"user-agent", _USER_AGENT.encode("ascii", "replace")),
            (b"grpc-accept-encoding", ACCEPT_ENCODING),
        ]
        if options.request_compression:
            headers.append((b"grpc-encoding", options.request_compression.encode("ascii")))
        self.headers: RawHeaders = tuple(headers)  #: the same for every call
        self._connect = connect
        self._nursery = nursery
        self._connections: dict[Http2Connection, Peer] = {}
        self._current: Http2Connection | None = None  # takes new calls
        self._candidate: Http2Connection | None = None  # waits for the server's SETTINGS
        self._dialling: trio.CancelScope | None = None  # from the first SYN to the server's SETTINGS
        self._calls: set[Call[Any, Any]] = set()
        self._waiting: dict[Call[Any, Any], trio.lowlevel.Task] = {}  # for a connection or a slot; oldest first
        self._started = 0
        self._dials = 0
        self._finished: Counter[Status] = Counter()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Channel to {self.target}: {'closed' if self._closed else f'{len(self._calls)} calls'}>"

    def request(
        self,
        name: str,
        cardinality: Cardinality,
        request_type: type[RequestT],
        reply_type: type[ReplyT],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Mapping[str, str | bytes] | Collection[tuple[str, str | bytes]] | None = None,
    ) -> Call[RequestT, ReplyT]:
        """A call, to be used as ``async with``.  Nothing is sent yet.

        Args:
            name: the method's path, ``/package.Service/Method``.
            timeout: seconds from now.  Like ``deadline``, it becomes ``GRPCError(DEADLINE_EXCEEDED)`` when it passes;
                of both, the earlier one counts.
            metadata: values of keys that end in ``-bin`` are bytes, all others printable ASCII.

        Raises:
            ValueError, TypeError: the name, or a key or value of ``metadata``, cannot be sent.
        """
        at = inf if timeout is None else trio.current_time() + timeout
        if deadline is not None:  # on whatever clock it is, Trio's or the system's
            at = min(at, trio.current_time() + deadline.time_remaining())
        encoded = [(key.encode("ascii"), value.encode("ascii")) for key, value in encode_metadata(metadata or ())]
        return Call(
            self, name.encode("ascii"), cardinality, request_type, reply_type, deadline=at, metadata=tuple(encoded)
        )

    def statistics(self) -> ChannelStatistics:
        """Gauges derived from the tables; counters since the channel was opened."""
        return ChannelStatistics(
            target=self.target,
            started=self._started,
            in_flight=len(self._calls),
            waiting=len(self._waiting),
            finished=dict(self._finished),
            dials=self._dials,
            connections=tuple(connection.statistics() for connection in self._connections),
        )

    def close(self) -> None:
        """End every call with CANCELLED, and the connections with GOAWAY.  Leaving :func:`open_channel` does it."""
        if self._closed:
            return
        self._closed = True
        why = f"The channel to {self.target} was closed"
        for call in list(self._calls):
            call.close(why)
        self._fail_waiting(Status.CANCELLED, why)
        if self._dialling is not None:
            self._dialling.cancel(reason=why)
        for connection in list(self._connections):
            connection.close(why=why)

    # -- for calls -------------------------------------------------------------------------------------------------

    def call_entered(self, call: Call[Any, Any]) -> None:
        """The block of ``call`` has been entered."""
        self._started += 1
        self._calls.add(call)

    def call_left(self, call: Call[Any, Any], status: Status) -> None:
        """And left, with its stream reset if it was open: there may be room for another."""
        self._calls.remove(call)
        self._finished[status] += 1
        if self._waiting:
            self._admit_waiting()

    def peer_of(self, connection: Http2Connection) -> Peer | None:
        """The server at the other end of ``connection``, while it lives."""
        return self._connections.get(connection)

    async def admit(self, call: Call[Any, Any]) -> None:
        """Have ``call`` open its stream, now or when there is a connection and a slot for it.

        Raises:
            GRPCError: UNAVAILABLE, no connection; CANCELLED, the channel was closed meanwhile.
            trio.ClosedResourceError: the channel had been closed before.

        **Cancellation:** the place in the line is given up, and no stream was opened.
        """
        if self._closed:
            raise trio.ClosedResourceError(f"The channel to {self.target} is closed")
        self._waiting[call] = trio.lowlevel.current_task()
        self._admit_waiting()
        if call in self._waiting:

            def leave(_: object) -> trio.lowlevel.Abort:
                del self._waiting[call]
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(leave)

    # -- admission -------------------------------------------------------------------------------------------------

    def _admit_waiting(self) -> None:
        """Open streams for calls that wait, oldest first, as long as the server permits; dial if there is no connection."""
        asking = trio.lowlevel.current_task()
        while self._waiting:
            connection = self._current
            if connection is None or not connection.can_open:
                self._current = None
                self._dial()
                return
            if len(connection.streams) >= connection.peer_max_concurrent_streams:
                return
            call = next(iter(self._waiting))
            task = self._waiting.pop(call)
            call.open_on(connection)
            if task is not asking:
                trio.lowlevel.reschedule(task)

    def _fail_waiting(self, status: Status, message: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for task in waiting.values():
            trio.lowlevel.reschedule(task, outcome.Error(GRPCError(status, message)))

    # -- connections -----------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        if self._dialling is None and not self._closed:
            self._dials += 1
            self._dialling = trio.CancelScope()
            # Ends with the connection; close() ends it.
            self._nursery.start_soon(self._keep_connection, self._dialling, name=f"connection {self.target}")

    async def _keep_connection(self, dialling: trio.CancelScope) -> None:
        """One connection, from its first SYN to its last FIN."""
        connection: Http2Connection | None = None
        # Shielded: whatever cancels the block of open_channel, the calls in it end first, and their resets go out.
        # Then close() ends this: a dial at once, a connection within its flush_timeout.
        with trio.CancelScope(shield=True):
            transport, why = await self._reach(dialling)
            if transport is not None:
                connection = self._candidate = Http2Connection(
                    transport, "client", options=self.options, label=self.target, after_read=self._after_read
                )
                self._connections[connection] = Peer(transport)
                if self._closed:
                    connection.close(why="the channel was closed")
                try:
                    await connection.run()
                except Exception:
                    # A bug of ours; its calls have been told that the connection is lost.
                    logger.exception("connection to %s failed", self.target)
                finally:
                    del self._connections[connection]
                why = connection.ended or why
                if not connection.handshaken:
                    why += " (is that an HTTP/2 server?)"
        if connection is self._candidate:
            self._candidate = self._dialling = None
            self._fail_waiting(Status.UNAVAILABLE, f"No connection to {self.target}: {why}")
        elif connection is self._current:
            self._current = None
            if self._waiting:  # for a slot on it; a new one will do
                self._dial()

    async def _reach(self, dialling: trio.CancelScope) -> tuple[trio.abc.Stream | None, str]:
        """A transport, or why there is none."""
        limit = self.options.connect_timeout
        dialling.deadline = trio.current_time() + limit
        with dialling:
            try:
                return await self._connect(), ""
            except (OSError, trio.BrokenResourceError) as exc:
                return None, _describe(exc)
        return None, f"not within {limit:g} s"

    def _after_read(self) -> None:
        connection = self._candidate
        if connection is not None and connection.handshaken and connection.can_open:
            self._current = connection
            self._candidate = self._dialling = None
        if self._waiting:
            self._admit_waiting()


@asynccontextmanager
async def open_channel(
    host: str,
    port: int,
    *,
    codec: CodecBase | None = None,
    ssl_context: ssl.SSLContext | None = None,
    connect: Connect | None = None,
    status_details_codec: StatusDetailsCodecBase | None = None,
    options: ChannelOptions | None = None,
) -> AsyncIterator[Channel]:
    """A channel to ``host:port``.  It dials when the first call needs a connection.

    Args:
        codec: encodes and decodes the messages of all calls; :class:`UpbCodec` if not given.
        ssl_context: use TLS, with ALPN ``h2``.
        connect: dials in place of TCP and TLS: returns a new connection's stream, or raises :exc:`OSError`.
        status_details_codec: for ``GRPCError.details``, which are bytes without it.
        options: every limit.

    **Cancellation:** calls inside the block unwind first, each resetting its stream.  When the block is left, calls
    that other tasks still make end with ``GRPCError(CANCELLED)``; what is queued is flushed within ``flush_timeout``.
    """
    dial = connect or _dialler(host, port, ssl_context)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with WithoutGroups(nurseries=1):
        async with trio.open_nursery() as nursery:
            channel = Channel(
                target,
                dial,
                nursery,
                scheme="http" if ssl_context is None else "https",
                codec=codec or UpbCodec(),
                status_details_codec=status_details_codec,
                options=options or ChannelOptions(),
            )
            try:
                yield channel
            finally:
                channel.close()


def _describe(error: Exception) -> str:
    """Trio wraps what went wrong: once for each address it has tried."""
    cause = error.__cause__ or error
    causes = cause.exceptions if isinstance(cause, ExceptionGroup) else [cause]
    return "; ".join(dict.fromkeys(str(each) or type(each).__name__ for each in causes))


def _dialler(host: str, port: int, ssl_context: ssl.SSLContext | None) -> Connect:
    async def dial_tcp() -> trio.abc.Stream:
        return await trio.open_tcp_stream(host, port)

    async def dial_tls() -> trio.abc.Stream:
        assert ssl_context is not None
        stream = trio.SSLStream(await trio.open_tcp_stream(host, port), ssl_context, server_hostname=host)
        try:
            await stream.do_handshake()
            if stream.selected_alpn_protocol() != "h2":
                raise OSError("the server does not speak HTTP/2: it did not choose h2 in ALPN")
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    if ssl_context is None:
        return dial_tcp
    ssl_context.set_alpn_protocols(["h2"])
    return dial_tls
