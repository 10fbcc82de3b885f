"""HTTP/2 on a Trio stream, for both roles.  The one file that touches ngh2; it knows nothing of gRPC.

:class:`Http2Connection` drives one transport with two tasks.  The *reader* never stops reading while the connection
lives: back-pressure is flow control, not silence, so a reset or a FIN is seen at once whatever the streams are doing.
Everything it has read is parsed and delivered, through synchronous methods of :class:`Http2Stream`, before anybody else
runs.  The *writer* sleeps until something is queued and is woken at most once per scheduler tick, so whatever all
streams queued in that tick leaves in one ``send_all``.

Rules that the rest of the package relies on:

* Received bytes are acknowledged when their owner consumes them.  What a stream still holds when it ends is
  acknowledged then, so an abandoned upload never shrinks the window its neighbours share.
* After a stream has closed, every send on it is a silent no-op: nothing follows the terminal frame.
* Decisions are synchronous.  ``on_*`` methods must not block and must not raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import ngh2
import trio
from ngh2 import ErrorCode as ErrorCode
from ngh2 import Setting

logger = logging.getLogger("triton_trio.http2")

Headers = Iterable[tuple[bytes, bytes]]

_SMALL_READ = 65_536  # below malloc's mmap threshold: an idle connection costs no page faults
_LARGE_READ = 1 << 20
_WRITE_SLICE = 1 << 20  # the write-stall watchdog wants to see progress within one large flush
_PREFACE_LENGTH = 24
_DATA_FRAME = 0
_PING_PAYLOAD = b"tritrio\0"


@dataclass(frozen=True, kw_only=True)
class Http2Options:
    """Limits of one connection.  Sizes are bytes, times are seconds; ``inf`` turns a timer off."""

    initial_window_size: int = 8 << 20  #: per stream; a 4 MB tensor needs no round trip
    connection_window_size: int = 64 << 20  #: what all streams together may hold unread
    max_frame_size: int = 1 << 20
    advertised_streams: int = 2_000  #: MAX_CONCURRENT_STREAMS; a peer that exceeds it loses its connection
    max_header_list_size: int = 16_384
    max_header_count: int = 128
    outbound_limit: int = 256 << 10  #: per stream: a sender with more than this queued waits
    stall_limit: float = 30.0  #: a peer that takes nothing for this long is not reading
    handshake_timeout: float = 10.0  #: for the preface and the first SETTINGS
    keepalive_time: float = 60.0  #: PING after this much silence
    keepalive_timeout: float = 20.0  #: without an ACK in this time the connection is lost
    keepalive_without_streams: bool = False
    flush_timeout: float = 2.0  #: for the last bytes (GOAWAY, trailers) of a connection that ends
    max_backlog: int = 20_000  #: frames other than DATA that may wait for a peer that does not read
    max_empty_frames: int = 10_000  #: zero-length DATA without END_STREAM, per connection


@dataclass(frozen=True)
class Http2Statistics:
    """One connection, at one moment."""

    open_streams: int
    streams_total: int
    resets_received: int
    resets_sent: int
    bytes_received: int
    bytes_sent: int
    queued_bytes: int  #: body bytes waiting for the peer's flow control
    unacknowledged_bytes: int  #: received, not yet consumed by their streams
    local_window: int  #: what the peer may still send on this connection


class Http2Stream:
    """One stream.  Subclass it and override the ``on_*`` methods; the connection calls them, synchronously.

    ``on_reset`` and ``on_lost`` are the last call a stream gets; ``closed`` is already true in them.
    """

    __slots__ = ("closed", "connection", "local_ended", "remote_ended", "stream_id", "unacknowledged")

    def __init__(self, connection: Http2Connection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.closed = False  #: nothing can be sent or received any more
        self.local_ended = False  #: END_STREAM is sent or queued
        self.remote_ended = False  #: END_STREAM has been received: half-closed, which is never a cancel
        self.unacknowledged = 0  #: bytes delivered to on_data and not yet given back to the window

    # -- called by the connection ----------------------------------------------------------------------------------

    def on_headers(self, headers: tuple[tuple[bytes, bytes], ...], end_stream: bool) -> None:
        """Client: the response headers."""

    def on_data(self, data: bytes, end_stream: bool) -> None:
        """Body bytes; whoever consumes them calls :meth:`acknowledge`."""

    def on_trailers(self, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        """Trailers; the peer sends nothing more."""

    def on_reset(self, error_code: int, by_peer: bool) -> None:
        """RST_STREAM: from the peer, or (``by_peer=False``) from our engine because the peer broke this stream."""

    def on_lost(self, why: str) -> None:
        """The connection has ended under the stream."""

    def on_stalled(self) -> None:
        """The peer did not read for the stall limit; the stream has been reset with CANCEL."""

    # -- called by the owner ---------------------------------------------------------------------------------------

    def send_headers(self, headers: Headers, *, end_stream: bool = False) -> None:
        """Server: queue the response headers."""
        if self.closed or self.local_ended:
            return
        connection = self.connection
        connection.engine.send_response(self.stream_id, headers, end_stream=end_stream)
        if end_stream:
            connection._ended_locally(self)
        connection._backlog += 1
        connection._wake_writer()

    def send_data(self, data: bytes, *, end_stream: bool = False) -> None:
        """Queue body bytes; large objects are kept by reference.  Use :meth:`wait_writable` to bound the queue."""
        if self.closed or self.local_ended:
            return
        connection = self.connection
        connection.engine.send_data(self.stream_id, data, end_stream=end_stream)
        if end_stream:
            connection._ended_locally(self)
        connection._wake_writer()

    def send_trailers(self, headers: Headers) -> None:
        """Queue trailers behind all queued body bytes.  They end the stream."""
        if self.closed or self.local_ended:
            return
        connection = self.connection
        connection.engine.send_trailers(self.stream_id, headers)
        connection._ended_locally(self)
        connection._wake_writer()

    def reset(self, error_code: int = ErrorCode.CANCEL) -> None:
        """Send RST_STREAM, drop what is queued and give the unread bytes back.  No callback follows."""
        if not self.closed:
            self.connection._reset(self, error_code)

    def acknowledge(self, amount: int) -> None:
        """Give ``amount`` received bytes back to the stream's and the connection's window."""
        if amount and not self.closed:
            self.unacknowledged -= amount
            self.connection._acknowledge(self.stream_id, amount)

    @property
    def queued(self) -> int:
        """Body bytes that flow control or the transport has not taken yet."""
        return 0 if self.connection.ended else self.connection.engine.queued_body_size(self.stream_id)

    async def wait_writable(self) -> None:
        """Wait until no more than ``outbound_limit`` bytes are queued, or the stream has closed.

        Checkpoints only if it must wait.  A peer that takes nothing for ``stall_limit`` is a slow consumer: the stream
        is reset, :meth:`on_stalled` is called, and this returns.

        **Cancellation:** leaves the queued bytes queued; trailers may still be sent behind them.
        """
        connection = self.connection
        options = connection.options
        before = self.queued
        while not self.closed and before > options.outbound_limit:
            with trio.move_on_after(options.stall_limit) as patience:
                await connection._wait_drained(self)
            now = self.queued
            if patience.cancelled_caught and not self.closed and now >= before:
                self.reset(ErrorCode.CANCEL)
                self.on_stalled()
            before = now


Accept = Callable[["Http2Connection", int, tuple[tuple[bytes, bytes], ...], bool], Http2Stream | None]


class Http2Connection:
    """One HTTP/2 connection.  :meth:`run` drives it; everything else is synchronous and may be called at any time.

    Args:
        transport: any Trio stream (socket, TLS, memory).  Owned: closed when :meth:`run` returns.
        role: "server" or "client".
        accept: server only: called for each request with its headers; returns its stream, or None to refuse it with
            REFUSED_STREAM.
        after_read: called when all events of one read have been delivered: the place to start tasks, so that a
            request that was reset in the same segment never starts.
        check_timers: called by the watchdog with the current time; returns when it wants to be called next.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        role: Literal["server", "client"],
        *,
        options: Http2Options,
        label: str = "?",
        accept: Accept | None = None,
        after_read: Callable[[], None] | None = None,
        check_timers: Callable[[float], float] | None = None,
    ) -> None:
        self.transport = transport
        self.options = options
        self.label = label  #: peer address; names the tasks
        self.streams: dict[int, Http2Stream] = {}
        self.ended: str | None = None  #: why the connection ended; None while it lives
        self.draining = False  #: no new streams (we drain, or the peer sent GOAWAY); ends when the last has closed
        self.peer_max_concurrent_streams = 100  #: the engine's assumption until SETTINGS arrive
        self._server = role == "server"
        self._accept = accept
        self._after_read = after_read
        self._check_timers = check_timers
        self._parked_writer: trio.lowlevel.Task | None = None
        self._blocked: dict[Http2Stream, trio.lowlevel.Task] = {}
        self._ended_early: list[Http2Stream] = []
        self._undelivered: dict[Http2Stream, tuple[float, int]] = {}
        self._pending_resets: dict[int, int] = {}
        self._backlog = 0
        self._empty_frames = 0
        self._goaway = b""
        # Where the peer's bytes are within a frame; see _follow_frames.
        self._frame_left = _PREFACE_LENGTH if self._server else 0
        self._frame_head = b""
        self._torn_stream = 0
        self._read_scope = trio.CancelScope()
        self._write_scope = trio.CancelScope(shield=True)
        self._watch_scope = trio.CancelScope()
        self._alarm = trio.CancelScope()
        self._reader_stopped = trio.Event()
        now = trio.current_time()
        self._last_read = now
        self._ping_sent: float | None = None
        self._write_began: float | None = None
        self._handshake_deadline = now + options.handshake_timeout
        self._streams_total = 0
        self._resets_received = 0
        self._resets_sent = 0
        self._bytes_received = 0
        self._bytes_sent = 0
        self.nursery: trio.Nursery  #: for the tasks of the streams; exists while run() does
        self.engine = ngh2.Connection(
            ngh2.Role.SERVER if self._server else ngh2.Role.CLIENT,
            ngh2.Configuration(
                auto_window_update=False,
                max_inbound_header_list_size=options.max_header_list_size,
                max_inbound_header_count=options.max_header_count,
                # An honest client may cancel thousands of its own calls a second.  What costs us is bounded
                # elsewhere: by the number of handlers that run, clean-up included.
                stream_reset_rate_limit=(1 << 40, 1 << 40),
            ),
        )
        settings = {
            Setting.INITIAL_WINDOW_SIZE: options.initial_window_size,
            Setting.MAX_FRAME_SIZE: options.max_frame_size,
            Setting.MAX_HEADER_LIST_SIZE: options.max_header_list_size,
        }
        if self._server:
            settings[Setting.MAX_CONCURRENT_STREAMS] = options.advertised_streams
        else:
            settings[Setting.ENABLE_PUSH] = 0
        self.engine.initiate_connection(settings)
        self.engine.set_local_window_size(options.connection_window_size)

    def __repr__(self) -> str:
        return f"<Http2Connection {self.label}: {self.ended or f'{len(self.streams)} streams'}>"

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(
        self,
        *,
        task_status: trio.TaskStatus[trio.Nursery] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Drive the connection until it has ended and every task in its nursery is gone.

        ``task_status`` receives the nursery in which the owner may start its streams' tasks.

        **Cancellation:** the nursery's tasks are cancelled first and may still queue their last frames; then GOAWAY
        and everything queued is flushed, shielded, for at most ``flush_timeout``; then the transport is closed.
        """
        try:
            async with trio.open_nursery() as io:
                # Ends after its last flush, which _shut_down bounds; shielded, so cancelled by nothing else.
                io.start_soon(self._write_loop, name=f"writer {self.label}")
                try:
                    async with trio.open_nursery() as nursery:
                        self.nursery = nursery
                        # Both end with the connection: _shut_down cancels their scopes.
                        nursery.start_soon(self._read_loop, name=f"reader {self.label}")
                        nursery.start_soon(self._watch, name=f"watchdog {self.label}")
                        task_status.started(nursery)
                finally:
                    self._shut_down("the connection was closed here", goaway=ErrorCode.NO_ERROR)
        finally:
            await trio.aclose_forcefully(self.transport)

    def close(self, error_code: int = ErrorCode.NO_ERROR, why: str = "the connection was closed here") -> None:
        """End the connection now: its streams are lost, GOAWAY and what is queued is flushed."""
        self._shut_down(why, goaway=error_code)

    def start_drain(self) -> None:
        """Tell the peer to open no more streams; the connection ends when the last open one has closed."""
        if self.draining or self.ended:
            return
        self.draining = True
        if self._server:
            # The notice names no last stream: what crosses it on the wire is refused one by one, and is safe to retry.
            self.engine.send_shutdown_notice()
            self._wake_writer()
        self._end_if_drained()

    def open_stream(
        self, factory: Callable[[Http2Connection, int], Http2Stream], headers: Headers, *, end_stream: bool = False
    ) -> Http2Stream:
        """Client: queue a request and register ``factory(connection, stream_id)`` for its events.

        Raises:
            trio.ClosedResourceError: the connection has ended or takes no new streams (see :attr:`can_open`).
        """
        if not self.can_open:
            raise trio.ClosedResourceError(f"connection {self.label} takes no new streams: {self.ended or 'draining'}")
        stream_id = self.engine.send_request(headers, end_stream=end_stream)
        stream = self.streams[stream_id] = factory(self, stream_id)
        stream.local_ended = end_stream
        self._streams_total += 1
        self.arm(self._last_read + self.options.keepalive_time)
        self._wake_writer()
        return stream

    @property
    def can_open(self) -> bool:
        """Whether a client may open another stream."""
        return self.ended is None and not self.draining and self.engine.can_send_request

    def statistics(self) -> Http2Statistics:
        """Counters since the connection began, and gauges derived from its tables."""
        return Http2Statistics(
            open_streams=len(self.streams),
            streams_total=self._streams_total,
            resets_received=self._resets_received,
            resets_sent=self._resets_sent,
            bytes_received=self._bytes_received,
            bytes_sent=self._bytes_sent,
            queued_bytes=0 if self.ended else self.engine.queued_body_size(),
            unacknowledged_bytes=sum(stream.unacknowledged for stream in self.streams.values()),
            local_window=0 if self.ended else self.engine.local_window_size,
        )

    def _shut_down(self, why: str, *, goaway: int | None = None, flush: bool = True) -> None:
        """The one way a connection ends, whoever decides it; the second caller changes nothing.

        Streams that are still open are lost.  With ``flush``, the writer sends what is queued, then ``goaway``; without,
        the transport is gone and there is nobody to tell.
        """
        if self.ended is not None:
            return
        self.ended = why
        if goaway is not None:
            try:
                # Not terminate_connection: it would drop the queued bodies, and trailers stand behind them.
                self.engine.send_goaway(goaway, debug_data=why.encode() if goaway else b"")
            except ngh2.NGH2Error:
                # The engine is unusable after what it has just read.  A GOAWAY is 17 bytes, so we write it ourselves.
                self._goaway = b"\0\0\x08\x07\0\0\0\0\0" + bytes(4) + goaway.to_bytes(4, "big")
        if flush:
            self._write_scope.deadline = trio.current_time() + self.options.flush_timeout
        else:
            self._write_scope.cancel(reason=why)
        lost = list(self.streams.values())
        self.streams.clear()
        self._undelivered.clear()
        self._ended_early.clear()
        for stream in lost:
            stream.closed = True
            stream.unacknowledged = 0
            stream.on_lost(why)
        for task in self._blocked.values():
            trio.lowlevel.reschedule(task)
        self._blocked.clear()
        self._read_scope.cancel(reason=why)
        self._watch_scope.cancel(reason=why)
        self._wake_writer()

    def _end_if_drained(self) -> None:
        if self.draining and not self.streams and self.ended is None:
            self._shut_down("drained", goaway=ErrorCode.NO_ERROR)

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        receive = self.transport.receive_some
        size = _SMALL_READ
        try:
            with self._read_scope:
                while self.ended is None:
                    data = await receive(size)
                    if not data:
                        self._shut_down("the peer closed the connection", flush=False)
                        return
                    # A full read means that more is waiting: a tensor should arrive in few large reads.
                    size = _LARGE_READ if len(data) == size else _SMALL_READ
                    self._receive(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._shut_down(f"the connection broke: {exc}", flush=False)
        finally:
            self._reader_stopped.set()

    def _receive(self, data: bytes | bytearray) -> None:
        self._bytes_received += len(data)
        self._last_read = trio.current_time()
        self._follow_frames(data)
        engine = self.engine
        try:
            engine.receive_data(data)
        except ngh2.DenialOfServiceError as exc:
            self._shut_down(f"a limit was exceeded: {exc}", goaway=ErrorCode.ENHANCE_YOUR_CALM)
            return
        except ngh2.NGH2Error as exc:
            self._shut_down(f"not HTTP/2: {exc}", goaway=ErrorCode.PROTOCOL_ERROR)
            return
        self._dispatch()
        if self._after_read is not None:
            self._after_read()
        if self._backlog > self.options.max_backlog:
            self._shut_down("the peer does not read what it asks for", flush=False)
        if self.ended is None and (engine.want_write or self._pending_resets):
            self._wake_writer()

    def _follow_frames(self, data: bytes | bytearray) -> None:
        """Know on which stream a DATA frame is half read.

        The engine drops the bytes of a half-read frame when its stream is reset, without giving them back to the
        connection's window.  So a reset waits for the end of the frame (see _take_output), and for that we must know.
        """
        size = len(data)
        position = self._frame_left
        if position >= size:
            self._frame_left = position - size
            if position == size:
                self._torn_stream = 0
            return
        if self._frame_head:
            data = self._frame_head + data
            size = len(data)
            position = 0
            self._frame_head = b""
        start = -1
        while position + 9 <= size:
            start = position
            position += 9 + (data[position] << 16 | data[position + 1] << 8 | data[position + 2])
        self._torn_stream = 0
        if position > size:
            self._frame_left = position - size
            if data[start + 3] == _DATA_FRAME:
                self._torn_stream = int.from_bytes(data[start + 5 : start + 9], "big")
        else:
            self._frame_left = 0
            self._frame_head = bytes(data[position:])

    def _dispatch(self) -> None:
        """Deliver the engine's events, in order."""
        for event in self.engine.events():
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)

    def _request_received(self, event: ngh2.RequestReceived) -> None:
        stream_id = event.stream_id
        if self.draining or self.ended is not None or self._accept is None:
            stream = None
        else:
            stream = self._accept(self, stream_id, event.headers, event.end_stream)
        if stream is None:
            self._queue_reset(stream_id, ErrorCode.REFUSED_STREAM)
            return
        self._streams_total += 1
        stream.remote_ended = event.end_stream
        self.streams[stream_id] = stream
        self.arm(self._last_read + self.options.keepalive_time)

    def _data_received(self, event: ngh2.DataReceived) -> None:
        stream_id = event.stream_id
        data = event.data
        stream = self.streams.get(stream_id)
        if stream is None:  # we have reset it, and the RST_STREAM is not on the wire yet
            self._acknowledge(stream_id, len(data))
            return
        stream.unacknowledged += len(data)
        if event.end_stream:
            stream.remote_ended = True
        elif not data:
            self._empty_frames += 1
            if self._empty_frames > self.options.max_empty_frames:
                self._shut_down("too many empty DATA frames", goaway=ErrorCode.ENHANCE_YOUR_CALM)
                return
        stream.on_data(data, event.end_stream)

    def _response_received(self, event: ngh2.ResponseReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.remote_ended = event.end_stream
            stream.on_headers(event.headers, event.end_stream)

    def _trailers_received(self, event: ngh2.TrailersReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.remote_ended = True
            stream.on_trailers(event.headers)

    def _reset_received(self, event: ngh2.StreamReset) -> None:
        stream = self.streams.get(event.stream_id)
        self._resets_received += 1
        if stream is not None:
            self._forget(stream)
            stream.on_reset(event.error_code, True)

    def _stream_closed(self, event: ngh2.StreamClosed) -> None:
        self._pending_resets.pop(event.stream_id, None)
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        self._forget(stream)
        if event.error_code or event.local_error or not (stream.local_ended and stream.remote_ended):
            # Refused by a GOAWAY (client), or reset by our engine because the peer broke a rule on this stream.
            stream.on_reset(event.error_code, False)

    def _settings_received(self, event: ngh2.SettingsReceived) -> None:
        self._handshake_deadline = inf
        self.peer_max_concurrent_streams = event.settings.get(
            Setting.MAX_CONCURRENT_STREAMS, self.peer_max_concurrent_streams
        )

    def _ping_acknowledged(self, event: ngh2.PingAcknowledged) -> None:
        if event.opaque_data == _PING_PAYLOAD:
            self._ping_sent = None

    def _goaway_received(self, event: ngh2.GoAwayReceived) -> None:
        if event.error_code != ErrorCode.NO_ERROR:
            self._shut_down(f"the peer sent GOAWAY: error {event.error_code}", goaway=ErrorCode.NO_ERROR)
        elif not self._server:
            self.draining = True
            self._end_if_drained()

    def _connection_closed(self, event: ngh2.ConnectionClosed) -> None:
        # The bytes that data_to_send returned with this event end in the engine's own GOAWAY.
        self._shut_down(f"HTTP/2 ended with error {event.error_code}")

    # -- streams ---------------------------------------------------------------------------------------------------

    def _forget(self, stream: Http2Stream) -> None:
        """``stream`` has closed: its unread bytes go back to the window, its waiting sender wakes up."""
        stream.closed = True
        del self.streams[stream.stream_id]
        self._undelivered.pop(stream, None)
        if stream.unacknowledged:
            self._acknowledge(stream.stream_id, stream.unacknowledged)
            stream.unacknowledged = 0
        task = self._blocked.pop(stream, None)
        if task is not None:
            trio.lowlevel.reschedule(task)
        if self.draining:
            self._end_if_drained()

    def _reset(self, stream: Http2Stream, error_code: int) -> None:
        # Before _forget: a drained connection flushes this frame, too.
        self._queue_reset(stream.stream_id, error_code)
        self._forget(stream)

    def _queue_reset(self, stream_id: int, error_code: int) -> None:
        self._pending_resets[stream_id] = error_code
        self._resets_sent += 1
        self._backlog += 1
        self._wake_writer()

    def _ended_locally(self, stream: Http2Stream) -> None:
        """Trailers are queued.  From here on the watchdog, not a task, sees to it that the peer takes them."""
        stream.local_ended = True
        now = trio.current_time()
        self._undelivered[stream] = (now, stream.queued)
        self.arm(now + self.options.stall_limit)
        if self._server and not stream.remote_ended:
            self._ended_early.append(stream)

    def _acknowledge(self, stream_id: int, amount: int) -> None:
        if amount and self.ended is None:
            self.engine.acknowledge_received_data(amount, stream_id)
            if self._parked_writer is not None and self.engine.want_write:  # a WINDOW_UPDATE has become due
                self._wake_writer()

    async def _wait_drained(self, stream: Http2Stream) -> None:
        if stream in self._blocked:
            raise trio.BusyResourceError("another task is already sending on this stream")
        self._blocked[stream] = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._blocked[stream]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _wake_writer(self) -> None:
        task = self._parked_writer
        if task is not None:
            self._parked_writer = None
            trio.lowlevel.reschedule(task)

    async def _write_loop(self) -> None:
        transport = self.transport
        with self._write_scope:
            try:
                while True:
                    data = self._take_output()
                    if data:
                        await self._write(data)
                    elif self.ended is not None:
                        break
                    else:
                        await self._park_writer()
                # Closing with unread bytes in the socket makes the kernel send RST, which can destroy the last
                # answers on their way.  So: our FIN, then the peer's, within the flush timeout.
                if isinstance(transport, trio.abc.HalfCloseableStream):
                    await transport.send_eof()
                    await self._reader_stopped.wait()
                    while await transport.receive_some(_SMALL_READ):
                        pass
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                self._shut_down(f"the connection broke: {exc}", flush=False)
        # With the last flush the transport goes, even if a handler below is still in its clean-up.
        await trio.aclose_forcefully(transport)

    async def _write(self, data: bytes) -> None:
        self._bytes_sent += len(data)
        now = self._write_began = trio.current_time()
        self.arm(now + self.options.stall_limit)
        if len(data) <= _WRITE_SLICE:
            await self.transport.send_all(data)
        else:
            view = memoryview(data)
            for start in range(0, len(data), _WRITE_SLICE):
                await self.transport.send_all(view[start : start + _WRITE_SLICE])
                self._write_began = trio.current_time()
        self._write_began = None

    async def _park_writer(self) -> None:
        self._parked_writer = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked_writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _take_output(self) -> bytes:
        """Everything that may go on the wire now."""
        engine = self.engine
        try:
            if self._pending_resets and self.ended is None:
                self._submit_resets()
            data = engine.data_to_send()
            self._dispatch()
            if self._ended_early:
                data += self._release_clients()
        except ngh2.NGH2Error as exc:
            self._shut_down(f"HTTP/2 engine: {exc}", goaway=ErrorCode.INTERNAL_ERROR)
            data = b""
        if self.ended is not None and self._goaway:
            data += self._goaway
            self._goaway = b""
        self._backlog = 0
        if self._blocked:
            for stream in [s for s in self._blocked if s.queued <= self.options.outbound_limit]:
                trio.lowlevel.reschedule(self._blocked.pop(stream))
        return data

    def _submit_resets(self) -> None:
        torn = self._torn_stream
        for stream_id in list(self._pending_resets):
            if stream_id != torn:
                self.engine.reset_stream(stream_id, self._pending_resets.pop(stream_id))

    def _release_clients(self) -> bytes:
        """Our trailers are out, but the client is still sending: RST_STREAM(NO_ERROR) tells it to stop.

        Only now: an RST_STREAM that overtakes the trailers costs the client its status.
        """
        waiting, self._ended_early = self._ended_early, []
        for stream in waiting:
            if stream.closed or stream.remote_ended:
                continue
            if stream.queued:
                self._ended_early.append(stream)
            else:
                self._reset(stream, ErrorCode.NO_ERROR)
        if not self._pending_resets:
            return b""
        self._submit_resets()
        data = self.engine.data_to_send()
        self._dispatch()
        return data

    # -- time ------------------------------------------------------------------------------------------------------

    def arm(self, deadline: float) -> None:
        """Have the watchdog look at its timers no later than ``deadline``."""
        if deadline < self._alarm.deadline:
            self._alarm.deadline = deadline

    async def _watch(self) -> None:
        """One task for every timer of the connection, asleep until the earliest.  It needs no traffic to fire."""
        with self._watch_scope:
            while True:
                self._alarm = trio.CancelScope(deadline=self._check(trio.current_time()))
                with self._alarm:
                    await trio.sleep_forever()

    def _check(self, now: float) -> float:
        """Act on the timers that have run out; return when the next one does."""
        options = self.options
        due = [self._handshake_deadline]
        if now >= self._handshake_deadline:
            self._shut_down("no HTTP/2 preface and SETTINGS in time", goaway=ErrorCode.SETTINGS_TIMEOUT)
        if self._write_began is not None:
            due.append(self._write_began + options.stall_limit)
            if now >= due[-1]:
                self._shut_down("the peer does not read", flush=False)
        due.append(self._check_keepalive(now))
        due.append(self._check_undelivered(now))
        if self._check_timers is not None:
            due.append(self._check_timers(now))
        return min(due)

    def _check_keepalive(self, now: float) -> float:
        options = self.options
        if self._ping_sent is not None:
            if self._last_read > self._ping_sent:  # any byte proves life, and an ACK may queue behind a large upload
                self._ping_sent = None
            elif now >= self._ping_sent + options.keepalive_timeout:
                self._shut_down("the peer did not answer a keepalive PING", flush=False)
                return inf
            else:
                return self._ping_sent + options.keepalive_timeout
        if not self.streams and not options.keepalive_without_streams:
            return inf
        due = self._last_read + options.keepalive_time
        if now < due or self.ended is not None:
            return due
        self.engine.ping(_PING_PAYLOAD)
        self._ping_sent = now
        self._wake_writer()
        return now + options.keepalive_timeout

    def _check_undelivered(self, now: float) -> float:
        """Streams whose handler is done while the peer does not take the answer."""
        limit = self.options.stall_limit
        for stream, (since, queued) in list(self._undelivered.items()):
            if now < since + limit:
                return since + limit  # in order of time, so the rest is younger
            del self._undelivered[stream]
            left = stream.queued
            if left < queued:
                self._undelivered[stream] = (now, left)
            else:
                self._reset(stream, ErrorCode.CANCEL)
                stream.on_stalled()
        return now + limit if self._undelivered else inf


_HANDLERS: dict[type, Callable[[Any, Any], None]] = {
    ngh2.RequestReceived: Http2Connection._request_received,
    ngh2.ResponseReceived: Http2Connection._response_received,
    ngh2.DataReceived: Http2Connection._data_received,
    ngh2.TrailersReceived: Http2Connection._trailers_received,
    ngh2.StreamReset: Http2Connection._reset_received,
    ngh2.StreamClosed: Http2Connection._stream_closed,
    ngh2.SettingsReceived: Http2Connection._settings_received,
    ngh2.PingAcknowledged: Http2Connection._ping_acknowledged,
    ngh2.GoAwayReceived: Http2Connection._goaway_received,
    ngh2.ConnectionClosed: Http2Connection._connection_closed,
}
