"""The libraries of the extra ``llm``: imported when a model needs them, with a text that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from ....errors import Unavailable


def require(module: str) -> Any:
    """Raises :exc:`Unavailable` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        raise Unavailable(
            f"language models need the package '{exc.name}'; install triton-trio's extra: pip install 'triton-trio[llm]'"
        ) from None
