"""The codec against betterproto2's own parser and writer, and against protobuf's generated classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, make_dataclass
from typing import Any

import betterproto2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from tests._pb import torture
from tests.grpc.messages import message_classes, messages, same
from triton_trio._pb import health
from triton_trio._pb import inference as pb
from triton_trio._pb.inference_grpc import GrpcInferenceServiceBase
from triton_trio.grpc import upb
from triton_trio.grpc.codec import DecodeError, EncodeError, UpbCodec
from triton_trio.testing._pb import echo

codec = UpbCodec()
CLASSES = [cls for module in (pb, health, echo, torture) for cls in message_classes(module)]
by_name = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def outcome(decode: Any, data: bytes, cls: type) -> Any:
    try:
        return decode(data, cls)
    except DecodeError as error:
        return str(error)


# --- the same objects as betterproto2, for every message type


def check_round_trips(message: betterproto2.Message) -> None:
    cls = type(message)
    theirs = bytes(message)
    parsed = cls.parse(theirs)
    assert same(codec.decode(theirs, cls), parsed)
    ours = codec.encode(message, cls)
    assert same(cls.parse(ours), parsed)
    assert same(codec.decode(ours, cls), parsed)


@by_name
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_type_round_trips(cls: type[betterproto2.Message], data: st.DataObject) -> None:
    check_round_trips(data.draw(messages(cls)))


@settings(max_examples=150, deadline=None)
@given(message=messages(torture.Torture, 4))
def test_torture_round_trips(message: torture.Torture) -> None:
    check_round_trips(message)


@by_name
def test_an_empty_message_is_empty(cls: type[betterproto2.Message]) -> None:
    assert codec.encode(cls(), cls) == b""
    assert same(codec.decode(b"", cls), cls())


@settings(max_examples=100, deadline=None)
@given(message=messages(torture.Torture, 3))
def test_unknown_fields_are_kept_byte_for_byte(message: torture.Torture) -> None:
    new = bytes(message)
    old = codec.decode(new, torture.OldTorture)
    assert same(old, torture.OldTorture.parse(new))
    assert same(codec.decode(codec.encode(old, torture.OldTorture), torture.Torture), torture.Torture.parse(new))


def test_presence_of_defaults() -> None:
    for empty in (
        pb.InferParameter(bool_param=False),
        pb.InferParameter(string_param=""),
        torture.Optionals(a_double=0.0, a_string="", a_colour=torture.Colour(0), scalars=torture.Scalars()),
        torture.Oneofs(empty=torture.OneofsEmpty()),
        torture.Maps(to_message={"": torture.Scalars()}, by_bool={False: ""}),
        torture.Repeateds(messages=[torture.Scalars()], blobs=[b""], bools=[False]),
    ):
        assert same(codec.decode(codec.encode(empty, type(empty)), type(empty)), empty)


def test_enums_are_members_and_unknown_numbers_survive() -> None:
    numbers = [torture.Colour(n) for n in (1, -1, 2**31 - 1, -(2**31), 77, -77)]
    decoded = codec.decode(codec.encode(torture.Repeateds(colours=numbers), torture.Repeateds), torture.Repeateds)
    assert decoded.colours[0] is torture.Colour.RED
    assert [(c.value, c.name) for c in decoded.colours] == [(c.value, c.name) for c in numbers]
    assert decoded.colours[4].name == ""


# --- where upb follows the specification and betterproto2 does not


def test_negative_zero_is_not_the_default() -> None:
    decoded = codec.decode(codec.encode(torture.Scalars(a_double=-0.0), torture.Scalars), torture.Scalars)
    assert math.copysign(1, decoded.a_double) == -1


def test_the_last_member_of_a_oneof_wins() -> None:
    twice = bytes(pb.InferParameter(int64_param=3)) + bytes(pb.InferParameter(string_param="x"))
    assert same(codec.decode(twice, pb.InferParameter), pb.InferParameter(string_param="x"))


def test_a_sub_message_that_occurs_twice_is_merged() -> None:
    parts = (torture.Scalars(an_int32=1), torture.Scalars(a_string="x"))
    decoded = codec.decode(b"".join(bytes(torture.Torture(scalars=part)) for part in parts), torture.Torture)
    assert decoded.scalars == torture.Scalars(an_int32=1, a_string="x")


def test_a_known_field_with_a_foreign_wire_type_is_unknown() -> None:
    data = b"\x0d\x01\x02\x03\x04"  # model_name, field 1, as a fixed32
    decoded = codec.decode(data, pb.ModelReadyRequest)
    assert decoded.name == ""
    assert codec.encode(decoded, pb.ModelReadyRequest) == data


# --- tensors do not pass through upb


@settings(max_examples=100, deadline=None)
@given(message=messages(pb.ModelInferRequest))
def test_a_large_message_decodes_as_a_small_one(message: pb.ModelInferRequest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upb, "LARGE", 0)
        check_round_trips(message)


def infer_request() -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="identity",
        id="42",
        parameters={"timeout": pb.InferParameter(int64_param=1000)},
        inputs=[pb.ModelInferRequestInferInputTensor(name="INPUT0", datatype="FP32", shape=[1, 16])],
        raw_input_contents=[bytes(range(200)), b"", b"\x80" * 5],
    )


def test_a_message_cut_off_anywhere_is_an_error_in_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (
        codec.encode(infer_request(), pb.ModelInferRequest)
        + b"\xf9\x07"
        + b"8 bytes."
        + b"\xfd\x074444"
        + b"\xf8\x07\xff\x01"
    )
    small = [outcome(codec.decode, whole[:n], pb.ModelInferRequest) for n in range(len(whole) + 1)]
    monkeypatch.setattr(upb, "LARGE", 0)
    large = [outcome(codec.decode, whole[:n], pb.ModelInferRequest) for n in range(len(whole) + 1)]
    assert all(map(same, small, large))
    assert sum(isinstance(message, str) for message in small) > len(whole) // 2
    assert small[-1].raw_input_contents == infer_request().raw_input_contents


def test_the_search_for_tensors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    request = pb.ModelInferRequest(raw_input_contents=[b"x"] * (upb.MOST_FIELDS + 1))
    looked: list[int] = []
    read = upb._varint

    def counted(*arguments: Any) -> Any:
        looked.append(1)
        return read(*arguments)

    monkeypatch.setattr(upb, "LARGE", 0)
    monkeypatch.setattr(upb, "_varint", counted)
    assert codec.decode(codec.encode(request, pb.ModelInferRequest), pb.ModelInferRequest) == request
    assert len(looked) == 2 * upb.MOST_FIELDS


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 4), dtype=np.int64),
        np.array(7, dtype=np.uint8),
        np.arange(2000, dtype=np.uint16),
    ],
)
def test_a_tensor_may_be_any_buffer(array: np.ndarray[Any, Any]) -> None:
    for value in (array, memoryview(array), bytearray(array.tobytes())):
        response = pb.ModelInferResponse(id="1", raw_output_contents=[value])  # type: ignore[list-item]
        nested = pb.ModelStreamInferResponse(infer_response=response)
        decoded = codec.decode(codec.encode(nested, pb.ModelStreamInferResponse), pb.ModelStreamInferResponse)
        assert decoded.infer_response.raw_output_contents == [array.tobytes()]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("large", [0, upb.LARGE])
def test_decode_reads_any_buffer(kind: Any, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upb, "LARGE", large)
    data = bytearray(codec.encode(infer_request(), pb.ModelInferRequest))
    decoded = codec.decode(kind(data), pb.ModelInferRequest)
    data[:] = bytes(len(data))  # what was decoded owns its bytes
    assert decoded == infer_request()


# --- errors


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=64), cls=st.sampled_from(CLASSES))
def test_garbage_is_a_decode_error_or_a_message(data: bytes, cls: type) -> None:
    result = outcome(codec.decode, data, cls)
    if isinstance(result, str):
        assert cls.__name__ in result
    else:
        assert same(codec.decode(codec.encode(result, cls), cls), result)


@settings(max_examples=200, deadline=None)
@given(message=messages(torture.Torture), at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_byte_is_a_decode_error_or_a_message(message: torture.Torture, at: int, byte: int) -> None:
    data = bytearray(bytes(message) or b"\0")
    data[at % len(data)] = byte
    outcome(codec.decode, bytes(data), torture.Torture)


def test_decode_errors_name_the_type() -> None:
    for data in (b"\x0a\x05ab", b"\x0a\x02\xff\xff", b"\x00\x00"):
        with pytest.raises(DecodeError, match="cannot decode ModelInferRequest: ") as caught:
            codec.decode(data, pb.ModelInferRequest)
        assert isinstance(caught.value, ValueError)


def test_encode_errors_name_the_type() -> None:
    wrong: list[Any] = [
        pb.ModelInferRequest(model_name=7),  # type: ignore[arg-type]
        pb.ModelInferRequest(raw_input_contents=["text"]),  # type: ignore[list-item]
        pb.ModelInferRequest(raw_input_contents=[5]),  # type: ignore[list-item]
        pb.ModelInferRequest(parameters={"x": pb.InferParameter(int64_param=2**63)}),
        pb.ModelInferRequest(inputs=["INPUT0"]),  # type: ignore[list-item]
        pb.ModelInferRequest(parameters=["x"]),  # type: ignore[arg-type]
    ]
    for message in wrong:
        with pytest.raises(EncodeError, match=r"cannot encode ModelInferRequest: ."):
            codec.encode(message, pb.ModelInferRequest)


def test_encode_refuses_another_type() -> None:
    with pytest.raises(TypeError, match="expected a message of type ModelInferResponse, got ModelInferRequest"):
        codec.encode(pb.ModelInferRequest(), pb.ModelInferResponse)
    with pytest.raises(TypeError, match="int is no message class"):
        codec.decode(b"", int)


def test_bounded_depth() -> None:
    tree = torture.Tree()
    for _ in range(2000):
        tree = torture.Tree(children=[tree])
    with pytest.raises(EncodeError, match="Tree"):
        codec.encode(tree, torture.Tree)
    circle = torture.Tree()
    circle.children = [circle]
    with pytest.raises(EncodeError, match="Tree"):
        codec.encode(circle, torture.Tree)
    data = b""
    for _ in range(200):
        data = bytes(torture.Tree(choice=torture.Oneofs())) + b"\x12" + betterproto2.encode_varint(len(data)) + data
    with pytest.raises(DecodeError, match="Tree"):
        codec.decode(data, torture.Tree)


# --- other message classes


def test_coexists_with_generated_code_of_the_same_names() -> None:
    data = codec.encode(infer_request(), pb.ModelInferRequest)
    theirs = codec.decode(data, service_pb2.ModelInferRequest)
    assert theirs.inputs[0].name == "INPUT0"
    assert theirs.parameters["timeout"].int64_param == 1000
    assert list(theirs.raw_input_contents) == infer_request().raw_input_contents
    assert codec.decode(codec.encode(theirs, service_pb2.ModelInferRequest), pb.ModelInferRequest) == infer_request()
    with pytest.raises(DecodeError, match="cannot decode ModelInferRequest"):
        codec.decode(b"\x0a\x05ab", service_pb2.ModelInferRequest)


@settings(max_examples=50, deadline=None)
@given(message=messages(pb.ModelConfig))
def test_protobuf_reads_what_we_write(message: pb.ModelConfig) -> None:
    theirs = model_config_pb2.ModelConfig.FromString(codec.encode(message, pb.ModelConfig))
    assert same(codec.decode(theirs.SerializeToString(), pb.ModelConfig), codec.decode(bytes(message), pb.ModelConfig))
    assert theirs == model_config_pb2.ModelConfig.FromString(bytes(message))


def test_prepared_types_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = GrpcInferenceServiceBase().__mapping__().values()
    codec.prepare(*(cls for handler in handlers for cls in (handler.request_type, handler.reply_type)), Timed)
    monkeypatch.setattr("triton_trio.grpc.codec._codec_of", None)
    for handler in handlers:
        assert codec.decode(b"", handler.request_type) == handler.request_type()
        assert codec.encode(handler.reply_type(), handler.reply_type) == b""
    monkeypatch.undo()
    with pytest.raises(TypeError, match="int is no message class"):
        codec.prepare(int)


def test_namesakes_from_elsewhere() -> None:
    def make(cls: type, kind: str) -> type[betterproto2.Message]:
        fields = [("value", cls, betterproto2.field(1, kind))]
        return make_dataclass("ModelReadyRequest", fields, bases=(betterproto2.Message,), eq=False, repr=False)

    text, blob = make(str, betterproto2.TYPE_STRING), make(bytes, betterproto2.TYPE_BYTES)
    assert codec.decode(codec.encode(text(value="x"), text), text).value == "x"
    assert codec.decode(codec.encode(blob(value=b"x"), blob), blob).value == b"x"


@dataclass(eq=False, repr=False)
class Milliseconds(betterproto2.Message):
    """A message that betterproto2 would show as a number, in the way it shows a Duration as a timedelta."""

    value: int = betterproto2.field(1, betterproto2.TYPE_INT64)

    @staticmethod
    def from_wrapped(seconds: float) -> Milliseconds:
        return Milliseconds(value=round(seconds * 1000))

    def to_wrapped(self) -> float:
        return self.value / 1000


@dataclass(eq=False, repr=False)
class Timed(betterproto2.Message):
    delay: float | None = betterproto2.field(1, betterproto2.TYPE_MESSAGE, unwrap=lambda: Milliseconds, optional=True)


def test_types_that_betterproto2_wraps_are_left_to_it() -> None:
    timed = Timed(delay=1.5)
    data = codec.encode(timed, Timed)
    assert data == bytes(timed)
    assert codec.decode(memoryview(data), Timed) == timed
    with pytest.raises(DecodeError, match="cannot decode Timed"):
        codec.decode(b"\x0a\xff", Timed)
