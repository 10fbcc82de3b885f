"""States that stay on the device: whose they are, what becomes of them when a sequence or a program ends, and what they take.

That a client sees the same wherever its states are kept is in ``test_sequences.py`` and ``test_served_sequences.py``.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trio
from trio.testing import MockClock

from triton_trio import InferenceServer, InternalError, InvalidArgument, Reason, RequestCancelled, Unavailable
from triton_trio.backends.jax.backend import JaxInstance
from triton_trio.backends.jax.loader import Form, ModelFunctions
from triton_trio.backends.jax.options import JaxOptions
from triton_trio.backends.jax.states import StateLayout, StateStore
from triton_trio.model import Model
from triton_trio.request import InferenceRequest
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.scheduling import SequenceTensors
from triton_trio.states import StateSlot
from triton_trio.testing.device import DeviceGate

from .test_sequences import FEW, SUM, SUM_BY_STEPS, backend_view, open_slots, sum_config, x
from .test_served_sequences import STRATEGIES, WAVE, WAVE_CONFIG, serve
from .world import write_model

#: The state is the last value that came, whatever it was.
LAST = """
def apply(params, inputs):
    return {"Y": inputs["WAVE_IN"], "WAVE": inputs["X"]}
"""
NAN = float("nan")


def jax_instance(server: InferenceServer, name: str = "m") -> JaxInstance:
    model = server.model(name)
    assert isinstance(model, ScheduledModel)
    backend = model.instances[0]._backend
    assert isinstance(backend, JaxInstance)
    return backend


def store(instance: JaxInstance) -> StateStore:
    assert instance._states is not None
    return instance._states


def wave(model: Model, sequence: int, value: float, flags: str = "") -> InferenceRequest:
    return model.request(
        {"X": np.array([[value]], np.float32)},
        sequence_id=sequence,
        sequence_start="start" in flags,
        sequence_end="end" in flags,
    )


async def answer(model: Model, sequence: int, value: float, flags: str = "") -> float:
    return float((await model.infer(wave(model, sequence, value, flags))).outputs["Y"].item())


# Whose a state is


@STRATEGIES
async def test_B7_whatever_ends_a_sequence_the_next_in_its_slot_starts_anew(
    tmp_path: Path, mock_clock: MockClock, strategy: str
) -> None:
    """Timeline, for each end: sequence 1 leaves NaN in the only slot and ends; sequence 2 takes the slot and finds zero."""
    mock_clock.rate = 1.0
    strategy = strategy.replace("8", "1")
    config = WAVE_CONFIG.replace("60000000", "10000000")
    write_model(tmp_path, LAST, config + strategy + "}", max_batch_size=1)
    gate = DeviceGate()
    async with serve(tmp_path, gate) as server:
        model = server.model("m")
        states = store(jax_instance(server))

        async def by_its_end() -> None:
            gate.let_end()
            assert np.isnan(await answer(model, 1, NAN, "end"))

        async def by_idleness() -> None:
            mock_clock.jump(11)

        async def by_another_start() -> None:
            gate.let_end()
            assert await answer(model, 1, 5, "start end") == 0

        async def by_a_cancel_on_the_device() -> None:
            sent, before = wave(model, 1, NAN), gate.dispatched
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused, model, sent, name="client")
                await gate.wait_dispatched(before + 1)
                sent.cancel(Reason.CLIENT_RESET)
                gate.let_end()

        async def by_a_cancel_in_the_queue() -> None:
            executing, queued, before = wave(model, 1, NAN), wave(model, 1, NAN), gate.dispatched
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused, model, executing, name="client")
                await gate.wait_dispatched(before + 1)
                nursery.start_soon(refused, model, queued, name="client")
                await trio.testing.wait_all_tasks_blocked()
                queued.cancel(Reason.CLIENT_RESET)
                gate.let_end()

        ends: tuple[Callable[[], Awaitable[None]], ...] = (
            by_its_end,
            by_idleness,
            by_another_start,
            by_a_cancel_on_the_device,
            by_a_cancel_in_the_queue,
        )
        for end in ends:
            gate.let_end(2)
            assert await answer(model, 1, NAN, "start") == 0, end.__name__
            assert np.isnan(await answer(model, 1, NAN)), end.__name__
            await end()
            gate.let_end(2)
            assert await answer(model, 2, 7, "start") == 0, end.__name__
            assert await answer(model, 2, 8, "end") == 7, end.__name__
            while any(states._kept):  # noqa: ASYNC110  # its task has yet to give the slot back
                await trio.lowlevel.checkpoint()
            assert not any(states._owners)
            assert not states._lost


async def refused(model: Model, sent: InferenceRequest) -> None:
    with pytest.raises(RequestCancelled):
        await model.infer(sent)


async def test_law_7_what_comes_late_is_put_nowhere(tmp_path: Path) -> None:
    """By the time a program's states could be kept, their slot has another owner."""
    context = write_model(tmp_path, SUM, sum_config(), max_batch_size=4, **FEW)
    async with open_slots(context) as sequences:
        assert isinstance(sequences.instance, JaxInstance)
        states = store(sequences.instance)
        first = sequences.batch(x(1), start=True)
        (late,) = first.members
        states.admit(first)
        (successor,) = (second := sequences.batch(x(2), start=True)).members
        successor.request.state_slot = StateSlot(0, generation=99)
        states.admit(second)
        await trio.to_thread.run_sync(states.put, {"SUM": jax.numpy.full((4, 1), 7)}, [(late, slice(0, 1))], 4)
        assert states._kept == [0, 0, 0, 0]
        taken = states.take([successor], 4)
        assert np.asarray(taken["SUM_IN"]).tolist() == [[0]] * 4


