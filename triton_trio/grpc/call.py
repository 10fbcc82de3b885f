"""One call, as its caller sees it: grpclib's ``client.Stream`` interface, and a block that is the call.

A call opens no cancel scope that lasts as long as its block, so that a block may stand in an async generator.  What
ends it from outside is the scope *around* it; a ``timeout`` bounds each of its waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, inf
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import trio
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, ProtocolError
from multidict import MultiDict

from .call_stream import CallStream
from .connection import Peer
from .http2 import Http2Connection
from .http2_stream import RawHeaders
from .metadata import decode_metadata

if TYPE_CHECKING:
    from .channel import Channel

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

_LEFT = "The caller left the call before its end"


def encode_timeout(seconds: float) -> bytes:
    """``grpc-timeout``, rounded up: the server must not give up before we do, or the caller would read its verdict."""
    for unit, per_second in ((b"u", 1e6), (b"m", 1e3), (b"S", 1.0)):
        amount = max(1, ceil(seconds * per_second))
        if amount < 100_000_000:
            return b"%d%s" % (amount, unit)
    return b"99999999S"


class Call(Generic[RequestT, ReplyT]):
    """A call in its ``async with`` block.  Made by :meth:`Channel.request`.

    ::

        async with channel.request(path, Cardinality.UNARY_UNARY, Question, Answer, timeout=2) as call:
            await call.send_message(Question("?"), end=True)
            answer = await call.recv_message()

    The deadline that the server is told is the earliest of ``timeout``, ``deadline`` and the deadlines of the scopes
    around the call, as they are when the call leaves.  If ``timeout`` or ``deadline`` passes first, the method that waits
    raises ``GRPCError(DEADLINE_EXCEEDED)``; if a scope around it expires, that is Trio's ordinary cancellation.

    A status other than OK is raised as :exc:`GRPCError` by whatever needs the call: by :meth:`recv_message` in place of
    the end, by :meth:`send_message`, by leaving the block of a call with one reply.

    **Cancellation:** leaving the block before the end of the call, for whatever reason, resets the stream, once; the
    server cancels its side.  Bytes that nobody has read go back to the connection's window.  It sends nothing if the
    call was still waiting for a connection or a stream slot.
    """

    def __init__(
        self,
        channel: Channel,
        path: bytes,
        cardinality: Cardinality,
        request_type: type[RequestT],
        reply_type: type[ReplyT],
        *,
        deadline: float,
        metadata: RawHeaders,
    ) -> None:
        self._channel = channel
        self._path = path.decode("ascii")
        self._request_line = ((b":method", b"POST"), (b":path", path))
        self._client_streaming, self._server_streaming = cardinality.value
        self._request_type = request_type
        self._reply_type = reply_type
        self._deadline = deadline  # Trio's clock; what the caller asked for with timeout= or deadline=
        self._travelling = deadline  # and what the server is told
        self._metadata = metadata
        self._entered = False
        self._requested = False
        self._end_with_request = False
        self._ended = False  # our side
        self._replies = 0
        self._stream: CallStream | None = None
        self._told: Status | None = None  # the failure that the caller has been told of first
        self._cancelled = False

    def __repr__(self) -> str:
        return f"<Call {self._path} to {self._channel.target}>"

    async def __aenter__(self) -> Call[RequestT, ReplyT]:
        if self._entered:
            raise ProtocolError(f"{self!r} was used before; make a new one with request()")
        self._entered = True
        self._channel.call_entered(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # OK comes after the one reply, or something else does.
            if error is None and self._replies and not (self._server_streaming or self._told or self._is_complete):
                await self.recv_message()  # noqa: ASYNC102  # a cancel here loses nothing: the call is ended below
        finally:
            stream = self._stream
            if stream is not None:
                stream.abort(Status.CANCELLED, _LEFT)
            self._channel.call_left(self, self._told or (stream and stream.status) or Status.CANCELLED)

    # -- sending ---------------------------------------------------------------------------------------------------

    async def send_request(self, *, end: bool = False) -> None:
        """Send the request's headers; waits for a connection, and for a stream slot if the server limits them.

        :meth:`send_message` does it if you have not.  With ``end``, there will be no messages.

        Raises:
            GRPCError: UNAVAILABLE, no connection, and why; DEADLINE_EXCEEDED.
            trio.ClosedResourceError: the channel is closed.

        **Cancellation:** nothing has been sent.
        """
        if not self._entered:
            raise ProtocolError(f"{self!r} is a block: use it with `async with`")
        if self._requested:
            raise ProtocolError("Request is already sent")
        if end and not self._client_streaming:
            raise ProtocolError("A unary request is ended by its message, not without one")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._requested = True
        self._end_with_request = end
        self._travelling = min(self._deadline, trio.current_effective_deadline())
        try:
            with self._bounded(f"waiting for a stream to {self._channel.target}"):
                await self._channel.admit(self)
            self._ended = end
        except GRPCError as exc:
            raise self._fail(exc.status, exc.message or "") from None
        finally:
            self._requested = self._stream is not None

    async def send_message(self, message: RequestT, *, end: bool = False) -> None:
        """Queue a request message; waits while the server reads more slowly than you send.

        After the server has ended the call with OK it wants no more messages, and this does nothing.

        Raises:
            GRPCError: the call's status, if it has failed; RESOURCE_EXHAUSTED, the message is over the limit.

        **Cancellation:** if it raises before its wait, the message has not been sent.
        """
        if self._ended:
            raise ProtocolError("The request has ended: no more messages")
        payload = self._channel.codec.encode(message, self._request_type)
        if not self._requested:
            await self.send_request()
        stream = self._opened()
        await stream.checkpoint()
        self._raise_if_failed(stream)
        last = end or not self._client_streaming
        stream.send_frame(payload, end_stream=last)
        self._ended = last
        if not stream.closed and stream.queued > stream.connection.options.outbound_limit:
            with self._bounded("sending"):
                await stream.wait_writable()
                await trio.lowlevel.checkpoint_if_cancelled()
            self._raise_if_failed(stream)

    async def end(self) -> None:
        """Half-close: there are no more request messages.  Not a cancel.

        **Cancellation:** not a checkpoint.
        """
        stream = self._opened()
        if not self._client_streaming:
            if not self._ended:
                raise ProtocolError("A unary request is ended by its message, not without one")
            return  # grpclib allows it, once or more
        if self._ended:
            raise ProtocolError("The request has ended already")
        self._ended = True
        stream.send_data(b"", end_stream=True)

    # -- receiving -------------------------------------------------------------------------------------------------

    async def recv_initial_metadata(self) -> None:
        """Wait for the server's headers; then :attr:`initial_metadata` is there.

        Raises:
            GRPCError: the call ended with this status instead.

        **Cancellation:** nothing is lost.
        """
        stream = self._opened()
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._bounded("waiting for the reply"):
            await stream.wait_headers()
        if stream.headers is None or stream.headers is stream.trailers:
            self._raise_if_failed(stream)

    async def recv_message(self) -> ReplyT | None:
        """The next reply; None after the last one of a stream that ended with OK.

        Raises:
            GRPCError: the call ended with this status, and all messages before it have been received; INTERNAL, the
                bytes are no such message; RESOURCE_EXHAUSTED, it is over the limit.

        **Cancellation:** no message is lost.
        """
        payload = await self._receive(self._opened())
        if payload is None:
            if not self._server_streaming and not self._replies:
                raise self._fail(Status.UNIMPLEMENTED, f"{self._path} ended with OK, but without its one reply")
            return None
        self._replies += 1
        if self._replies > 1 and not self._server_streaming:
            raise self._fail(Status.UNIMPLEMENTED, f"{self._path} has one reply, and the server sent more")
        try:
            return cast(ReplyT, self._channel.codec.decode(payload, self._reply_type))
        except ValueError as exc:
            raise self._fail(Status.INTERNAL, f"Malformed reply from {self._path}: {exc}") from None

    def __aiter__(self) -> Call[RequestT, ReplyT]:
        return self

    async def __anext__(self) -> ReplyT:
        message = await self.recv_message()
        if message is None:
            raise StopAsyncIteration
        return message

    async def recv_trailing_metadata(self) -> None:
        """Wait for the end of the call; then :attr:`trailing_metadata` is there.

        Messages that nobody has received stay where they are; a server that waits for its window waits for ever.

        Raises:
            GRPCError: the call's status, if it is not OK.

        **Cancellation:** nothing is lost.
        """
        stream = self._opened()
        if not self._ended:
            raise ProtocolError("The request has not ended: send_message(end=True) or end() come first")
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._bounded("waiting for the status"):
            await stream.wait_status()
        self._raise_if_failed(stream)

    @property
    def initial_metadata(self) -> MultiDict[str | bytes] | None:
        """What the server sent before its first reply; None as long as it has not."""
        stream = self._stream
        if stream is None or stream.headers is None:
            return None
        return decode_metadata(() if stream.headers is stream.trailers else stream.headers)

    @property
    def trailing_metadata(self) -> MultiDict[str | bytes] | None:
        """What the server sent with its status; None as long as it has not."""
        stream = self._stream
        return None if stream is None or stream.trailers is None else decode_metadata(stream.trailers)

    @property
    def peer(self) -> Peer | None:
        """The server at the other end: ``addr()`` and ``cert()``; None before the call has a connection."""
        return None if self._stream is None else self._channel.peer_of(self._stream.connection)

    async def cancel(self) -> None:
        """Reset the stream, as leaving the block does.  What still uses the call gets ``GRPCError(CANCELLED)``.

        **Cancellation:** not a checkpoint.
        """
        self._opened()
        if self._cancelled:
            raise ProtocolError("The call was cancelled already")
        self._cancelled = True
        self._fail(Status.CANCELLED, "Cancelled by the caller")

    # -- the channel's side ----------------------------------------------------------------------------------------

    def open_on(self, connection: Http2Connection) -> None:
        """Open the call's stream.  Synchronous, so that nothing comes between having a slot and using it."""
        channel = self._channel
        options = channel.options
        headers = [*self._request_line, *channel.headers]
        if self._travelling < inf:
            headers.append((b"grpc-timeout", encode_timeout(self._travelling - trio.current_time())))
        headers.extend(self._metadata)

        def make(connection: Http2Connection, stream_id: int) -> CallStream:
            return CallStream(
                connection,
                stream_id,
                options.max_receive_message_size,
                options.max_send_message_size,
                content_type=channel.content_type,
                details_codec=channel.status_details_codec,
            )

        self._stream = cast(CallStream, connection.open_stream(make, headers, end_stream=self._end_with_request))
        self._stream.send_encoding = options.request_compression.encode()

    def close(self, message: str) -> None:
        """The channel closes."""
        self._fail(Status.CANCELLED, message)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _opened(self) -> CallStream:
        if self._stream is None:
            raise ProtocolError("Request was not sent yet: send_request() or send_message() come first")
        return self._stream

    @property
    def _is_complete(self) -> bool:
        return self._stream is not None and self._stream.is_complete

    def _fail(self, status: Status, message: str) -> GRPCError:
        """End the call here, unless it has ended, and tell the caller."""
        self._told = self._told or status
        if self._stream is not None:
            self._stream.abort(status, message)
        return GRPCError(status, message)

    def _raise_if_failed(self, stream: CallStream) -> None:
        error = stream.error
        if error is not None:
            self._told = self._told or error.status
            raise error

    async def _receive(self, stream: CallStream) -> bytes | None:
        """The next message's bytes; None at the end of a call that ended with OK."""
        with self._bounded("waiting for the reply"):
            try:
                payload = await stream.receive_frame()
            except GRPCError as exc:  # the server broke the framing
                raise self._fail(exc.status, exc.message or "") from None
        if payload is None:
            self._raise_if_failed(stream)
        return payload

    @contextmanager
    def _bounded(self, doing: str) -> Iterator[None]:
        """Raise DEADLINE_EXCEEDED if the block still waits when ``timeout=`` or ``deadline=`` has passed."""
        if self._deadline == inf:
            yield
            return
        with trio.CancelScope(deadline=self._deadline) as scope:
            yield
        if scope.cancelled_caught:
            raise self._fail(Status.DEADLINE_EXCEEDED, f"Deadline exceeded while {doing}")
