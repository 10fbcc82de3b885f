"""``oldest``: many sequences share the batches of an instance, the one that has waited longest first.

At most one request of a sequence is in a batch, or on the device; its row is another one each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .ordering import ResponseOrder
from .queue import INF
from .sequence_batcher import SequenceBatcher, SequenceOptions

if TYPE_CHECKING:
    from ..request import InferenceRequest
    from .sequence import InferenceSequence
    from .sequence_tensors import SequenceTensors
    from .slots import SequenceSlots


class OldestBatcher(SequenceBatcher):
    """Triton's ``oldest`` strategy; ``max_candidate_sequences`` slots.

    Args:
      max_batch_size: rows an execution may have.
      preferred_sizes: rows at which a batch is sent without waiting for more.
      max_queue_delay: seconds the oldest request may wait for company.
      preserve_ordering: responses go out in the order in which their requests went to an instance.
    """

    def __init__(
        self,
        options: SequenceOptions,
        tensors: SequenceTensors,
        *,
        max_batch_size: int,
        preferred_sizes: Sequence[int] = (),
        max_queue_delay: float = 0.0,
        preserve_ordering: bool = False,
    ) -> None:
        super().__init__(options, tensors)
        self.max_batch_size = max_batch_size
        self.preferred_sizes = sorted(preferred_sizes or (max_batch_size,))
        self.max_queue_delay = max_queue_delay
        if preserve_ordering:
            self.order = ResponseOrder()

    def choose(self, now: float, slots: SequenceSlots) -> tuple[Sequence[InferenceSequence], float]:
        # The same decision as the dynamic batcher's, with sequences for requests.
        taken: list[InferenceSequence] = []
        signature, oldest, full = None, INF, False
        for sequence, since in self.candidates(slots):
            signature_here = self.signature(sequence)
            if not taken:
                signature, oldest = signature_here, since
            elif signature_here != signature:
                full = True
                break
            taken.append(sequence)
            if len(taken) == self.max_batch_size:
                break
        preferred = max((size for size in self.preferred_sizes if size <= len(taken)), default=0)
        if preferred:
            del taken[preferred:]
        elif taken and not (full or len(taken) >= self.preferred_sizes[-1]) and now < oldest + self.max_queue_delay:
            return (), oldest + self.max_queue_delay
        return taken, INF

    def fill_rows(self, chosen: Sequence[InferenceSequence]) -> Sequence[InferenceRequest]:
        requests = [self.execute_next(sequence) for sequence in chosen]
        if self.order is not None:
            # Not before: an answer must never wait for one that needs a slot.
            for request in requests:
                self.order.expect(request)
        return requests
