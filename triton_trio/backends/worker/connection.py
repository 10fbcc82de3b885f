"""One end of the socket between the server and a worker process."""

from __future__ import annotations

import socket
from collections import deque

import trio

from ...tensor import Buffer
from .messages import Message
from .wire import PREFIX, decode, encode, read_prefix

#: Bytes that are read at a time; a longer frame is received into memory of its own.
_READ = 1 << 16
_PIECES = 64  #: of one system call


class Connection:
    """Posts and receives messages.  Everything but :meth:`write` and :meth:`receive` is synchronous.

    Args:
      sock: a stream socket, which belongs to the connection from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._outbound: deque[memoryview] = deque()
        self._written = trio.lowlevel.ParkingLot()
        self._work = trio.Event()
        self._broken = False
        self._buffer = bytearray(_READ)
        self._start = self._end = 0  # of what was read and not yet taken
        self.outbound_bytes = 0  #: posted, and not yet taken by the kernel

    def post(self, message: Message) -> None:
        """Send, or get in line behind what was posted before.  Sync, so that an abort function can call it.

        Nobody hears of a peer that is gone here, but :meth:`receive`.

        Raises:
          InternalError: a tensor cannot be sent.
        """
        pieces = encode(message)
        if self._broken:
            return
        for piece in pieces:
            if piece:
                self._outbound.append(memoryview(piece))
                self.outbound_bytes += len(piece)
        if not self._work.is_set():
            # Nothing was in line.  At once, and not when the writer's turn comes: a busy event loop is why there is a
            # worker, and a cancel should be there before it.
            self._send()
            if self._outbound:
                self._work.set()

    def _send(self) -> None:
        outbound = self._outbound
        try:
            while outbound:
                sent = self._socket.sendmsg([outbound[index] for index in range(min(len(outbound), _PIECES))])
                self.outbound_bytes -= sent
                while sent:
                    if sent < len(outbound[0]):
                        outbound[0] = outbound[0][sent:]
                        break
                    sent -= len(outbound.popleft())
        except BlockingIOError:
            return
        except OSError:
            self._broken = True
            outbound.clear()
            self.outbound_bytes = 0

    async def write(self) -> None:
        """Send what could not be sent at once; for a task of its own.

        **Cancellation:** what is in line stays there.
        """
        while True:
            await self._work.wait()
            while self._outbound:
                await trio.lowlevel.wait_writable(self._socket)
                self._send()
            self._work = trio.Event()
            self._written.unpark_all()

    async def wait_written(self) -> None:
        """Wait until the kernel has everything.  **Cancellation:** only the wait ends."""
        await trio.lowlevel.checkpoint()
        while self._outbound:
            await self._written.park()

    async def receive(self) -> Message | None:
        """The next message; None when the peer is gone.

        Raises:
          NonsenseError: it is none.

        **Cancellation:** a checkpoint only where it has to wait; cancelled in a frame, the connection is of no more use.
        """
        prefix = await self._take(PREFIX.size)
        if prefix is None:
            return None
        header_size, body_size = read_prefix(prefix)
        header = await self._take(header_size)
        body = await self._take(body_size)
        return None if header is None or body is None else decode(header, body)

    async def _take(self, size: int) -> Buffer | None:
        there = self._end - self._start
        if size <= there:
            self._start += size
            return self._buffer[self._start - size : self._start]
        taken = memoryview(bytearray(size))
        taken[:there] = self._buffer[self._start : self._end]
        self._start = self._end = 0
        while there < size:
            rest = size - there
            if rest >= _READ:
                received = await self._receive_into(taken[there:])
                there += received
            else:
                received = await self._receive_into(memoryview(self._buffer))
                here = min(rest, received)
                taken[there : there + here] = self._buffer[:here]
                there += here
                self._start, self._end = here, received
            if not received:
                return None
        return taken

    async def _receive_into(self, memory: memoryview) -> int:
        """How many bytes came; 0 at the end."""
        while True:
            try:
                return self._socket.recv_into(memory)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
            except ConnectionError:
                return 0

    def end(self) -> None:
        """The peer is gone for certain: :meth:`receive` returns what came before, and then None."""
        if self._socket.fileno() >= 0:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it knows already

    def close(self) -> None:
        """Nobody may be waiting in :meth:`receive`."""
        self._broken = True
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
