"""JAX's persistent compilation cache: what one process has compiled, the next one reads from a directory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from ...errors import InvalidArgument

_HIT = "/jax/compilation_cache/cache_hits"


def use_compilation_cache(directory: str) -> dict[str, str]:
    """Keep what is compiled in ``directory``, which is made if needed.  For the whole process; idempotent.

    Returns:
      Environment variables that do the same for another process.

    Raises:
      InvalidArgument: nothing can be written there.
    """
    path = Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InvalidArgument(f"compilation_cache_dir '{directory}' cannot be made: {exc.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InvalidArgument(f"compilation_cache_dir '{directory}' cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(path))  # type: ignore[no-untyped-call]
    # By default only what took a second is kept; a model of twenty programs of half a second would be compiled anew each time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # type: ignore[no-untyped-call]
    # JAX looks for a cache once, at the first compilation of the process, which may have been long ago.
    compilation_cache.reset_cache()
    return {"JAX_COMPILATION_CACHE_DIR": str(path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@dataclass(slots=True)
class Hits:
    count: int = 0


class CacheHits:
    """Counts programs that were found in the cache.  JAX tells so in the thread that compiles."""

    def __init__(self) -> None:
        self._current = threading.local()
        jax.monitoring.register_event_listener(self._heard)

    def _heard(self, event: str, **_: Any) -> None:
        hits: Hits | None = getattr(self._current, "hits", None)
        if hits is not None and event == _HIT:
            hits.count += 1

    @contextmanager
    def counted(self) -> Iterator[Hits]:
        """Those that this thread finds in the block."""
        before, self._current.hits = getattr(self._current, "hits", None), Hits()
        try:
            yield self._current.hits
        finally:
            self._current.hits = before


CACHE_HITS = CacheHits()  # one, because JAX's listeners are the process's
