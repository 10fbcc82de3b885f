"""A TCP socket for exactly one reading and one writing task, without the checkpoints those two do not need."""

from __future__ import annotations

import os

import trio


class SocketTransport(trio.abc.HalfCloseableStream):
    """A ``trio.SocketStream`` that saves a turn of the scheduler per write, and a failed ``recv`` per read.

    A write that the kernel takes at once is not a checkpoint: the writer that calls it sleeps right afterwards anyway.
    A read waits first: between two requests there is nothing to read.  Who calls it must be the only reader, and the
    only writer.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As ``trio.abc.ReceiveStream``, but always waits for the socket to be readable."""
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("this socket was closed here")
            await trio.lowlevel.wait_readable(self._socket)
            try:
                # fileno() each time: it is -1 once the socket is closed, when the number may already be another's.
                return os.read(self._socket.fileno(), max_bytes or 65_536)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(f"socket connection broken: {exc}") from exc

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As ``trio.abc.SendStream``, but a checkpoint only if it must wait."""
        rest = memoryview(data)
        while True:
            try:
                rest = rest[os.write(self._socket.fileno(), rest) :]
            except BlockingIOError:
                pass
            except OSError as exc:
                raise trio.BrokenResourceError(f"socket connection broken: {exc}") from exc
            if not rest:
                return
            await trio.lowlevel.wait_writable(self._socket)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()
