"""Models of sequences: what a sequence batcher's rows are to the JAX and identity backends.

Here the batches are made by hand, one row a slot; ``tests/scheduling`` has who gets a slot and when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from triton_trio.backends import BackendInstance, ModelContext
from triton_trio.backends.identity import IdentityBackend
from triton_trio.backends.jax.turns import stack_inputs
from triton_trio.batch import Batch, Member
from triton_trio.errors import InternalError, InvalidArgument
from triton_trio.lifecycle import Event
from triton_trio.request import InferenceRequest
from triton_trio.scheduling import SequenceTensors
from triton_trio.scopes import Reason
from triton_trio.states import StateSlot
from triton_trio.testing.device import DeviceGate
from triton_trio.validation import RequestValidator

from .world import CPU, open_world, write_model

Inputs = Mapping[str, np.ndarray]

SUM_CONFIG = """
input [{ name: "X" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [1] }]
sequence_batching {
  control_input [
    { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } },
    { name: "READY" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [false, true] } },
    { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT32 } }
  ]
  state { input_name: "SUM_IN" output_name: "SUM" data_type: TYPE_INT32 dims: [1] }
  MORE
}
"""
#: Adds up a sequence, and answers with the sum and the sequence's id; the first request counts a thousand more.
SUM = """
def apply(params, inputs):
    total = inputs["SUM_IN"] + inputs["X"] + 1000 * inputs["START"]
    return {"Y": total * 10 + inputs["ID"], "SUM": total}
"""
SUM_BY_STEPS = """
def init(params, inputs):
    return {"left": inputs["X"], "sum": inputs["SUM_IN"] + 1000 * inputs["START"], "id": inputs["ID"]}

def step(params, carry):
    return {**carry, "left": carry["left"] - 1, "sum": carry["sum"] + 1}

def done(carry):
    return carry["left"][0] <= 0

def finish(params, carry):
    return {"Y": carry["sum"] * 10 + carry["id"], "SUM": carry["sum"]}
"""
SUM_EXPLICIT = """
def add(inputs):
    total = inputs["SUM_IN"] + inputs["X"] + 1000 * inputs["START"]
    return {"Y": total * 10 + inputs["ID"], "SUM": total}

async def run(ctx, params, inputs):
    outputs = await ctx.run(add, inputs)
    await ctx.checkpoint(outputs)
    return outputs
