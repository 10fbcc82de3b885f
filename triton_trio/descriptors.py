"""The schema of the protocol, for protobuf's own C runtime.

In a pool of our own: the process may have loaded Triton's client, whose messages bear the same names.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass


def _load() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(files("triton_trio._pb").joinpath("descriptors.bin").read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load()


def message_class(name: str) -> Any:
    """The C runtime's class of a message, by its full name: ``inference.ModelConfig``."""
    return GetMessageClass(POOL.FindMessageTypeByName(name))


def enum_name(message: Any, field: str) -> str:
    """The name of an enum field's value: ``TYPE_FP32``.  The message is checked for unknown values when it is read."""
    name: str = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(message, field)].name
    return name
