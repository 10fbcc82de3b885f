"""Stop strings: text as it comes, up to the first of them."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Holds back what may be the beginning of a stop string, and no more.

    Args:
      stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False  #: one was found: the text is over

    def add(self, text: str) -> str:
        """What can be shown of the text so far and was not shown before."""
        if self.stopped:
            return ""
        self._held += text
        # The one that is complete first; of two that begin together, the shorter.
        found = min(((at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            shown, self._held = self._held[: found[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """No more text comes: what was held back was no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
