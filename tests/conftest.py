import gc
import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

from triton_trio.testing.fixtures import serve as serve


def pytest_configure(config: pytest.Config) -> None:
    """Tests load the same small models again and again: one run compiles a program once, its child processes included.

    In the environment, for JAX reads it when it is imported.  A directory of its own for each run, so that the first run
    and the tenth do the same.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        programs = tempfile.TemporaryDirectory(prefix="jax-programs-", ignore_cleanup_errors=True)
        config.add_cleanup(programs.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
        config.add_cleanup(lambda: os.environ.pop("JAX_COMPILATION_CACHE_DIR", None))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection needs to look at it, and tests that wait for one are many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line configures logging for its process; here the process is everybody's."""
    logger = logging.getLogger("triton_trio")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
