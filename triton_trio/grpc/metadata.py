"""Custom metadata out of HTTP/2 headers, for both roles."""

from __future__ import annotations

import binascii
from collections.abc import Iterable

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import decode_bin_value, encode_grpc_message
from multidict import MultiDict

#: Headers that gRPC itself uses; neither they nor ``grpc-*`` are metadata.
_OWN_HEADERS = frozenset({b"content-type", b"te", b"user-agent"})
#: Bytes of ``grpc-message`` as it is sent.  With headers of 8 KiB gRPC's own clients begin to refuse the answer, and say
#: RESOURCE_EXHAUSTED or INTERNAL in the place of what it was.
LONGEST_MESSAGE = 4096


def encode_message(text: str) -> bytes:
    """A status's message as a header's value; cut if it is too long."""
    encoded = encode_grpc_message(text)
    length = len(text)
    while len(encoded) > LONGEST_MESSAGE:
        length = min(length - 1, length * LONGEST_MESSAGE // len(encoded))
        encoded = encode_grpc_message(text[:length]) + f"... (cut: it had {len(text)} characters)"
    return encoded.encode("ascii")


def decode_metadata(headers: Iterable[tuple[bytes, bytes]]) -> MultiDict[str | bytes]:
    """The metadata among ``headers``; values of ``-bin`` keys are bytes, several in one header are taken apart.

    Raises:
        GRPCError: INTERNAL, a ``-bin`` value is not base64.
    """
    metadata: MultiDict[str | bytes] = MultiDict()
    for name, value in headers:
        if name.startswith((b":", b"grpc-")) or name in _OWN_HEADERS:
            continue
        key = name.decode("ascii", "replace")
        if not name.endswith(b"-bin"):
            metadata.add(key, value.decode("ascii", "surrogateescape"))
            continue
        for part in value.split(b","):
            metadata.add(key, _decode_binary(key, part.strip()))
    return metadata


def _decode_binary(key: str, value: bytes) -> bytes:
    try:
        return decode_bin_value(value)
    except binascii.Error as exc:
        raise GRPCError(Status.INTERNAL, f"Malformed metadata: {key} is not base64: {exc}") from None
