"""Who pays for device time that several texts share, and what a cancel has saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Generation, Program


class TextAccounts:
    """Of the texts of one model on one device.

    A program's seconds are shared by the texts that it worked for.  It ran ahead of an end that nobody could foresee, if
    those were over before it was: then whoever comes next pays.  So useful, wasted and unpaid seconds together are the
    device's own.
    """

    def __init__(self) -> None:
        self.useful = 0.0
        self.wasted = 0.0  #: of programs that had not ended when their text was cancelled
        self.unpaid = 0.0
        self.saved = 0.0  #: an estimate: what cancelled texts would have gone on to take
        self._fed = self._made = 0  # tokens of prompts, and steps of rows
        self._fed_seconds = self._made_seconds = 0.0  # of the device, for these
        self._completed = self._completed_tokens = 0

    def charge(self, program: Program, rows: Sequence[Generation], seconds: float) -> None:
        """A program has ended, or failed.

        Args:
          rows: of the program's, those that the device made something for.
        """
        if program.chunk is not None:
            self._fed += len(program.chunk.tokens)
            self._fed_seconds += seconds
        elif rows:
            self._made += len(rows) * program.steps
            self._made_seconds += seconds
        seconds += self.unpaid
        payers = [row for row in rows if not row.settled]
        self.unpaid = 0.0 if payers else seconds
        for row in payers:
            share = seconds / len(payers)
            row.reader.charge(share, max(program.steps, 1))
            if row.reader.cancelled:
                self.wasted += share
            else:
                self.useful += share

    def settle(self, row: Generation, *, completed: bool) -> None:
        """It is over for ``row``: learn from it, or estimate what it would have taken."""
        row.settled = True
        if completed:
            self._completed += 1
            self._completed_tokens += row.arrived
        elif row.reader.cancelled:
            seconds = self._seconds_left(row)
            row.reader.spare(seconds)
            self.saved += seconds

    def _seconds_left(self, row: Generation) -> float:
        """Of the rest of its prompt, and of as many tokens as texts have on average, if it may have so many."""
        tokens = float(row.settings.max_tokens)
        if self._completed:
            tokens = min(tokens, self._completed_tokens / self._completed)
        seconds = 0.0
        if self._fed:
            seconds += (len(row.prompt) - row.fed) * self._fed_seconds / self._fed
        if self._made:
            seconds += max(tokens - max(row.made, 1), 0.0) * self._made_seconds / self._made
        return seconds
