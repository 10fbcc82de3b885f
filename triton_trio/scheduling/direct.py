"""``direct``: a sequence keeps one slot, which is one row of every batch of its instance.

The model may keep state by row.  So a row that has nothing to execute is filled with a not-ready one, and a sequence that
leaves never moves its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from .queue import INF
from .sequence_batcher import SequenceBatcher, SequenceOptions

if TYPE_CHECKING:
    from ..request import InferenceRequest
    from .sequence import InferenceSequence
    from .sequence_tensors import SequenceTensors
    from .slots import SequenceSlots


class DirectBatcher(SequenceBatcher):
    """Triton's ``direct`` strategy; as many slots as a batch has rows.

    Args:
      max_queue_delay: seconds a request may wait for others, while less than ``minimum_slot_utilization`` (0 to 1) of
        the slots have one.
    """

    def __init__(
        self,
        options: SequenceOptions,
        tensors: SequenceTensors,
        *,
        max_queue_delay: float = 0.0,
        minimum_slot_utilization: float = 0.0,
    ) -> None:
        super().__init__(options, tensors)
        self.max_queue_delay = max_queue_delay
        self.minimum_slot_utilization = minimum_slot_utilization

    def choose(self, now: float, slots: SequenceSlots) -> tuple[Sequence[InferenceSequence], float]:
        waiting = list(islice(self.candidates(slots), slots.count))
        if not waiting:
            return (), INF
        oldest, since = waiting[0]
        if len(waiting) < self.minimum_slot_utilization * slots.count and now < since + self.max_queue_delay:
            return (), since + self.max_queue_delay
        signature = self.signature(oldest)
        return [sequence for sequence, _ in waiting if self.signature(sequence) == signature], INF

    def fill_rows(self, chosen: Sequence[InferenceSequence]) -> Sequence[InferenceRequest]:
        rows = {sequence.slot: self.execute_next(sequence) for sequence in chosen}
        like = next(iter(rows.values()))
        return [rows.get(slot) or self.null_row(like) for slot in range(max(rows) + 1)]
