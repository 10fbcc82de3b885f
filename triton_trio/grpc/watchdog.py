"""Every timer of a connection in one task, which needs no traffic to fire."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import trio

from .http2_options import ErrorCode

if TYPE_CHECKING:
    from .http2 import Http2Connection
    from .http2_stream import Http2Stream


class Watchdog:
    """Asleep until the earliest of: handshake, keepalive, a write that stalls, an answer nobody takes, the owner's.

    Args:
        check_owner: called with the current time; acts, and returns when it wants to be called next.
    """

    def __init__(self, connection: Http2Connection, check_owner: Callable[[float], float] | None) -> None:
        now = trio.current_time()
        self.last_read = now
        self.write_began: float | None = None  #: since when the transport has taken nothing of what we write
        self.ping_sent: float | None = None
        #: Streams that we have ended: since when, and with how many bytes, the peer has not taken what is queued.
        self.undelivered: dict[Http2Stream, tuple[float, int]] = {}
        self.cancel_scope = trio.CancelScope()
        self._handshake_deadline = now + connection.options.handshake_timeout
        self._connection = connection
        self._check_owner = check_owner
        self._alarm = trio.CancelScope()

    def arm(self, deadline: float) -> None:
        """Look at the timers no later than ``deadline``."""
        if deadline < self._alarm.deadline:
            self._alarm.deadline = deadline

    def handshake_done(self) -> None:
        """The peer has sent its first SETTINGS."""
        self._handshake_deadline = inf

    async def run(self) -> None:
        """Until :attr:`cancel_scope` is cancelled."""
        with self.cancel_scope:
            while True:
                self._alarm = trio.CancelScope(deadline=self._check(trio.current_time()))
                with self._alarm:
                    await trio.sleep_forever()

    def _check(self, now: float) -> float:
        """Act on the timers that have run out; return when the next one does."""
        return min(
            self._check_handshake(now),
            self._check_write(now),
            self._check_keepalive(now),
            self._check_undelivered(now),
            inf if self._check_owner is None else self._check_owner(now),
        )

    def _check_handshake(self, now: float) -> float:
        if now >= self._handshake_deadline:
            self._connection.close(ErrorCode.SETTINGS_TIMEOUT, "no HTTP/2 preface and SETTINGS in time")
        return self._handshake_deadline

    def _check_write(self, now: float) -> float:
        if self.write_began is None:
            return inf
        due = self.write_began + self._connection.options.stall_limit
        if now >= due:
            self._connection.abandon("the peer does not read")
        return due

    def _check_keepalive(self, now: float) -> float:
        connection = self._connection
        options = connection.options
        if self.ping_sent is not None:
            due = self.ping_sent + options.keepalive_timeout
            # Any byte proves life; the ACK itself may queue behind a large upload.
            if self.last_read > self.ping_sent:
                self.ping_sent = None
            elif now < due:
                return due
            else:
                connection.abandon("the peer did not answer a keepalive PING")
                return inf
        if connection.ended is not None or not (connection.streams or options.keepalive_without_streams):
            return inf
        due = self.last_read + options.keepalive_time
        if now < due:
            return due
        connection.ping()
        self.ping_sent = now
        return now + options.keepalive_timeout

    def _check_undelivered(self, now: float) -> float:
        limit = self._connection.options.stall_limit
        for stream, (since, queued) in list(self.undelivered.items()):
            if now < since + limit:
                return since + limit  # in order of time, so the rest is younger
            del self.undelivered[stream]
            left = stream.queued
            if left < queued:
                self.undelivered[stream] = (now, left)
            else:
                stream.reset(ErrorCode.CANCEL)
                stream.on_stalled()
        return now + limit if self.undelivered else inf
