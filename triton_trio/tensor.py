"""Tensors: Triton's datatypes and wire forms on one side, numpy arrays on the other.

A raw tensor becomes an array over the very bytes of the message, without a copy and therefore read-only.  ``BYTES``
tensors are the exception: their elements have a length each, so they become object arrays of ``bytes``.

Inputs come from strangers.  Whatever does not add up raises :exc:`InvalidArgument` with what was expected and what
came; ``name``, ``model`` and ``request_id`` are only there for that text.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod
from struct import Struct
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import InternalError, InvalidArgument

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

#: Datatype by its name in the protocol, as the wire has it: little-endian.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FIXED = {name: dtype for name, dtype in DTYPES.items() if name != "BYTES"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Datatypes whose typed contents live in a field of a wider type, and are cut down to size as in Triton.
_CONTENTS: Mapping[str, tuple[str, np.dtype[Any]]] = {
    "BOOL": ("bool_contents", np.dtype("?")),
    "UINT8": ("uint_contents", np.dtype("u4")),
    "UINT16": ("uint_contents", np.dtype("u4")),
    "UINT32": ("uint_contents", np.dtype("u4")),
    "UINT64": ("uint64_contents", np.dtype("u8")),
    "INT8": ("int_contents", np.dtype("i4")),
    "INT16": ("int_contents", np.dtype("i4")),
    "INT32": ("int_contents", np.dtype("i4")),
    "INT64": ("int64_contents", np.dtype("i8")),
    "FP32": ("fp32_contents", np.dtype("f4")),
    "FP64": ("fp64_contents", np.dtype("f8")),
    "BYTES": ("bytes_contents", np.dtype(object)),
}

_LENGTH = Struct("<I")

#: Bytes from which on a view costs less than a copy.
_WORTH_A_VIEW = 4096

if sys.byteorder != "little":
    raise ImportError("triton_trio needs a little-endian machine: tensors are views of the wire's bytes")


class TensorContents(Protocol):
    """The protocol's ``InferTensorContents``: one list per kind of element, of which one is used."""

    bool_contents: list[bool]
    int_contents: list[int]
    int64_contents: list[int]
    uint_contents: list[int]
    uint64_contents: list[int]
    fp32_contents: list[float]
    fp64_contents: list[float]
    bytes_contents: list[bytes]


def datatype_of(array: Array) -> str:
    """The datatype of an array: ``FP32``, ``BYTES`` (object, ``S`` and ``U`` arrays), ...

    Raises:
      InternalError: Triton has no such datatype (``complex64``, ``datetime64``, float8, ...).
    """
    name = _NAMES.get(array.dtype)
    if name is not None:
        return name
    if array.dtype.kind in "SUT":
        return "BYTES"
    name = _NAMES.get(array.dtype.newbyteorder("="))
    if name is not None:
        return name
    raise InternalError(f"no datatype for arrays of {array.dtype}; convert them to one of {', '.join(DTYPES)}")


