"""(f) What checkpoints cost, and what they buy, on a device that does not need the host's cores.

The emulated device of :mod:`bench.emulated` is served by the JAX backend as it is: real device thread, real dispatch, real
cancels through ``model.infer``.  One step is one chunk.  *Lost* is the share of the time between two operations of the device,
by its own clock, less the same of a single program with all the steps.  *Idle* is from the cancel to the end of the last
operation, *resumed* until the execution's task runs again and the instance is free.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import trio

from triton_trio import open_server
from triton_trio.model import Model

from .emulated import EmulatedDevice, write_model
from .harness import RESULTS, machine, percentile, save, table

TARGETS = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
#: What is claimed of the default, and of late enqueue with a chunk that is half as long again.
CLAIMS = ((2.0, False), (3.0, True))
LOST, RESUMED = 2.5, 5.0  #: percent, ms


class Releases(logging.Handler):
    """Hears when the device has let go of a cancelled request: the server's line says after how many milliseconds."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.latest = 0.0
        self.event = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.latest = record.__dict__["device_ms_after_cancel"]
        self.event.set()


def name_of(target: float, late: bool) -> str:
    return f"{'late' if late else 'window'}_{target:g}"


async def run_steps(model: Model, steps: int) -> None:
    await model.infer({"STEPS": np.full((1, 1), steps, np.float32)})


async def cancelled(model: Model, device: EmulatedDevice, releases: Releases, after: float) -> tuple[float, float]:
    """Milliseconds from a cancel until the device is idle, and until the execution's task has resumed."""
    device.reset()
    releases.event = trio.Event()
    with trio.move_on_after(after) as scope:
        await run_steps(model, 1_000_000)
    with trio.fail_after(10):
        await releases.event.wait()
    # As the member's clock has it: when the cancel reached it, a few µs after the deadline.
    cancelled_at = trio.current_time() - releases.latest / 1e3
    offset = trio.current_time() - time.perf_counter()
    idle = device.times()[1][-1] + offset - cancelled_at
    assert scope.cancelled_caught
    return max(float(idle), 0.0) * 1e3, releases.latest


async def measure(folder: Path, seconds: float, rounds: int, cancels: int) -> tuple[float, list[dict[str, object]]]:
    device = EmulatedDevice(folder)
    cells = [(target, late) for target in TARGETS for late in (False, True)]
    root = folder / "models"
    for target, late in cells:
        write_model(
            root,
            name_of(target, late),
            step_ms=target,
            ladder="1",
            target_chunk_ms=f"{1.5 * target:g}",
            late_enqueue=str(late).lower(),
        )
    write_model(root, "unchunked", step_ms=2, ladder="256", target_chunk_ms="10000", warmup="false")
    releases = Releases()
    logger = logging.getLogger("triton_trio.cancel")
    logger.addHandler(releases)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    lost: dict[tuple[float, bool], list[float]] = {cell: [] for cell in cells}
    alone = []
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    async with open_server(root) as server:
        for _ in range(rounds):
            device.reset()
            await run_steps(server.model("unchunked"), 256)
            alone.append(100 * device.idle_share())
            for target, late in cells:
                device.reset()
                await run_steps(server.model(name_of(target, late)), max(round(seconds / target * 1e3), 20))
                lost[target, late].append(100 * device.idle_share())
        baseline = percentile(alone, 50)
        for target, late in cells:
            model = server.model(name_of(target, late))
            ends = [
                await cancelled(model, device, releases, 0.02 + 0.001 * target * (2 + rng.random()))
                for _ in range(cancels)
            ]
            idle, resumed = [end[0] for end in ends], [end[1] for end in ends]
            rows.append(
                {
                    "chunk_ms": target,
                    "late_enqueue": late,
                    "lost_percent": round(percentile(lost[target, late], 50) - baseline, 2),
                    "idle_p50_ms": round(percentile(idle, 50), 2),
                    "idle_p99_ms": round(percentile(idle, 99), 2),
                    "resumed_p50_ms": round(percentile(resumed, 50), 2),
                    "resumed_p99_ms": round(percentile(resumed, 99), 2),
                    "resumed_max_ms": round(max(resumed), 2),
                }
            )
    return baseline, rows


def verdicts(rows: list[dict[str, object]]) -> list[str]:
    said = []
    for target, late in CLAIMS:
        (row,) = (row for row in rows if (row["chunk_ms"], row["late_enqueue"]) == (target, late))
        holds = float(str(row["lost_percent"])) <= LOST and float(str(row["resumed_p99_ms"])) <= RESUMED
        said.append(
            f"{'PASS' if holds else 'FAIL'}: chunks of {target:g} ms{' with late enqueue' if late else ' (the default)'}: "
            f"{row['lost_percent']}% lost (at most {LOST}), cancel to resumed p99 {row['resumed_p99_ms']} ms "
            f"(at most {RESUMED:g})"
        )
    return said


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Lost throughput and cancel latency against the time of a chunk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for late, colour, label in ((False, "tab:blue", "one queued"), (True, "tab:orange", "late enqueue")):
        mine = [row for row in rows if row["late_enqueue"] is late]
        chunk = [row["chunk_ms"] for row in mine]
        left.plot(chunk, [row["lost_percent"] for row in mine], "o-", color=colour, label=label)
        right.plot(chunk, [row["resumed_p50_ms"] for row in mine], "o-", color=colour, label=f"{label}, p50")
        right.plot(chunk, [row["resumed_p99_ms"] for row in mine], "o--", color=colour, label=f"{label}, p99")
    left.axhline(LOST, color="grey", linewidth=0.8)
    right.axhline(RESUMED, color="grey", linewidth=0.8)
    right.plot(TARGETS, [2 * target for target in TARGETS], ":", color="black", label="two chunks")
    for axes, what in ((left, "throughput lost, %"), (right, "cancel to resumed, ms")):
        axes.set(xscale="log", yscale="log", xlabel="time of a chunk, ms", ylabel=what)
        axes.set_xticks(TARGETS, [f"{target:g}" for target in TARGETS])
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="of device time for each cell and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cancels", type=int, default=300)
    args = parser.parse_args()
    before = machine() | {"device": f"emulated, on {jax.devices()[0]}"}
    with tempfile.TemporaryDirectory() as folder:
        baseline, rows = trio.run(measure, Path(folder), args.seconds, args.rounds, args.cancels)
    RESULTS.mkdir(exist_ok=True)
    plot(rows, RESULTS / "checkpoints.png")
    said = verdicts(rows)
    text = (
        f"One step is one chunk; {args.cancels} cancels a line; median of {args.rounds} alternating rounds of "
        f"{args.seconds:g} s. A single program with all the steps is idle between them for {baseline:.2f}%, which is taken "
        "off.\n\n"
        + table(
            ["chunk ms", "enqueue", "lost %", "idle p50 ms", "p99", "resumed p50 ms", "p99", "max"],
            [
                ["late" if value is True else "at once" if value is False else value for value in row.values()]
                for row in rows
            ],
        )
        + "\n\n"
        + "\n".join(f"- {line}" for line in said)
        + "\n\n![chunk time, overhead, latency](checkpoints.png)"
    )
    save("checkpoints", "python -m bench checkpoints", {"baseline_percent": baseline, "rows": rows}, text, before)


if __name__ == "__main__":
    main()
