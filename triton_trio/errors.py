"""The errors a client can meet, and how they map to gRPC.

One tree under :class:`TritonError`, one class per code of Triton's C API (``TRITONSERVER_Error_Code``).  Message texts
that clients match on are Triton's own.  An error says what is wrong, where, and what to change; it never carries a
traceback to the wire.

Cancellation is not an error here: inside the server it is ``trio.Cancelled``.  :class:`RequestCancelled` exists for the
caller who is *still there* when somebody else cancelled the request (an operator, another member of its sequence).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from grpclib.const import Status


class TritonError(Exception):
    """A request, load or lookup that failed for a reason the caller should read."""

    code = "UNKNOWN"
    status = Status.UNKNOWN

    @property
    def message(self) -> str:
        """What a client reads."""
        return str(self.args[0]) if self.args else self.code

    def __str__(self) -> str:
        return self.message


class InternalError(TritonError):
    code, status = "INTERNAL", Status.INTERNAL


class NotFound(TritonError):
    code, status = "NOT_FOUND", Status.NOT_FOUND


class InvalidArgument(TritonError):
    code, status = "INVALID_ARG", Status.INVALID_ARGUMENT


class Unavailable(TritonError):
    code, status = "UNAVAILABLE", Status.UNAVAILABLE


class Unsupported(TritonError):
    code, status = "UNSUPPORTED", Status.UNIMPLEMENTED


class AlreadyExists(TritonError):
    code, status = "ALREADY_EXISTS", Status.ALREADY_EXISTS


class RequestCancelled(TritonError):
    """Somebody other than the caller cancelled the request; the message names the reason and is never empty.

    Triton's CANCELLED has an empty message, which its own clients read as success inside a stream.
    """

    code, status = "CANCELLED", Status.CANCELLED

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason


class DeadlineExceeded(TritonError):
    """The request's own deadline passed (``grpc-timeout``)."""

    code, status = "UNAVAILABLE", Status.DEADLINE_EXCEEDED


@contextmanager
def no_panic(what: str, error: type[TritonError] = InternalError) -> Iterator[None]:
    """Raise ``error`` for a panic of a library in Rust: it comes as a BaseException, and would end the server as Ctrl-C does.

    The same for one that comes out of nurseries, unless something is with it that must go on: a cancel, or a Ctrl-C.

    Args:
      what: the beginning of the message.
    """
    try:
        yield
    except BaseException as exc:
        panic = _panic(exc)
        if panic is None:
            raise
        raise error(f"{what}: {type(panic).__name__}: {panic}") from None  # noqa: ASYNC104  # no Cancelled is in it


def _panic(exc: BaseException) -> BaseException | None:
    if not isinstance(exc, BaseExceptionGroup):
        return exc if _is_panic(exc) else None
    panics, others = exc.split(_is_panic)
    if panics is None or not (others is None or isinstance(others, Exception)):
        return None
    first: BaseException = panics
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def _is_panic(exc: BaseException) -> bool:
    # PyO3's PanicException; no module has the class, so there is no other way to know it.
    return type(exc).__module__ == "pyo3_runtime"
