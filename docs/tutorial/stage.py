"""What the lessons share: a simulated clock, and ``say``, which prints the time before each line.

Time is simulated (Trio's ``MockClock``): when every task waits, the clock jumps to the next thing that is due.  So a lesson
takes no time, and prints the same on every machine.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
import trio.testing

MODELS = Path(__file__).parent / "models"

_began = 0.0


def say(text: str) -> None:
    for line in text.splitlines():
        print(f"{trio.current_time() - _began:5.2f} s  {line}")


def run(lesson: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        global _began
        _began = trio.current_time()
        await lesson()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
