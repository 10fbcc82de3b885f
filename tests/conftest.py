import logging
from collections.abc import Iterator

import pytest

from triton_trio.testing.fixtures import serve as serve


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line configures logging for its process; here the process is everybody's."""
    logger = logging.getLogger("triton_trio")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
