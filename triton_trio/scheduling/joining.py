"""Requests that join an execution under way: who may, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ..request import InferenceRequest
    from .dynamic_batcher import DynamicBatcher
    from .scheduler import Seat


class Joining:
    """For one execution of ``seat``: the way from the queue into it.

    An execution that others can join may go on for as long as there are requests, so nobody must wait for its end:

    * The queue's order holds.  Requests join from its head only, so one that does not fit (another shape, more rows than
      are free) keeps all behind it from joining, and the execution runs dry for it.
    * Where a new batch could have more rows than this execution has, requests join as long as all who wait fit.  Else it
      runs dry, for a small batch without end would be all that many requests get.
    * Nobody joins while another model's instance waits for what this one holds of the rate limiter's resources.
    """

    def __init__(self, batcher: DynamicBatcher, seat: Seat) -> None:
        self._batcher = batcher
        self._seat = seat
        self._seen = -1  #: changes of the queue, when it was last looked at

    def take_nowait(self, signature: object, rows: int, *, all_or_none: bool = False) -> Sequence[InferenceRequest]:
        """Requests for up to ``rows`` rows, of the execution's signature; they are in the queue no more.

        ``all_or_none``: see :meth:`~triton_trio.batch.Batch.join`.
        """
        self._seen = self._batcher.changes
        permit = self._seat.permit
        if permit is not None and permit.wanted(besides=self._batcher.permits_in_line()):
            return ()
        return self._batcher.take_head(signature, rows, all_or_none=all_or_none)

    async def wait_arrival(self) -> None:
        """Wait until the queue has changed since :meth:`take_nowait`: somebody may be able to join who could not before.

        **Cancellation:** only the wait ends.
        """
        await trio.lowlevel.checkpoint()
        while self._seen == self._batcher.changes:
            await self._batcher.changed.park()
