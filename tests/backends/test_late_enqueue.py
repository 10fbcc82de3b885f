"""A chunk is queued only just before the running one ends: when that is, and what a cancel until then saves."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty

import jax
import pytest
import trio

from triton_trio.backends.jax import DeviceJob, DeviceThread, Executor, Turn, short_switch_interval
from triton_trio.backends.jax.controller import ChunkController, LateEnqueue
from triton_trio.testing.device import DeviceGate

from .world import COUNTDOWN, COUNTDOWN_CONFIG, countdown, open_world, until, write_model

# The decision


@pytest.mark.parametrize(
    ("now", "started", "expected", "seconds"),
    [
        (10.0, 10.0, 3.0, 2.0),  # to one second before its end
        (11.5, 10.0, 3.0, 0.5),
        (12.5, 10.0, 3.0, 0.0),  # the time has come
        (20.0, 10.0, 3.0, 0.0),  # it is late
        (10.0, 10.0, 0.5, 0.0),  # shorter than the margin: at once, as without the option
        (10.0, 10.0, None, 0.0),  # nobody knows
    ],
)
def test_waits_until_a_margin_before_the_predicted_end(
    now: float, started: float, expected: float | None, seconds: float
) -> None:
    assert LateEnqueue(margin=1.0).hold(now, started, expected) == seconds


async def test_E3_a_wait_that_is_over_before_it_begins_ends() -> None:
    """With ``queue.SimpleQueue`` of Python 3.11 it never does, if a letter came and was taken before; a soak hung on it."""
    device = DeviceThread("test")
    mail, ends = type(device.mail)(), 0
    device.close()

    def hold_often() -> None:
        nonlocal ends
        for _ in range(20_000):
            mail.put(None)
            mail.get()
            with suppress(Empty):
                Executor().hold(mail, 1e-7)
            ends += 1

    thread = threading.Thread(target=hold_often, daemon=True)
    with short_switch_interval(1e-6):
        thread.start()
        # It takes another thread, for the moment in which the time passes.
        until = time.monotonic() + 10
        while thread.is_alive() and time.monotonic() < until:
            pass
    assert ends == 20_000


def test_the_prediction_is_the_least_of_the_last_16() -> None:
    controller = ChunkController(2e-3, (1, 2, 4))
    assert controller.expect(1) is None
    controller.observe(1, 1e-3)
    for _ in range(15):
        controller.observe(2, 6e-3)
    assert controller.expect(4) == pytest.approx(4e-3)
    controller.observe(2, 6e-3)  # the short one is forgotten
    assert controller.expect(4) == pytest.approx(12e-3)


def test_the_margin_grows_fast_and_shrinks_slowly() -> None:
    late = LateEnqueue(1e-3).queued(late=True)
    assert late.margin == pytest.approx(1.55e-3)
    assert late.queued(late=False).margin == pytest.approx(1.5345e-3)
    assert LateEnqueue(0.0).queued(late=True).margin == pytest.approx(50e-6)


@pytest.mark.parametrize("needed", [1e-4, 5e-4, 2e-3])
def test_the_margin_settles_near_what_the_host_needs(needed: float) -> None:
    late = LateEnqueue()
    margins = []
    for _ in range(2000):
        late = late.queued(late=late.margin < needed)
        margins.append(late.margin)
    assert needed * 0.98 <= min(margins[1000:])
    assert max(margins[1000:]) <= needed * 1.5 + 50e-6
    assert sum(margin < needed for margin in margins[1000:]) <= 30


# The device thread


class Program(Turn):
    steps = 1

    def __init__(self, label: str, log: list[str], expected: float | None = 5.0) -> None:
        self.label = label
        self.log = log
        self.expected = expected

    def dispatch(self) -> bool:
        self.log.append(self.label)
        return True

    def wait(self) -> None:
        """Its end is the gate's."""

    def ready(self) -> bool:
        return False

    def expect(self) -> float | None:
        return self.expected


@pytest.fixture
async def gate() -> DeviceGate:  # noqa: ASYNC124  (pytest-trio makes async fixtures inside the Trio run)
    return DeviceGate()


