"""Requests against a configuration: Triton's words for what does not fit, and signatures that keep batches uniform."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from triton_trio.config import parse_model_config
from triton_trio.errors import InvalidArgument
from triton_trio.request import InferenceRequest
from triton_trio.validation import RequestValidator

BATCHING = """
name: "m" backend: "jax" max_batch_size: 8
input { name: "X" data_type: TYPE_FP32 dims: [ 16 ] }
input { name: "Y" data_type: TYPE_INT32 dims: [ -1, 2 ] }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 16 ] }
"""
SINGLE = """
name: "m" backend: "jax"
input { name: "X" data_type: TYPE_FP32 dims: [ -1, 16 ] }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 16 ] }
"""
OPTIONAL = """
name: "m" backend: "jax" max_batch_size: 8
input { name: "A" data_type: TYPE_FP32 dims: 1 }
input { name: "B" data_type: TYPE_FP32 dims: 1 optional: true }
input { name: "C" data_type: TYPE_FP32 dims: 1 optional: true }
"""
NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


def f32(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def i32(*shape: int) -> Any:
    return np.zeros(shape, np.int32)


def check(config: str, inputs: dict[str, Any], *outputs: str, request_id: str = "7") -> tuple[int, Any]:
    request = InferenceRequest(inputs, requested_outputs=outputs, request_id=request_id)
    return RequestValidator(parse_model_config(config)).check(request)


def refusal(config: str, inputs: dict[str, Any], *outputs: str, request_id: str = "7") -> str:
    with pytest.raises(InvalidArgument) as caught:
        check(config, inputs, *outputs, request_id=request_id)
    return caught.value.message


P = "[request id: 7] "


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (
            BATCHING,
            {"X": f32(1, 16)},
            P + "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['X'], but missing required input(s) "
            "['Y']. Please provide all required input(s).",
        ),
        (
            BATCHING,
            {},
            P + "expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required input(s) "
            "['X','Y']. Please provide all required input(s).",
        ),
        (
            SINGLE,
            {"X": f32(1, 16), "Z": f32(1)},
            P + "expected 1 inputs but got 2 inputs for model 'm'. Got input(s) ['X','Z'], but missing required "
            "input(s) []. Please provide all required input(s).",
        ),
        (SINGLE, {"Z": f32(1, 16)}, "unexpected inference input 'Z' for model 'm'"),
        (BATCHING, {"X": f32(1, 16), "Z": f32(1)}, "unexpected inference input 'Z' for model 'm'"),
        (
            BATCHING,
            {"X": f32(), "Y": i32(1, 1, 2)},
            P + "input 'X' has no shape but model requires batch dimension for 'm'",
        ),
        (
            BATCHING,
            {"X": f32(1, 16), "Y": i32(2, 1, 2)},
            P + "input 'Y' batch size does not match other inputs for 'm'",
        ),
        (BATCHING, {"X": f32(9, 16), "Y": i32(9, 1, 2)}, P + "inference request batch-size must be <= 8 for 'm'"),
        (BATCHING, {"X": f32(0, 16), "Y": i32(0, 1, 2)}, P + "inference request batch-size must be >= 1 for 'm'"),
        (BATCHING, {"X": f32(0, 16), "Y": i32(1, 1, 2)}, P + "inference request batch-size must be >= 1 for 'm'"),
        (
            SINGLE,
            {"X": np.zeros((1, 16))},
            P + "inference input 'X' data-type is 'FP64', but model 'm' expects 'FP32'",
        ),
        (
            SINGLE,
            {"X": np.zeros((1, 16), ml_dtypes.bfloat16)},
            P + "inference input 'X' data-type is 'BF16', but model 'm' expects 'FP32'",
        ),
        (
            SINGLE,
            {"X": np.zeros((1, 16), complex)},
            P + "inference input 'X' data-type is 'complex128', but model 'm' expects 'FP32'",
        ),
        (
            SINGLE,
            {"X": f32(1, 8)},
            P + "unexpected shape for input 'X' for model 'm'. Expected [-1,16], got [1,8]. ",
        ),
        (SINGLE, {"X": f32(16)}, P + "unexpected shape for input 'X' for model 'm'. Expected [-1,16], got [16]. "),
        (
            BATCHING,
            {"X": f32(1, 8), "Y": i32(1, 1, 2)},
            P + f"unexpected shape for input 'X' for model 'm'. Expected [-1,16], got [1,8]. {NOTE}",
        ),
        (
            BATCHING,
            {"X": f32(1, 16), "Y": i32(1, 1, 3)},
            P + f"unexpected shape for input 'Y' for model 'm'. Expected [-1,-1,2], got [1,1,3]. {NOTE}",
        ),
        (
            OPTIONAL,
            {},
            P + "expected number of inputs between 1 and 3 but got 0 inputs for model 'm'. Got input(s) [], but "
            "missing required input(s) ['A']. Please provide all required input(s).",
        ),
        (
            OPTIONAL,
            {"B": f32(1, 1)},
            P + "missing required input(s) ['A'] for model 'm'. Please provide all required input(s).",
        ),
    ],
)
def test_what_does_not_fit(config: str, inputs: dict[str, Any], message: str) -> None:
    assert refusal(config, inputs) == message


def test_a_request_without_id_says_so() -> None:
    assert refusal(SINGLE, {"X": f32(1, 8)}, request_id="").startswith("[request id: <id_unknown>] unexpected shape")


def test_outputs_are_those_of_the_model() -> None:
    inputs = {"X": f32(1, 16)}
    assert check(SINGLE, inputs, "OUT")[0] == 1
    assert refusal(SINGLE, inputs, "OUT", "NOPE") == "unexpected inference output 'NOPE' for model 'm'"


def test_batch_size_is_the_first_dimension_of_a_batching_model() -> None:
    assert check(BATCHING, {"X": f32(3, 16), "Y": i32(3, 5, 2)})[0] == 3
    assert check(SINGLE, {"X": f32(3, 16)}) == (1, ())
    assert check('name: "m" backend: "jax" max_batch_size: 4', {}) == (1, ())


def test_variable_dimensions_of_size_zero_are_fine() -> None:
    assert check(BATCHING, {"X": f32(2, 16), "Y": i32(2, 0, 2)})[0] == 2


# Signatures


def test_only_variable_dimensions_tell_requests_apart() -> None:
    def signature(rows: int, length: int) -> Any:
        return check(BATCHING, {"X": f32(rows, 16), "Y": i32(rows, length, 2)})[1]

    assert signature(1, 5) == signature(4, 5)
    assert signature(1, 5) != signature(1, 6)
    hash(signature(1, 5))


def test_ragged_inputs_may_differ() -> None:
    ragged = BATCHING.replace("dims: [ -1, 2 ]", "dims: [ -1, 2 ] allow_ragged_batch: true")
    first = check(ragged, {"X": f32(1, 16), "Y": i32(1, 5, 2)})
    assert first == check(ragged, {"X": f32(1, 16), "Y": i32(1, 6, 2)})


def test_requests_with_other_optional_inputs_do_not_share_a_batch() -> None:
    a, b, c = ({"A": f32(2, 1), **extra} for extra in ({}, {"B": f32(2, 1)}, {"C": f32(2, 1)}))
    signatures = [check(OPTIONAL, inputs)[1] for inputs in (a, b, c, b | c)]
    assert len(set(signatures)) == 4


# What is put into the model's form


def test_reshape_is_applied() -> None:
    config = """
    name: "m" backend: "jax" max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] reshape { } }
    input { name: "Y" data_type: TYPE_FP32 dims: [ 4, -1 ] reshape { shape: [ 2, 2, -1 ] } }
    input { name: "Z" data_type: TYPE_FP32 dims: [ 3 ] }
    """
    request = InferenceRequest({"X": f32(5, 1), "Y": f32(5, 4, 7), "Z": f32(5, 3)})
    assert RequestValidator(parse_model_config(config)).check(request)[0] == 5
    assert {name: array.shape for name, array in request.inputs.items()} == {"X": (5,), "Y": (5, 2, 2, 7), "Z": (5, 3)}


@pytest.mark.parametrize("strings", [["é", "b"], ["é".encode(), b"b"]])
def test_numpy_strings_become_bytes(strings: list[Any]) -> None:
    config = 'name: "m" backend: "jax" max_batch_size: 2 input { name: "T" data_type: TYPE_STRING dims: [ 1 ] }'
    request = InferenceRequest({"T": np.array(strings).reshape(2, 1)})
    assert RequestValidator(parse_model_config(config)).check(request)[0] == 2
    assert request.inputs["T"].dtype == object
    assert request.inputs["T"].tolist() == [["é".encode()], [b"b"]]


def test_byte_order_is_not_a_datatype() -> None:
    request = InferenceRequest({"X": np.ones((1, 16), ">f4")})
    RequestValidator(parse_model_config(SINGLE)).check(request)
    assert request.inputs["X"].dtype == np.dtype("<f4")
    assert request.inputs["X"].sum() == 16
    assert "'FP64', but model" in refusal(SINGLE, {"X": np.ones((1, 16), ">f8")})
