"""Configurations and statistics as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, make_dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any

from ...config import ModelConfig
from ...config.model_config import MESSAGE

_KIND = "class"  #: no field can have that name


def write_config(config: ModelConfig) -> str:
    """The clients' message; :func:`read_config` adds what a sequence batcher adds."""
    data: bytes = config.message.SerializeToString()
    return data.decode("latin-1")


def read_config(written: str) -> ModelConfig:
    """As the backend sees it."""
    return ModelConfig.read(MESSAGE.FromString(written.encode("latin-1"))).backend_view()


def write_statistics(value: object) -> object:
    """Dataclasses become mappings that know the names of their classes; what has no plain form becomes text."""
    if is_dataclass(value) and not isinstance(value, type):
        values = {field.name: write_statistics(getattr(value, field.name)) for field in fields(value)}
        return {_KIND: type(value).__name__, **values}
    if isinstance(value, Mapping):
        return {str(key): write_statistics(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [write_statistics(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_statistics(written: Any) -> Any:
    """With frozen objects where dataclasses were; they have the same fields, and a class of the same name."""
    if isinstance(written, list):
        return tuple(map(read_statistics, written))
    if not isinstance(written, dict):
        return written
    values = {name: read_statistics(each) for name, each in written.items()}
    kind = values.pop(_KIND, None)
    if not all(isinstance(name, str) and name.isidentifier() and not iskeyword(name) for name in (kind, *values)):
        return values
    return _frozen(kind, tuple(values))(**values)


@lru_cache(64)
def _frozen(kind: str, names: tuple[str, ...]) -> type:
    return make_dataclass(kind, names, frozen=True, slots=True)
