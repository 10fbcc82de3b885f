"""Configurations and statistics as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import make_dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any

from ...config import ModelConfig
from ...config.model_config import MESSAGE


def write_config(config: ModelConfig) -> str:
    """The clients' message; :func:`read_config` adds what a sequence batcher adds."""
    data: bytes = config.message.SerializeToString()
    return data.decode("latin-1")


def read_config(written: str) -> ModelConfig:
    """As the backend sees it."""
    return ModelConfig.read(MESSAGE.FromString(written.encode("latin-1"))).backend_view()


def read_fields(kind: str, fields: Mapping[str, Any]) -> object:
    """A frozen object with the fields that ``statistics()`` had in the worker.

    Objects in it have become objects of the same kind, and mappings with other keys than names are mappings.
    """
    values = {name: _read_field(kind, value) for name, value in fields.items()}
    if not all(name.isidentifier() and not iskeyword(name) for name in (kind, *values)):
        return values
    return _frozen(kind, tuple(values))(**values)


def _read_field(kind: str, value: Any) -> Any:
    if isinstance(value, dict):
        return read_fields(kind, value)
    if isinstance(value, list):
        return tuple(_read_field(kind, each) for each in value)
    return value


@lru_cache(64)
def _frozen(kind: str, names: tuple[str, ...]) -> type:
    return make_dataclass(kind, names, frozen=True, slots=True)
