"""The live tree of named tasks and scopes, drawn from Trio's public introspection.

Every task has a name that says what it is for, so the printed tree *is* the architecture: a request below its RPC,
below its connection; an instance below its model.
"""

from __future__ import annotations

import trio


def tree(task: trio.lowlevel.Task | None = None) -> str:
    """The tasks below ``task`` (default: everything), a line each, indented; ``✗`` marks a cancelled nursery scope.

    Trio's own system tasks are left out.  Sync and side-effect free: call it from any task, at any moment.
    """
    if task is None:
        root = trio.lowlevel.current_root_task()
        if root is None:
            return ""
        # The root task is Trio's; its first nursery holds system tasks and main.
        main = [child for nursery in root.child_nurseries for child in nursery.child_tasks if child.child_nurseries]
        return "\n".join(line for child in main for line in _lines(child, 0) if "trio._core" not in child.name)
    return "\n".join(_lines(task, 0))


def _lines(task: trio.lowlevel.Task, depth: int) -> list[str]:
    lines = ["  " * depth + _short(task.name)]
    for nursery in task.child_nurseries:
        cancelled = nursery.cancel_scope.cancel_called
        children = sorted(nursery.child_tasks, key=lambda child: _short(child.name))
        for child in children:
            below = _lines(child, depth + 1)
            if cancelled:
                below[0] += " ✗"
            lines += below
    return lines


def _short(name: str) -> str:
    # Unnamed tasks are called after their function, with its module path.
    return name if " " in name else name.rsplit(".", 1)[-1]
