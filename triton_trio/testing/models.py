"""Model repositories and servers for a test, in one call each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from ..server import InferenceServer, open_server
from .quiescent import assert_quiescent
from .scripted import ScriptedBackend

if TYPE_CHECKING:
    from ..backends import Backend


def scripted_config(
    *,
    max_batch_size: int = 0,
    batching: str | None = None,
    sequences: str | None = None,
    instances: int = 1,
    decoupled: bool = False,
    dims: Sequence[int] = (2,),
    more: str = "",
) -> str:
    """A config.pbtxt for :class:`ScriptedBackend`: ``INPUT0`` and ``OUTPUT0``, FP32.

    Args:
      batching: the fields of ``dynamic_batching``; None for the default scheduler.
      sequences: the fields of ``sequence_batching``, instead.
      more: further text.
    """
    shape = ", ".join(map(str, dims))
    lines = [
        'backend: "scripted"',
        f"max_batch_size: {max_batch_size}",
        f'input [{{ name: "INPUT0", data_type: TYPE_FP32, dims: [ {shape} ] }}]',
        f'output [{{ name: "OUTPUT0", data_type: TYPE_FP32, dims: [ {shape} ] }}]',
        f"instance_group [{{ count: {instances}, kind: KIND_CPU }}]",
    ]
    if batching is not None:
        lines.append(f"dynamic_batching {{ {batching} }}")
    if sequences is not None:
        lines.append(f"sequence_batching {{ {sequences} }}")
    if decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    return "\n".join([*lines, more])


def model_repository(root: Path, models: Mapping[str, str], *, versions: Sequence[int] = (1,)) -> Path:
    """Write a repository: the text of a config.pbtxt by model name, and empty version directories.  Returns ``root``.

    Blocking, as the file system is; a test may call it from an async function.
    """
    for name, config in models.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for version in versions:
            (root / name / str(version)).mkdir(exist_ok=True)
        (root / name / "config.pbtxt").write_text(config, encoding="utf-8")
    return root


@asynccontextmanager
async def open_test_server(
    root: Path,
    models: Mapping[str, str],
    backend: Backend | None = None,
    *,
    versions: Sequence[int] = (1,),
    limit: float = 100.0,
    idle_sequences: bool = False,
    **options: Any,
) -> AsyncIterator[InferenceServer]:
    """A server on ``models``, with ``backend`` under the name ``scripted``; the test fails if it does not end quiescent.

    Args:
      root: an empty directory (``tmp_path``) for the repository.
      models: see :func:`model_repository`.
      backend: default: a :class:`ScriptedBackend` that answers at once.
      limit: after so many seconds the block hangs, and fails.  With a clock that jumps that takes no time, but a block
        which waits for a thread (to load a model, say) needs ``math.inf`` then.
      idle_sequences: whether sequences may be left that nobody has ended.
      options: for :func:`triton_trio.open_server`.

    **Cancellation:** as :func:`triton_trio.open_server`.
    """
    model_repository(root, models, versions=versions)
    scripted = backend or ScriptedBackend(automatic=True)
    async with open_server(root, backends={"scripted": lambda: scripted}, **options) as server:
        with trio.fail_after(limit):
            yield server
            await trio.testing.wait_all_tasks_blocked()
            assert_quiescent(server, idle_sequences=idle_sequences)
    if isinstance(scripted, ScriptedBackend):
        assert (scripted.open_models, scripted.open_instances) == (0, 0), "a model or an instance was not closed"
