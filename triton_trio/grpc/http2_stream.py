"""One HTTP/2 stream, as its owner sees it: methods to override for what arrives, methods to call for what leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from .http2_options import ErrorCode

if TYPE_CHECKING:
    from .http2 import Http2Connection

Headers = Iterable[tuple[bytes, bytes]]
RawHeaders = tuple[tuple[bytes, bytes], ...]


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

    def on_headers(self, headers: RawHeaders, end_stream: bool) -> None:
        """Client: the response headers."""

    def on_data(self, data: bytes, end_stream: bool) -> None:
        """Body bytes; whoever consumes them calls :meth:`acknowledge`."""

    def on_trailers(self, headers: RawHeaders) -> None:
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
        connection = self.connection
        if self.closed or self.local_ended or not connection.usable:
            return
        connection.engine.send_response(self.stream_id, headers, end_stream=end_stream)
        if end_stream:
            connection._ended_locally(self)
        connection._backlog += 1
        connection.writer.wake()

    def send_data(self, data: bytes, *, end_stream: bool = False) -> None:
        """Queue body bytes; large objects are kept by reference.  Use :meth:`wait_writable` to bound the queue."""
        connection = self.connection
        if self.closed or self.local_ended or not connection.usable:
            return
        connection.engine.send_data(self.stream_id, data, end_stream=end_stream)
        if end_stream:
            connection._ended_locally(self)
        connection.writer.wake()

    def send_trailers(self, headers: Headers) -> None:
        """Queue trailers behind all queued body bytes.  They end the stream."""
        connection = self.connection
        if self.closed or self.local_ended or not connection.usable:
            return
        connection.engine.send_trailers(self.stream_id, headers)
        connection._ended_locally(self)
        connection.writer.wake()

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
        return 0 if not self.connection.usable else self.connection.engine.queued_body_size(self.stream_id)

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
