"""Backends: what runs behind a model."""

from .base import Backend as Backend
from .base import BackendInstance as BackendInstance
from .base import BackendModel as BackendModel
from .base import ModelContext as ModelContext
from .base import Placement as Placement