"""
#: With the value of ``state_on_device``: whoever keeps the states, a client sees the same.
FORMS = pytest.mark.parametrize(
    ("code", "on_device"),
    [(SUM, "true"), (SUM, "false"), (SUM_BY_STEPS, "true"), (SUM_BY_STEPS, "false"), (SUM_EXPLICIT, "true")],
    ids=["apply", "apply-host", "steps", "steps-host", "explicit"],
)
#: Few programs, for what does not depend on their number.
FEW: dict[str, Any] = {"buckets": 4, "ladder": "1,4", "warmup": "false"}


def sum_config(more: str = "") -> str:
    return SUM_CONFIG.replace("MORE", more)


def x(value: int) -> Inputs:
    return {"X": np.array([[value]], np.int32)}


class Slots:
    """One instance; slot ``i`` holds sequence ``i + 1`` and its state."""

    def __init__(self, context: ModelContext, instance: BackendInstance, slots: int, *, keep_cancelled: bool) -> None:
        self.tensors = SequenceTensors(context.config)
        self.states = [self.tensors.initial_state() for _ in range(slots)]
        self.instance = instance
        self.decoupled = context.config.decoupled
        self.keep_cancelled = keep_cancelled
        self.requests: list[InferenceRequest | None] = []
        self.rescheduled: list[int | str] = []

    def batch(self, *slots: Inputs | None, start: bool = False) -> Batch:
        """A row for each slot; None: nothing to execute there."""
        self.requests = [
            None if inputs is None else InferenceRequest(inputs, sequence_id=index + 1)
            for index, inputs in enumerate(slots)
        ]
        return self.again(start=start)

    def again(self, *, start: bool = False) -> Batch:
        """The requests of the batch before."""
        real = [request for request in self.requests if request is not None]
        for request in real:
            request.advance(Event.ENQUEUE if request.bound_at == 0 else Event.RESCHEDULE)
            if self.instance.keeps_states:
                request.state_slot = StateSlot(int(request.sequence_id) - 1, generation=int(request.sequence_id))
            state = {} if self.instance.keeps_states else self.state(request)
            self.tensors.fill(request, state, start=start, end=False)
        return Batch(
            [self.tensors.null_row(real[0]) if request is None else request for request in self.requests],
            decoupled=self.decoupled,
            take_states=None if self.instance.keeps_states else self.take_states,
            keep_cancelled=self.keep_cancelled,
            on_rescheduled=self.note_rescheduled,
        )

    def take_states(self, request: InferenceRequest, outputs: Inputs) -> Inputs:
        return self.tensors.take_states(self.state(request), request, outputs)

    def note_rescheduled(self, member: Member) -> None:
        self.rescheduled.append(member.request.sequence_id)

    def state(self, request: InferenceRequest) -> dict[str, np.ndarray]:
        return self.states[int(request.sequence_id) - 1]

    async def execute(self, *slots: Inputs | None, start: bool = False) -> list[object]:
        """The answers by slot: numbers of the output ``Y``."""
        with trio.fail_after(30):
            await self.instance.execute(self.batch(*slots, start=start))
            return [None if request is None else (await self.answer(request)) for request in self.requests]

    async def answer(self, request: InferenceRequest) -> object:
        outputs = (await request.receive()).outputs
        assert list(outputs) == ["Y"], "a state is not for clients"
        return outputs["Y"].item()


def backend_view(context: ModelContext, slots: int = 4) -> ModelContext:
    """What a backend gets, when it may keep the states of so many sequences."""
    states = SequenceTensors(context.config).slots(slots)
    return dataclasses.replace(context, config=context.config.backend_view(), states=states)


@asynccontextmanager
async def open_slots(
    context: ModelContext, *, slots: int = 4, gate: DeviceGate | None = None, keep_cancelled: bool = False
) -> AsyncIterator[Slots]:
    async with open_world(backend_view(context, slots), gate=gate) as world:
        yield Slots(context, world.instance, slots, keep_cancelled=keep_cancelled)


# The three forms


@FORMS
async def test_controls_and_states_are_inputs_and_new_states_are_outputs(
    tmp_path: Path, code: str, on_device: str
) -> None:
    context = write_model(tmp_path, code, sum_config(), max_batch_size=4, **FEW, state_on_device=on_device)
    async with open_slots(context) as sequences:
        assert await sequences.execute(x(1), x(2), x(3), start=True) == [10011, 10022, 10033]
        assert await sequences.execute(x(4), x(5), x(6)) == [10051, 10072, 10093]
        assert await sequences.execute(x(0), x(0), x(0), x(0)) == [10051, 10072, 10093, 4]


@FORMS
async def test_a_sequence_of_a_model_that_does_not_batch(tmp_path: Path, code: str, on_device: str) -> None:
    context = write_model(tmp_path, code, sum_config(), max_batch_size=0, ladder="1,4", state_on_device=on_device)
    async with open_slots(context, slots=1) as sequences:
        one, two = ({"X": np.array([value], np.int32)} for value in (1, 2))
        assert await sequences.execute(one, start=True) == [10011]
        assert await sequences.execute(two) == [10031]
        assert await sequences.execute(two) == [10051]


@FORMS
async def test_law_7_rows_without_a_request_do_not_touch_their_neighbours(
    tmp_path: Path, code: str, on_device: str
) -> None:
    context = write_model(tmp_path, code, sum_config(), max_batch_size=4, **FEW, state_on_device=on_device)
    async with open_slots(context) as sequences:
        assert await sequences.execute(None, x(2), None, x(4), start=True) == [None, 10022, None, 10044]
        assert await sequences.execute(x(1), None, None, x(4)) == [11, None, None, 10084]
        assert await sequences.execute(x(0), x(0), x(0), x(0)) == [11, 10022, 3, 10084]


async def test_a_row_without_a_request_is_computed_with_another_row_s_tensors(tmp_path: Path) -> None:
    """Zeros could be what a ``while_loop`` in the model never ends with."""
    context = write_model(tmp_path, SUM, sum_config(), max_batch_size=4, buckets=4, state_on_device="false")
    async with open_slots(context) as sequences:
        sequences.states[1]["SUM_IN"] = np.array([[70]], np.int32)
        stacked = stack_inputs(sequences.batch(None, x(5), start=True), context.config.backend_view(), bucket=4)
    assert {name: array.ravel().tolist() for name, array in stacked.items()} == {
        "X": [5, 5, 5, 5],
        "SUM_IN": [70, 70, 70, 70],
        "START": [0, 1, 0, 0],
        "READY": [False, True, False, False],
        "ID": [0, 2, 0, 0],
    }


@FORMS
async def test_a_cancelled_row_that_is_kept_is_computed_for_its_state(
    tmp_path: Path, code: str, on_device: str
) -> None:
    """Timeline: two rows on the device; one is cancelled; the device ends; its state is there, an answer is not."""
    context = write_model(tmp_path, code, sum_config(), max_batch_size=4, **FEW, state_on_device=on_device)
    gate = DeviceGate()
    async with open_slots(context, gate=gate, keep_cancelled=True) as sequences:
        batch = sequences.batch(x(1), x(2), start=True)
        first, second = (request for request in sequences.requests if request is not None)
        first.admit("m", 1, lambda request, place: None)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sequences.instance.execute, batch, name="execute")
                await gate.wait_dispatched(1)
                first.cancel(Reason.CLIENT_RESET)
                gate.open()
        assert await sequences.answer(second) == 10022
        assert first.reason is Reason.CLIENT_RESET
        assert await sequences.execute(x(0), x(0)) == [10011, 10022]


# Rescheduling


UNTIL_10 = """
def add(inputs):
    return inputs["SUM_IN"] + inputs["X"]

