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

#: Bytes in line behind which log lines are dropped: the server does not read, and answers come first.
FULL = 1 << 20


class PostHandler(logging.Handler):
    """In the worker: posts every line, from whichever thread.  Made in the Trio run that owns ``connection``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self._message(record)
        except Exception:  # noqa: BLE001  # as every handler: a bad log call is not an error of its caller's
            self.handleError(record)
            return
        if threading.get_ident() == self._thread:
            self._post(message)  # before what happens next, the answer to a request, say
            return
        try:
            self._token.run_sync_soon(self._post, message)
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

    def _post(self, message: Log) -> None:
        if self._connection.outbound_bytes > FULL:
            self._dropped += 1
            return
        if self._dropped:
            message = replace(message, text=f"({self._dropped} lines were dropped) {message.text}")
            self._dropped = 0
        self._connection.post(message)


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
