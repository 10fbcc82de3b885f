"""Blocking place: a device that is at work for others, or that nobody but the model's own code waits for.

What the watchdog gives up is lost for every model on the device.  So it looks whose program has been there for how long.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

import triton_trio
from tests.backends.test_compiles import Compiler
from tests.backends.world import COUNTDOWN, COUNTDOWN_CONFIG, countdown, until, write_model
from triton_trio import InferenceRequest, Outcome, Reason
from triton_trio.backends.jax import DeviceState, Executor, JaxBackend, Turn
from triton_trio.backends.jax.apply import ApplyTurn
from triton_trio.backends.jax.checks import FunctionChecker
from triton_trio.instance import InstanceState
from triton_trio.model import ModelState
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.server import InferenceServer
from triton_trio.testing.device import DeviceGate

LIMIT = 8.0
STEP = LIMIT / 64
VECTOR = 'input [{ name: "X" data_type: TYPE_FP32 dims: [2] }] output [{ name: "Y" data_type: TYPE_FP32 dims: [2] }]'
APPLY = "def apply(params, inputs):\n    return {'Y': inputs['X'] + 1}\n"
#: Its first number is how many seconds it does something that is none of the device's business.
STUBBORN = """
import trio

async def run(ctx, params, inputs):
    with trio.CancelScope(shield=True):
        await trio.sleep(float(inputs["X"][0, 0]))
    return {"Y": inputs["X"]}
"""


async def pass_time(clock: MockClock, seconds: float) -> None:
    """In steps, so that all who sleep wake up when their time has come."""
    for _ in range(round(seconds / STEP)):
        clock.jump(STEP)
        await wait_all_tasks_blocked()


@asynccontextmanager
async def opened(
    root: Path, executor: Executor, **settings: object
) -> AsyncIterator[tuple[InferenceServer, JaxBackend]]:
    backend = JaxBackend(executor=lambda name: executor)
    made = {"backends": {"jax": lambda: backend}, "release_limit": LIMIT} | settings
    async with triton_trio.open_server(root, **made) as server:  # type: ignore[arg-type]
        try:
            yield server, backend
        finally:
            if isinstance(executor, DeviceGate):
                executor.open()  # whatever has happened: leaving waits for the device


def scheduled(server: InferenceServer, name: str) -> ScheduledModel:
    model = server.model(name)
    assert isinstance(model, ScheduledModel)
    return model


async def ask(model: ScheduledModel, request: InferenceRequest) -> None:
    with trio.CancelScope():
        try:
            await model.infer(request)
        except triton_trio.RequestCancelled:
            return


def vector(first: float) -> dict[str, np.ndarray]:
    return {"X": np.array([[first, 0]], np.float32)}


def state(backend: JaxBackend) -> DeviceState:
    (device,) = backend.statistics()
    return device.state


class Watched(DeviceGate):
    """A gate that knows which program the device thread waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.waits_for: Turn | None = None

    def wait(self, turn: Turn) -> None:
        self.waits_for = turn
        self.waits += not turn.at_load
        super().wait(turn)


@asynccontextmanager
async def short_behind_long(
    root: Path, gate: Watched
) -> AsyncIterator[tuple[JaxBackend, ScheduledModel, InferenceRequest, InferenceRequest]]:
    """A model whose chunk is queued behind another one's program; with the requests of both."""
    write_model(root, APPLY, VECTOR, name="long", buckets=1, max_batch_size=1)
    write_model(root, COUNTDOWN, COUNTDOWN_CONFIG, name="short", buckets=1, max_batch_size=1, ladder=1)
    async with opened(root, gate) as (server, backend), trio.open_nursery() as clients:
        short, long = scheduled(server, "short"), scheduled(server, "long")
        first, second = short.request(countdown(30)), long.request(vector(1))
        clients.start_soon(ask, short, first)
        await gate.wait_dispatched(2)
        clients.start_soon(ask, long, second)
        await until(lambda: long.instances[0].batch is not None)
        await wait_all_tasks_blocked()
        (job,) = (each for each in device_jobs(backend) if each.name == "model 'short'")
        while not isinstance(gate.waits_for, ApplyTurn):
            await until(lambda: job.turns)  # one is in line
            waits = gate.waits
            gate.let_end()
            await until(lambda waits=waits: gate.waits > waits)
        assert sum(job.in_flight for job in device_jobs(backend)) == 2
        yield backend, short, first, second