async def run(ctx, params, inputs):
    total = await ctx.fetch(add, inputs)
    if (total < 10).all() and inputs["X"].any():
        ctx.reschedule()
        return {"SUM": total}
    return {"Y": total, "SUM": total}
"""


async def test_an_explicit_model_asks_for_another_turn_and_keeps_its_state(tmp_path: Path) -> None:
    context = write_model(tmp_path, UNTIL_10, sum_config("iterative_sequence: true"), max_batch_size=4)
    async with open_slots(context) as sequences:
        with trio.fail_after(30):
            await sequences.instance.execute(sequences.batch(x(4), x(12), start=True))
            assert sequences.rescheduled == [1]
            first, second = sequences.requests
            assert second is not None
            assert await sequences.answer(second) == 12
            sequences.requests = [first, None]
            await sequences.instance.execute(sequences.again())
            await sequences.instance.execute(sequences.again())
            assert sequences.rescheduled == [1, 1]
            assert first is not None
            assert await sequences.answer(first) == 12


async def test_a_rescheduled_run_may_leave_its_states_as_they_are(tmp_path: Path) -> None:
    code = """
    async def run(ctx, params, inputs):
        await ctx.checkpoint()
        ctx.reschedule()
    """
    context = write_model(tmp_path, code, sum_config("iterative_sequence: true"), max_batch_size=4)
    async with open_slots(context) as sequences:
        sequences.states[0]["SUM_IN"] = before = np.array([[5]], np.int32)
        await sequences.instance.execute(sequences.batch(x(1)))
        assert sequences.rescheduled == [1]
        assert sequences.states[0]["SUM_IN"] is before


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ('{"SUM": inputs["SUM_IN"], "Y": inputs["X"]}', "may return states and nothing else, got 'Y'"),
        ("{}", "run(): output 'SUM' is missing, got none"),
    ],
)
async def test_what_a_rescheduled_run_returns_is_checked(tmp_path: Path, outputs: str, text: str) -> None:
    code = f"async def run(ctx, params, inputs):\n    ctx.reschedule()\n    return {outputs}\n"
    context = write_model(tmp_path, code, sum_config("iterative_sequence: true"), max_batch_size=4, warmup="false")
    async with open_slots(context) as sequences:
        with pytest.raises(InternalError) as caught:
            await sequences.execute(x(1))
        assert text in str(caught.value)
        assert sequences.rescheduled == []


async def test_answers_of_a_decoupled_run_may_leave_states_out(tmp_path: Path) -> None:
    code = """
    async def run(ctx, params, inputs):
        await ctx.send({"Y": inputs["X"]})
        await ctx.send({"Y": inputs["X"], "SUM": inputs["X"] + 1})
    """
    config = sum_config() + "model_transaction_policy { decoupled: true }"
    context = write_model(tmp_path, code, config, max_batch_size=4)
    async with open_slots(context) as sequences:
        await sequences.instance.execute(sequences.batch(x(1)))
        assert sequences.states[0]["SUM_IN"].item() == 2


# Loading


@pytest.mark.parametrize(
    ("code", "config", "text"),
    [
        (
            SUM,
            sum_config("iterative_sequence: true"),
            "has apply(), which cannot ask for another turn, and config.pbtxt says iterative_sequence; write async def "
            "run(ctx, params, inputs) and call ctx.reschedule(), or remove iterative_sequence",
        ),
        (
            SUM_BY_STEPS,
            sum_config("iterative_sequence: true"),
            "has init(), which cannot ask for another turn",
        ),
        (
            UNTIL_10.replace('and inputs["X"].any()', ""),
            sum_config(),
            "ctx.reschedule() needs 'sequence_batching { iterative_sequence: true }' in config.pbtxt",
        ),
        (
            SUM,
            sum_config().replace("TYPE_INT32 }", "TYPE_STRING }"),
            "input 'ID', which sequence_batching adds, is TYPE_STRING, and devices have no strings; for "
            "CONTROL_SEQUENCE_CORRID use TYPE_UINT64, and keep states as numbers",
        ),
        (
            'def apply(params, inputs):\n    return {"Y": inputs["X"]}\n',
            sum_config(),
            "apply(): output 'SUM' is missing, got ['Y']",
        ),
        (
            'def apply(params, inputs):\n    return {"Y": inputs["X"], "SUM": inputs["X"][0]}\n',
            sum_config(),
            "apply(): output 'SUM' must have dims [1] as in config.pbtxt, got []",
        ),
    ],
    ids=["apply-iterative", "steps-iterative", "not-iterative", "string-id", "no-state", "state-dims"],
)
async def test_what_cannot_work_is_said_when_the_model_is_loaded(
    tmp_path: Path, code: str, config: str, text: str
) -> None:
    context = backend_view(write_model(tmp_path, code, config, max_batch_size=4))
    with pytest.raises(InvalidArgument) as caught:
        async with open_world(context):
            pass
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["START", "ID", "SUM_IN"])
def test_clients_do_not_send_controls_and_states(tmp_path: Path, name: str) -> None:
    config = write_model(tmp_path, SUM, sum_config(), max_batch_size=4).config
    with pytest.raises(InvalidArgument, match=f"unexpected inference input '{name}' for model 'm'"):
        RequestValidator(config).check(InferenceRequest({name: np.zeros((1, 1), np.int32)}))


# Identity


async def test_identity_ignores_controls_and_leaves_states_as_they_are(tmp_path: Path) -> None:
    context = backend_view(write_model(tmp_path, "", sum_config(), max_batch_size=4))
    async with IdentityBackend().open_model(context) as model, model.open_instance(CPU) as instance:
        sequences = Slots(write_model(tmp_path, "", sum_config(), max_batch_size=4), instance, 2, keep_cancelled=False)
        sequences.states[1]["SUM_IN"] = np.array([[9]], np.int32)
        assert await sequences.execute(None, x(3), start=True) == [None, 3]
        assert sequences.states[1]["SUM_IN"].tolist() == [[9]]
