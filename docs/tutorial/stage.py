"""What the lessons share: a simulated clock, and ``say``, which prints the time before each line.

Time is simulated (Trio's ``MockClock``): when every task waits, the clock jumps to the next thing that is due.  So a lesson
takes no time, and prints the same on every machine.
"""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
import trio.testing

MODELS = Path(__file__).parent / "models"

_began = 0.0
_noted: list[tuple[float, str]] = []


def say(text: str) -> None:
    """Print ``text``, after what was noted before."""
    for time, line in sorted(_noted) + [(trio.current_time(), line) for line in text.splitlines()]:
        print(f"{time - _began:5.2f} s  {line}")
    _noted.clear()


def note(text: str) -> None:
    """For tasks that go on at the same moment, in whatever order: their lines are printed in alphabetical order."""
    _noted.append((trio.current_time(), text))


class NoteCancelled(logging.Handler):
    """Notes the server's log of cancelled requests, in short."""

    def emit(self, record: logging.LogRecord) -> None:
        of = vars(record)
        note(f"   log: request '{of['request_id']}' of {of['model']} cancelled while {of['stage']}: {of['reason']}")


def note_cancelled() -> None:
    log = logging.getLogger("triton_trio.cancel")
    log.addHandler(NoteCancelled())
    log.setLevel(logging.INFO)


def run(lesson: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        global _began
        _began = trio.current_time()
        await lesson()
        say("")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
