"""Messages as bytes: a prefix, a header in JSON, and the tensors as they are.

JSON, though pickle is quicker by some microseconds: model code may have gone wrong in the worker, and nothing that comes
from there can do more to the server than not make sense (:exc:`NonsenseError`).
"""

from __future__ import annotations

import dataclasses
import json
from struct import Struct
from typing import Any, cast

from ...errors import InternalError, InvalidArgument
from ...tensor import Array, Buffer, datatype_of, from_raw, to_raw
from . import messages
from .messages import Message

#: A mark, bytes of the header, bytes of the tensors.
PREFIX = Struct("<4sQQ")
_MARK = b"TTw1"
#: Where each tensor begins: arrays are views of the body, and an unaligned view is slow.
_ALIGNED = 16
#: Far from what a batch has: its requests' texts are in one header, and must not be too long together if none is by itself.
_MAX_HEADER, _MAX_BODY = 1 << 36, 1 << 36

_KINDS: dict[str, type[Message]] = {
    name: kind for name, kind in vars(messages).items() if isinstance(kind, type) and issubclass(kind, Message)
}
_FIELDS = {
    kind: tuple(field.name for field in dataclasses.fields(kind) if field.name != "tensors") for kind in _KINDS.values()
}


class NonsenseError(Exception):
    """What came is no message: somebody else wrote to the socket, or the worker's memory is not what it was."""


def encode(message: Message) -> list[Buffer]:
    """The frame, in pieces; tensors are not copied, if they are contiguous.

    Raises:
      InternalError: an array has a dtype that Triton has no datatype for; or it is more than the other end takes.
    """
    pieces: list[Buffer] = [b""]
    size = 0
    described = []
    for group in getattr(message, "tensors", ()):
        entries = []
        for name, array in group.items():
            raw = to_raw(array)
            entries.append((name, datatype_of(array), array.shape, len(raw)))
            pieces.append(raw)
            size += len(raw)
            if padding := -size % _ALIGNED:
                pieces.append(bytes(padding))
                size += padding
        described.append(entries)
    kind = type(message)
    fields = [getattr(message, name) for name in _FIELDS[kind]]
    header = json.dumps((kind.__name__, fields, described), separators=(",", ":")).encode()
    if len(header) > _MAX_HEADER or size > _MAX_BODY:
        raise InternalError(
            f"{len(header)} bytes, and {size} of tensors, are too much for a message to or from a worker process"
        )
    pieces[0] = PREFIX.pack(_MARK, len(header), size) + header
    return pieces


def read_prefix(prefix: Buffer) -> tuple[int, int]:
    """Bytes of the header and of the body; raises :exc:`NonsenseError`."""
    mark, header, body = PREFIX.unpack(prefix)
    if mark != _MARK or header > _MAX_HEADER or body > _MAX_BODY:
        raise NonsenseError(f"no frame begins with {bytes(prefix)!r}")
    return header, body


def decode(header: Buffer, body: Buffer) -> Message:
    """The message; its tensors are views of ``body``.  Raises :exc:`NonsenseError`."""
    try:
        name, fields, described = json.loads(bytes(header))
        kind: Any = _KINDS[name]
        if len(fields) != len(_FIELDS[kind]):
            raise ValueError(f"{name} has {len(fields)} fields")
        if "tensors" in kind.__slots__:
            return cast(Message, kind(*fields, tensors=_tensors(described, memoryview(body))))
        return cast(Message, kind(*fields))
    except (ValueError, TypeError, KeyError, RecursionError, InvalidArgument) as exc:
        raise NonsenseError(f"{type(exc).__name__}: {exc}") from None


def _tensors(described: Any, body: memoryview) -> list[dict[str, Array]]:
    groups = []
    start = 0
    for entries in described:
        group = {}
        for name, datatype, shape, size in entries:
            group[name] = from_raw(datatype, tuple(shape), body[start : start + size], name=name)
            start += size + -size % _ALIGNED
        groups.append(group)
    return groups
