"""Nurseries that are nobody's business but ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


@contextmanager
def without_groups(nurseries: int) -> Iterator[None]:
    """What comes out of these nurseries alone goes on alone: that there are nurseries is none of the caller's business.

    One cancel that came out of several tasks is alone, too.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        exc: BaseException = group
        if group.split(trio.Cancelled)[1] is None:
            nurseries = 0
            while isinstance(exc, BaseExceptionGroup):
                exc = exc.exceptions[0]
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
