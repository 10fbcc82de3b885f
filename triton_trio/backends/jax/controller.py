"""How many steps to put into the next chunk, so that a chunk takes about as long as a cancel may."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


def program_seconds(done: float, dispatched: float, previous_done: float) -> float:
    """Device time of one program of a queue: from when the device could start it until it was done.

    Counting from ``previous_done`` alone would take our own late dispatch for device time: the estimate would grow,
    chunks would shrink, dispatch would be late more often, and the estimate would run away.
    """
    return max(0.0, done - max(previous_done, dispatched))


@dataclass(frozen=True, slots=True)
class LateEnqueue:
    """When to queue a program behind the one that runs: so late that the device just does not run dry.

    What is queued cannot be taken back, what is not yet queued can.  So a program that is queued ``margin`` before the
    running one's predicted end is one that a cancel until then keeps off the device.  The margin is how late the host
    may be: raised by half when it was not enough, lowered by a hundredth when it was, it stays near what this host needs.
    Where that is more than a program takes, the next one is queued at once, as if there were no margin.
    """

    margin: float = 1e-3  #: seconds

    LATE = 1.5
    LATE_MORE = 50e-6
    IN_TIME = 0.99

    def hold(self, now: float, started: float, expected: float | None) -> float:
        """Seconds to wait before the next program is queued, with one running since ``started``.

        ``expected`` is how long that one will take at least: too low queues early, which costs a cancel; too high lets
        the device run dry, which costs everybody.  None: nobody knows, so do not wait.
        """
        return 0.0 if expected is None else max(0.0, started + expected - self.margin - now)

    def queued(self, *, late: bool) -> LateEnqueue:
        """After a program was queued; ``late``: the one before it had ended by then."""
        return LateEnqueue(self.margin * self.LATE + self.LATE_MORE if late else self.margin * self.IN_TIME)


class ChunkController:
    """Picks K from a ladder of compiled chunk sizes: the largest whose steps fit into ``target`` seconds.

    The time of a step is a moving average that believes a slow-down at once, because the target bounds the cancel
    latency, and a speed-up slowly, because it only costs throughput.  One controller serves one set of programs (model,
    device, bucket).  Written by the device thread only; others may read.

    Args:
      target: seconds.
      ladder: chunk sizes, in steps.
    """

    SLOWER = 0.5
    FASTER = 0.2
    #: Measurements before a verdict: the first programs of a process are slower than those that follow.
    ENOUGH = 8

    def __init__(self, target: float, ladder: Sequence[int]) -> None:
        if not ladder or min(ladder) < 1 or target <= 0:
            raise ValueError(f"need a positive target and chunk sizes of 1 or more, got {target!r} and {ladder!r}")
        self.target = target
        self.ladder = tuple(sorted(set(ladder)))
        self.step_seconds: float | None = None  #: None until a chunk was measured
        self.k = self.ladder[0]
        #: Even the smallest chunk takes longer than the target.  Judged by the median, for that the machine was busy for a
        #: moment says nothing of the model; False as long as too few were measured.
        self.too_slow = False
        self._latest: deque[float] = deque(maxlen=2 * self.ENOUGH)  #: seconds of a step

    def pick(self, left: int | None = None) -> int:
        """Steps for the next chunk; at most ``left`` (steps that can still be useful) if the ladder goes as low."""
        if left is None or self.k <= left:
            return self.k
        return max((k for k in self.ladder if k <= left), default=self.ladder[0])

    def expect(self, steps: int) -> float | None:
        """The least that a chunk of ``steps`` takes, by the latest 16: whatever disturbs a chunk makes it longer."""
        return steps * min(self._latest) if self._latest else None

    def observe(self, steps: int, seconds: float, *, at_most: bool = False) -> None:
        """A chunk of ``steps`` occupied the device for ``seconds``.

        ``at_most``: not alone.  That says nothing of a slow step, but something of a quick one; and where requests join
        with every chunk, nothing else would be heard of it.
        """
        step = seconds / steps
        if not at_most:
            self._latest.append(step)
        elif self.step_seconds is not None and step >= self.step_seconds:
            return
        if self.step_seconds is None:
            self.step_seconds = step
        else:
            weight = self.SLOWER if step > self.step_seconds else self.FASTER
            self.step_seconds += weight * (step - self.step_seconds)
        self.k = max((k for k in self.ladder if k * self.step_seconds <= self.target), default=self.ladder[0])
        self.too_slow = len(self._latest) >= self.ENOUGH and self.ladder[0] * median(self._latest) > self.target
