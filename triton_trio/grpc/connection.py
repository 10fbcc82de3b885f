"""The RPCs of one connection: who runs, who waits for a slot, who is refused.

The path of an RPC: HEADERS make a :class:`Stream` and its scope; a unary request then waits, without a task, until its
message is whole; then it gets a task in its connection's nursery, one of the ``max_concurrent_streams`` handler slots
(or waits for one, inside its scope), and runs.  The slot is free when the handler *and its clean-up* have ended, not
when the stream has been reset: that bounds what a client can make us do, however fast it resets.
"""

from __future__ import annotations

import logging
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import trio
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import encode_bin_value

from ..errors import TritonError
from ..scopes import Reason
from .http2 import ErrorCode, Http2Connection, Http2Stream
from .http2_stream import RawHeaders
from .metadata import encode_message
from .server_options import ConnectionStatistics
from .stream import Stream

if TYPE_CHECKING:
    from .server import GrpcServer

logger = logging.getLogger("triton_trio.grpc")

_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_UPLOAD_RATE = 65_536  # bytes/second: a large first message gets first_message_timeout and what it takes at this rate


def decode_timeout(value: bytes) -> float:
    """``grpc-timeout`` in seconds.

    Raises:
        ValueError: it is not 1 to 8 digits and a unit.
    """
    digits, unit = value[:-1], value[-1:]
    if not digits.isdigit() or len(digits) > 8 or unit not in _UNITS:
        raise ValueError(f"Invalid grpc-timeout header: {value.decode('ascii', 'replace')!r}")
    return int(digits) * _UNITS[unit]


