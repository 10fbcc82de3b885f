"""Plots of what the benchmarks have measured, as SVG.  Like the timelines, they take the reader's colours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape
from math import log
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
WIDTH, HEIGHT, TOP, BOTTOM, PANEL, GAP, LEFT = 820, 330, 48, 44, 310, 80, 62

STYLE = """
  svg { --paper: #ffffff; --line: #d1d9e0; --text: #1f2328; --faint: #59636e; --early: #0969da; --late: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --line: #30363d; --text: #f0f6fc; --faint: #9198a1; --early: #58a6ff; --late: #f0883e; }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--text); }
  .faint { fill: var(--faint); font-size: 11.5px; }
  .paper { fill: var(--paper); stroke: var(--line); }
  .grid { stroke: var(--line); fill: none; }
  .rule { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 0.1 4; stroke-linecap: round; fill: none; }
  .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
  .worst { stroke-dasharray: 6 4; }
  .early { stroke: var(--early); } .late { stroke: var(--late); }
  .dot { fill: var(--paper); stroke-width: 2; }
"""


class Panel:
    """Two logarithmic axes; ``x`` is the time of a chunk."""

    def __init__(self, left: float, title: str, xs: list[float], ticks: list[float]) -> None:
        self.left, self.title, self.xs, self.ticks = left, title, xs, ticks

    def x(self, value: float) -> float:
        return round(self.left + PANEL * _share(value, self.xs), 1)

    def y(self, value: float) -> float:
        bottom = HEIGHT - BOTTOM
        return round(bottom - (bottom - TOP) * min(max(_share(value, self.ticks), 0), 1), 1)

    def axes(self) -> Iterator[str]:
        bottom, right = HEIGHT - BOTTOM, self.left + PANEL
        yield f'<text x="{self.left}" y="{TOP - 22}">{escape(self.title)}</text>'
        for value in self.xs:
            x = self.x(value)
            yield f'<path class="grid" d="M{x} {TOP}V{bottom + 4}"/>'
            yield f'<text class="faint" x="{x}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
        for value in self.ticks:
            y = self.y(value)
            yield f'<path class="grid" d="M{self.left - 4} {y}H{right}"/>'
            yield f'<text class="faint" x="{self.left - 9}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        middle = self.left + PANEL / 2
        yield f'<text class="faint" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">time of a chunk, ms</text>'

    def curve(self, ys: list[float], kind: str, *, worst: bool = False) -> Iterator[str]:
        points = [(self.x(x), self.y(y)) for x, y in zip(self.xs, ys, strict=True)]
        path = "L".join(f"{x} {y}" for x, y in points)
        yield f'<path class="curve {kind}{" worst" if worst else ""}" d="M{path}"/>'
        for x, y in points:
            shape = (
                f'<circle cx="{x}" cy="{y}" r="3.5"' if kind == "early" else f'<path d="M{x - 4} {y}l4 -4l4 4l-4 4z"'
            )
            yield f'{shape} class="dot {kind}"/>'

    def rule(self, of: Callable[[float], float], name: str) -> Iterator[str]:
        first, last = self.xs[0], self.xs[-1]
        yield f'<path class="rule" d="M{self.x(first)} {self.y(of(first))}L{self.x(last)} {self.y(of(last))}"/>'
        yield f'<text class="faint" x="{self.x(last) + 6}" y="{self.y(of(last)) + 4}">{name}</text>'


def checkpoints() -> str:
    """Throughput lost and time to cancel, against the time of a chunk; bench/checkpoints.py has measured them."""
    rows = json.loads((RESULTS / "checkpoints.json").read_text())["figures"]["rows"]
    xs = sorted({row["chunk_ms"] for row in rows})
    lost = Panel(LEFT, "throughput lost, %", xs, [0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    cancel = Panel(LEFT + PANEL + GAP, "from the cancel until the device has let go, ms", xs, [1, 2, 5, 10, 20, 50])
    body = [
        *lost.axes(),
        *cancel.axes(),
        *cancel.rule(lambda x: 2 * x, "2 chunks"),
        *cancel.rule(lambda x: x, "1 chunk"),
    ]
    for kind, late in (("early", False), ("late", True)):
        mine = sorted((row for row in rows if row["late_enqueue"] is late), key=lambda row: row["chunk_ms"])
        body += lost.curve([row["lost_percent"] for row in mine], kind)
        body += cancel.curve([row["resumed_p99_ms"] for row in mine], kind, worst=True)
        body += cancel.curve([row["resumed_p50_ms"] for row in mine], kind)
    x, y = LEFT + 14, HEIGHT - BOTTOM - 34
    for kind, name in (("early", "one queued"), ("late", "one queued, late")):
        body.append(
            f'<path class="curve {kind}" d="M{x} {y}h22"/><text class="faint" x="{x + 29}" y="{y + 4}">{name}</text>'
        )
        y += 18
    x, y = cancel.left + 14, TOP + 16
    for worst, name in (("", "half of the cancels"), (" worst", "99 of 100")):
        body.append(
            f'<path class="curve early{worst}" d="M{x} {y}h22"/><text class="faint" x="{x + 29}" y="{y + 4}">{name}</text>'
        )
        y += 18
    title = "What chunks cost, and what they buy: throughput lost and time to cancel, against the time of a chunk"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _share(value: float, scale: list[float]) -> float:
    """Where ``value`` is between the ends of a logarithmic scale."""
    return (log(max(value, scale[0])) - log(scale[0])) / (log(scale[-1]) - log(scale[0]))
