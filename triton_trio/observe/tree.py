"""The live tree of named tasks and scopes, drawn from Trio's public introspection.

Every task has a name that says what it is for, so the printed tree *is* the architecture: a request below the task that
waits for it, that below its connection; a batch below its instance, that below its model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakKeyDictionary, WeakMethod

import trio

#: What there is to say of some tasks: pairs of a task and a line to draw below it.
Notes = Callable[[], Iterable[tuple[trio.lowlevel.Task, str]]]

_Drawn = defaultdict[trio.lowlevel.Task, list[str]]

#: Nurseries that are drawn by name, with the notes of their owner on any task of the program; by a weak reference, for the
#: owner knows its nursery.
_named: WeakKeyDictionary[trio.Nursery, tuple[str, Callable[[], Notes | None]]] = WeakKeyDictionary()


def name_nursery(nursery: trio.Nursery, name: str, notes: Notes | None = None) -> None:
    """Draw ``nursery`` as a line of its own.

    ``notes``, a method of its owner, is asked whenever a tree is drawn.
    """
    _named[nursery] = (name, (lambda: None) if notes is None else WeakMethod(notes))


def tree(task: trio.lowlevel.Task | None = None) -> str:
    """The tasks below ``task`` (default: everything), a line each; ``✗`` marks what is in a cancelled nursery.

    Trio's own system tasks are left out.  Sync and side-effect free: call it from any task, at any moment.
    """
    root = trio.lowlevel.current_root_task()
    if root is None:
        return ""
    notes: _Drawn = defaultdict(list)
    for nursery in _nurseries_below(root):
        if nursery in _named and (ask := _named[nursery][1]()) is not None:
            for about, line in ask():
                notes[about].append(line)
    # The root task is Trio's; in its nurseries are system tasks and main.
    tasks = (
        [task]
        if task is not None
        else [
            child
            for nursery in root.child_nurseries
            for child in nursery.child_tasks
            if child.child_nurseries and "trio._core" not in child.name
        ]
    )
    return "\n".join(line for found in tasks for line in _lines(found, notes))


def _nurseries_below(task: trio.lowlevel.Task) -> Iterator[trio.Nursery]:
    for nursery in task.child_nurseries:
        yield nursery
        for child in nursery.child_tasks:
            yield from _nurseries_below(child)


def _lines(task: trio.lowlevel.Task, notes: _Drawn) -> Iterator[str]:
    yield _short(task.name)
    branches = [[line] for line in sorted(notes.get(task, ()), key=_natural)]
    yield from _branches(branches + _nurseries(task.child_nurseries, notes))


def _nurseries(nurseries: list[trio.Nursery], notes: _Drawn) -> list[list[str]]:
    """The branches of a task's nurseries: each is inside of the one before it."""
    if not nurseries:
        return []
    first, *inner = nurseries
    cross = " ✗" if first.cancel_scope.cancel_called else ""
    children = sorted(first.child_tasks, key=lambda child: _natural(_short(child.name)))
    branches = [list(_lines(child, notes)) for child in children]
    branches += _nurseries(inner, notes)
    if first in _named:
        return [[_named[first][0] + cross, *_branches(branches)]]
    for branch in branches[: len(children)]:
        branch[0] += cross
    return branches


def _branches(branches: list[list[str]]) -> Iterator[str]:
    for number, (head, *rest) in enumerate(branches, 1):
        last = number == len(branches)
        yield ("└── " if last else "├── ") + head
        for line in rest:
            yield ("    " if last else "│   ") + line


def _natural(name: str) -> list[str | int]:
    """Sorts ``client 10`` after ``client 9``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _short(name: str) -> str:
    # Unnamed tasks are called after their function, with its module path.
    short = name if " " in name else name.rsplit(".", 1)[-1]
    return "listener" if short == "_serve_one_listener" else short  # Trio starts it, and gives it no name
