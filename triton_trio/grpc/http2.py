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
from collections.abc import Callable
from typing import Any, Literal

import ngh2
import trio
from ngh2 import Setting

from .frames import FrameFollower
from .http2_options import ErrorCode as ErrorCode
from .http2_options import Http2Options as Http2Options
from .http2_options import Http2Statistics as Http2Statistics
from .http2_stream import Headers, RawHeaders
from .http2_stream import Http2Stream as Http2Stream
from .socket_transport import SocketTransport
from .watchdog import Watchdog
from .writer import Writer

logger = logging.getLogger("triton_trio.http2")

_SMALL_READ = 65_536  # below malloc's mmap threshold: an idle connection costs no page faults
_LARGE_READ = 1 << 20
_PREFACE_LENGTH = 24
_PING_PAYLOAD = b"tritrio\0"


Accept = Callable[["Http2Connection", int, RawHeaders, bool], Http2Stream | None]


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
        self.transport = SocketTransport(transport) if type(transport) is trio.SocketStream else transport
        self.options = options
        self.label = label  #: peer address; names the tasks
        self.streams: dict[int, Http2Stream] = {}
        self.ended: str | None = None  #: why the connection ended; None while it lives
        self.usable = True  #: the engine still takes what streams want of it
        self.handshaken = False  #: the peer's SETTINGS have arrived, so its limits are known
        self.draining = False  #: no new streams (we drain, or the peer sent GOAWAY); ends when the last has closed
        self.peer_max_concurrent_streams = 100  #: the engine's assumption until SETTINGS arrive
        self._server = role == "server"
        self._accept = accept
        self._after_read = after_read
        self._blocked: dict[Http2Stream, trio.lowlevel.Task] = {}
        self._just_ended: list[Http2Stream] = []  # since the last flush, by us
        self._ended_early: list[Http2Stream] = []  # by us, while the peer was still sending
        self._pending_resets: dict[int, int] = {}
        self._backlog = 0
        self._empty_frames = 0
        self._goaway = b""
        self._frames = FrameFollower(_PREFACE_LENGTH if self._server else 0)
        self._read_scope = trio.CancelScope()
        self.writer = Writer(self)
        self.watchdog = Watchdog(self, check_timers)
        self._streams_total = 0
        self._resets_received = 0
        self._resets_sent = 0
        self._bytes_received = 0
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

    async def run(  # noqa: ASYNC114  # nothing is lost if a caller uses start_soon
        self, *, task_status: trio.TaskStatus[trio.Nursery] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Drive the connection until it has ended and every task in its nursery is gone.

        ``task_status`` receives the nursery in which the owner may start its streams' tasks.

        **Cancellation:** the nursery's tasks are cancelled first and may still queue their last frames; then GOAWAY
        and everything queued is flushed, shielded, for at most ``flush_timeout``; then the transport is closed.
        """
        try:
            async with trio.open_nursery() as io:
                # Ends after its last flush, which _shut_down bounds; shielded, so cancelled by nothing else.
                io.start_soon(self.writer.run, name=f"writer {self.label}")
                try:
                    async with trio.open_nursery() as nursery:
                        self.nursery = nursery
                        # Both end with the connection: _shut_down cancels their scopes.
                        nursery.start_soon(self._read_loop, name=f"reader {self.label}")
                        nursery.start_soon(self.watchdog.run, name=f"watchdog {self.label}")
                        task_status.started(nursery)
                finally:
                    self._shut_down("the connection was closed here", goaway=ErrorCode.NO_ERROR)
        finally:
            await trio.aclose_forcefully(self.transport)

    def arm(self, deadline: float) -> None:
        """Have the watchdog, and with it ``check_timers``, look at the clock no later than ``deadline``."""
        self.watchdog.arm(deadline)

    def ping(self) -> None:
        """Send a keepalive PING."""
        self.engine.ping(_PING_PAYLOAD)
        self.writer.wake()

    def abandon(self, why: str) -> None:
        """End the connection now; its peer does not listen, so nothing is flushed."""
        self._shut_down(why, flush=False)

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
            self.writer.wake()
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
        self.watchdog.arm(self.watchdog.last_read + self.options.keepalive_time)
        self.writer.wake()
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
            bytes_sent=self.writer.bytes_sent,
            queued_bytes=0 if not self.usable else self.engine.queued_body_size(),
            unacknowledged_bytes=sum(stream.unacknowledged for stream in self.streams.values()),
            local_window=0 if not self.usable else self.engine.local_window_size,
        )

    def _shut_down(self, why: str, *, goaway: int | None = None, flush: bool = True) -> None:
        """The one way a connection ends, whoever decides it; the second caller changes nothing.

        Streams that are still open are lost.  With ``flush``, the writer sends what is queued, then ``goaway``; without,
        the transport is gone and there is nobody to tell.
        """
        if self.ended is not None:
            return
        self.ended = why
        self.usable = False
        if goaway is not None:
            try:
                for stream_id, code in self._pending_resets.items():
                    self.engine.reset_stream(stream_id, code)
                # Not terminate_connection: it would drop the queued bodies, and trailers stand behind them.
                self.engine.send_goaway(goaway, debug_data=why.encode() if goaway else b"")
            except ngh2.NGH2Error:
                # The engine is unusable after what it has just read.  A GOAWAY is 17 bytes, so we write it ourselves.
                self._goaway = b"\0\0\x08\x07\0\0\0\0\0" + bytes(4) + goaway.to_bytes(4, "big")
        if flush:
            self.writer.cancel_scope.deadline = trio.current_time() + self.options.flush_timeout
        else:
            self.writer.cancel_scope.cancel(reason=why)
        lost = list(self.streams.values())
        self.streams.clear()
        self.watchdog.undelivered.clear()
        self._just_ended.clear()
        self._ended_early.clear()
        for stream in lost:
            stream.closed = True
            stream.unacknowledged = 0
            stream.on_lost(why)
        for task in self._blocked.values():
            trio.lowlevel.reschedule(task)
        self._blocked.clear()
        self._read_scope.cancel(reason=why)
        self.watchdog.cancel_scope.cancel(reason=why)
        self.writer.wake()

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
            self.writer.reader_stopped.set()

    def _receive(self, data: bytes | bytearray) -> None:
        self._bytes_received += len(data)
        self.watchdog.last_read = trio.current_time()
        self._frames.feed(data)
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
            self.writer.wake()

    def _dispatch(self) -> None:
        """Deliver the engine's events, in order."""
        events = self.engine.events()
        if events and type(events[-1]) is ngh2.ConnectionClosed:
            self.usable = False  # already during the events before it, a last response among them
        for event in events:
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
        self.watchdog.arm(self.watchdog.last_read + self.options.keepalive_time)

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
        self.handshaken = True
        self.watchdog.handshake_done()
        self.peer_max_concurrent_streams = event.settings.get(
            Setting.MAX_CONCURRENT_STREAMS, self.peer_max_concurrent_streams
        )

    def _ping_acknowledged(self, event: ngh2.PingAcknowledged) -> None:
        if event.opaque_data == _PING_PAYLOAD:
            self.watchdog.ping_sent = None

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
        self.watchdog.undelivered.pop(stream, None)
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
        self.writer.wake()

    def _ended_locally(self, stream: Http2Stream) -> None:
        """The terminal frame is queued.  What the next flush cannot deliver is the watchdog's from then on."""
        stream.local_ended = True
        self._just_ended.append(stream)

    def _acknowledge(self, stream_id: int, amount: int) -> None:
        if amount and self.usable:
            self.engine.acknowledge_received_data(amount, stream_id)
            if self.writer.asleep and self.engine.want_write:  # a WINDOW_UPDATE has become due
                self.writer.wake()

    async def _wait_drained(self, stream: Http2Stream) -> None:
        if stream in self._blocked:
            raise trio.BusyResourceError("another task is already sending on this stream")
        self._blocked[stream] = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._blocked[stream]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    # -- writing ---------------------------------------------------------------------------------------------------

    def take_output(self) -> bytes:
        """Everything that may go on the wire now.  The writer's."""
        engine = self.engine
        data = b""
        try:
            if self._pending_resets and self.usable:
                self._submit_resets()
            data = engine.data_to_send()
            self._dispatch()
            if self._just_ended:
                self._note_undelivered()
            if self._ended_early:
                data += self._release_clients()
        except ngh2.NGH2Error as exc:
            self._shut_down(f"HTTP/2 engine: {exc}", goaway=ErrorCode.INTERNAL_ERROR)
        if self.ended is not None and self._goaway:
            data += self._goaway
            self._goaway = b""
        self._backlog = 0
        if self._blocked:
            for stream in [s for s in self._blocked if s.queued <= self.options.outbound_limit]:
                trio.lowlevel.reschedule(self._blocked.pop(stream))
        return data

    def _note_undelivered(self) -> None:
        now = trio.current_time()
        for stream in self._just_ended:
            if stream.closed:  # as nearly always: both sides have ended, and the last byte is out
                continue
            self.watchdog.undelivered[stream] = (now, stream.queued)
            self.watchdog.arm(now + self.options.stall_limit)
            if self._server and not stream.remote_ended:
                self._ended_early.append(stream)
        self._just_ended.clear()

    def _submit_resets(self) -> None:
        torn = self._frames.torn_stream
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
        if not (self._pending_resets and self.usable):
            return b""
        self._submit_resets()
        data = self.engine.data_to_send()
        self._dispatch()
        return data


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
