"""Who pays for device time, and what a cancel has saved.

Every second that the device thread measures for an execution is charged to its members, so that useful and wasted
seconds together are the device's.  A program counts whole: one that a request left while it ran is wasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...batch import Batch, Member


def share(batch: Batch, members: Sequence[Member], seconds: float) -> None:
    """Charge one program to those it was made for, by their rows; padding and masked rows are on them.

    ``members`` empty, because nobody knows any more, means all.
    """
    members = members or [member for member in batch.members if member.ready]
    rows = sum(member.stop - member.start for member in members)
    for member in members:
        batch.charge(member, seconds * (member.stop - member.start) / rows)


class Typical:
    """What a request of one model takes, judged by those so far.

    Args:
      max_steps: the model's own limit, if it has one; what is expected until a request was served to its end.
    """

    def __init__(self, max_steps: int | None) -> None:
        self._max_steps = max_steps
        self._completed = self._completed_steps = 0
        self._row_steps = 0
        self._seconds = 0.0

    def settle(self, member: Member, steps: int, *, completed: bool) -> None:
        """The execution is over for ``member``: learn from it, or estimate what it would have taken.

        Args:
          steps: that were dispatched for its rows.
          completed: nothing of it was left to do.
        """
        rows = member.stop - member.start
        self._row_steps += rows * steps
        self._seconds += member.useful_seconds + member.wasted_seconds
        if completed:
            self._completed += 1
            self._completed_steps += steps
        elif member.left_at is not None:
            member.saved_seconds = self._seconds_of(rows, steps)

    def _seconds_of(self, rows: int, steps: int) -> float:
        """Of the steps that a request typically makes after ``steps``."""
        expected = self._completed_steps / self._completed if self._completed else self._max_steps
        if expected is None or not self._row_steps:
            return 0.0
        return max(expected - steps, 0.0) * rows * self._seconds / self._row_steps