def config_datatype(datatype: str) -> str:
    """The name that ``config.pbtxt`` has for it: ``TYPE_FP32``; ``BYTES`` is ``TYPE_STRING`` there."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def byte_size(datatype: str, shape: Sequence[int]) -> int:
    """Bytes of a raw tensor; for ``BYTES`` the least it can have, four per element."""
    return prod(shape) * (4 if datatype == "BYTES" else DTYPES[datatype].itemsize)


def format_shape(shape: Sequence[int]) -> str:
    """As Triton prints shapes: ``[-1,16]``."""
    return f"[{','.join(map(str, shape))}]"


def _label(request_id: str | None) -> str:
    return "" if request_id is None else f"[request id: {request_id or '<id_unknown>'}] "


def _of(name: str, model: str) -> str:
    return f"'{name}' for model '{model}'" if model else f"'{name}'"


# Raw


def from_raw(
    datatype: str,
    shape: Sequence[int],
    data: Buffer,
    *,
    name: str = "",
    model: str = "",
    request_id: str | None = None,
) -> Array:
    """The array of a raw tensor.

    Args:
      datatype: the protocol's name, such as ``FP32``.
      shape: all dimensions, none negative; ``()`` is a scalar.
      data: little-endian and row-major; for ``BYTES`` each element is its length as uint32 and then its bytes.

    Returns:
      A view of ``data``, which is read-only if ``data`` is (``BYTES``: an object array of ``bytes``).

    Raises:
      InvalidArgument: no such datatype, or ``data`` does not fit ``shape``.
    """
    try:
        array: Array = np.ndarray(shape, _FIXED[datatype], data)
    except (KeyError, ValueError, TypeError):
        return _from_raw_slow(datatype, shape, data, name, model, request_id)
    if array.nbytes != len(data) or -1 in shape:  # to numpy, [-1] is as many as there are
        return _from_raw_slow(datatype, shape, data, name, model, request_id)
    if datatype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
        # numpy takes for granted that a bool is 0 or 1; clients may send any byte for true.
        array = np.not_equal(array.view(np.uint8), 0, out=np.empty(shape, bool))
        array.flags.writeable = False
    return array


def _from_raw_slow(
    datatype: str, shape: Sequence[int], data: Buffer, name: str, model: str, request_id: str | None
) -> Array:
    _check_shape(datatype, shape, name, model, request_id)
    if datatype == "BYTES":
        return _parse_bytes(shape, bytes(data), name, model, request_id)
    expected = byte_size(datatype, shape)
    if expected != len(data):
        raise _size_mismatch(expected, len(data), name, model, request_id)
    # The size is right, so numpy refuses something else: too many dimensions, or [0, 2**63 - 1].
    raise InvalidArgument(
        f"{_label(request_id)}unsupported shape {format_shape(shape)} for input {_of(name, model)}: at most 64 "
        f"dimensions and {sys.maxsize} bytes, zero dimensions counted as one"
    )


def _check_shape(datatype: str, shape: Sequence[int], name: str, model: str, request_id: str | None) -> None:
    if datatype not in DTYPES:
        raise InvalidArgument(
            f"{_label(request_id)}unsupported datatype '{datatype}' for input {_of(name, model)}, "
            f"expected one of {', '.join(DTYPES)}"
        )
    if any(dim == -1 for dim in shape):
        raise InvalidArgument(
            f"{_label(request_id)}All input dimensions should be specified for input {_of(name, model)}, "
            f"got {format_shape(shape)}"
        )
    if any(dim < 0 for dim in shape):
        raise InvalidArgument(
            f"{_label(request_id)}tensor {_of(name, model)} contains an invalid dimension {format_shape(shape)}"
        )


def _size_mismatch(expected: int, got: int, name: str, model: str, request_id: str | None) -> InvalidArgument:
    return InvalidArgument(
        f"{_label(request_id)}input byte size mismatch for input {_of(name, model)}. Expected {expected}, got {got}"
    )


def _parse_bytes(shape: Sequence[int], data: bytes, name: str, model: str, request_id: str | None) -> Array:
    count = prod(shape)
    # A shape can promise more elements than there is memory for; what came bounds what is made.
    elements = _split_uniform(data, count) if count > 1 else None
    if elements is None:
        elements = []
        offset, end = 0, len(data)
        while offset < end:
            if end - offset < 4:
                raise InvalidArgument(
                    f"{_label(request_id)}incomplete string length indicator for inference input {_of(name, model)}, "
                    f"expecting 4 bytes but only {end - offset} bytes available (element {len(elements)}, at byte "
                    f"{offset})"
                )
            (length,) = _LENGTH.unpack_from(data, offset)
            if len(elements) == count:
                raise InvalidArgument(
                    f"{_label(request_id)}unexpected number of string elements {count + 1} for inference input "
                    f"{_of(name, model)}, expecting {count} (at byte {offset})"
                )
            start = offset + 4
            offset = start + length
            if offset > end:
                raise InvalidArgument(
                    f"{_label(request_id)}incomplete string data for inference input {_of(name, model)}, expecting "
                    f"string of length {length} but only {end - start} bytes available (element {len(elements)}, at "
                    f"byte {start})"
                )
            elements.append(data[start:offset])
    return _object_array(elements, shape, name, model, request_id)


def _split_uniform(data: bytes, count: int) -> list[bytes] | None:
    """The elements if all are equally long, cut in one numpy operation; None if they are not."""
    stride, rest = divmod(len(data), count)
    if rest or stride < 5:
        return None
    (length,) = _LENGTH.unpack_from(data)
    if length != stride - 4:
        return None
    record = np.dtype([("length", "<u4"), ("data", f"V{length}")])
    records = np.frombuffer(data, record)
    if not (records["length"] == length).all():
        return None
    elements: list[bytes] = records["data"].tolist()
    return elements


def _object_array(
    elements: Sequence[object], shape: Sequence[int], name: str, model: str, request_id: str | None
) -> Array:
    if len(elements) != prod(shape):
        raise InvalidArgument(
            f"{_label(request_id)}expected {prod(shape)} string elements for inference input {_of(name, model)}, "
            f"got {len(elements)}"
        )
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidArgument(
            f"{_label(request_id)}unsupported shape {format_shape(shape)} for input {_of(name, model)}: at most 64 "
            "dimensions"
        ) from None


def to_raw(array: Array, datatype: str | None = None) -> bytes | memoryview:
    """The raw tensor of an array in any memory layout and byte order.

    Args:
      array: for ``BYTES``, elements are ``bytes``, or ``str`` which is encoded as UTF-8.
      datatype: what the array must be, if it is known; nothing is converted.

    Returns:
      A flat view of the array's memory, if it is contiguous and not small; otherwise a copy.

    Raises:
      InternalError: the array is of another datatype, or of none that Triton has; its maker is at fault.
    """
    actual = datatype_of(array)
    if datatype is not None and actual != datatype:
        raise InternalError(f"expected an array of {datatype}, got one of {array.dtype} ({actual})")
    if actual == "BYTES":
        return _format_bytes(array)
    if array.dtype != DTYPES[actual]:
        array = array.astype(DTYPES[actual])
    if array.nbytes < _WORTH_A_VIEW or not array.flags.c_contiguous:
        return array.tobytes()
    # By way of uint8: BF16 has no buffer of its own.
    return array.reshape(-1).view(np.uint8).data


def _format_bytes(array: Array) -> bytes:
    parts = []
    for element in array.ravel().tolist():
        if isinstance(element, str):
            element = element.encode()
        elif not isinstance(element, bytes):
            raise InternalError(f"an element of a BYTES array must be bytes or str, got {type(element).__name__}")
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


# Typed contents


def from_contents(
    datatype: str,
    shape: Sequence[int],
    contents: TensorContents,
    *,
    name: str = "",
    model: str = "",
    request_id: str | None = None,
) -> Array:
    """The array of a tensor whose elements are in the message's typed lists; a copy, in the end like :func:`from_raw`.

    INT8, INT16, UINT8 and UINT16 travel as 32-bit integers and lose their upper bits, as in Triton.

    Raises:
      InvalidArgument: no such datatype, FP16 or BF16 (they have no list), or not as many elements as ``shape`` has.
    """
    _check_shape(datatype, shape, name, model, request_id)
    if datatype not in _CONTENTS:
        raise InvalidArgument(
            f"{_label(request_id)}datatype '{datatype}' of input {_of(name, model)} has no typed contents; send it in "
            "raw_input_contents"
        )
    field, wide = _CONTENTS[datatype]
    values = getattr(contents, field)
    if datatype == "BYTES":
        return _object_array(values, shape, name, model, request_id)
    if len(values) != prod(shape):
        size = DTYPES[datatype].itemsize
        raise _size_mismatch(prod(shape) * size, len(values) * size, name, model, request_id)
    array = np.array(values, wide).astype(DTYPES[datatype], copy=False)
    array.flags.writeable = False
    try:
        return array.reshape(shape)
    except ValueError:
        return _from_raw_slow(datatype, shape, array.tobytes(), name, model, request_id)


# Classification

_CLASSIFIABLE = frozenset(
    DTYPES[name] for name in ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64")
)


def classification(values: Array, k: int, labels: Sequence[str] = (), *, batched: bool = False) -> Array:
    """The ``k`` highest values of an output, in Triton's text form ``<value>:<index>[:<label>]``.

    Args:
      values: an output; indices count its elements in row-major order.
      k: 1 or more; an output with fewer elements gives them all.
      labels: by index; an empty or missing one is left out.
      batched: the first dimension is the batch, and each row has its own ranking.

    Returns:
      A BYTES array of shape ``[min(k, n)]``, or ``[batch, min(k, n)]``; among equal values the lower index is first.

    Raises:
      InvalidArgument: the output's datatype has no order or no text form (BOOL, FP16, BF16, BYTES).
    """
    if values.dtype not in _CLASSIFIABLE:
        raise InvalidArgument(f"class result not available for output due to unsupported type '{datatype_of(values)}'")
    batch = values.shape[0] if batched else 1
    per_row = prod(values.shape[1:] if batched else values.shape)
    rows = values.reshape(batch, per_row)
    k = min(k, per_row)
    # A stable sort, from its end, would rank equal values by descending index; so sort and count backwards.
    top = per_row - 1 - np.argsort(rows[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :k]
    form = "%f:%d" if values.dtype.kind == "f" else "%d:%d"
    result = np.empty((batch, k), dtype=object)
    for row in range(batch):
        for rank, index in enumerate(top[row].tolist()):
            text = form % (rows[row, index], index)
            if index < len(labels) and labels[index]:
                text = f"{text}:{labels[index]}"
            result[row, rank] = text.encode()
    return result if batched else result[0]
