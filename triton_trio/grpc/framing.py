"""gRPC's message framing on an HTTP/2 stream, for both roles: the five-byte prefix, compression, size limits.

:class:`MessageStream` turns DATA into whole messages as they arrive and messages into DATA.  A message's bytes go back
to the flow-control window when somebody takes the message; only a message larger than half the window is acknowledged
while it is still arriving, because it could not arrive otherwise.
"""

from __future__ import annotations

import zlib
from collections import deque

import trio
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from .http2 import Http2Connection, Http2Stream
from .http2_stream import RawHeaders

PREFIX_LENGTH = 5
ACCEPT_ENCODING = b"identity,deflate,gzip"

# Copying a small message behind its prefix is cheaper than a second queue entry.
_JOIN_LIMIT = 16_384
# A loop over messages that never has to wait still lets others run this often: its cancel may be on the wire.
_OPERATIONS_PER_YIELD = 16

_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


def compress(data: bytes, encoding: bytes) -> bytes:
    """``data`` as ``encoding`` (gzip or deflate, as gRPC means them: a gzip member, a zlib stream)."""
    compressor = zlib.compressobj(wbits=_WINDOW_BITS[encoding])
    return compressor.compress(data) + compressor.flush()


def decompress(data: bytes, encoding: bytes, limit: int) -> bytes:
    """The message in ``data``; never more than ``limit`` bytes of it exist, however small ``data`` is.

    Raises:
        GRPCError: UNIMPLEMENTED for an unknown encoding, INTERNAL for broken data or no encoding at all,
            RESOURCE_EXHAUSTED for a message over the limit.
    """
    if encoding == b"identity":
        raise GRPCError(Status.INTERNAL, "Message is marked as compressed, but grpc-encoding is identity")
    if encoding not in _WINDOW_BITS:
        raise GRPCError(
            Status.UNIMPLEMENTED,
            f"Compression {encoding.decode('ascii', 'replace')!r} is not supported; use gzip, deflate or identity",
        )
    decompressor = zlib.decompressobj(wbits=_WINDOW_BITS[encoding])
    try:
        message = decompressor.decompress(data, limit + 1)
    except zlib.error as exc:
        raise GRPCError(Status.INTERNAL, f"Compressed message is broken: {exc}") from None
    if len(message) > limit:
        raise GRPCError(Status.RESOURCE_EXHAUSTED, f"Decompressed message is larger than max ({limit} bytes)")
    if not decompressor.eof:
        raise GRPCError(Status.INTERNAL, "Compressed message is truncated")
    return message


