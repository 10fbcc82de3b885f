"""betterproto2 messages over gRPC, encoded and decoded by protobuf's C runtime (upb).

What a decoded object holds is what betterproto2's own parser would build, unknown fields included. Where the two
differ, upb follows the specification: a sub-message that occurs twice is merged, the last member of a oneof wins, a
known field with a foreign wire type counts as unknown, and malformed bytes are an error instead of a guess.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import betterproto2
from google.protobuf import message as protobuf
from grpclib.encoding.base import CodecBase

from .upb import Buffer, Unmapped, converters


class DecodeError(ValueError):
    """The bytes are not a message of the type; the text names the type and what is wrong."""


class EncodeError(ValueError):
    """A field holds a value that its type does not permit; the text names the message type and what is wrong."""


class UpbCodec(CodecBase):
    """A codec for betterproto2 messages, and for any class that has ``SerializeToString`` and ``FromString``.

    Stateless: one instance serves any number of connections. The first message of a type waits until the type's
    converters are made: 4 ms for ModelInferRequest, 17 ms for ModelConfig and all that it can hold. A server that must
    not stall then calls :meth:`prepare`.

    **Cancellation:** never waits, so it is never cancelled half-way.
    """

    __content_subtype__ = "proto"

    def prepare(self, *message_types: type[Any]) -> None:
        """Make the converters of these types now. Raises :exc:`TypeError` for a class that is no message."""
        for message_type in message_types:
            _ = _codecs.get(message_type) or _codec_of(message_type)

    def encode(self, message: Any, message_type: Any) -> bytes:
        """The message's bytes.

        Raises :exc:`TypeError` if ``message`` is no ``message_type``, :exc:`EncodeError` if a field's value is invalid.
        """
        if not isinstance(message, message_type):
            raise TypeError(f"expected a message of type {message_type.__name__}, got {message!r:.200}")
        codec = _codecs.get(message_type) or _codec_of(message_type)
        try:
            return codec.encode(message)
        except _ENCODE_FAILURES as failure:
            raise EncodeError(f"cannot encode {message_type.__name__}: {failure}") from failure

    def decode(self, data: Buffer, message_type: Any) -> Any:
        """A new ``message_type``. Raises :exc:`DecodeError` if ``data`` is not one."""
        codec = _codecs.get(message_type) or _codec_of(message_type)
        try:
            return codec.decode(data)
        except _DECODE_FAILURES as failure:
            raise DecodeError(f"cannot decode {message_type.__name__}: {failure}") from failure


# protobuf's own, what upb raises for a value of a wrong type or range, what betterproto2 raises for types left to it.
_ENCODE_FAILURES = (
    protobuf.EncodeError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)
_DECODE_FAILURES = (protobuf.DecodeError, ValueError, EOFError, OverflowError, struct.error)


class _Codec(NamedTuple):
    encode: Callable[[Any], bytes]
    decode: Callable[[Buffer], Any]


_codecs: dict[type, _Codec] = {}


def _codec_of(message_type: type[Any]) -> _Codec:
    """The codec of a type that is met for the first time."""
    if issubclass(message_type, betterproto2.Message):
        try:
            codec = _Codec(*converters(message_type))
        except Unmapped:
            codec = _Codec(bytes, message_type.parse)  # type: ignore[arg-type]  # it reads from any buffer
    elif hasattr(message_type, "SerializeToString") and hasattr(message_type, "FromString"):
        codec = _Codec(message_type.SerializeToString, message_type.FromString)
    else:
        raise TypeError(f"{message_type.__name__} is no message class: it lacks SerializeToString and FromString")
    return _codecs.setdefault(message_type, codec)
