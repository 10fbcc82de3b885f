"""A part of the live tree: some models and the connections, without the tasks that are always there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_SHOWN = ("queue:", "instance", "batch", "waits for", "sequence", "slot", "connection", "rpc", "request", "step")
_SERVICE = "/inference.GRPCInferenceService/"


@dataclass
class _Node:
    name: str
    children: list[_Node] = field(default_factory=list)


def excerpt(tree: str, *models: str) -> str:
    """What ``tree`` (see :func:`triton_trio.observe.tree`) says of ``models`` and of the clients, drawn as a tree for each."""
    shown = (*(f"model {model}:" for model in models), "grpc frontend")
    top = [node for node in _walk(_parse(tree)) if node.name.startswith(shown)]
    return "\n".join(line for node in top for line in _draw(_prune(node)))


def _parse(tree: str) -> _Node:
    path = [_Node("")]
    for line in tree.splitlines():
        name = line.lstrip(" │├└─")
        depth = (len(line) - len(name)) // 4
        del path[depth + 1 :]
        path[-1].children.append(_Node(name.replace(_SERVICE, "")))
        path.append(path[-1].children[-1])
    return path[0]


def _walk(node: _Node) -> Iterator[_Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _prune(node: _Node) -> _Node:
    children = [_prune(child) for child in node.children if child.name.startswith(_SHOWN)]
    if (
        node.name.startswith(("rpc", "instance", "sequence", "step"))
        and len(children) == 1
        and not children[0].children
    ):
        return _Node(f"{node.name} › {children[0].name}")  # one line for the two: nothing else can be there
    return _Node(node.name, children)


def _draw(node: _Node) -> Iterator[str]:
    yield node.name
    for child in node.children:
        last = child is node.children[-1]
        head, *rest = _draw(child)
        yield ("└── " if last else "├── ") + head
        for line in rest:
            yield ("    " if last else "│   ") + line
