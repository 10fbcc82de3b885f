"""Laws that can be read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import triton_trio

PACKAGE = Path(triton_trio.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "_pb" not in path.parts)
SERVER = [path for path in SOURCES if not {"demo", "testing"} & set(path.relative_to(PACKAGE).parts)]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def started(path: Path) -> Iterator[tuple[int, ast.Call]]:
    """The places where a task is started in a nursery."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr == "start_soon" or (node.func.attr == "start" and "nursery" in owner):
                yield node.lineno, node


@pytest.mark.parametrize("path", SERVER, ids=name_of)
def test_law_15_every_task_has_a_name_and_an_owner(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, call in started(path):
        where = f"{path}:{number}"
        assert any(keyword.arg == "name" for keyword in call.keywords), f"{where}: a task without a name"
        assert comment_above(lines, number), f"{where}: say above it who ends the task, and what cancels it"


def comment_above(lines: list[str], number: int) -> str:
    """The comment above a line, or above the loop or the run of such lines that it is in."""
    above = number - 2
    while not lines[above].lstrip().startswith("#") and ("start_soon" in lines[above] or " for " in lines[above]):
        above -= 1
    comment = ""
    while lines[above].lstrip().startswith("#"):
        comment = lines[above].strip() + comment
        above -= 1
    return comment


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_law_14_no_asyncio_in_the_source(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )  # fmt: skip
        assert not any(name.split(".")[0] == "asyncio" for name in names), f"{path}:{node.lineno}"


def test_law_14_nor_in_the_process() -> None:
    code = "import sys, triton_trio, triton_trio.cli; print(*[m for m in sys.modules if m.split('.')[0] == 'asyncio'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_law_2_there_is_one_is_cancelled_and_nobody_in_the_server_reads_it() -> None:
    defined, read = [], []
    for path in SERVER:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "is_cancelled":
                defined.append(name_of(path))
            if isinstance(node, ast.Attribute) and node.attr == "is_cancelled":
                read.append(name_of(path))
    assert defined == ["request.py"]
    assert read == []


@pytest.mark.parametrize("path", SERVER, ids=name_of)
def test_law_12_every_shield_has_a_deadline_or_says_what_bounds_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        if "shield" in keywords and ast.unparse(node.func).endswith("CancelScope"):
            bounded = keywords & {"deadline", "relative_deadline"} or "hielded" in comment_above(lines, node.lineno)
            assert bounded, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_dependencies_point_one_way(path: Path) -> None:
    """Schedulers know neither gRPC nor JAX nor models; backends know neither frontends nor schedulers."""
    forbidden = {
        "scheduling": {"grpc", "backends", "model", "instance", "server", "repository"},
        "backends": {"grpc", "scheduling", "model", "instance", "server", "repository"},
        "config": {"grpc", "scheduling", "backends", "model", "instance", "server", "repository", "request"},
    }.get(path.relative_to(PACKAGE).parts[0], set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(PACKAGE).parts[: -node.level]
            target = (*package, *(node.module or "").split("."))
            assert target[0] not in forbidden, f"{path}:{node.lineno}"
