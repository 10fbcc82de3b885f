"""What the benchmarks share: servers in processes of their own, CPU time from /proc, percentiles, results on disk.

Every comparison is made in one run on one machine, in alternating rounds, and reported as a ratio: absolute figures of a shared
machine mean little.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
TICK = os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-th percentile by nearest rank; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))]


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    return {
        "n": len(values),
        "p50": round(percentile(values, 50), digits),
        "p90": round(percentile(values, 90), digits),
        "p99": round(percentile(values, 99), digits),
        "max": round(max(values, default=float("nan")), digits),
    }


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants."""
    children: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry))
            used[int(entry)] = int(fields[11]) + int(fields[12])
    total, todo = 0, [pid]
    while todo:
        process = todo.pop()
        total += used.get(process, 0)
        todo += children.get(process, [])
    return total / TICK


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Server:
    """A server process that printed ``READY {json}`` and answers JSON lines on its standard input."""

    name: str
    process: subprocess.Popen[str]
    info: dict[str, Any]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.info["port"])

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def serving(name: str, *argv: str, python: str = sys.executable) -> Iterator[Server]:
    """Run ``python argv...`` from bench/ until the block ends; its errors go to our standard error."""
    process = subprocess.Popen(
        [python, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=BENCH.parent
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("READY "):
                yield Server(name, process, json.loads(line[6:]))
                return
        raise SystemExit(f"{name} ended before it was ready (exit status {process.wait()})")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, command: str, figures: dict[str, Any], text: str, before: dict[str, Any]) -> None:
    """Write results/NAME.json and results/NAME.md, and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    record = {"benchmark": name, "command": command, "machine": before, "figures": figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    head = (
        f"# {name}\n\n`{command}`, {before['when']}, {before['cores']} × {before['cpu']}, Python {before['python']}, "
        f"load before {before['load_before']:.2f}\n\n"
    )
    (RESULTS / f"{name}.md").write_text(head + text + "\n")
    print(text, flush=True)