@pytest.mark.parametrize("form", ["apply", "steps"])
async def test_a_state_has_the_same_bits_wherever_it_is_kept(tmp_path: Path, form: str) -> None:
    """And one that config.pbtxt lists as an output, too, arrives."""
    by_steps = """
    import jax.numpy as jnp

    def init(params, inputs):
        return {"wave": inputs["WAVE_IN"], "x": inputs["X"]}

    def step(params, carry):
        return {**carry, "wave": jnp.sin(carry["wave"]) * 1.1 + carry["x"]}

    def finish(params, carry):
        return {"Y": carry["wave"] * 2, "WAVE": carry["wave"]}
    """
    shown = WAVE_CONFIG.replace("output [{", 'output [{ name: "WAVE" data_type: TYPE_FP32 dims: [1] }, {')
    found: dict[str, list[bytes]] = {}
    for on_device in ("true", "false"):
        parameters: dict[str, Any] = FEW | {"state_on_device": on_device, "max_steps": 3}
        write_model(tmp_path, WAVE if form == "apply" else by_steps, shown + "}", max_batch_size=4, **parameters)
        bits = found[on_device] = []
        async with serve(tmp_path) as server:
            assert jax_instance(server).keeps_states == (on_device == "true")
            model = server.model("m")
            for index, flags in enumerate(["start", "", "", "end"]):
                outputs = (await model.infer(wave(model, 1, 0.3 + index, flags))).outputs
                bits += [outputs["Y"].tobytes(), outputs["WAVE"].tobytes()]
    assert found["true"] == found["false"]
    assert len({*found["true"]}) >= 4


async def test_two_instances_of_a_device_share_no_state(tmp_path: Path) -> None:
    """Sequences 1 and 2 have the same slot, each of an instance of its own."""
    config = WAVE_CONFIG + "} instance_group { count: 2 }"
    write_model(tmp_path, LAST, config, max_batch_size=1)
    async with serve(tmp_path) as server:
        model = server.model("m")
        assert (await answer(model, 1, 1, "start"), await answer(model, 2, 2, "start")) == (0, 0)
        assert (await answer(model, 1, 3), await answer(model, 2, 4)) == (1, 2)
        assert isinstance(model, ScheduledModel)
        one, other = (store(instance._backend) for instance in model.instances)  # type: ignore[arg-type]
        assert sum(map(bool, one._kept)) == sum(map(bool, other._kept)) == 1
        assert jax_instance(server).statistics().state_bytes == 2 * (1 + 1) * 4


# Programs that fail


async def test_a_program_that_fails_leaves_every_state_as_it_was(tmp_path: Path) -> None:
    """Timeline: sequences 1 and 2 have states; the program for 1 fails on the device; both go on from what they had."""
    write_model(tmp_path, LAST, WAVE_CONFIG + "}", max_batch_size=4, buckets=4)
    async with serve(tmp_path) as server:
        model, instance = server.model("m"), jax_instance(server)
        await answer(model, 1, 1, "start")
        await answer(model, 2, 2, "start")
        (programs,) = instance._placed.program_sets()
        apply, programs.apply = programs.apply, broken
        with pytest.raises(InternalError, match="out of luck"):
            await answer(model, 1, 10)
        programs.apply = apply
        assert (await answer(model, 1, 3), await answer(model, 2, 4)) == (1, 2)


def broken(*args: object) -> Any:
    raise RuntimeError("out of luck")


