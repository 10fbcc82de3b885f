"""One RPC on the server: grpclib's ``Stream`` interface, with a cancel scope in it.

Handlers written for grpclib run on it unmodified.  Everything a handler may never ask for (metadata, peer, deadline) is
decoded when it asks.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import trio
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError, ProtocolError
from grpclib.metadata import Deadline, encode_metadata
from multidict import MultiDict

from ..scopes import Reason
from .framing import ACCEPT_ENCODING, MessageStream
from .http2 import Http2Connection
from .http2_stream import RawHeaders
from .metadata import decode_metadata, encode_message

if TYPE_CHECKING:
    from .connection import Connection, Peer

logger = logging.getLogger("triton_trio.grpc")

RecvT = TypeVar("RecvT")
SendT = TypeVar("SendT")
MetadataLike = Mapping[str, str | bytes] | Collection[tuple[str, str | bytes]]

_OK_TRAILERS = ((b"grpc-status", b"0"),)

#: What a client that is still there reads when the server ended its RPC.  Reasons that are not here leave nobody to tell.
#: "Deadline Exceeded" is what gRPC's own clients say, and programs look for it.
CANCELLED_STATUS: dict[Reason, tuple[Status, str]] = {
    Reason.DEADLINE: (Status.DEADLINE_EXCEEDED, "Deadline Exceeded"),
    Reason.SEQUENCE_CANCELLED: (Status.CANCELLED, "Cancelled: another request of the sequence was cancelled"),
    Reason.ADMIN: (Status.CANCELLED, "Cancelled by an operator of the server"),
    Reason.MODEL_UNLOADING: (Status.UNAVAILABLE, "The model is being unloaded"),
    Reason.SERVER_DRAIN: (Status.UNAVAILABLE, "The server is shutting down"),
    Reason.SIBLING_FAILED: (Status.CANCELLED, "Cancelled: a related request failed"),
    Reason.CALLER: (Status.CANCELLED, "Cancelled by the server"),
}


#: Seconds.  A client starts its deadline's clock before the server does, and resets the stream when its own has rung.  A reset
#: that comes so shortly before the server's deadline is that deadline.
SAME_INSTANT = 0.01


class Method:
    """A handler of a service, and what of it is the same for every call."""

    __slots__ = ("client_streaming", "func", "headers", "path", "reply_type", "request_type", "server_streaming")

    def __init__(self, path: str, handler: Handler, content_type: bytes) -> None:
        self.path = path
        self.func = handler.func
        self.client_streaming, self.server_streaming = handler.cardinality.value
        self.request_type = handler.request_type
        self.reply_type = handler.reply_type
        self.headers: RawHeaders = ((b":status", b"200"), (b"content-type", content_type))


class TrioDeadline(Deadline):
    """grpclib's deadline on Trio's clock."""

    def time_remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._timestamp - trio.current_time())


class Stream(MessageStream, Generic[RecvT, SendT]):
    """What a handler gets: receive and send messages and metadata, and the scope the RPC lives in.

    **Cancellation:** :attr:`cancel_scope` surrounds the handler.  The client's reset, the loss of its connection, its
    deadline, a stall of its reading and the server's own decisions cancel it; :attr:`cancel_reason` tells which.  Every
    method that sends or receives raises ``Cancelled`` then, even if it had nothing to wait for.
    """

    __slots__ = (
        "_connection",
        "_messages_sent",
        "_metadata",
        "_received",
        "_responded",
        "_started",
        "cancel_message",
        "cancel_reason",
        "cancel_scope",
        "headers",
        "method",
    )

    def __init__(
        self, connection: Connection, http2: Http2Connection, stream_id: int, method: Method, headers: RawHeaders
    ) -> None:
        options = connection.options
        super().__init__(http2, stream_id, options.max_receive_message_size, options.max_send_message_size)
        self.method = method
        self.headers = headers  #: as they came, pseudo-headers included
        self.cancel_scope = trio.CancelScope()
        self.cancel_reason: Reason | None = None  #: who cancelled; the first one counts
        self.cancel_message = ""  #: what to tell a client that is still there, instead of the reason's text
        self._connection = connection
        self._metadata: MultiDict[str | bytes] | None = None
        self._started = False
        self._received = False
        self._responded = False  # response headers are queued
        self._messages_sent = 0

    # -- what the handler reads ------------------------------------------------------------------------------------

    @property
    def metadata(self) -> MultiDict[str | bytes]:
        """The client's metadata; values of ``-bin`` keys are bytes.

        Raises:
            GRPCError: INTERNAL, such a value is not base64.  Not catching it answers the client with it.
        """
        if self._metadata is None:
            self._metadata = decode_metadata(self.headers)
        return self._metadata

    @property
    def deadline(self) -> Deadline | None:
        """When the client stops waiting; None if it did not say."""
        at = self.cancel_scope.deadline
        return None if at == inf else TrioDeadline(_timestamp=at)

    @property
    def user_agent(self) -> str | None:
        """The client's user-agent."""
        return next((value.decode("latin-1") for name, value in self.headers if name == b"user-agent"), None)

    @property
    def peer(self) -> Peer:
        """The other end of the connection: ``addr()`` and ``cert()``."""
        return self._connection.peer

    # -- messages --------------------------------------------------------------------------------------------------

    async def recv_message(self) -> RecvT | None:
        """The next request message; None after the client has half-closed, which is never a cancel.

        Raises:
            GRPCError: the bytes are no such message (INTERNAL), over the limit (RESOURCE_EXHAUSTED), or a unary call
                came without its message (UNIMPLEMENTED).  Not catching it answers the client with it.

        **Cancellation:** no message is lost.
        """
        payload = await self.receive_frame()
        if payload is None:
            if not (self._received or self.method.client_streaming):
                raise GRPCError(Status.UNIMPLEMENTED, "A unary call needs exactly one request message, got none")
            return None
        self._received = True
        try:
            return cast(RecvT, self._connection.codec.decode(payload, self.method.request_type))
        except ValueError as exc:
            raise GRPCError(Status.INTERNAL, f"Malformed request message: {exc}") from None
        except Exception:
            logger.exception("the codec failed on a request of %s", self.method.path)
            raise GRPCError(Status.INTERNAL, "Malformed request message") from None

    def __aiter__(self) -> Stream[RecvT, SendT]:
        return self

    async def __anext__(self) -> RecvT:
        message = await self.recv_message()
        if message is None:
            raise StopAsyncIteration
        return message

    async def send_initial_metadata(self, *, metadata: MetadataLike | None = None) -> None:
        """Send the response headers now, before the first message does it.

        **Cancellation:** nothing has been sent if it raises.
        """
        if self._responded:
            raise ProtocolError("Initial metadata was already sent")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._respond(_encode(metadata))

    async def send_message(self, message: SendT) -> None:
        """Queue a response message, and wait while the client reads more slowly than the handler sends.

        Raises:
            GRPCError: RESOURCE_EXHAUSTED, the message is over the limit.

        **Cancellation:** if it raises before its wait, nothing has been sent; in the wait, the message is on its way.
        """
        if self._messages_sent and not self.method.server_streaming:
            raise ProtocolError("Message was already sent")
        payload = self._connection.codec.encode(message, self.method.reply_type)
        await self._maybe_yield()
        if not self._responded:
            self._respond(())
        self.send_frame(payload)
        self._messages_sent += 1
        if self.queued > self.connection.options.outbound_limit:
            await self.wait_writable()
            await trio.lowlevel.checkpoint_if_cancelled()

    async def send_trailing_metadata(
        self,
        *,
        status: Status = Status.OK,
        status_message: str | None = None,
        status_details: Any = None,
        metadata: MetadataLike | None = None,
    ) -> None:
        """End the RPC with ``status``; nothing can be sent after it.

        Called for the handler when it returns or raises, if it has not done so itself.

        **Cancellation:** nothing has been sent if it raises.
        """
        if self.local_ended:
            raise ProtocolError("Trailing metadata was already sent")
        if status is Status.OK and not self._messages_sent and not self.method.server_streaming:
            raise ProtocolError("Unary response with OK status requires a single message to be sent")
        await trio.lowlevel.checkpoint_if_cancelled()
        self.finish(status, status_message, status_details, _encode(metadata))

    async def cancel(self) -> None:
        """Reset the stream: the client gets RST_STREAM instead of a status.

        **Cancellation:** not a checkpoint.
        """
        if self.closed and self.cancel_reason is None:
            raise ProtocolError("Stream was already cancelled")
        self.reset()

    # -- the server's side -----------------------------------------------------------------------------------------

    def request_cancel(self, reason: Reason) -> bool:
        """Cancel the RPC for ``reason``; False if somebody, or its deadline, already has.

        Reading ``cancel_called`` first lets a deadline that has passed win over whatever comes in the same instant.
        """
        if self.cancel_scope.cancel_called:
            return False
        self.cancel_reason = reason
        self.cancel_scope.cancel(reason=reason.value)
        return True

    @property
    def has_answered(self) -> bool:
        """Whether returning now is a complete answer: a unary one needs its message."""
        return self._messages_sent > 0 or self.method.server_streaming or self.local_ended

    def finish(
        self, status: Status, message: str | None = None, details: Any = None, metadata: RawHeaders = ()
    ) -> None:
        """Queue the terminal frame.  Once; whoever comes second changes nothing."""
        if self.closed or self.local_ended:
            return
        if status is Status.OK and self.cancel_scope.cancel_called:
            self.finish_cancelled()
            return
        if self._responded and status is Status.OK and not metadata and message is None:
            self.send_trailers(_OK_TRAILERS)
            return
        trailers: list[tuple[bytes, bytes]] = [] if self._responded else list(self.method.headers)
        trailers.append((b"grpc-status", b"%d" % status.value))
        if message is not None:
            trailers.append((b"grpc-message", encode_message(message)))
        if details is not None:
            trailers.extend(self._connection.encode_details(status, message, details))
        if status is Status.UNIMPLEMENTED:
            trailers.append((b"grpc-accept-encoding", ACCEPT_ENCODING))
        trailers.extend(metadata)
        if self._responded:
            self.send_trailers(trailers)
        else:
            self._responded = True
            self.send_headers(trailers, end_stream=True)

    def finish_cancelled(self, reason: Reason | None = None) -> None:
        """Answer a cancelled RPC as its reason demands; partial output is never followed by OK."""
        reason = reason or self.cancel_reason or self._derived_reason()
        self.cancel_reason = reason
        answer = CANCELLED_STATUS.get(reason)
        if answer is None:
            self.reset()
        else:
            self.finish(answer[0], self.cancel_message or answer[1])

    def _derived_reason(self) -> Reason:
        return Reason.DEADLINE if trio.current_time() >= self.cancel_scope.deadline else Reason.CALLER

    def _respond(self, metadata: RawHeaders) -> None:
        self._responded = True
        headers = self.method.headers
        if self.send_encoding:
            headers = (*headers, (b"grpc-encoding", self.send_encoding))
        self.send_headers((*headers, *metadata) if metadata else headers)

    # -- events ----------------------------------------------------------------------------------------------------

    def on_messages(self) -> None:
        if not self._started and self.has_message:
            self._connection.message_arrived(self)

    def on_reset(self, error_code: int, by_peer: bool) -> None:
        self._connection.stream_gone(self)
        if not by_peer:
            reason = Reason.PROTOCOL_ERROR
        elif self.cancel_scope.deadline - trio.current_time() <= SAME_INSTANT:
            reason = Reason.DEADLINE
        else:
            reason = Reason.CLIENT_RESET
        self.request_cancel(reason)

    def on_lost(self, why: str) -> None:
        self._connection.stream_gone(self)
        self.request_cancel(Reason.CONNECTION_LOST)

    def on_stalled(self) -> None:
        self.request_cancel(Reason.SLOW_CONSUMER)


def _encode(metadata: MetadataLike | None) -> RawHeaders:
    if not metadata:
        return ()
    return tuple((name.encode("ascii"), value.encode("ascii")) for name, value in encode_metadata(metadata))
