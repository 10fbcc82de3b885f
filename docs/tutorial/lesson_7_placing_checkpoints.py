from collections import deque

import trio
from stage import run, say

from triton_trio.backends.jax.controller import ChunkController, LateEnqueue, program_seconds

STEPS, STEP = 1000, 0.1e-3  # the work: so many steps, and the seconds of one on the device
HANDOVER = 40e-6  # the device goes from one program to the next, if the next one is there
HOST = 400e-6  # a host that has slept wakes up, and dispatches
MARGIN = LateEnqueue(margin=700e-6)


class Device:
    """Runs programs one after another.  There is no way to stop one, so all of its future is known."""

    def __init__(self) -> None:
        self.idle_at = 0.0

    def dispatch(self, steps: int, step: float = STEP) -> tuple[float, float]:
        """Put a program behind what is there; returns when it begins and when it will have ended."""
        begins = max(trio.current_time(), self.idle_at + HANDOVER)
        self.idle_at = begins + steps * step
        return begins, self.idle_at


async def execute(steps: int, chunk: int, *, queued: int = 0, late: bool = False) -> None:
    """All steps, in programs of ``chunk``: one runs, and so many are queued behind it."""
    device = Device()
    out: deque[tuple[float, float]] = deque()
    try:
        while steps > 0 or out:
            while steps > 0 and len(out) <= queued:
                if late and out:
                    begins, ends = out[0]
                    await trio.sleep(MARGIN.hold(trio.current_time(), begins, expected=ends - begins))
                await trio.sleep(HOST)
                out.append(device.dispatch(min(chunk, steps)))
                steps -= chunk
            await trio.sleep_until(out.popleft()[1])
    finally:
        # Whoever leaves has left when the device is idle for him, and his memory is free.
        with trio.CancelScope(shield=True):
            await trio.sleep_until(device.idle_at)


async def measure(chunk: int, **how: int | bool) -> tuple[float, float]:
    """Throughput lost, percent, and the longest of 40 cancels, milliseconds."""
    began = trio.current_time()
    await execute(STEPS, chunk, **how)
    lost = (trio.current_time() - began) / (STEPS * STEP) - 1
    longest = 0.0
    for number in range(40):
        with trio.move_on_after(20e-3 + number * 1.01e-3) as scope:
            await execute(STEPS, chunk, **how)
        if scope.cancelled_caught:
            longest = max(longest, trio.current_time() - scope.deadline)
    return lost * 100, longest * 1e3


async def lesson() -> None:
    say("1. One program with all its steps, and a cancel after a tenth of it.")
    began = trio.current_time()
    with trio.move_on_after(10e-3):
        await execute(STEPS, STEPS)
    say(f"   cancelled after 10 ms; the device was free after {(trio.current_time() - began) * 1e3:.1f} ms")

    say("2. Cut into chunks. Lost: what all steps take longer. Cancel: until the device is free, at the worst.")
    ways = {"wait, then dispatch": {}, "one queued": {"queued": 1}, "one queued, late": {"queued": 1, "late": True}}
    say(f"   {'':18}" + "".join(f"{way:>23}" for way in ways))
    say(f"   {'steps':>6}{'chunk':>10}  " + f"{'lost':>12}{'cancel':>11}" * 3)
    for chunk in (5, 10, 20, 40, 100, 250):
        cells = [await measure(chunk, **how) for how in ways.values()]
        row = "".join(f"{lost:10.1f} %{longest:8.1f} ms" for lost, longest in cells)
        say(f"   {chunk:6}{chunk * STEP * 1e3:7.1f} ms  {row}")

    say("3. Nobody has to know how long a step takes. The server measures, and picks from the sizes it has compiled.")
    controller = ChunkController(target=2e-3, ladder=(1, 2, 4, 8, 16, 32))
    device, done = Device(), trio.current_time()
    for step, programs in ((0.1e-3, 5), (0.4e-3, 5), (0.1e-3, 25)):
        picked = []
        for _ in range(programs):
            picked.append(controller.pick())
            await trio.sleep(HOST)
            dispatched = trio.current_time()
            _, ended = device.dispatch(picked[-1], step)
            await trio.sleep_until(ended)
            controller.observe(picked[-1], program_seconds(ended, dispatched, previous_done=done))
            done = ended
        say(f"   a step takes {step * 1e3:.1f} ms: {' '.join(map(str, picked))}")


if __name__ == "__main__":
    run(lesson)
