"""The slots of one instance: which sequences have one, and whose next request may be executed."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Seat
    from .sequence import InferenceSequence


class SequenceSlots:
    """``count`` slots, of which the lowest free one is taken first."""

    def __init__(self, seat: Seat, count: int) -> None:
        self.seat = seat
        self.count = count
        self.taken: dict[int, InferenceSequence] = {}
        #: Sequences whose next request may be executed, in the order in which it became so, with the time.
        self.ready: dict[InferenceSequence, float] = {}
        self._given_back: list[int] = []  # a heap
        self._untouched = 0  # from here on, none was ever taken

    @property
    def free(self) -> int:
        return self.count - len(self.taken)

    def take(self, sequence: InferenceSequence) -> None:
        """Give ``sequence`` a slot; there must be a free one."""
        if self._given_back:
            slot = heapq.heappop(self._given_back)
        else:
            assert self._untouched < self.count
            slot = self._untouched
            self._untouched += 1
        self.taken[slot] = sequence
        sequence.slots, sequence.slot = self, slot

    def give_back(self, sequence: InferenceSequence) -> None:
        """Raises if it is not the sequence's: a slot that is given back twice would be shared by two."""
        if self.taken.get(sequence.slot) is not sequence:
            raise RuntimeError(f"{sequence!r} has no slot to give back")
        del self.taken[sequence.slot]
        heapq.heappush(self._given_back, sequence.slot)
        sequence.slot = -1
