"""The HTTP/2 side of one call: what the server sends, and the one status that follows from it."""

from __future__ import annotations

import binascii
from typing import Any

import trio
from grpclib.const import Status
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.exceptions import GRPCError
from grpclib.metadata import decode_bin_value, decode_grpc_message

from .framing import MessageStream
from .http2 import ErrorCode, Http2Connection
from .http2_stream import RawHeaders

#: An answer without grpc-status comes from something between us and the gRPC server, or is cut short.
_STATUS_OF_HTTP = {
    b"400": Status.INTERNAL,
    b"401": Status.UNAUTHENTICATED,
    b"403": Status.PERMISSION_DENIED,
    b"404": Status.UNIMPLEMENTED,
    b"429": Status.UNAVAILABLE,
    b"502": Status.UNAVAILABLE,
    b"503": Status.UNAVAILABLE,
    b"504": Status.UNAVAILABLE,
}

# RFC 9113's error codes, and what gRPC makes of each.  Those that it does not name are UNKNOWN.
_STATUS_OF_RESET = {
    0: (Status.INTERNAL, "NO_ERROR before the end of the answer"),
    1: (Status.INTERNAL, "PROTOCOL_ERROR"),
    2: (Status.INTERNAL, "INTERNAL_ERROR"),
    3: (Status.INTERNAL, "FLOW_CONTROL_ERROR"),
    4: (Status.INTERNAL, "SETTINGS_TIMEOUT"),
    6: (Status.INTERNAL, "FRAME_SIZE_ERROR"),
    7: (Status.UNAVAILABLE, "REFUSED_STREAM: not processed, safe to retry"),
    8: (Status.CANCELLED, "CANCEL"),
    9: (Status.INTERNAL, "COMPRESSION_ERROR"),
    10: (Status.INTERNAL, "CONNECT_ERROR"),
    11: (Status.RESOURCE_EXHAUSTED, "ENHANCE_YOUR_CALM"),
    12: (Status.PERMISSION_DENIED, "INADEQUATE_SECURITY"),
}


