"""Log lines of a worker process go through the server's logging, under the names and at the levels that they have there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from .messages import Log, cut

if TYPE_CHECKING:
    from .connection import Connection

#: Bytes in line behind which log lines are dropped: the server does not read, and answers come first.  As much may wait
#: for the worker's own event loop.
FULL = 1 << 20
#: What a line that waits for it takes beside its text, roughly.
_BESIDE = 1 << 9


class PostHandler(logging.Handler):
    """In the worker: posts every line, from whichever thread.  Made in the Trio run that owns ``connection``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self._dropped = 0  # by the event loop
        # Of other threads.  Each number has one writer, emit(), which logging calls in one thread at a time, or the loop.
        self._missed = 0  # lines that were dropped, of which the loop does not know
        self._handed = self._taken = 0  # bytes, of all lines ever

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self._message(record)
        except Exception:  # noqa: BLE001  # as every handler: a bad log call is not an error of its caller's
            self.handleError(record)
            return
        here = threading.get_ident() == self._thread
        if not here and self._handed - self._taken > FULL:
            self._missed += 1  # the loop is busy, and what waits for it has no other bound
            return
        missed, self._missed = self._missed, 0
        if here:
            self._post(message, missed)  # before what happens next, the answer to a request, say
            return
        self._handed += _size(message)
        try:
            self._token.run_sync_soon(self._take, message, missed)
        except trio.RunFinishedError:
            return

    def _message(self, record: logging.LogRecord) -> Log:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + (self.formatter or logging.Formatter()).formatException(record.exc_info)
        return Log(
            record.name,
            record.levelno,
            cut(text),
            record.created,
            record.pathname,
            record.lineno,
            record.threadName or "",
        )

    def _take(self, message: Log, missed: int) -> None:
        self._taken += _size(message)
        self._post(message, missed)

    def _post(self, message: Log, missed: int) -> None:
        self._dropped += missed
        if self._connection.outbound_bytes > FULL:
            self._dropped += 1
            return
        if self._dropped:
            message = replace(message, text=f"({self._dropped} lines were dropped) {message.text}")
            self._dropped = 0
        self._connection.post(message)


def _size(message: Log) -> int:
    return len(message.text) + _BESIDE


def levels() -> dict[str, int]:
    """In the server: the level of each logger that has one of its own; that of the root is under ``""``."""
    # A copy, for other threads make loggers.
    loggers = list(logging.root.manager.loggerDict.items())
    own = {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger) and logger.level}
    return {"": logging.root.level, **own}


def set_levels(wanted: Mapping[str, int]) -> None:
    """In the worker: log what the server would, and make no lines that it would drop."""
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)


def log(message: Log, pid: int) -> None:
    """In the server."""
    logger = logging.getLogger(message.logger)
    if not logger.isEnabledFor(message.level):
        return
    record = logger.makeRecord(message.logger, message.level, message.path, message.line, message.text, (), None)
    record.created = message.created
    record.process = pid
    record.processName = "worker"
    record.threadName = message.thread
    logger.handle(record)