async def test_B5_a_cancel_behind_a_long_program_that_somebody_wants_costs_nobody_the_device(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    gate = Watched()
    async with short_behind_long(tmp_path, gate) as (backend, short, left, wanted):
        left.cancel(Reason.ADMIN)
        await pass_time(mock_clock, 5 * LIMIT)
        assert (state(backend), short.instances[0].state) == (DeviceState.READY, InstanceState.EXECUTING)
        gate.let_end()
        await until(lambda: wanted.outcome is Outcome.OK)
        # From now on it is its own program that the device is at.
        await pass_time(mock_clock, 0.9 * LIMIT)
        assert state(backend) is DeviceState.READY
        gate.open()
        await until(lambda: short.instances[0].state is InstanceState.IDLE)


async def test_B5_behind_a_long_program_its_own_has_the_limit_and_no_more(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    gate = Watched()
    async with short_behind_long(tmp_path, gate) as (backend, short, left, wanted):
        left.cancel(Reason.ADMIN)
        gate.let_end()
        await until(lambda: wanted.outcome is Outcome.OK)
        await pass_time(mock_clock, 3 * LIMIT)
        assert (state(backend), short.instances[0].state) == (DeviceState.DEAD, InstanceState.QUARANTINED)


async def test_C1_a_model_whose_own_code_does_not_let_go_loses_its_instance_and_nobody_else_theirs(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    write_model(tmp_path, STUBBORN, VECTOR, name="stubborn", max_batch_size=1)
    write_model(tmp_path, APPLY, VECTOR, name="beside", buckets=1, max_batch_size=1)
    gate = DeviceGate()
    gate.open()
    async with opened(tmp_path, gate) as (server, backend):
        stubborn, beside = scheduled(server, "stubborn"), scheduled(server, "beside")
        async with trio.open_nursery() as clients:
            request = stubborn.request(vector(10 * LIMIT))
            clients.start_soon(ask, stubborn, request)
            await until(lambda: stubborn.instances[0].batch is not None)
            await wait_all_tasks_blocked()
            request.cancel(Reason.ADMIN)
            await pass_time(mock_clock, 1.1 * LIMIT)
            assert stubborn.instances[0].state is InstanceState.QUARANTINED
            assert not stubborn.ready
            assert state(backend) is DeviceState.READY
            assert beside.ready
            assert (await beside.infer(vector(1))).outputs["Y"].tolist() == [[2, 1]]
            await pass_time(mock_clock, 10 * LIMIT)


AFTER_RUN = """
import trio

def bump(x):
    return x + 1

async def run(ctx, params, inputs):
    y = await ctx.run(bump, inputs["X"])
    with trio.CancelScope(shield=True):
        await trio.sleep(float(inputs["X"][0, 0]))
    return {"Y": y}
"""


async def test_law_6_a_model_whose_own_code_does_not_let_go_is_found_though_a_program_of_its_was_not_fetched(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Nobody waits for that program's end, so the device thread had not heard of it, and the device seemed to get on."""
    write_model(tmp_path, AFTER_RUN, VECTOR, name="stubborn", max_batch_size=1)
    gate = DeviceGate()
    gate.open()
    async with opened(tmp_path, gate) as (server, backend):
        stubborn = scheduled(server, "stubborn")
        async with trio.open_nursery() as clients:
            before = gate.dispatched
            request = stubborn.request(vector(20 * LIMIT))
            clients.start_soon(ask, stubborn, request)
            await until(lambda: gate.dispatched == before + 1)
            await wait_all_tasks_blocked()
            request.cancel(Reason.ADMIN)
            await pass_time(mock_clock, 1.1 * LIMIT)
            assert stubborn.instances[0].state is InstanceState.QUARANTINED
            assert state(backend) is DeviceState.READY
            mock_clock.jump(20 * LIMIT)


async def test_B5_of_time_in_which_nobody_could_run_a_program_that_has_just_begun_has_lost_nothing(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    gate = Watched()
    async with short_behind_long(tmp_path, gate) as (backend, _, left, wanted):
        left.cancel(Reason.ADMIN)
        await pass_time(mock_clock, 0.95 * LIMIT)
        gate.let_end()
        await until(lambda: wanted.outcome is Outcome.OK)
        await wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await wait_all_tasks_blocked()
        await pass_time(mock_clock, 0.9 * LIMIT)
        assert state(backend) is DeviceState.READY
        await pass_time(mock_clock, 0.2 * LIMIT)
        assert state(backend) is DeviceState.DEAD


async def test_rows_that_are_kept_are_watched_when_nobody_waits_any_more(tmp_path: Path, mock_clock: MockClock) -> None:
    narrow = (
        'parameters { key: "executing_cancel_ends_sequence" value { string_value: "false" } } '
        "sequence_batching { oldest {} }"
    )
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + narrow, name="m", buckets=2, max_batch_size=2, ladder=1)
    gate = Watched()
    async with opened(tmp_path, gate) as (server, backend), trio.open_nursery() as clients:
        model = scheduled(server, "m")
        requests = [model.request(countdown(100), sequence_id=7 + row, sequence_start=True) for row in range(2)]
        for request in requests:
            clients.start_soon(ask, model, request)
        await gate.wait_dispatched(2)
        await wait_all_tasks_blocked()
        batch = model.instances[0].batch
        assert batch is not None
        assert len(batch.members) == 2
        requests[0].cancel(Reason.ADMIN)
        await pass_time(mock_clock, 3 * LIMIT)
        assert state(backend) is DeviceState.READY  # it computes for the other, and takes what it takes
        requests[1].cancel(Reason.ADMIN)
        await pass_time(mock_clock, 1.1 * LIMIT)
        assert state(backend) is DeviceState.DEAD


async def test_B5_a_row_that_is_kept_for_its_sequence_is_watched_too(tmp_path: Path, mock_clock: MockClock) -> None:
    """It may take its time, but a device that hangs is noticed though nobody's cancel stops it."""
    narrow = 'parameters { key: "executing_cancel_ends_sequence" value { string_value: "false" } } sequence_batching {}'
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG + narrow, name="m", buckets=1, max_batch_size=1, ladder=1)
    gate = Watched()
    async with opened(tmp_path, gate) as (server, backend), trio.open_nursery() as clients:
        model = scheduled(server, "m")
        request = model.request(countdown(100), sequence_id=7, sequence_start=True)
        clients.start_soon(ask, model, request)
        await gate.wait_dispatched(2)
        request.cancel(Reason.ADMIN)
        for ended in range(1, 6):  # it gets on, more slowly than the limit allows for all of it
            await pass_time(mock_clock, 0.6 * LIMIT)
            gate.let_end()
            await until(lambda ended=ended: gate.waits == ended + 1)
        assert (state(backend), model.instances[0].state) == (DeviceState.READY, InstanceState.EXECUTING)
        await pass_time(mock_clock, 3 * LIMIT)
        assert (state(backend), model.instances[0].state) == (DeviceState.DEAD, InstanceState.QUARANTINED)


# Loads


class StuckTrial(Executor):
    """A device on which what is tried at load does not end before the test says so."""

    def __init__(self) -> None:
        self.tried = threading.Event()
        self.end = threading.Event()

    def wait(self, turn: Turn) -> None:
        if turn.at_load:
            self.tried.set()
            self.end.wait(30)
        turn.wait()


@pytest.mark.parametrize("how", ["unload", "shutdown", "caller"])
async def test_C8_a_trial_that_does_not_end_can_be_left_and_its_device_is_given_up(
    tmp_path: Path, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The model was LOADING for ever, and with it the unload and the server's end; and the device hung in silence."""
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, name="endless", buckets=1, max_batch_size=1)
    device = StuckTrial()
    try:
        async with opened(tmp_path, device, explicit=True) as (server, backend), trio.open_nursery() as nursery:
            loading = trio.CancelScope()

            async def load() -> None:
                with loading:
                    with pytest.raises(triton_trio.Unavailable):
                        await server.load_model("endless")

            nursery.start_soon(load)
            await until(device.tried.is_set)
            await pass_time(mock_clock, 1.1 * LIMIT)
            assert "model 'endless' is being tried on zeros, and has not come back from device cpu:0" in caplog.text
            assert state(backend) is DeviceState.READY  # somebody wants it
            if how == "unload":
                nursery.start_soon(server.unload_model, "endless")
            elif how == "caller":
                loading.cancel()
            else:
                server.repository.stop()
            await wait_all_tasks_blocked()
            await pass_time(mock_clock, 0.9 * LIMIT)
            assert state(backend) is DeviceState.READY
            await pass_time(mock_clock, 0.2 * LIMIT)
            await until(lambda: not backend.statistics())
            assert "what model 'endless' was tried with did not end within 8.0 s, when its load was left" in caplog.text
            (line,) = await server.repository.index()
            assert line.state == ModelState.UNAVAILABLE.value
    finally:
        device.end.set()


class Stepwise(Executor):
    """Programs end one by one, those at load too."""

    def __init__(self) -> None:
        self.waits = 0
        self.permits = threading.Semaphore(0)

    def wait(self, turn: Turn) -> None:
        self.waits += 1
        self.permits.acquire(timeout=30)
        turn.wait()


OWN_LIMIT = """
import trio

def slow(x):
    return x + 1

async def run(ctx, params, inputs):
    with trio.move_on_after(1):
        await ctx.fetch(slow, inputs["X"])
    return {"Y": await ctx.fetch(slow, inputs["X"])}
"""


async def test_C8_a_trial_with_a_limit_of_its_own_is_still_wanted(tmp_path: Path, mock_clock: MockClock) -> None:
    write_model(tmp_path, OWN_LIMIT, VECTOR, name="m", max_batch_size=1)
    device = Stepwise()
    async with opened(tmp_path, device, explicit=True) as (server, backend), trio.open_nursery() as nursery:
        nursery.start_soon(server.load_model, "m")
        await until(lambda: device.waits == 1)
        await wait_all_tasks_blocked()
        mock_clock.jump(2)
        await wait_all_tasks_blocked()
        device.permits.release()
        await until(lambda: device.waits == 2)
        await wait_all_tasks_blocked()
        await pass_time(mock_clock, 2 * LIMIT)
        assert state(backend) is DeviceState.READY
        device.permits.release(10)


async def test_C8_a_cancel_behind_a_trial_that_somebody_wants_costs_nobody_the_device(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, name="m", buckets=1, max_batch_size=1, ladder=1, warmup="false")
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, name="slow", buckets=1, max_batch_size=1)
    device = StuckTrial()
    async with opened(tmp_path, device, explicit=True, load_models=["m"]) as (server, backend):
        async with trio.open_nursery() as nursery:
            model = scheduled(server, "m")
            request = model.request(countdown(10_000_000))
            nursery.start_soon(ask, model, request)
            nursery.start_soon(server.load_model, "slow")
            await until(device.tried.is_set)
            request.cancel(Reason.ADMIN)
            await pass_time(mock_clock, 3 * LIMIT)
            assert state(backend) is DeviceState.READY
            device.end.set()
        assert server.model("slow").ready


async def test_C8_of_time_in_which_nobody_could_run_a_load_that_was_left_loses_nothing(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, name="m", buckets=1, max_batch_size=1)
    device = StuckTrial()
    async with opened(tmp_path, device, explicit=True) as (server, backend), trio.open_nursery() as nursery:
        loading = trio.CancelScope()

        async def load() -> None:
            with loading:
                await server.load_model("m")

        nursery.start_soon(load)
        await until(device.tried.is_set)
        await wait_all_tasks_blocked()
        loading.cancel()
        await wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await wait_all_tasks_blocked()
        assert state(backend) is DeviceState.READY
        device.end.set()


async def test_C8_a_trial_that_does_not_let_go_by_itself_is_not_the_devices_fault(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Its load is left, and its own code goes on: for as long as it likes, for the device has nothing to do with it."""
    write_model(tmp_path, STUBBORN.replace('float(inputs["X"][0, 0])', "100"), VECTOR, name="m", max_batch_size=1)
    write_model(tmp_path, APPLY, VECTOR, name="beside", buckets=1, max_batch_size=1)
    async with opened(tmp_path, Executor(), explicit=True, load_models=["beside"]) as (server, backend):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.load_model, "m")
            await until(lambda: len(device_jobs(backend)) == 1)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await pass_time(mock_clock, 3 * LIMIT)
                assert state(backend) is DeviceState.READY
                mock_clock.jump(100)
        assert (await scheduled(server, "beside").infer(vector(1))).outputs["Y"].tolist() == [[2, 1]]


def device_jobs(backend: JaxBackend) -> list[triton_trio.backends.jax.DeviceJob]:
    return [job for thread, _ in backend._devices._threads.values() for job in thread.jobs]


# Compilations


class Tracing:
    """Holds what is traced for a request, until the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.times = 0
        check = FunctionChecker.check

        def checked(checker: FunctionChecker) -> None:
            self.times += 1
            self.began.set()
            self.go_on.wait(30)
            check(checker)

        monkeypatch.setattr(FunctionChecker, "check", checked)


ANY = 'input [{ name: "X" data_type: TYPE_FP32 dims: [-1] }] output [{ name: "Y" data_type: TYPE_FP32 dims: [-1] }]'


async def test_a_request_leaves_while_its_shape_is_compiled_and_the_shape_is_there_for_the_next(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instance waited for the compiler, and the watchdog gave up the device, which had nothing to do."""
    write_model(tmp_path, APPLY, ANY, name="m", buckets=1, max_batch_size=1)
    tracing = Tracing(monkeypatch)
    async with opened(tmp_path, Executor()) as (server, _), trio.open_nursery() as clients:
        model = scheduled(server, "m")
        request = model.request(vector(1))
        clients.start_soon(ask, model, request)
        await until(tracing.began.is_set)
        request.cancel(Reason.ADMIN)
        await until(lambda: model.instances[0].state is InstanceState.IDLE)
        await pass_time(mock_clock, 3 * LIMIT)
        assert server.ready
        tracing.go_on.set()
        assert (await model.infer(vector(1))).outputs["Y"].tolist() == [[2, 1]]
        assert tracing.times == 1


async def test_a_compiler_that_is_slow_at_load_is_not_said_to_be_the_device(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Compiler(monkeypatch)
    write_model(tmp_path, OWN_LIMIT, VECTOR, name="m", max_batch_size=1)
    async with opened(tmp_path, Executor(), explicit=True) as (server, _), trio.open_nursery() as nursery:
        nursery.start_soon(server.load_model, "m")
        await until(lambda: compiler.begun == 1)
        await pass_time(mock_clock, 2 * LIMIT)
        compiler.permits.release(10)
    assert "has not come back from device" not in caplog.text


async def test_an_unload_waits_for_the_compiler_and_gives_nothing_up(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, APPLY, ANY, name="m", buckets=1, max_batch_size=1)
    write_model(tmp_path, APPLY, VECTOR, name="beside", buckets=1, max_batch_size=1)
    async with opened(tmp_path, Executor(), explicit=True, load_models=["m", "beside"]) as (server, backend):
        tracing = Tracing(monkeypatch)
        model = scheduled(server, "m")
        async with trio.open_nursery() as clients:
            request = model.request(vector(1))
            clients.start_soon(ask, model, request)
            await until(tracing.began.is_set)
            request.cancel(Reason.ADMIN)
            clients.start_soon(server.unload_model, "m")
            await pass_time(mock_clock, 10 * LIMIT)
            assert state(backend) is DeviceState.READY
            tracing.go_on.set()
        assert (await scheduled(server, "beside").infer(vector(1))).outputs["Y"].tolist() == [[2, 1]]