class Peer:
    """The other end of a connection."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self._transport = transport

    def addr(self) -> tuple[str, int] | None:
        """Its address; None if the transport has none."""
        transport = self._transport
        if isinstance(transport, trio.SSLStream):
            transport = transport.transport_stream
        if isinstance(transport, trio.SocketStream):
            name = transport.socket.getpeername()
            return name[:2] if isinstance(name, tuple) else None
        return None

    def cert(self) -> dict[str, Any] | None:
        """Its TLS certificate, as ``ssl.SSLSocket.getpeercert`` gives it."""
        if isinstance(self._transport, trio.SSLStream):
            certificate: dict[str, Any] | None = self._transport.getpeercert()
            return certificate
        return None


class _Rejected(Http2Stream):
    """A stream that was answered at once; what the client still sends of it is dropped."""

    __slots__ = ()

    def on_data(self, data: bytes, end_stream: bool) -> None:
        self.acknowledge(len(data))


class Connection:
    """The RPCs of one HTTP/2 connection: who runs, who waits, who is refused."""

    def __init__(self, server: GrpcServer, transport: trio.abc.Stream) -> None:
        self.server = server
        self.options = server.options
        self.codec = server.codec
        self.peer = Peer(transport)
        address = self.peer.addr()
        self.label = f"{address[0]}:{address[1]}" if address else "memory"
        self.running: set[Stream[Any, Any]] = set()
        self.started = 0
        self.refused = 0
        self._waiting: dict[Stream[Any, Any], trio.lowlevel.Task | None] = {}  # for a slot; oldest first
        self._incomplete: dict[Stream[Any, Any], float] = {}  # unary, message not whole: until when
        self._ready: list[Stream[Any, Any]] = []  # whole since the beginning of this read
        now = trio.current_time()
        self._age_limit = now + self.options.max_connection_age
        self._age_grace = self._age_limit + self.options.max_connection_age_grace
        self.http2 = Http2Connection(
            transport,
            "server",
            options=self.options,
            label=self.label,
            accept=self._accept,
            after_read=self._start_ready,
            check_timers=self._check_timers,
        )

    def statistics(self) -> ConnectionStatistics:
        """Gauges are derived from the tables; counters since the connection began."""
        return ConnectionStatistics(
            peer=self.label,
            http2=self.http2.statistics(),
            started=self.started,
            running=len(self.running),
            queued=len(self._waiting),
            incomplete=len(self._incomplete),
            refused=self.refused,
        )

    def cancel_all(self, reason: Reason) -> None:
        """Cancel every RPC, those that wait included."""
        for stream in [*self.running, *self._waiting]:
            stream.request_cancel(reason)
        for stream in list(self._incomplete):
            self.stream_gone(stream)
            stream.finish_cancelled(reason)

    # -- admission -------------------------------------------------------------------------------------------------

    def _accept(self, http2: Http2Connection, stream_id: int, headers: RawHeaders, end: bool) -> Http2Stream | None:
        fields = dict(headers)
        method = self.server.methods.get(fields.get(b":path", b""))
        if (
            method is None
            or fields.get(b"content-type") not in self.server.content_types
            or fields.get(b"te") != b"trailers"
            or fields.get(b":method") != b"POST"
        ):
            return self._reject(http2, stream_id, fields, end)
        options = self.options
        if len(self.running) >= options.max_concurrent_streams and len(self._waiting) >= options.max_queued_streams:
            self.refused += 1
            return None
        stream: Stream[Any, Any] = Stream(self, http2, stream_id, method, headers)
        now = trio.current_time()
        due = now + options.first_message_timeout
        timeout = fields.get(b"grpc-timeout")
        if timeout is not None:
            try:
                stream.cancel_scope.deadline = now + decode_timeout(timeout)
            except ValueError as exc:
                return self._answer(http2, stream_id, end, b"200", Status.INTERNAL, str(exc))
            due = min(due, stream.cancel_scope.deadline)
        if b"grpc-encoding" in fields:
            stream.receive_encoding = fields[b"grpc-encoding"]
        if options.response_compression:
            wanted = options.response_compression.encode()
            if wanted in fields.get(b"grpc-accept-encoding", b"").replace(b" ", b"").split(b","):
                stream.send_encoding = wanted
        if method.client_streaming or end:
            stream._started = True
            self._ready.append(stream)
        else:
            self._incomplete[stream] = due
            http2.arm(due)
        return stream

    def _reject(self, http2: Http2Connection, stream_id: int, fields: dict[bytes, bytes], end: bool) -> Http2Stream:
        """The first thing that is wrong, as grpclib answers it."""
        answer = partial(self._answer, http2, stream_id, end)
        if fields.get(b":method") != b"POST":
            return answer(b"405")
        content_type = fields.get(b"content-type")
        if content_type is None:
            return answer(b"415", Status.UNKNOWN, "Missing content-type header")
        if content_type not in self.server.content_types:
            return answer(b"415", Status.UNKNOWN, "Unacceptable content-type header")
        if fields.get(b"te") != b"trailers":
            return answer(b"400", Status.UNKNOWN, 'Required "te: trailers" header is missing')
        return answer(b"200", Status.UNIMPLEMENTED, "Method not found: " + fields[b":path"].decode("ascii", "replace"))

    def _answer(
        self,
        http2: Http2Connection,
        stream_id: int,
        end: bool,
        http_status: bytes,
        status: Status | None = None,
        message: str = "",
    ) -> Http2Stream:
        headers = [(b":status", http_status)]
        if http_status == b"200":
            headers.append((b"content-type", self.server.content_type))
        if status is not None:
            headers.append((b"grpc-status", b"%d" % status.value))
            headers.append((b"grpc-message", encode_message(message)))
        stream = _Rejected(http2, stream_id)
        stream.remote_ended = end
        stream.send_headers(headers, end_stream=True)
        return stream

    def message_arrived(self, stream: Stream[Any, Any]) -> None:
        """A unary request is whole (or broken, or empty): its handler may start."""
        stream._started = True
        del self._incomplete[stream]
        self._ready.append(stream)

    def stream_gone(self, stream: Stream[Any, Any]) -> None:
        """``stream`` was reset or lost.  One that had no task yet has nothing more to undo."""
        self._incomplete.pop(stream, None)

    def _start_ready(self) -> None:
        """Start what has become whole in this read and was not reset in it."""
        if not self._ready:
            return
        options = self.options
        nursery = self.http2.nursery
        for stream in self._ready:
            if stream.closed:
                continue
            if len(self.running) < options.max_concurrent_streams:
                self.running.add(stream)
            elif len(self._waiting) < options.max_queued_streams:
                self._waiting[stream] = None
            else:
                self.refused += 1
                stream.reset(ErrorCode.REFUSED_STREAM)
                continue
            self.started += 1
            # Ends with the handler; cancelled by the RPC's own scope, or with the connection.
            nursery.start_soon(self._run, stream, name=f"rpc {stream.method.path} #{stream.stream_id}")
        self._ready.clear()

    # -- one RPC ---------------------------------------------------------------------------------------------------

    async def _run(self, stream: Stream[Any, Any]) -> None:
        """The task of one RPC."""
        try:
            with stream.cancel_scope as scope:
                try:
                    if stream not in self.running:
                        await self._wait_turn(stream)
                    await stream.method.func(stream)
                except trio.Cancelled as exc:
                    if stream.cancel_reason is None and scope.cancel_called:
                        stream.cancel_reason = Reason.of(exc)
                    raise
            # The handler may have swallowed a Cancelled, ours or one from outside: still no OK.
            await trio.lowlevel.checkpoint_if_cancelled()
            if stream.has_answered:
                stream.finish(Status.OK)
            elif scope.cancel_called:
                stream.finish_cancelled()
            else:
                logger.error("%s returned without sending its response message", stream.method.path)
                stream.finish(Status.UNKNOWN, "Internal Server Error")
        except trio.Cancelled:
            # Not by our scope, which would have caught it: the server, or whoever runs it, stops.
            stream.finish_cancelled(Reason.SERVER_DRAIN)
            raise
        except Exception as exc:  # noqa: BLE001  # handlers are not ours; _fail logs what it does not know
            self._fail(stream, exc)
        except BaseExceptionGroup as group:
            # The same from a handler with a nursery.  Its errors end here; what is not its to raise goes on.
            own, foreign = group.split(Exception)
            if own is not None:
                logger.error("%s failed", stream.method.path, exc_info=own)
            stream.finish_cancelled(Reason.SERVER_DRAIN)
            if foreign is not None:
                raise foreign from None
        finally:
            self._release(stream)

    def _fail(self, stream: Stream[Any, Any], error: Exception) -> None:
        """Answer for a handler that raised."""
        cause = _sole_cause(error)
        if not isinstance(cause, (GRPCError, TritonError)):
            logger.error("%s failed", stream.method.path, exc_info=cause)
        if stream.cancel_scope.cancel_called:
            stream.finish_cancelled()  # whatever a cancelled handler raises, its outcome is why it was cancelled
        elif isinstance(cause, GRPCError):
            stream.finish(cause.status, cause.message, cause.details)
        elif isinstance(cause, TritonError):
            stream.finish(cause.status, cause.message)
        else:
            stream.finish(Status.UNKNOWN, "Internal Server Error")

    async def _wait_turn(self, stream: Stream[Any, Any]) -> None:
        """Wait for a handler slot.  Whoever frees one hands it over, so nobody overtakes."""
        self._waiting[stream] = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiting[stream]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _release(self, stream: Stream[Any, Any]) -> None:
        self.server._finished += 1
        self._waiting.pop(stream, None)
        if stream not in self.running:
            return
        self.running.remove(stream)
        if self._waiting:
            heir = next(iter(self._waiting))
            task = self._waiting.pop(heir)
            self.running.add(heir)
            if task is not None:  # None: its task has not run yet, and will not wait
                trio.lowlevel.reschedule(task)

    def encode_details(self, status: Status, message: str | None, details: Any) -> RawHeaders:
        """``grpc-status-details-bin``: bytes as they are, anything else through the server's details codec."""
        if not isinstance(details, bytes):
            codec = self.server.status_details_codec
            if codec is None:
                return ()
            details = codec.encode(status, message, details)
        return ((b"grpc-status-details-bin", encode_bin_value(details)),)

    # -- time ------------------------------------------------------------------------------------------------------

    def _check_timers(self, now: float) -> float:
        next_due = inf
        for stream, due in list(self._incomplete.items()):
            deadline = stream.cancel_scope.deadline
            if deadline > due:
                due = min(deadline, due + stream.buffered / _UPLOAD_RATE)
            if now < due:
                next_due = min(next_due, due)
            else:
                self.stream_gone(stream)
                late = now >= deadline
                stream.finish(
                    Status.DEADLINE_EXCEEDED,
                    "Deadline Exceeded"
                    if late
                    else f"The request message did not arrive within {self.options.first_message_timeout:g} s",
                )
        if now >= self._age_limit:
            self.http2.start_drain()
            if now >= self._age_grace:
                self.cancel_all(Reason.SERVER_DRAIN)
                return next_due
            return min(next_due, self._age_grace)
        return min(next_due, self._age_limit)


def _sole_cause(error: Exception) -> Exception:
    """The one error in nested groups of one: a handler with a nursery raises the same GRPCError as one without."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
