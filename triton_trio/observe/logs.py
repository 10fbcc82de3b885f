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


class _Levels(logging.Filter):
    """Triton switches each level on or off by itself."""

    def __init__(self, enabled: dict[int, bool]) -> None:
        super().__init__()
        self.enabled = enabled

    def filter(self, record: logging.LogRecord) -> bool:
        return self.enabled.get(record.levelno, True)


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
    handler.setFormatter(JsonFormatter() if style == "json" else TritonFormatter(style))
    handler.addFilter(_Levels({logging.INFO: info, logging.WARNING: warning, logging.ERROR: error}))
    logger = logging.getLogger("triton_trio")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose > 0 else logging.INFO)
    return handler
