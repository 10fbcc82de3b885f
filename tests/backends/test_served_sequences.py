"""Sequence models behind the server: states from request to request, a cancel in between, and what a load refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

import triton_trio
from triton_trio import InferenceServer, InvalidArgument, Reason, RequestCancelled
from triton_trio.backends.jax import Executor, JaxBackend
from triton_trio.model import Model
from triton_trio.request import InferenceRequest
from triton_trio.testing.device import DeviceGate

from .test_sequences import FORMS, SUM, UNTIL_10, sum_config
from .world import write_model

STRATEGIES = pytest.mark.parametrize("strategy", ["direct { }", "oldest { max_candidate_sequences: 8 }"])
IDLE = "max_sequence_idle_microseconds: 60000000"


@asynccontextmanager
async def serve(root: Path, gate: DeviceGate | None = None) -> AsyncIterator[InferenceServer]:
    with trio.fail_after(60):
        async with triton_trio.open_server(
            root, backends={"jax": lambda: JaxBackend(executor=gate.executor if gate else lambda name: Executor())}
        ) as server:
            yield server


def request(model: Model, sequence: int, value: int, *, start: bool = False, end: bool = False) -> InferenceRequest:
    return model.request(
        {"X": np.array([[value]], np.int32)}, sequence_id=sequence, sequence_start=start, sequence_end=end
    )


async def answer(model: Model, sent: InferenceRequest) -> int:
    return int((await model.infer(sent)).outputs["Y"].item())


async def play(model: Model, sequence: int, *values: int) -> list[int]:
    """A whole sequence, one request after the other."""
    last = len(values) - 1
    return [
        await answer(model, request(model, sequence, value, start=index == 0, end=index == last))
        for index, value in enumerate(values)
    ]


def sums(sequence: int, *values: int) -> list[int]:
    return [(1000 + sum(values[: index + 1])) * 10 + sequence for index in range(len(values))]


@FORMS
@STRATEGIES
async def test_sequences_side_by_side_have_a_state_each(
    tmp_path: Path, strategy: str, code: str, on_device: str
) -> None:
    config = sum_config(strategy + IDLE)
    write_model(tmp_path, code, config, max_batch_size=4, buckets="2,4", ladder="1,4", state_on_device=on_device)
    played: dict[int, list[int]] = {}
    async with serve(tmp_path) as server:
        model = server.model("m")

        async def client(sequence: int) -> None:
            played[sequence] = await play(model, sequence, *range(sequence, sequence + 5))

        async with trio.open_nursery() as clients:
            for sequence in range(1, 8):
                clients.start_soon(client, sequence, name=f"sequence {sequence}")
        # An id that has ended may be used again, and starts from nothing.
        assert await play(model, 3, 1, 1) == sums(3, 1, 1)
    assert played == {sequence: sums(sequence, *range(sequence, sequence + 5)) for sequence in range(1, 8)}


WAVE = """
import jax.numpy as jnp

def apply(params, inputs):
    wave = jnp.sin(inputs["WAVE_IN"]) * 1.1 + inputs["X"]
    return {"Y": wave, "WAVE": wave}
