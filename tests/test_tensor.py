"""Raw tensors, typed contents and classification, with Triton's client as the outside witness."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient import utils as witness
from tritonclient.grpc import InferInput

from triton_trio.errors import InternalError, InvalidArgument
from triton_trio.tensor import (
    DTYPES,
    byte_size,
    classification,
    config_datatype,
    datatype_of,
    from_contents,
    from_raw,
    to_raw,
)

FIXED = [name for name in DTYPES if name != "BYTES"]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def raw_tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    datatype = draw(st.sampled_from(FIXED))
    shape = draw(SHAPES)
    size = byte_size(datatype, shape)
    data = draw(st.binary(min_size=size, max_size=size))
    return datatype, shape, bytes(byte & 1 for byte in data) if datatype == "BOOL" else data


def bytes_arrays() -> st.SearchStrategy[Any]:
    def build(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
        n = prod(shape)
        sizes = st.one_of(
            st.lists(st.binary(max_size=6), min_size=n, max_size=n),
            st.integers(0, 5).flatmap(lambda k: st.lists(st.binary(min_size=k, max_size=k), min_size=n, max_size=n)),
        )
        return sizes.map(lambda items: _objects(items, shape))

    return SHAPES.flatmap(build)


def _objects(items: list[Any], shape: tuple[int, ...]) -> Any:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


# Round trips


@given(raw_tensors())
def test_raw_to_array_and_back(tensor: tuple[str, tuple[int, ...], bytes]) -> None:
    datatype, shape, data = tensor
    array = from_raw(datatype, shape, data)
    assert array.shape == shape
    assert array.dtype == DTYPES[datatype]
    assert datatype_of(array) == datatype
    assert bytes(to_raw(array, datatype)) == data


@given(bytes_arrays())
def test_bytes_round_trip_and_agree_with_the_client(array: Any) -> None:
    raw = to_raw(array, "BYTES")
    back = from_raw("BYTES", array.shape, raw)
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()
    assert all(type(item) is bytes for item in back.ravel())
    if array.size:
        assert raw == witness.serialize_byte_tensor(array).item()
        assert witness.deserialize_bytes_tensor(raw).tolist() == array.ravel().tolist()
    else:
        assert raw == b""


@given(raw_tensors())
def test_fixed_size_tensors_are_sent_as_the_client_sends_them(tensor: tuple[str, tuple[int, ...], bytes]) -> None:
    datatype, shape, data = tensor
    array = from_raw(datatype, shape, data)
    sent = InferInput("x", list(shape), datatype).set_data_from_numpy(array)._get_content()
    assert sent == bytes(to_raw(array))


def test_bf16_is_the_upper_half_of_a_float() -> None:
    values = np.array([1.0, -2.5, 3.0e38], np.float32)
    upper = values.view(np.uint16)[1::2].tobytes()
    array = from_raw("BF16", (3,), upper)
    assert to_raw(array, "BF16") == upper
    assert array.astype(np.float32).tolist()[:2] == [1.0, -2.5]


@pytest.mark.parametrize("datatype", DTYPES)
def test_datatypes_are_those_of_the_client(datatype: str) -> None:
    assert DTYPES[datatype] == np.dtype(witness.triton_to_np_dtype(datatype))
    assert config_datatype(datatype) == ("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


# What a view is


@pytest.mark.parametrize("datatype", FIXED)
def test_from_raw_is_a_view_and_read_only(datatype: str) -> None:
    data = bytes(byte_size(datatype, (4, 3)))
    array = from_raw(datatype, (4, 3), data)
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))
    assert not array.flags.writeable


def test_from_raw_takes_a_slice_of_a_message() -> None:
    message = memoryview(b"xyz" + np.arange(6, dtype="<f4").tobytes())
    assert from_raw("FP32", (2, 3), message[3:]).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("datatype", FIXED)
def test_to_raw_of_a_large_contiguous_array_is_a_view(datatype: str) -> None:
    array = np.zeros((8, 4096), DTYPES[datatype])
    raw = to_raw(array)
    assert isinstance(raw, memoryview)
    assert (raw.format, raw.ndim, len(raw)) == ("B", 1, array.nbytes)
    assert np.shares_memory(np.frombuffer(raw, np.uint8), array)
    assert b"".join([raw]) == array.tobytes()


def test_to_raw_is_row_major_and_little_endian_whatever_the_array_is() -> None:
    array = np.arange(6, dtype="<i4").reshape(2, 3)
    for other in (np.asfortranarray(array), array.astype(">i4"), np.repeat(array, 2, axis=1)[:, ::2]):
        assert to_raw(other, "INT32") == array.tobytes()
    wide = np.arange(20_000, dtype="<i4").reshape(100, 200)
    assert bytes(to_raw(wide.T)) == np.ascontiguousarray(wide.T).tobytes()


def test_scalars_and_empty_tensors() -> None:
    assert from_raw("FP32", (), np.float32(2.5).tobytes()).item() == 2.5
    assert from_raw("INT64", (0, 7), b"").shape == (0, 7)
    assert from_raw("BYTES", (0,), b"").shape == (0,)
    assert from_raw("BYTES", (), b"\x02\x00\x00\x00ab").item() == b"ab"
    assert to_raw(np.float32(2.5).reshape(())) == np.float32(2.5).tobytes()


def test_a_bool_is_zero_or_one_whatever_byte_was_sent() -> None:
    array = from_raw("BOOL", (4,), b"\x00\x01\x02\xff")
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_to_raw_takes_text_and_numpy_strings() -> None:
    expected = b"\x03\x00\x00\x00\xc3\xa9a\x00\x00\x00\x00"
    assert to_raw(_objects(["éa", b""], (2,))) == expected
    assert to_raw(np.array(["éa", ""])) == expected
    assert to_raw(np.array(["éa".encode(), b""])) == expected
    assert datatype_of(np.array(["a"])) == "BYTES"


# What does not add up


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "message"),
    [
        ("FP32", [2, 3], b"x" * 20, "input byte size mismatch for input 'in' for model 'm'. Expected 24, got 20"),
        ("FP32", [2], b"x" * 12, "input byte size mismatch for input 'in' for model 'm'. Expected 8, got 12"),
        ("FP32", [], b"", "input byte size mismatch for input 'in' for model 'm'. Expected 4, got 0"),
        ("BOOL", [2**62, 4], b"", f"input byte size mismatch for input 'in' for model 'm'. Expected {2**64}, got 0"),
        (
            "FP32",
            [-1, 2],
            b"x" * 8,
            "All input dimensions should be specified for input 'in' for model 'm', got [-1,2]",
        ),
        ("FP32", [-2, 2], b"", "tensor 'in' for model 'm' contains an invalid dimension [-2,2]"),
        ("BYTES", [-1], b"", "All input dimensions should be specified for input 'in' for model 'm', got [-1]"),
        (
            "FP31",
            [1],
            b"",
            "unsupported datatype 'FP31' for input 'in' for model 'm', expected one of " + ", ".join(DTYPES),
        ),
        (
            "FP32",
            [0, 2**63 - 1, 2**63 - 1],
            b"",
            f"unsupported shape [0,{2**63 - 1},{2**63 - 1}] for input 'in' for model 'm': at most 64 dimensions and "
            f"{2**63 - 1} bytes, zero dimensions counted as one",
        ),
        (
            "BYTES",
            [2],
            b"\x01\x00\x00\x00a\x02\x00",
            "incomplete string length indicator for inference input 'in' for model 'm', expecting 4 bytes but only 2 "
            "bytes available (element 1, at byte 5)",
        ),
        (
            "BYTES",
            [1],
            b"\x05\x00\x00\x00ab",
            "incomplete string data for inference input 'in' for model 'm', expecting string of length 5 but only 2 "
            "bytes available (element 0, at byte 4)",
        ),
        (
            "BYTES",
            [1],
            b"\x01\x00\x00\x00a\x01\x00\x00\x00b",
            "unexpected number of string elements 2 for inference input 'in' for model 'm', expecting 1 (at byte 5)",
        ),
        (
            "BYTES",
            [3],
            b"\x01\x00\x00\x00a",
            "expected 3 string elements for inference input 'in' for model 'm', got 1",
        ),
        (
            "BYTES",
            [2**40],
            b"",
            f"expected {2**40} string elements for inference input 'in' for model 'm', got 0",
        ),
    ],
)
def test_malformed_raw_tensors(datatype: str, shape: list[int], data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_raw(datatype, shape, data, name="in", model="m", request_id="7")
    assert caught.value.message == f"[request id: 7] {message}"


def test_the_prefix_is_tritons() -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_raw("FP32", [1], b"", name="in", model="m", request_id="")
    assert caught.value.message.startswith("[request id: <id_unknown>] input byte size")
    with pytest.raises(InvalidArgument) as caught:
        from_raw("FP32", [1], b"", name="in")
    assert caught.value.message == "input byte size mismatch for input 'in'. Expected 4, got 0"


@given(st.binary(max_size=40), st.lists(st.integers(-2, 5), max_size=3), st.sampled_from(list(DTYPES)))
def test_from_raw_accepts_or_refuses_any_bytes_and_what_it_accepts_round_trips(
    data: bytes, shape: list[int], datatype: str
) -> None:
    try:
        array = from_raw(datatype, shape, data)
    except InvalidArgument:
        return
    assert array.shape == tuple(shape)
    if datatype != "BOOL":
        assert to_raw(array, datatype) == data


def test_to_raw_blames_the_maker_of_the_array() -> None:
    with pytest.raises(InternalError, match=r"expected an array of FP32, got one of float64 \(FP64\)"):
        to_raw(np.zeros(2), "FP32")
    with pytest.raises(InternalError, match="no datatype for arrays of complex128; convert them to one of BOOL"):
        to_raw(np.zeros(2, complex))
    with pytest.raises(InternalError, match="an element of a BYTES array must be bytes or str, got int"):
        to_raw(_objects([1], (1,)))


# Typed contents


def contents(**lists: list[Any]) -> Any:
    names = ("bool", "int", "int64", "uint", "uint64", "fp32", "fp64", "bytes")
    return SimpleNamespace(**{f"{name}_contents": lists.get(name, []) for name in names})


@pytest.mark.parametrize(
    ("datatype", "field", "values", "expected"),
    [
        ("BOOL", "bool", [True, False], [True, False]),
        ("INT8", "int", [-1, 300], [-1, 44]),
        ("INT16", "int", [-1, 65_537], [-1, 1]),
        ("INT32", "int", [-(2**31), 7], [-(2**31), 7]),
        ("INT64", "int64", [-(2**63), 7], [-(2**63), 7]),
        ("UINT8", "uint", [255, 256], [255, 0]),
        ("UINT16", "uint", [65_535, 65_536], [65_535, 0]),
        ("UINT32", "uint", [2**32 - 1, 0], [2**32 - 1, 0]),
        ("UINT64", "uint64", [2**64 - 1, 0], [2**64 - 1, 0]),
        ("FP32", "fp32", [0.5, -2.0], [0.5, -2.0]),
        ("FP64", "fp64", [0.1, -2.0], [0.1, -2.0]),
        ("BYTES", "bytes", [b"", b"ab"], [b"", b"ab"]),
    ],
)
def test_typed_contents(datatype: str, field: str, values: list[Any], expected: list[Any]) -> None:
    array = from_contents(datatype, [1, 2], contents(**{field: values}))
    assert datatype_of(array) == datatype
    assert array.tolist() == [expected]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_typed_contents(datatype: str) -> None:
    with pytest.raises(InvalidArgument, match=f"datatype '{datatype}' of input 'in' has no typed contents; send it in"):
        from_contents(datatype, [1], contents(fp32=[1.0]), name="in")


def test_typed_contents_must_be_as_many_as_the_shape_says() -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_contents("INT16", [3], contents(int=[1]), name="in", model="m", request_id="7")
    assert caught.value.message == (
        "[request id: 7] input byte size mismatch for input 'in' for model 'm'. Expected 6, got 2"
    )
    with pytest.raises(InvalidArgument, match="expected 2 string elements for inference input 'in', got 1"):
        from_contents("BYTES", [2], contents(bytes=[b"a"]), name="in")
    with pytest.raises(InvalidArgument, match="All input dimensions should be specified"):
        from_contents("FP32", [-1], contents(fp32=[1.0]), name="in")
    with pytest.raises(InvalidArgument, match="unsupported shape"):
        from_contents("FP32", [0, 2**63 - 1, 2**63 - 1], contents(), name="in")


# Classification


def test_classification_is_value_index_label() -> None:
    values = np.array([[0.1, 3.3, 0.2], [7.0, 7.0, 1.0]], np.float32)
    ranked = classification(values, 2, ["cat", "", "dog"], batched=True)
    assert ranked.tolist() == [[b"3.300000:1", b"0.200000:2:dog"], [b"7.000000:0:cat", b"7.000000:1"]]
    assert from_raw("BYTES", ranked.shape, to_raw(ranked)).tolist() == ranked.tolist()


def test_classification_without_batch_counts_all_elements() -> None:
    assert classification(np.array([[1, 5], [9, 2]], np.int32), 3).tolist() == [b"9:2", b"5:1", b"2:3"]


def test_classification_gives_no_more_than_there_is() -> None:
    assert classification(np.array([1, 2], np.uint8), 5, ["only"]).tolist() == [b"2:1", b"1:0:only"]
    assert classification(np.zeros((0, 4), np.float32), 2, batched=True).shape == (0, 2)
    assert classification(np.zeros((2, 0), np.float32), 2, batched=True).shape == (2, 0)


@given(hnp.arrays(st.sampled_from([np.int64, np.uint64, np.int8, np.uint8]), st.integers(1, 12)), st.integers(1, 12))
def test_classification_ranks_as_sorting_does(values: Any, k: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (-int(values[i]), i))[:k]
    assert classification(values, k).tolist() == [b"%d:%d" % (values[i], i) for i in order]


@pytest.mark.parametrize("datatype", ["BOOL", "FP16", "BF16", "BYTES"])
def test_classification_of_what_has_no_rank(datatype: str) -> None:
    with pytest.raises(
        InvalidArgument, match=f"class result not available for output due to unsupported type '{datatype}'"
    ):
        classification(np.zeros(3, DTYPES[datatype]), 1)