class MessageStream(Http2Stream):
    """A stream of whole messages.  Subclasses decide what a message means and who waits for it."""

    __slots__ = (
        "_ahead",
        "_buffer",
        "_buffered",
        "_messages",
        "_needed",
        "_operations",
        "_receiver",
        "failure",
        "max_receive",
        "max_send",
        "receive_encoding",
        "send_encoding",
    )

    def __init__(self, connection: Http2Connection, stream_id: int, max_receive: int, max_send: int) -> None:
        super().__init__(connection, stream_id)
        self.max_receive = max_receive  #: bytes of one message, before and after decompression
        self.max_send = max_send
        self.receive_encoding = b"identity"  #: the peer's grpc-encoding
        self.send_encoding = b""  #: gzip or deflate: compress what we send
        self.failure: GRPCError | None = None  #: the peer broke the framing; raised to the receiver after what is good
        self._messages: deque[tuple[int, bytes]] = deque()  # whole: (compression flag, payload)
        self._buffer: list[bytes | memoryview] = []  # of the message that is arriving
        self._buffered = 0
        self._needed = PREFIX_LENGTH  # bytes that _buffer must have before anything can be done with it
        self._ahead = 0  # bytes acknowledged before their message was taken
        self._receiver: trio.lowlevel.Task | None = None
        self._operations = 0

    # -- receiving -------------------------------------------------------------------------------------------------

    def on_data(self, data: bytes, end_stream: bool) -> None:
        if self.failure is not None:
            self.acknowledge(len(data))
        elif not self._buffered and len(data) >= PREFIX_LENGTH and self._is_whole(data):
            self._messages.append((data[0], data[PREFIX_LENGTH:]))  # one DATA frame, one message
        elif data:
            self._buffer.append(data)
            self._buffered += len(data)
            if self._buffered >= self._needed:
                self._cut()
            elif not self._messages and self._needs_ahead:
                self._acknowledge_ahead()
        if end_stream and self._buffered and self.failure is None:
            self._fail(Status.INTERNAL, f"Stream ended within a message: {self._buffered} bytes of {self._needed}")
        self.on_messages()
        self._wake_receiver()

    def on_messages(self) -> None:
        """Something that a receiver may look at has changed: messages, failure, or the end of the stream."""

    def on_trailers(self, headers: RawHeaders) -> None:
        self.on_data(b"", True)

    def on_reset(self, error_code: int, by_peer: bool) -> None:
        self._wake_receiver()

    def on_lost(self, why: str) -> None:
        self._wake_receiver()

    @property
    def has_message(self) -> bool:
        """Whether a receiver would find something without waiting: a message, or the reason why there is none."""
        return bool(self._messages) or self.failure is not None or self.remote_ended

    def _is_whole(self, data: bytes) -> bool:
        length = int.from_bytes(data[1:PREFIX_LENGTH], "big")
        return length == len(data) - PREFIX_LENGTH and data[0] <= 1 and length <= self.max_receive

    def _cut(self) -> None:
        """Cut whole messages from the front of the buffer."""
        if self._buffered == self._needed > PREFIX_LENGTH:
            # The rest of a message and no more.  A tensor is copied once, here, and not again for its prefix, all of
            # which is in the first piece since it was cut for the first time.
            first = memoryview(self._buffer[0])
            self._buffer[0] = first[PREFIX_LENGTH:]
            self._messages.append((first[0], b"".join(self._buffer)))
            self._buffer.clear()
            self._buffered, self._needed = 0, PREFIX_LENGTH
            return
        data = b"".join(self._buffer)
        position = 0
        self._needed = PREFIX_LENGTH
        while len(data) - position >= PREFIX_LENGTH:
            if data[position] > 1:
                self._buffered = len(data) - position
                self._fail(Status.INTERNAL, f"Malformed message prefix: compression flag is {data[position]}")
                return
            length = int.from_bytes(data[position + 1 : position + PREFIX_LENGTH], "big")
            if length > self.max_receive:
                self._buffered = len(data) - position
                self._fail(
                    Status.RESOURCE_EXHAUSTED, f"Received message larger than max ({length} vs. {self.max_receive})"
                )
                return
            end = position + PREFIX_LENGTH + length
            if end > len(data):
                self._needed = PREFIX_LENGTH + length
                break
            self._messages.append((data[position], data[position + PREFIX_LENGTH : end]))
            position = end
        rest = data[position:]
        self._buffer = [rest] if rest else []
        self._buffered = len(rest)

    @property
    def buffered(self) -> int:
        """Bytes of the message that is arriving."""
        return self._buffered

    @property
    def _needs_ahead(self) -> bool:
        return self._needed > self.connection.options.initial_window_size // 2

    def _acknowledge_ahead(self) -> None:
        amount = self._buffered - self._ahead
        self._ahead += amount
        self.acknowledge(amount)

    def _fail(self, status: Status, message: str) -> None:
        self.failure = GRPCError(status, message)
        self._buffer.clear()
        if self._messages:  # then what was acknowledged ahead belongs to the first of them
            self.acknowledge(self._buffered)
        else:
            self.acknowledge(self._buffered - self._ahead)
            self._ahead = 0
        self._buffered = 0

    async def receive_frame(self) -> bytes | None:
        """The next message's payload, decompressed; None after the peer has half-closed (or closed) the stream.

        Checkpoints when it must wait, and now and then when it need not.

        Raises:
            GRPCError: the peer broke the framing, or sent a message over the limit.

        **Cancellation:** no message is lost; the next call returns it.
        """
        await self._maybe_yield()
        while not self._messages:
            if self.failure is not None:
                raise self.failure
            if self.remote_ended or self.closed:
                return None
            await self._wait_receive()
        flag, payload = self._messages.popleft()
        # What was acknowledged ahead belongs to the oldest message that was then incomplete: this one.
        self.acknowledge(PREFIX_LENGTH + len(payload) - self._ahead)
        self._ahead = 0
        if self._buffered and not self._messages and self._needs_ahead:
            self._acknowledge_ahead()
        return decompress(payload, self.receive_encoding, self.max_receive) if flag else payload

    async def _wait_receive(self) -> None:
        if self._receiver is not None:
            raise trio.BusyResourceError("another task is already receiving from this stream")
        self._receiver = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._receiver = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake_receiver(self) -> None:
        task = self._receiver
        if task is not None and (self._messages or self.failure is not None or self.remote_ended or self.closed):
            self._receiver = None
            trio.lowlevel.reschedule(task)

    # -- sending ---------------------------------------------------------------------------------------------------

    def send_frame(self, payload: bytes, *, end_stream: bool = False) -> None:
        """Queue one message.

        Raises:
            GRPCError: RESOURCE_EXHAUSTED, it is over ``max_send``; nothing was queued.
        """
        flag = b"\0"
        if self.send_encoding:
            payload = compress(payload, self.send_encoding)
            flag = b"\1"
        length = len(payload)
        if length > self.max_send:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"Sent message larger than max ({length} vs. {self.max_send})")
        prefix = flag + length.to_bytes(4, "big")
        if length <= _JOIN_LIMIT:
            self.send_data(prefix + payload, end_stream=end_stream)
        else:
            self.send_data(prefix)
            self.send_data(payload, end_stream=end_stream)

    async def _maybe_yield(self) -> None:
        """Raise if cancelled; let others run every few operations."""
        self._operations += 1
        if self._operations % _OPERATIONS_PER_YIELD:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