"""
WAVE_CONFIG = """
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }] output [{ name: "Y" data_type: TYPE_FP32 dims: [1] }]
sequence_batching {
  state { input_name: "WAVE_IN" output_name: "WAVE" data_type: TYPE_FP32 dims: [1] } max_sequence_idle_microseconds: 60000000
"""


@STRATEGIES
async def test_law_7_a_cancel_in_mid_sequence_changes_no_bit_of_its_neighbour(tmp_path: Path, strategy: str) -> None:
    """Timeline: sequences 1 and 2 share a batch; 1 is cancelled on the device; 2 goes on; 1 starts again, from nothing."""
    write_model(tmp_path, WAVE, WAVE_CONFIG + strategy + "}", max_batch_size=4, buckets=4)
    gate = DeviceGate()
    waves: dict[int, list[bytes]] = {1: [], 2: [], 3: []}
    async with serve(tmp_path, gate) as server:
        model = server.model("m")

        def wave(sequence: int, value: float, *, start: bool = False, end: bool = False) -> InferenceRequest:
            inputs = {"X": np.array([[value]], np.float32)}
            return model.request(inputs, sequence_id=sequence, sequence_start=start, sequence_end=end)

        async def send(sent: InferenceRequest) -> None:
            sequence = int(sent.sequence_id)
            try:
                waves[sequence].append((await model.infer(sent)).outputs["Y"].tobytes())
            except RequestCancelled as exc:
                waves[sequence].append(exc.reason.encode())

        gate.let_end()
        async with trio.open_nursery() as clients:
            clients.start_soon(send, wave(1, 0.1, start=True))
            clients.start_soon(send, wave(2, 0.2, start=True))
        await gate.wait_ended(1)
        cancelled, neighbour = wave(1, 0.3), wave(2, 0.4)
        async with trio.open_nursery() as clients:
            clients.start_soon(send, cancelled)
            clients.start_soon(send, neighbour)
            await gate.wait_dispatched(2)
            assert cancelled.bound_at == neighbour.bound_at > 0
            cancelled.cancel(Reason.CLIENT_RESET)
            gate.open()
        with pytest.raises(InvalidArgument, match="must specify the START flag"):
            await model.infer(wave(1, 0.5))
        await send(wave(1, 0.1, start=True, end=True))
        await send(wave(2, 0.6, end=True))
        for value, start, end in ((0.2, True, False), (0.4, False, False), (0.6, False, True)):
            await send(wave(3, value, start=start, end=end))
    assert waves[1] == [waves[1][0], b"client_reset", waves[1][0]]
    assert waves[2] == waves[3], "not what the sequence gets when it is alone"


@STRATEGIES
async def test_a_rescheduled_request_shares_the_device_until_it_is_done(tmp_path: Path, strategy: str) -> None:
    write_model(tmp_path, UNTIL_10, sum_config(strategy + IDLE + " iterative_sequence: true"), max_batch_size=4)
    answers: list[int] = []
    async with serve(tmp_path) as server:
        model = server.model("m")

        async def client(value: int) -> None:
            answers.append(await answer(model, model.request({"X": np.array([[value]], np.int32)})))

        async with trio.open_nursery() as clients:
            for value in (1, 3, 4, 12):
                clients.start_soon(client, value)
    assert sorted(answers) == [10, 12, 12, 12]


async def test_a_sequence_starts_with_its_file(tmp_path: Path) -> None:
    config = sum_config(IDLE).replace(
        "TYPE_INT32 dims: [1] }\n",
        'TYPE_INT32 dims: [1] initial_state { name: "s" data_type: TYPE_INT32 dims: 1 data_file: "s" } }\n',
    )
    context = write_model(tmp_path, SUM, config, max_batch_size=4)
    (context.model_directory / "initial_state").mkdir()
    (context.model_directory / "initial_state" / "s").write_bytes(np.int32(500).tobytes())
    async with serve(tmp_path) as server:
        model = server.model("m")
        assert await play(model, 1, 1, 2) == [15011, 15031]
        assert await play(model, 1, 1) == [15011]


async def test_a_load_says_which_file_of_a_state_is_missing(tmp_path: Path) -> None:
    config = sum_config().replace(
        "TYPE_INT32 dims: [1] }\n",
        'TYPE_INT32 dims: [1] initial_state { name: "s" data_type: TYPE_INT32 dims: 1 data_file: "s" } }\n',
    )
    write_model(tmp_path, SUM, config, max_batch_size=4)
    with pytest.raises(InvalidArgument, match="initial state 's' of state 'SUM_IN' of model 'm': cannot read"):
        async with serve(tmp_path):
            pass


async def test_clients_neither_send_nor_see_what_the_batcher_adds(tmp_path: Path) -> None:
    write_model(tmp_path, SUM, sum_config(IDLE), max_batch_size=4)
    async with serve(tmp_path) as server:
        model = server.model("m")
        for name in ("START", "SUM_IN"):
            sent = model.request({name: np.array([[1]], np.int32)}, sequence_id=1, sequence_start=True)
            with pytest.raises(InvalidArgument, match=f"unexpected inference input '{name}' for model 'm'"):
                await model.infer(sent)
        sent = model.request({"X": np.array([[1]], np.int32)}, outputs=("SUM",), sequence_id=1, sequence_start=True)
        with pytest.raises(InvalidArgument, match="unexpected inference output 'SUM' for model 'm'"):
            await model.infer(sent)
        for sequence, text in (("a", "sequence batching control 'ID' data-type is 'BYTES'"), (2**31, "does not fit")):
            sent = model.request({"X": np.array([[1]], np.int32)}, sequence_id=sequence, sequence_start=True)
            with pytest.raises(InvalidArgument, match=text):
                await model.infer(sent)
        assert await play(model, 1, 4) == sums(1, 4)
        assert [spec.name for spec in model.config.inputs] == ["X"]


@STRATEGIES
async def test_a_state_may_grow_and_only_states_of_one_length_share_a_batch(tmp_path: Path, strategy: str) -> None:
    code = """
    import jax.numpy as jnp

    def apply(params, inputs):
        history = jnp.concatenate([inputs["PAST"], inputs["X"]])
        return {"Y": history, "HISTORY": history}
    """
    config = """
    input [{ name: "X" data_type: TYPE_INT32 dims: [1] }] output [{ name: "Y" data_type: TYPE_INT32 dims: [-1] }]
    sequence_batching {
      state { input_name: "PAST" output_name: "HISTORY" data_type: TYPE_INT32 dims: [-1]
        initial_state { name: "nothing" data_type: TYPE_INT32 dims: [0] zero_data: true } }
    """
    write_model(tmp_path, code, config + strategy + IDLE + "}", max_batch_size=4)
    histories: dict[int, list[int]] = {}
    async with serve(tmp_path) as server:
        model = server.model("m")

        async def client(sequence: int) -> None:
            for index in range(sequence):
                response = await model.infer(request(model, sequence, index, start=index == 0))
            histories[sequence] = response.outputs["Y"].ravel().tolist()

        for late in (2, 3):
            await client(late)
        async with trio.open_nursery() as clients:
            for sequence in (1, 4):
                clients.start_soon(client, sequence, name=f"sequence {sequence}")
            clients.start_soon(model.infer, request(model, 3, 3))
    assert histories == {sequence: list(range(sequence)) for sequence in range(1, 5)}
