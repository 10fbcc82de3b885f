"""The one task that writes to a connection's transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from .http2 import Http2Connection

_SLICE = 1 << 20  # the watchdog wants to see progress within one large flush


class Writer:
    """Sleeps until something is queued; then everything that may go on the wire leaves in one ``send_all``.

    Woken at most once per scheduler tick: the tasks of one tick queue, and the writer runs in the next.  It outlives
    the connection's other tasks, so that what they queued at their end is flushed, and it closes the transport.
    """

    __slots__ = ("_connection", "_parked", "bytes_sent", "cancel_scope", "reader_stopped")

    def __init__(self, connection: Http2Connection) -> None:
        self.bytes_sent = 0
        self.reader_stopped = trio.Event()
        #: Shielded: nothing from outside cancels a last flush, but its deadline does.
        self.cancel_scope = trio.CancelScope(shield=True)
        self._connection = connection
        self._parked: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        """Something is queued."""
        task = self._parked
        if task is not None:
            self._parked = None
            trio.lowlevel.reschedule(task)

    @property
    def asleep(self) -> bool:
        """Whether what is queued now leaves only after :meth:`wake`."""
        return self._parked is not None

    async def run(self) -> None:
        """Until the connection has ended and its last output is flushed, or :attr:`cancel_scope` is cancelled."""
        connection = self._connection
        transport = connection.transport
        with self.cancel_scope:
            try:
                while True:
                    data = connection.take_output()
                    if data:
                        await self._write(data)
                    elif connection.ended is not None:
                        break
                    else:
                        await self._park()
                await self._say_goodbye(transport)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                connection.abandon(f"the connection broke: {exc}")
        # With the last flush the transport goes, even if a handler below is still in its clean-up.
        await trio.aclose_forcefully(transport)

    async def _say_goodbye(self, transport: trio.abc.Stream) -> None:
        """Our FIN, then the peer's.

        Closing with unread bytes in the socket makes the kernel send RST, which can destroy the last answers on their
        way.
        """
        if isinstance(transport, trio.abc.HalfCloseableStream):
            await transport.send_eof()
            await self.reader_stopped.wait()
            while await transport.receive_some(65_536):
                pass

    async def _write(self, data: bytes) -> None:
        self.bytes_sent += len(data)
        connection = self._connection
        watchdog = connection.watchdog
        now = watchdog.write_began = trio.current_time()
        watchdog.arm(now + connection.options.stall_limit)
        if len(data) <= _SLICE:
            await connection.transport.send_all(data)
        else:
            view = memoryview(data)
            for start in range(0, len(data), _SLICE):
                await connection.transport.send_all(view[start : start + _SLICE])
                watchdog.write_began = trio.current_time()
        watchdog.write_began = None

    async def _park(self) -> None:
        self._parked = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
