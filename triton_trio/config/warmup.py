"""Requests that a model runs before it is ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..descriptors import enum_name


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """Data for one input: the contents of ``data_file``, random, or else zeros."""

    datatype: str
    dims: tuple[int, ...]
    random: bool = False
    data_file: str = ""


@dataclass(frozen=True, slots=True)
class ModelWarmup:
    name: str
    batch_size: int  #: 0: the model does not batch
    inputs: Mapping[str, WarmupInput]
    count: int = 1

    @classmethod
    def read(cls, message: Any) -> ModelWarmup:
        """From a ``ModelWarmup``."""
        return cls(
            name=message.name,
            batch_size=message.batch_size,
            inputs={
                name: WarmupInput(
                    datatype=enum_name(value, "data_type").removeprefix("TYPE_").replace("STRING", "BYTES"),
                    dims=tuple(value.dims),
                    random=value.random_data,
                    data_file=value.input_data_file,
                )
                for name, value in sorted(message.inputs.items())
            },
            count=message.count or 1,
        )
