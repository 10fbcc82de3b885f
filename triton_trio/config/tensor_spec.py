"""What a model's configuration says of one input or output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..descriptors import enum_name
from ..tensor import config_datatype

WILDCARD = -1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output.

    ``dims`` is the shape that requests have, ``reshape`` the one that the model has where it differs; -1 is any size.
    Neither has the batch dimension of a model whose ``max_batch_size`` is not 0.
    """

    name: str
    datatype: str  #: the protocol's name, ``FP32``; empty while it is not known
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    optional: bool = False
    is_shape_tensor: bool = False
    allow_ragged_batch: bool = False  #: requests with different shapes may share a batch
    label_filename: str = ""  #: of an output: the names of its classes, one a line
    format: str = "FORMAT_NONE"  #: of an input: ``FORMAT_NHWC`` and ``FORMAT_NCHW`` have three dims
    is_non_linear_format_io: bool = False

    @property
    def config_datatype(self) -> str:
        """The name that ``config.pbtxt`` has for the datatype: ``TYPE_FP32``."""
        return config_datatype(self.datatype) if self.datatype else "TYPE_INVALID"

    def to_model_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the model has for a request's ``shape``; both without batch dimension."""
        return _carry_over(self.dims, self.reshape, shape)

    def to_request_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that a response has for the model's ``shape``; both without batch dimension."""
        return _carry_over(self.reshape or (), self.dims if self.reshape is not None else None, shape)

    @classmethod
    def read(cls, message: Any) -> TensorSpec:
        """From a ``ModelInput`` or ``ModelOutput``."""
        datatype = enum_name(message, "data_type").removeprefix("TYPE_")
        is_input = message.DESCRIPTOR.name == "ModelInput"
        return cls(
            name=message.name,
            datatype={"STRING": "BYTES", "INVALID": ""}.get(datatype, datatype),
            dims=tuple(message.dims),
            reshape=tuple(message.reshape.shape) if message.HasField("reshape") else None,
            optional=message.optional if is_input else False,
            is_shape_tensor=message.is_shape_tensor,
            allow_ragged_batch=message.allow_ragged_batch if is_input else False,
            label_filename="" if is_input else message.label_filename,
            format=enum_name(message, "format") if is_input else "FORMAT_NONE",
            is_non_linear_format_io=message.is_non_linear_format_io,
        )

    def write(self, message: Any) -> None:
        """Into an empty ``ModelInput`` or ``ModelOutput``; raises ValueError for a field the other one has."""
        fields: dict[str, object] = {
            "name": self.name,
            "is_shape_tensor": self.is_shape_tensor,
            "is_non_linear_format_io": self.is_non_linear_format_io,
            "data_type": self.config_datatype,
            "dims": self.dims,
            # What only inputs or only outputs have is written if it is set, so that the wrong one is refused.
            "optional": self.optional or None,
            "allow_ragged_batch": self.allow_ragged_batch or None,
            "label_filename": self.label_filename or None,
            "format": None if self.format == "FORMAT_NONE" else self.format,
        }
        message.MergeFrom(type(message)(**{name: value for name, value in fields.items() if value is not None}))
        if self.reshape is not None:
            message.reshape.SetInParent()
            message.reshape.shape.extend(self.reshape)


def _carry_over(known: tuple[int, ...], wanted: tuple[int, ...] | None, shape: Sequence[int]) -> tuple[int, ...]:
    """``wanted`` with its wildcards filled from those of ``known``, in order, as ``shape`` has them."""
    if wanted is None:
        return tuple(shape)
    sizes = (size for dim, size in zip(known, shape, strict=True) if dim == WILDCARD)
    return tuple(next(sizes) if dim == WILDCARD else dim for dim in wanted)
