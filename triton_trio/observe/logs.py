"""Logging for the command line: stdlib loggers, one handler, text or JSON.

Embedders configure ``logging`` themselves; nothing here runs on import.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Style = Literal["default", "ISO8601", "json"]

#: What :mod:`logging` itself puts on a record; everything else came in by ``extra=``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TritonFormatter(logging.Formatter):
    """Triton's line: ``I1123 02:10:33.123456 4711 server.py:97] "text"``, or with an ISO 8601 time."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self._iso = style == "ISO8601"

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        where = f"{record.process} {record.filename}:{record.lineno}]"
        if self._iso:
            return f"{when:%Y-%m-%dT%H:%M:%SZ} {record.levelname} {where} {text}"
        return f"{record.levelname[0]}{when:%m%d %H:%M:%S.%f} {where} {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; fields passed as ``extra=`` are keys of their own."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogSettings(logging.Filter):
    """What :func:`configure_logging` has set up, to be read and changed while the server runs.

    Triton switches each level on or off by itself, which a logger's threshold cannot say; so this is a filter.
    """

    def __init__(
        self, handler: logging.Handler, *, verbose: int, info: bool, warning: bool, error: bool, style: Style, file: str
    ) -> None:
        super().__init__()
        self.file = file
        self.info = info
        self.warning = warning
        self.error = error
        self._handler = handler
        self.update(verbose=verbose, style=style)

    def update(
        self,
        *,
        verbose: int | None = None,
        info: bool | None = None,
        warning: bool | None = None,
        error: bool | None = None,
        style: Style | None = None,
    ) -> None:
        """Change what is given; takes effect at once."""
        self.info = self.info if info is None else info
        self.warning = self.warning if warning is None else warning
        self.error = self.error if error is None else error
        if verbose is not None:
            self.verbose = verbose
            logging.getLogger("triton_trio").setLevel(logging.DEBUG if verbose > 0 else logging.INFO)
        if style is not None:
            self.style: Style = style
            self._handler.setFormatter(JsonFormatter() if style == "json" else TritonFormatter(style))

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == logging.INFO:
            return self.info
        if record.levelno == logging.WARNING:
            return self.warning
        return self.error if record.levelno == logging.ERROR else True


def log_settings() -> LogSettings | None:
    """The settings made by :func:`configure_logging`; None where an embedder has configured logging instead."""
    filters = (found for handler in logging.getLogger("triton_trio").handlers for found in handler.filters)
    return next((found for found in filters if isinstance(found, LogSettings)), None)


def configure_logging(
    *,
    verbose: int = 0,
    info: bool = True,
    warning: bool = True,
    error: bool = True,
    style: Style = "default",
    file: str | None = None,
) -> logging.Handler:
    """Send the package's log lines to standard error, or to ``file``; returns the handler."""
    handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("triton_trio")
    handler.addFilter(
        LogSettings(handler, verbose=verbose, info=info, warning=warning, error=error, style=style, file=file or "")
    )
    logger.handlers[:] = [handler]
    logger.propagate = False
    return handler
