"""Backends: what runs behind a model."""

from __future__ import annotations

from collections.abc import Callable

from .availability import Availability as Availability
from .base import Backend as Backend
from .base import BackendInstance as BackendInstance
from .base import BackendModel as BackendModel
from .base import ModelContext as ModelContext
from .base import Placement as Placement


def _identity() -> Backend:
    from .identity import IdentityBackend

    return IdentityBackend()


def _jax() -> Backend:
    from .jax import JaxBackend

    return JaxBackend()


#: Makers of the built-in backends, by their name in config.pbtxt.  Imported when first needed: JAX takes a second.
DEFAULT_BACKENDS: dict[str, Callable[[], Backend]] = {"identity": _identity, "jax": _jax}
