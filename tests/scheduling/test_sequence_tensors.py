"""What a sequence batcher adds to a request's tensors and takes from its answer, one table a rule."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from triton_trio.config import parse_model_config
from triton_trio.errors import InternalError, InvalidArgument
from triton_trio.request import InferenceRequest
from triton_trio.scheduling.sequence_tensors import NULL_ROWS, SequenceTensors
from triton_trio.tensor import datatype_of

CONTROLS = """
control_input [
  { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ -1, 2 ] } },
  { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } },
  { name: "END" control { kind: CONTROL_SEQUENCE_END bool_false_true: [ false, true ] } }
]
"""
SUM = 'state { input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_INT32 dims: [ 2 ] }'
LOG = 'state { input_name: "LOG_IN" output_name: "LOG_OUT" data_type: TYPE_STRING dims: [ -1 ] }'


def tensors(
    batching: str = "", *, max_batch_size: int = 4, more: str = "", initial: Mapping[str, np.ndarray] | None = None
) -> SequenceTensors:
    config = parse_model_config(
        f"""name: "m" backend: "b" max_batch_size: {max_batch_size}
        input {{ name: "X" data_type: TYPE_FP32 dims: [ 3 ] }} output {{ name: "Y" data_type: TYPE_FP32 dims: [ 3 ] }}
        sequence_batching {{ {batching} }} {more}"""
    )
    return SequenceTensors(config, initial)


def corrid(data_type: str) -> str:
    return f'control_input {{ name: "ID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{data_type} }} }}'


def request(sequence_id: int | str = 7, **inputs: np.ndarray) -> InferenceRequest:
    return InferenceRequest(inputs or {"X": np.ones((1, 3), np.float32)}, request_id="r", sequence_id=sequence_id)


def filled(
    made: SequenceTensors, sent: InferenceRequest | None = None, *, start: bool = False, end: bool = False
) -> InferenceRequest:
    sent = sent or request()
    made.fill(sent, made.initial_state(), start=start, end=end)
    return sent


# Controls


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (True, False, (2.0, 1, False)),
        (False, False, (-1.0, 1, False)),
        (False, True, (-1.0, 1, True)),
        (True, True, (2.0, 1, True)),
    ],
)
def test_controls_say_where_in_its_sequence_a_request_is(start: bool, end: bool, expected: tuple[object, ...]) -> None:
    inputs = filled(tensors(CONTROLS), start=start, end=end).inputs
    assert tuple(inputs[name].item() for name in ("START", "READY", "END")) == expected
    assert [datatype_of(inputs[name]) for name in ("START", "READY", "END")] == ["FP32", "INT32", "BOOL"]
    assert (inputs["X"] == 1).all()


@pytest.mark.parametrize(("max_batch_size", "shape"), [(4, (1, 1)), (0, (1,))])
def test_controls_have_one_element_and_a_batch_dimension_if_the_model_batches(
    max_batch_size: int, shape: tuple[int, ...]
) -> None:
    made = tensors(CONTROLS + corrid("UINT64"), max_batch_size=max_batch_size)
    inputs = filled(made).inputs
    assert {name: inputs[name].shape for name in ("START", "READY", "END", "ID")} == dict.fromkeys(
        ("START", "READY", "END", "ID"), shape
    )


@pytest.mark.parametrize(
    ("data_type", "sequence_id", "datatype"),
    [
        ("UINT64", 2**64 - 1, "UINT64"),
        ("INT64", 2**63 - 1, "INT64"),
        ("UINT32", 2**32 - 1, "UINT32"),
        ("INT32", 2**31 - 1, "INT32"),
        ("STRING", "späť\0", "BYTES"),
    ],
)
def test_the_correlation_id_comes_as_the_datatype_that_the_model_wants(
    data_type: str, sequence_id: int | str, datatype: str
) -> None:
    made = tensors(corrid(data_type))
    sent = request(sequence_id)
    made.check(sent)
    got = filled(made, sent).inputs["ID"]
    assert datatype_of(got) == datatype
    assert got.item() == (sequence_id.encode() if isinstance(sequence_id, str) else sequence_id)


@pytest.mark.parametrize(
    ("data_type", "sequence_id", "text"),
    [
        ("UINT64", "a", "sequence batching control 'ID' data-type is 'BYTES', but model 'm' expects 'UINT64'"),
        ("STRING", 7, "sequence batching control 'ID' data-type is 'UINT64', but model 'm' expects 'BYTES'"),
        (
            "INT32",
            2**31,
            "correlation ID 2147483648 does not fit sequence batching control 'ID' of model 'm', which is INT32: use one "
            "from -2147483648 to 2147483647",
        ),
        (
            "UINT64",
            -1,
            "correlation ID -1 does not fit sequence batching control 'ID' of model 'm', which is UINT64: use one from 0 "
            "to 18446744073709551615",
        ),
    ],
)
def test_a_correlation_id_that_the_model_cannot_be_told_is_refused(
    data_type: str, sequence_id: int | str, text: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tensors(corrid(data_type)).check(request(sequence_id))
    assert str(caught.value) == f"[request id: r] {text}"


def test_any_correlation_id_will_do_for_a_model_that_is_not_told() -> None:
    for sequence_id in (1, 2**64 - 1, "a"):
        tensors(CONTROLS).check(request(sequence_id))


# States: what a sequence starts with


@pytest.mark.parametrize(("max_batch_size", "lead"), [(4, (1,)), (0, ())])
def test_a_new_sequence_starts_with_zeros(max_batch_size: int, lead: tuple[int, ...]) -> None:
    state = tensors(SUM + LOG, max_batch_size=max_batch_size).initial_state()
    assert state["SUM_IN"].shape == (*lead, 2)
    assert state["SUM_IN"].dtype == np.int32
    assert not state["SUM_IN"].any()
    assert state["LOG_IN"].shape == (*lead, 1)  # a variable dim starts at 1, as in Triton
    assert state["LOG_IN"].ravel().tolist() == [b""]


def test_zero_data_gives_a_variable_dim_its_first_size() -> None:
    made = tensors(
        'state { input_name: "I" output_name: "O" data_type: TYPE_FP32 dims: [ -1, 2 ] '
        'initial_state { name: "empty" data_type: TYPE_FP32 dims: [ 0, 2 ] zero_data: true } }'
    )
    assert made.initial_state()["I"].shape == (1, 0, 2)


def test_a_new_sequence_starts_with_the_file_s_data() -> None:
    data = np.array([[3, 4]], np.int32)
    made = tensors(SUM, initial={"SUM_IN": data})
    assert filled(made, start=True).inputs["SUM_IN"] is data


def test_sequences_do_not_share_a_state() -> None:
    made = tensors(SUM)
    one, other = made.initial_state(), made.initial_state()
    made.take_states(one, request(), {"SUM_OUT": np.array([[1, 2]], np.int32)})
    assert one["SUM_IN"].tolist() == [[1, 2]]
    assert other["SUM_IN"].tolist() == made.initial_state()["SUM_IN"].tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="read-only"):
        other["SUM_IN"][0] = 1


# States: from answer to request


def test_the_state_of_one_answer_is_an_input_of_the_next_request() -> None:
    made = tensors(SUM)
    state = made.initial_state()
    left = made.take_states(
        state, request(), {"Y": np.zeros((1, 3), np.float32), "SUM_OUT": np.array([[5, 6]], np.int32)}
    )
    assert list(left) == ["Y"]
    again = request()
    made.fill(again, state, start=False, end=False)
    assert again.inputs["SUM_IN"].tolist() == [[5, 6]]


def test_a_state_that_is_also_an_output_is_shown_to_the_client() -> None:
    made = tensors(SUM, more='output { name: "SUM_OUT" data_type: TYPE_INT32 dims: [ 2 ] }')
    state = made.initial_state()
    outputs = {"Y": np.zeros((1, 3), np.float32), "SUM_OUT": np.array([[5, 6]], np.int32)}
    assert made.take_states(state, request(), outputs) == outputs
    assert state["SUM_IN"].tolist() == [[5, 6]]


def test_a_kept_state_is_a_copy() -> None:
    """A model may answer with a view of its whole batch, and write the next batch into the same memory."""
    made = tensors(SUM)
    state = made.initial_state()
    whole = np.arange(64, dtype=np.int32).reshape(32, 2)
    made.take_states(state, request(), {"SUM_OUT": whole[1:2]})
    whole[:] = -1
    assert state["SUM_IN"].tolist() == [[2, 3]]
    assert state["SUM_IN"].base is None


def test_a_growing_state_changes_its_shape_and_what_it_may_share_a_batch_with() -> None:
    made = tensors(LOG)
    short, long = made.initial_state(), made.initial_state()
    made.take_states(long, request(), {"LOG_OUT": np.array([[b"a", b"b"]], object)})
    assert long["LOG_IN"].tolist() == [[b"a", b"b"]]
    sent = request()
    assert made.signature(sent, short) == made.signature(request(), made.initial_state())
    assert made.signature(sent, short) != made.signature(sent, long)


def test_states_of_one_shape_do_not_keep_requests_apart() -> None:
    sent = request()
    sent.signature = ("X", 3)
    assert tensors(SUM).signature(sent, {"SUM_IN": np.zeros((1, 2), np.int32)}) == ("X", 3)


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({}, "model 'm' did not produce state output 'SUM_OUT'"),
        (
            {"SUM_OUT": np.zeros((1, 2), np.int64)},
            "model 'm' produced state output 'SUM_OUT' as INT64 [1,2], expected INT32 [1,2]",
        ),
        (
            {"SUM_OUT": np.zeros((1, 3), np.int32)},
            "model 'm' produced state output 'SUM_OUT' as INT32 [1,3], expected INT32 [1,2]",
        ),
        (
            {"SUM_OUT": np.zeros((2,), np.int32)},
            "model 'm' produced state output 'SUM_OUT' as INT32 [2], expected INT32 [1,2]",
        ),
        (
            {"SUM_OUT": np.zeros((1, 2), np.complex64)},
            "model 'm' produced state output 'SUM_OUT' as complex64 [1,2], expected INT32 [1,2]",
        ),
    ],
)
def test_a_wrong_state_fails_the_request_and_changes_no_state(outputs: Mapping[str, np.ndarray], text: str) -> None:
    made = tensors(LOG + SUM)
    state = made.initial_state()
    with pytest.raises(InternalError) as caught:
        made.take_states(state, request(), {"LOG_OUT": np.array([[b"a", b"b"]], object), **outputs})
    assert str(caught.value) == f"[request id: r] {text}"
    assert state == made.initial_state()


def test_an_answer_of_a_decoupled_model_may_leave_a_state_as_it_was() -> None:
    made = tensors(SUM + LOG, more="model_transaction_policy { decoupled: true }")
    state = made.initial_state()
    made.take_states(state, request(), {"SUM_OUT": np.array([[1, 2]], np.int32)})
    made.take_states(state, request(), {})
    assert (state["SUM_IN"].tolist(), state["LOG_IN"].tolist()) == ([[1, 2]], [[b""]])


def test_a_rescheduled_request_gets_the_new_state_and_no_start() -> None:
    made = tensors(CONTROLS + SUM)
    state = made.initial_state()
    sent = request()
    made.fill(sent, state, start=True, end=True)
    made.take_states(state, sent, {"SUM_OUT": np.array([[1, 1]], np.int32)})
    made.fill(sent, state, start=False, end=True)
    assert sent.inputs["START"].item() == -1
    assert sent.inputs["SUM_IN"].tolist() == [[1, 1]]
    assert list(sent.inputs) == ["X", "START", "READY", "END", "SUM_IN"]


# Rows without a request


def test_a_null_row_is_not_ready_and_all_zeros() -> None:
    made = tensors(CONTROLS + corrid("STRING") + SUM + LOG)
    like = request("a", X=np.ones((1, 3), np.float32), NAME=np.array([[b"client"]], object))
    like.signature = "shape"
    filled(made, like, start=True, end=True)
    row = made.null_row(like)
    assert {name: array.ravel().tolist() for name, array in row.inputs.items()} == {
        "X": [0, 0, 0],
        "NAME": [b""],
        "START": [-1],
        "READY": [0],
        "END": [False],
        "ID": [b""],
        "SUM_IN": [0, 0],
        "LOG_IN": [b""],
    }
    assert {name: (array.shape, array.dtype) for name, array in row.inputs.items()} == {
        name: (array.shape, array.dtype) for name, array in like.inputs.items()
    }
    assert row.signature == "shape"


def test_a_null_row_has_correlation_id_0() -> None:
    made = tensors(corrid("INT32"))
    assert made.null_row(filled(made)).inputs["ID"].tolist() == [[0]]


def test_null_rows_of_one_shape_are_made_once_and_of_many_shapes_are_forgotten() -> None:
    made = tensors(CONTROLS)
    first = made.null_row(filled(made))
    assert made.null_row(filled(made, request(8))) is first
    for size in range(NULL_ROWS + 1):
        made.null_row(filled(made, request(X=np.ones((1, size + 4), np.float32))))
    assert made.null_row(filled(made)) is not first
