"""Nurseries that are nobody's business but ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_groups(nurseries: int) -> Iterator[None]:
    """What comes out of these nurseries alone goes on alone: that there are nurseries is none of the caller's business."""
    try:
        yield
    except BaseExceptionGroup as group:
        exc: BaseException = group
        for _ in range(nurseries):
            if not (isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1):
                raise
            exc = exc.exceptions[0]
        context = exc.__context__
        try:
            raise exc  # noqa: ASYNC123 - its context is restored below
        finally:
            exc.__context__ = context  # and not the group it was in, which would be a cycle
            del exc, context
