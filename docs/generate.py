"""Writes what the docs show but nobody should type: recorded output, code listings, diagrams, pictures of runs, plots.

``python docs/generate.py`` rewrites the parts of the pages between ``<!-- begin: NAME ARGUMENT -->`` and ``<!-- end -->``, and
the pictures that they show; ``--check`` only says what is out of date, and is what the test runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import plots
from timeline.draw import draw
from timeline.record import record
from timeline.runs import RUNS

from triton_trio.lifecycle import TRANSITIONS, Outcome

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- begin: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def life_cycle(_: str) -> str:
    """The transition table as a Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> received"]
    for stage, events in TRANSITIONS.items():
        by_target: dict[str, list[str]] = {}
        for event, target in events.items():
            by_target.setdefault(target.value, []).append(event.value)
        lines += [f"    {stage.value} --> {target}: {', '.join(names)}" for target, names in by_target.items()]
    lines += [f"    {outcome.value} --> [*]" for outcome in Outcome]
    return "\n".join([*lines, "```"])


def transition_table(_: str) -> str:
    """The same as a table: stages down, events across."""
    events = list(dict.fromkeys(event for row in TRANSITIONS.values() for event in row))
    lines = [
        "| in stage | " + " | ".join(f"`{event.value}`" for event in events) + " |",
        "|---" * (len(events) + 1) + "|",
    ]
    for stage, row in TRANSITIONS.items():
        cells = [row[event].value if event in row else "" for event in events]
        lines.append(f"| **{stage.value}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def code(path: str) -> str:
    return f"```python\n{(DOCS / path).read_text().strip()}\n```"


def output(path: str) -> str:
    """Run a program and record what it prints."""
    done = subprocess.run([sys.executable, DOCS / path], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise SystemExit(f"docs/{path} failed:\n{done.stderr}")
    return f"```text\n{done.stdout.rstrip()}\n```"


def picture(name: str) -> str:
    """Show the run ``name`` of timeline/runs.py; :func:`pictures` draws it."""
    return f"![{RUNS[name].title}](../images/{name}.svg)"


def pictures() -> Iterator[tuple[Path, str]]:
    for name, run in RUNS.items():
        yield DOCS / "images" / f"{name}.svg", draw(record(run.play), run.title)
    yield DOCS / "images" / "checkpoints.svg", plots.checkpoints()


def pages() -> Iterator[tuple[Path, str]]:
    paths = sorted(DOCS.rglob("*.md"))
    with ThreadPoolExecutor() as pool:  # they wait for the programs whose output they record
        yield from zip(paths, pool.map(lambda path: render(path.read_text()), paths), strict=True)


MAKERS: dict[str, Callable[[str], str]] = {
    "life-cycle": life_cycle,
    "transition-table": transition_table,
    "code": code,
    "output": output,
    "picture": picture,
}


def render(page: str) -> str:
    """``page`` with every generated block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{MAKERS[match[2]](match[3])}\n{match[4]}", page)


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for path, fresh in chain(pages(), pictures()):
        if not path.exists() or fresh != path.read_text():
            stale.append(path)
            if not check:
                path.write_text(fresh)
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
    if check and stale:
        print("run `make docs`")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
