"""From message to request and back: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.parity.world import infer_message
from triton_trio._pb import inference as pb
from triton_trio.errors import InvalidArgument, NotFound, TritonError
from triton_trio.grpc.service_infer import (
    decode_request,
    encode_error,
    encode_response,
    parse_version,
    wants_empty_final,
)
from triton_trio.request import InferenceResponse

Parameter = pb.InferParameter
Tensor = pb.ModelInferRequestInferInputTensor
Output = pb.ModelInferRequestInferRequestedOutputTensor


def with_parameter(name: str, value: pb.InferParameter) -> pb.ModelInferRequest:
    return infer_message("m", 1, **{name: value})


def refused(message: pb.ModelInferRequest, error: type[TritonError] = InvalidArgument) -> str:
    with pytest.raises(error) as caught:
        decode_request(message)
    return caught.value.message


def test_a_version_is_empty_or_a_number() -> None:
    assert parse_version("") is None
    assert parse_version("7") == 7


@pytest.mark.parametrize("text", ["x", "1.5", "١2x", "9" * 30])
def test_a_version_that_is_no_number(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_version(text)
    assert caught.value.message == (
        f"failed to get model version from specified version string '{text}' (details: stol), "
        "version should be an integral value > 0"
    )


def test_a_negative_version() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_version("-3")
    assert caught.value.message == "invalid model version specified '-3' , version should be an integral value > 0"


def test_inputs_are_views_of_the_message() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    message = infer_message("m", {"A": array}, id="7")
    request, classes = decode_request(message)
    assert request.request_id == "7"
    assert not classes
    np.testing.assert_array_equal(request.inputs["A"], array)
    assert not request.inputs["A"].flags.owndata
    assert np.shares_memory(request.inputs["A"], np.frombuffer(message.raw_input_contents[0], np.float32))


def test_parameters_are_passed_on_and_those_of_the_protocol_are_understood() -> None:
    message = infer_message(
        "m",
        1,
        sequence_id=Parameter(string_param="s"),
        sequence_start=Parameter(bool_param=True),
        sequence_end=Parameter(bool_param=False),
        priority=Parameter(uint64_param=2),
        timeout=Parameter(int64_param=500),
        triton_enable_empty_final_response=Parameter(bool_param=True),
        flag=Parameter(bool_param=False),
        count=Parameter(int64_param=0),
        text=Parameter(string_param=""),
        ratio=Parameter(double_param=0.5),
    )
    request, _ = decode_request(message)
    assert (request.priority, request.timeout_us) == (2, 500)
    assert wants_empty_final(message)
    assert (request.sequence_id, request.sequence_start, request.sequence_end) == ("s", True, False)
    assert request.parameters == {
        "flag": False,
        "count": 0,
        "text": "",
        "ratio": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "sequence_id",
            Parameter(bool_param=True),
            "invalid value type for 'sequence_id' parameter, expected int64_param or string_param.",
        ),
        (
            "sequence_start",
            Parameter(int64_param=1),
            "invalid value type for 'sequence_start' parameter, expected bool_param.",
        ),
        (
            "sequence_end",
            Parameter(string_param="true"),
            "invalid value type for 'sequence_end' parameter, expected bool_param.",
        ),
        (
            "priority",
            Parameter(string_param="1"),
            "invalid value type for 'priority' parameter, expected int64_param or uint64_param.",
        ),
        ("priority", Parameter(int64_param=-1), "invalid value for 'priority', expected value >= 0."),
        ("timeout", Parameter(uint64_param=5), "invalid value type for 'timeout' parameter, expected int64_param."),
        (
            "triton_enable_empty_final_response",
            Parameter(int64_param=1),
            "invalid value type for 'triton_enable_empty_final_response' parameter, expected bool_param.",
        ),
        (
            "triton_mine",
            Parameter(int64_param=1),
            "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting "
            "with 'triton_' are allowed: triton_enable_empty_final_response",
        ),
        (
            "mine",
            Parameter(uint64_param=5),
            "invalid value type for 'mine' parameter, expected int64_param, bool_param, or string_param.",
        ),
        (
            "mine",
            Parameter(),
            "invalid value type for 'mine' parameter, expected int64_param, bool_param, or string_param.",
        ),
    ],
)
def test_parameters_that_are_refused(name: str, value: pb.InferParameter, text: str) -> None:
    assert refused(with_parameter(name, value)) == text


@pytest.mark.parametrize(
    ("datatype", "contents", "expected"),
    [
        ("BOOL", pb.InferTensorContents(bool_contents=[True, False]), np.array([True, False])),
        ("INT8", pb.InferTensorContents(int_contents=[-1, 300]), np.array([-1, 44], np.int8)),
        ("INT16", pb.InferTensorContents(int_contents=[-1, 2]), np.array([-1, 2], np.int16)),
        ("INT32", pb.InferTensorContents(int_contents=[-1, 2]), np.array([-1, 2], np.int32)),
        ("INT64", pb.InferTensorContents(int64_contents=[-1, 2**40]), np.array([-1, 2**40], np.int64)),
        ("UINT8", pb.InferTensorContents(uint_contents=[1, 257]), np.array([1, 1], np.uint8)),
        ("UINT16", pb.InferTensorContents(uint_contents=[1, 2]), np.array([1, 2], np.uint16)),
        ("UINT32", pb.InferTensorContents(uint_contents=[1, 2]), np.array([1, 2], np.uint32)),
        ("UINT64", pb.InferTensorContents(uint64_contents=[1, 2**63]), np.array([1, 2**63], np.uint64)),
        ("FP32", pb.InferTensorContents(fp32_contents=[0.5, 2]), np.array([0.5, 2], np.float32)),
        ("FP64", pb.InferTensorContents(fp64_contents=[0.1, 2]), np.array([0.1, 2], np.float64)),
        ("BYTES", pb.InferTensorContents(bytes_contents=[b"a", b""]), np.array([b"a", b""], object)),
    ],
)
def test_typed_contents(datatype: str, contents: pb.InferTensorContents, expected: np.ndarray) -> None:
    message = pb.ModelInferRequest(inputs=[Tensor(name="A", datatype=datatype, shape=[2], contents=contents)])
    request, _ = decode_request(message)
    np.testing.assert_array_equal(request.inputs["A"], expected)
    assert request.inputs["A"].dtype == expected.dtype


def test_typed_and_raw_contents_are_not_mixed() -> None:
    message = infer_message("m", 1)
    message.inputs[0].contents = pb.InferTensorContents(int_contents=[1])
    assert refused(message) == (
        "contents field must not be specified when using raw_input_contents for 'IN' for model 'm'"
    )


def test_an_input_without_data() -> None:
    message = infer_message("m", 1)
    message.raw_input_contents = []
    assert refused(message) == "unable to find data for input tensor 'IN' for model 'm' in request."


def test_raw_contents_of_the_wrong_size() -> None:
    message = infer_message("m", 1, id="4")
    message.raw_input_contents = [b"123"]
    assert refused(message) == (
        "[request id: 4] input byte size mismatch for input 'IN' for model 'm'. Expected 4, got 3"
    )


def test_an_input_or_output_that_comes_twice() -> None:
    message = infer_message("m", 1)
    message.inputs *= 2
    message.raw_input_contents *= 2
    assert refused(message) == "[request id: <id_unknown>] input 'IN' already exists in request"
    assert refused(infer_message("m", 1, id="1", outputs=["A", "B", "A"])) == (
        "[request id: 1] output 'A' already exists in request"
    )


def test_shared_memory_is_not_there() -> None:
    region = {"shared_memory_region": Parameter(string_param="r")}
    message = pb.ModelInferRequest(inputs=[Tensor(name="A", datatype="INT32", shape=[1], parameters=region)])
    assert refused(message, NotFound) == "Unable to find shared memory region: 'r'"
    message = infer_message("m", 1)
    message.outputs = [Output(name="A", parameters=region)]
    assert refused(message, NotFound) == "Unable to find shared memory region: 'r'"


def test_classes_are_asked_for_by_output() -> None:
    message = infer_message("m", 1)
    message.outputs = [
        Output(name="A", parameters={"classification": Parameter(int64_param=3)}),
        Output(name="B", parameters={"binary_data": Parameter(bool_param=True)}),
    ]
    request, classes = decode_request(message)
    assert classes == {"A": 3}
    assert request.requested_outputs == ("A", "B")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"classification": Parameter(int64_param=0)},
            "invalid value for 'classification' parameter, expected >= 0",
        ),
        (
            {"classification": Parameter(string_param="3")},
            "invalid value type for 'classification' parameter, expected int64_param",
        ),
        (
            {"classification": Parameter(int64_param=1), "shared_memory_region": Parameter(string_param="r")},
            "output can't set both 'shared_memory_region' and 'classification'",
        ),
    ],
)
def test_classes_that_are_refused(parameters: dict[str, pb.InferParameter], text: str) -> None:
    message = infer_message("m", 1)
    message.outputs = [Output(name="A", parameters=parameters)]
    assert refused(message) == text


def test_a_response_has_one_raw_entry_for_each_output() -> None:
    outputs = {
        "A": np.array([[1, 2]], np.int64),
        "EMPTY": np.zeros((0, 3), np.float32),
        "S": np.array([b"ab", b""], object),
        "B": np.array([1.5], ml_dtypes.bfloat16),
    }
    message = encode_response(
        InferenceResponse(
            outputs,
            model_name="m",
            model_version=3,
            request_id="9",
            parameters={"b": True, "i": 1, "d": 0.5, "s": "x"},
        )
    )
    assert (message.model_name, message.model_version, message.id) == ("m", "3", "9")
    assert [(each.name, each.datatype, each.shape) for each in message.outputs] == [
        ("A", "INT64", [1, 2]),
        ("EMPTY", "FP32", [0, 3]),
        ("S", "BYTES", [2]),
        ("B", "BF16", [1]),
    ]
    assert message.raw_output_contents == [
        outputs["A"].tobytes(),
        b"",
        b"\x02\0\0\0ab\0\0\0\0",
        outputs["B"].tobytes(),
    ]
    assert message.parameters == {
        "b": Parameter(bool_param=True),
        "i": Parameter(int64_param=1),
        "d": Parameter(double_param=0.5),
        "s": Parameter(string_param="x"),
    }


@pytest.mark.parametrize("final", [True, False])
def test_only_a_stream_says_which_response_is_the_last(final: bool) -> None:
    response = InferenceResponse({}, parameters={"mine": 1}, final=final)
    assert set(encode_response(response).parameters) == {"mine"}
    parameters = encode_response(response, stream=True).parameters
    assert parameters["triton_final_response"].bool_param is final
    assert parameters["mine"].int64_param == 1


def test_d1_an_error_in_a_stream_is_never_empty() -> None:
    """Triton's clients read an empty error_message as success."""
    reply = encode_error(infer_message("m", 1, id="5", version="2"), "")
    assert reply.error_message
    assert reply.infer_response is not None
    assert (reply.infer_response.id, reply.infer_response.model_name, reply.infer_response.model_version) == (
        "5",
        "m",
        "2",
    )
    assert reply.infer_response.parameters["triton_final_response"].bool_param is True