async def test_states_that_are_lost_end_their_sequences_clearly(tmp_path: Path) -> None:
    """Timeline: sequences 1 and 2 have states, 3 has yet to start; the device breaks while it writes the state of 1."""
    write_model(tmp_path, LAST, WAVE_CONFIG + "}", max_batch_size=4, buckets=4)
    async with serve(tmp_path) as server:
        model, instance = server.model("m"), jax_instance(server)
        layout, states = instance._placed.layout, store(instance)
        assert layout is not None
        await answer(model, 1, 1, "start")
        await answer(model, 2, 2, "start")
        put = layout._put[4]

        def lose(arrays: dict[str, jax.Array], *args: object) -> Any:
            for array in arrays.values():
                array.delete()  # as when they were donated to a program that fails
            raise RuntimeError("out of luck")

        layout._put[4] = lose
        with pytest.raises(InternalError, match="out of luck"):
            await answer(model, 1, 10)
        layout._put[4] = put
        assert await answer(model, 3, 3, "start") == 0
        for flags in ("", "", "end"):
            with pytest.raises(
                Unavailable, match="sequence 2 of model 'm' has lost its state with a program that failed"
            ):
                await answer(model, 2, 20, flags)
        with pytest.raises(Unavailable, match=r"sequence 1 .*; start it again"):
            await answer(model, 1, 11)
        assert await answer(model, 3, 4, "end") == 3
        for sequence in (1, 2):
            assert await answer(model, sequence, 5, "start") == 0
            assert await answer(model, sequence, 6, "end") == 5
        while any(states._kept) or states._lost:  # noqa: ASYNC110  # their tasks have yet to give the slots back
            await trio.lowlevel.checkpoint()


# What they take


@pytest.mark.parametrize("code", [SUM, SUM_BY_STEPS], ids=["apply", "steps"])
async def test_states_are_written_in_place_and_nothing_is_compiled_for_them_later(tmp_path: Path, code: str) -> None:
    context = write_model(tmp_path, code, sum_config(), max_batch_size=4, buckets="2,4", ladder="1,4")
    gc.collect()
    before = len(jax.live_arrays())
    async with open_slots(context, slots=7) as sequences:
        assert isinstance(sequences.instance, JaxInstance)
        states = store(sequences.instance)
        (array,) = (states._arrays or {}).values()
        assert array.shape == (8, 1)
        where = array.unsafe_buffer_pointer()
        for rows in (1, 2, 3, 4):
            await sequences.execute(*(x(1) for _ in range(rows)))
        (array,) = (states._arrays or {}).values()
        assert array.unsafe_buffer_pointer() == where
        del array
        statistics = sequences.instance.statistics()
        assert statistics.compiles_after_load == 0
        assert statistics.state_bytes == (7 + 1) * 4
        sequences.requests = []
    del sequences, states
    gc.collect()
    assert len(jax.live_arrays()) == before


async def test_states_count_for_the_memory_limit(tmp_path: Path) -> None:
    config = WAVE_CONFIG.replace('"WAVE" data_type: TYPE_FP32 dims: [1]', '"WAVE" data_type: TYPE_FP32 dims: [262144]')
    code = 'def apply(params, inputs):\n    return {"Y": inputs["X"], "WAVE": inputs["WAVE_IN"]}\n'
    context = write_model(tmp_path, code, config + "}", max_batch_size=1, device_memory_limit_mb=8)
    with pytest.raises(
        InvalidArgument, match=r"and 9\.0 MiB of states of sequences; .* set state_on_device to 'false'"
    ):
        async with open_slots(context, slots=8):
            pass


async def test_states_that_do_not_fit_are_told_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(layout: StateLayout) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(StateLayout, "make", make)
    context = write_model(tmp_path, LAST, WAVE_CONFIG + "}", max_batch_size=1)
    with pytest.raises(
        InvalidArgument, match="for the states of 4 sequences do not fit; set the parameter state_on_device"
    ):
        async with open_slots(context):
            pass


# Where the server keeps them


def test_what_keeps_its_states_on_the_host(tmp_path: Path) -> None:
    def on_device(config: str = WAVE_CONFIG + "}", form: Form = Form.APPLY, **functions: Any) -> bool:
        context = write_model(tmp_path, "", config, max_batch_size=4, **functions.pop("parameters", {}))
        seen = backend_view(context)
        made = ModelFunctions(tmp_path, form, None, **functions)
        options = JaxOptions.read(seen.config)
        return StateLayout.of(seen.config, made, options, seen.states, jax.devices("cpu")[0]) is not None

    def function() -> None: ...

    variable = WAVE_CONFIG.replace('"WAVE" data_type: TYPE_FP32 dims: [1]', '"WAVE" data_type: TYPE_FP32 dims: [-1]')
    assert on_device()
    assert on_device(form=Form.STEPS, finish=function)
    assert not on_device(form=Form.STEPS, finish=function, emit=function)
    assert not on_device(form=Form.EXPLICIT, run=function)
    assert not on_device(variable + "}")
    assert not on_device(parameters={"state_on_device": "false"})
    with pytest.raises(
        InvalidArgument, match=r"state_on_device in config\.pbtxt must be 'true' or 'false', got 'maybe'"
    ):
        on_device(parameters={"state_on_device": "maybe"})
    context = write_model(tmp_path, "", WAVE_CONFIG + "}", max_batch_size=4)
    slots = SequenceTensors(context.config).slots(4)
    assert slots is not None
    assert dataclasses.astuple(slots)[0] == 4
    assert slots.hidden == {"WAVE"}