class CallStream(MessageStream):
    """One call on the wire.

    :attr:`status` is settled once: by the server's trailers, by its reset, by the loss of the connection, or by
    :meth:`abort`.  Whoever comes second changes nothing.  Messages that came before it can still be received.
    """

    __slots__ = ("_content_type", "_details", "_details_codec", "_watcher", "headers", "message", "status", "trailers")

    def __init__(
        self,
        connection: Http2Connection,
        stream_id: int,
        max_receive: int,
        max_send: int,
        *,
        content_type: bytes,
        details_codec: StatusDetailsCodecBase | None,
    ) -> None:
        super().__init__(connection, stream_id, max_receive, max_send)
        self.headers: RawHeaders | None = None
        self.trailers: RawHeaders | None = None  #: of a trailers-only answer, its headers
        self.status: Status | None = None  #: None while the call is in flight
        self.message: str | None = None
        self._details: bytes | None = None  # as they came
        self._content_type = content_type
        self._details_codec = details_codec
        self._watcher: trio.lowlevel.Task | None = None  # waits for headers or status, whatever comes first

    @property
    def error(self) -> GRPCError | None:
        """The status as an exception, each time a new one; None if it is OK or not known."""
        if self.status is None or self.status is Status.OK:
            return None
        return GRPCError(self.status, self.message, self._decode_details(self.status))

    def _decode_details(self, status: Status) -> Any:
        if self._details is None:
            return None
        try:
            details = decode_bin_value(self._details)
        except binascii.Error:
            return None  # the status and its message matter more
        codec = self._details_codec
        return details if codec is None else codec.decode(status, self.message, details)

    @property
    def is_complete(self) -> bool:
        """Whether the call has ended with OK and every message has been received."""
        return self.status is Status.OK and not self._messages

    async def checkpoint(self) -> None:
        """Raise if cancelled; let others run every few operations."""
        await self._maybe_yield()

    def abort(self, status: Status, message: str) -> None:
        """End the call here: settle, send RST_STREAM(CANCEL) if anything is still open, wake who waits."""
        self._settle(status, message)
        self.reset(ErrorCode.CANCEL)
        self._wake_receiver()

    # -- waiting ---------------------------------------------------------------------------------------------------

    async def wait_headers(self) -> None:
        """Until the server's headers are here, or its status is known.

        **Cancellation:** nothing is lost.
        """
        while self.headers is None and self.status is None:
            await self._watch()

    async def wait_status(self) -> None:
        """Until the status is known.  Messages stay where they are.

        **Cancellation:** nothing is lost.
        """
        while self.status is None:
            await self._watch()

    async def _watch(self) -> None:
        if self._watcher is not None:
            raise trio.BusyResourceError("another task is already waiting for this call's headers or status")
        self._watcher = trio.lowlevel.current_task()

        def unwatch(_: object) -> trio.lowlevel.Abort:
            self._watcher = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(unwatch)

    def _wake_watcher(self) -> None:
        task, self._watcher = self._watcher, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    # -- events ----------------------------------------------------------------------------------------------------

    def on_headers(self, headers: RawHeaders, end_stream: bool) -> None:
        self.headers = headers
        fields = dict(headers)
        if b"grpc-encoding" in fields:
            self.receive_encoding = fields[b"grpc-encoding"]
        if end_stream:
            self.on_trailers(headers)
        elif fields[b":status"] != b"200":
            self.abort(*_status_of_http(fields))
        elif not self._is_acceptable(fields.get(b"content-type", b"")):
            theirs = fields.get(b"content-type", b"nothing").decode("ascii", "replace")
            self.abort(Status.UNKNOWN, f"The server answers in {theirs}, not in {self._content_type.decode()}")
        else:
            self._wake_watcher()

    def _is_acceptable(self, content_type: bytes) -> bool:
        kind, _, subtype = content_type.partition(b";")[0].partition(b"+")
        return kind == b"application/grpc" and (subtype or b"proto") == (
            self._content_type.partition(b"+")[2] or b"proto"
        )

    def on_data(self, data: bytes, end_stream: bool) -> None:
        super().on_data(data, end_stream)
        if end_stream and self.trailers is None:
            self._conclude(Status.UNKNOWN, "The answer ended without a grpc-status")

    def on_trailers(self, headers: RawHeaders) -> None:
        self.trailers = headers
        super().on_trailers(headers)  # a message that was cut short is a failure, and then there is no OK
        fields = dict(headers)
        value = fields.get(b"grpc-status")
        if value is None:
            self._conclude(*_status_of_http(dict(self.headers or ())))
            return
        try:
            status = Status(int(value))
        except ValueError:
            self._conclude(
                Status.UNKNOWN, f"The server sent an unknown grpc-status: {value.decode('ascii', 'replace')!r}"
            )
            return
        if status is Status.OK:
            self._conclude(status)
            return
        message = fields.get(b"grpc-message")
        text = None if message is None else decode_grpc_message(message.decode("ascii", "replace"))
        self._conclude(status, text, fields.get(b"grpc-status-details-bin"))

    def on_reset(self, error_code: int, by_peer: bool) -> None:
        status, name = _STATUS_OF_RESET.get(error_code, (Status.UNKNOWN, f"error {error_code}"))
        if by_peer or error_code == ErrorCode.REFUSED_STREAM:
            self._settle(status, f"The server reset the stream: {name}")
        else:
            self._settle(Status.INTERNAL, f"The server broke HTTP/2 on this stream: {name}")
        super().on_reset(error_code, by_peer)

    def on_lost(self, why: str) -> None:
        self._settle(Status.UNAVAILABLE, f"Connection to {self.connection.label} lost: {why}")
        super().on_lost(why)

    def on_stalled(self) -> None:
        limit = self.connection.options.stall_limit
        self._settle(Status.UNAVAILABLE, f"{self.connection.label} took nothing of what was sent for {limit:g} s")
        self._wake_receiver()

    def _conclude(self, status: Status, message: str | None = None, details: bytes | None = None) -> None:
        """The server has said its last word.  What we have not sent yet, it does not want."""
        if self.failure is not None and status is Status.OK:
            status, message = self.failure.status, self.failure.message
        self._settle(status, message, details)
        if not self.closed and (self.queued or not self.local_ended):
            self.reset(ErrorCode.CANCEL)

    def _settle(self, status: Status, message: str | None = None, details: bytes | None = None) -> None:
        if self.status is None:
            self.status, self.message, self._details = status, message, details
            self._wake_watcher()


def _status_of_http(fields: dict[bytes, bytes]) -> tuple[Status, str]:
    """For an answer without grpc-status."""
    http = fields.get(b":status", b"?")
    if http == b"200":
        return Status.UNKNOWN, "The answer ended without a grpc-status"
    return _STATUS_OF_HTTP.get(
        http, Status.UNKNOWN
    ), f"The server answered with HTTP status {http.decode('ascii', 'replace')}"
