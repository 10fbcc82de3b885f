"""Pytest fixtures; in a ``conftest.py``: ``from triton_trio.testing.fixtures import *``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from ..server import InferenceServer
from .models import open_test_server

__all__ = ["serve"]

Serve = Callable[..., AbstractAsyncContextManager[InferenceServer]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """:func:`~triton_trio.testing.open_test_server` in a directory of the test's own."""
    return partial(open_test_server, tmp_path)
