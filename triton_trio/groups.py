"""Nurseries that are nobody's business but ours."""

from __future__ import annotations

from types import TracebackType

import trio


class WithoutGroups:
    """What comes out of these nurseries alone goes on alone: that there are nurseries is none of the caller's business.

    One cancel that came out of several tasks is alone, too.
    """

    __slots__ = ("_nurseries",)

    def __init__(self, nurseries: int) -> None:
        self._nurseries = nurseries

    def __enter__(self) -> None:
        return

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not isinstance(exc, BaseExceptionGroup):
            return
        alone = _alone(exc, self._nurseries)
        context = None if alone is None else alone.__context__
        try:
            if alone is not None:
                raise alone  # its context is restored below
        finally:
            if alone is not None:
                alone.__context__ = context  # and not the group it was in, which would be a cycle
            # As would be the group in this frame, which is in the traceback.
            del alone, context, exc, exc_type, tb


def _alone(group: BaseExceptionGroup[BaseException], nurseries: int) -> BaseException | None:
    exc: BaseException = group
    if group.split(trio.Cancelled)[1] is None:
        while isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        return exc
    for _ in range(nurseries):
        if not (isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1):
            return None
        exc = exc.exceptions[0]
    return exc