@pytest.fixture
async def device(gate: DeviceGate):
    thread = DeviceThread("fake", executor=gate, clock=lambda: 0.0)  # time stands still; the gate says what passes
    yield thread
    gate.open()
    thread.close()


async def test_the_next_program_waits_for_its_time(device: DeviceThread, gate: DeviceGate) -> None:
    """Timeline: a runs, b is held back; its time comes, it is queued; a ends, and c is held back while b runs."""
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job", late=True) as job:
            job.submit(*(Program(label, log) for label in "abc"))
            await gate.wait_held(1)
            assert log == ["a"]
            assert gate.held == [pytest.approx(5.0 - 1e-3)]
            gate.let_pass()
            await gate.wait_dispatched(2)
            gate.let_end()
            await job.next()  # heard of at once, not when c's time has come
            await gate.wait_held(2)
            assert log == ["a", "b"]
            gate.let_pass()
            gate.open()
            await job.next()
            await job.next()
    assert log == ["a", "b", "c"]
    assert 0 < device.statistics().margin_ms < 1


async def test_c6_a_cancel_while_the_next_program_is_held_back_keeps_it_off_the_device(
    device: DeviceThread, gate: DeviceGate
) -> None:
    log: list[str] = []
    scope = trio.CancelScope()

    async def work() -> None:
        with scope:
            async with DeviceJob(device, "job", late=True) as job:
                job.submit(*(Program(label, log) for label in "abc"))
                while True:
                    await job.next()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, name="work")
            await gate.wait_held(1)
            scope.cancel()
            gate.let_end()  # no time has passed: it is the cancel that ends the wait
    assert log == ["a"]
    assert device.statistics().cancels == 1


async def test_a_program_whose_end_nobody_can_predict_is_followed_at_once(
    device: DeviceThread, gate: DeviceGate
) -> None:
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job", late=True) as job:
            job.submit(Program("a", log, None), Program("b", log))
            await gate.wait_dispatched(2)
            gate.open()
            await job.next()
            await job.next()
    assert gate.held == []


async def test_who_is_not_late_does_not_wait(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job:
            job.submit(Program("a", log), Program("b", log))
            await gate.wait_dispatched(2)
            gate.open()
            await job.next()
            await job.next()
    assert (log, gate.held) == (["a", "b"], [])


# A step model


async def test_at_most_one_chunk_runs_after_a_cancel(tmp_path: Path) -> None:
    """Timeline: two chunks are measured and the third runs; the fourth is held back, and never comes."""
    gate = DeviceGate()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2, late_enqueue="true")
    async with open_world(context, gate=gate) as world:
        (thread, _) = world.backend._devices._threads[jax.devices("cpu")[0]]
        now = thread.clock()  # later than what the load has put on the device
        thread.clock = lambda: now
        async with world.running([countdown(50), countdown(50, 1)]) as run:
            await gate.wait_dispatched(2)  # the first one's time is not known
            now += 3
            gate.let_end()
            await gate.wait_dispatched(3)  # nor the second one's
            await until(lambda: run.batch.device_seconds)
            await trio.testing.wait_all_tasks_blocked()  # the server has heard of the first and asked for a fourth
            now += 3
            gate.let_end()
            await gate.wait_held(1)
            assert gate.held == [pytest.approx(3.0, abs=0.01)]
            (bucket,) = world.placed.buckets
            assert (bucket.k, bucket.step_ms, bucket.target_ms) == (2, pytest.approx(1500), 2.0)
            run.cancel(0, 1)
            gate.let_end()
        assert gate.steps == [2, 2, 2]
        assert [member.steps_after_cancel for member in run.batch.members] == [2, 2]


async def test_late_chunks_make_the_same_result(tmp_path: Path) -> None:
    results = []
    for late in ("true", "false"):
        context = write_model(tmp_path / late, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=2, late_enqueue=late)
        async with open_world(context) as world:
            responses = await world.execute(*(countdown(100, seed) for seed in range(8)))
            results.append([response["Y"].tobytes() for (response,) in responses])
    assert results[0] == results[1]
