"""The device thread by itself, with programs that end when the test says so: order, windows, cancels, late answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from triton_trio.backends.jax import DeviceJob, DeviceState, DeviceThread, Turn
from triton_trio.backends.jax.device import WINDOW, Pause
from triton_trio.errors import InternalError, Unavailable
from triton_trio.testing.device import DeviceGate

from .world import until


class Program(Turn):
    """A program without a device; says in ``log`` what happens to it."""

    steps = 1

    def __init__(
        self, label: str, log: list[str], error: str = "", *, early: bool = False, expected: float | None = None
    ) -> None:
        self.label = label
        self.log = log
        self.error = error
        self.expected = expected
        self.reply_when_done = not early

    def expect(self) -> float | None:
        return self.expected

    def dispatch(self) -> bool:
        self.log.append(self.label)
        return True

    def wait(self) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def ready(self) -> bool:
        return True


@pytest.fixture
async def gate() -> DeviceGate:  # noqa: ASYNC124  (pytest-trio makes async fixtures inside the Trio run)
    return DeviceGate()


@pytest.fixture
async def device(gate: DeviceGate):
    thread = DeviceThread("fake", executor=gate)
    yield thread
    gate.open()
    thread.close()


async def test_turns_complete_in_order_and_the_window_is_two(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job:
            job.submit(*(Program(label, log) for label in "abcd"))
            await gate.wait_dispatched(WINDOW)
            await trio.testing.wait_all_tasks_blocked()
            assert log == ["a", "b"]
            gate.let_end()
            await job.next()
            await gate.wait_dispatched(3)
            assert log == ["a", "b", "c"]
            gate.open()
            for _ in range(3):
                await job.next()
    assert device.statistics().chunks == 4
    assert device.statistics().jobs == 0


async def test_two_jobs_take_turns(device: DeviceThread, gate: DeviceGate) -> None:
    # One model with much to do and one that comes later: the chunk is the quantum.
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "long") as long, DeviceJob(device, "short") as short:
            long.submit(*(Program(f"long{index}", log) for index in range(5)))
            await gate.wait_dispatched(WINDOW)
            short.submit(*(Program(f"short{index}", log) for index in range(3)))
            gate.open()
            for _ in range(5):
                await long.next()
            for _ in range(3):
                await short.next()
    assert log == ["long0", "long1", "long2", "short0", "long3", "short1", "long4", "short2"]


async def test_c6_no_dispatch_after_the_cancel_and_the_exception_waits_for_the_device(
    device: DeviceThread, gate: DeviceGate
) -> None:
    log: list[str] = []
    passed_on = trio.Event()

    async def work(scope: trio.CancelScope) -> None:
        with scope:
            async with DeviceJob(device, "job") as job:
                job.submit(*(Program(label, log) for label in "abcde"))
                while True:
                    await job.next()
        passed_on.set()

    scope = trio.CancelScope()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, scope)
            await gate.wait_dispatched(WINDOW)
            scope.cancel()
            gate.let_end()  # the running one ends; the queued one still runs
            await gate.wait_ended(1)
            await trio.testing.wait_all_tasks_blocked()
            assert not passed_on.is_set()
            gate.let_end()
            await passed_on.wait()
    assert log == ["a", "b"]
    statistics = device.statistics()
    assert statistics.cancels == 1
    assert 0 < statistics.last_cancel_seconds == statistics.max_cancel_seconds


async def test_a_cancel_in_line_never_reaches_the_device(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "first") as first:
            first.submit(Program("a", log), Program("b", log))
            await gate.wait_dispatched(WINDOW)
            with trio.move_on_after(0) as scope:
                async with DeviceJob(device, "second") as second:
                    await second.call(Program("never", log))
            assert scope.cancelled_caught
            gate.open()
            await first.next()
            await first.next()
    assert log == ["a", "b"]


async def test_a_job_can_be_used_again_after_an_inner_cancel(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    inner = trio.CancelScope()

    async def use(job: DeviceJob) -> None:
        with inner:
            await job.call(Program("a", log))
        await job.call(Program("b", log))  # returns for its own program's end, not for that of the cancelled one
        log.append("b has ended")

    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job, trio.open_nursery() as nursery:
            nursery.start_soon(use, job)
            await gate.wait_dispatched(1)
            inner.cancel()
            gate.let_end(1)
            await gate.wait_dispatched(2)
            await trio.testing.wait_all_tasks_blocked()
            before = tuple(log)
            gate.let_end(1)
    assert inner.cancelled_caught
    assert before == ("a", "b")
    assert log == ["a", "b", "b has ended"]


async def test_leaving_the_block_waits_for_programs_nobody_awaits(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    left = trio.Event()

    async def work() -> None:
        async with DeviceJob(device, "job") as job:
            await job.call(Program("a", log, early=True))
        left.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await gate.wait_dispatched(1)
            await trio.testing.wait_all_tasks_blocked()
            assert not left.is_set()
            gate.open()
    assert gate.ended == 1


async def test_a_pause_returns_when_one_program_is_left(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job:
            await job.call(Program("a", log, early=True))
            await job.call(Pause())
            await job.call(Program("b", log, early=True))
            job.submit(Pause())
            await trio.testing.wait_all_tasks_blocked()
            assert job.outstanding == 1
            assert gate.ended == 0
            gate.let_end()
            await job.next()
            assert gate.ended == 1
            gate.open()


async def test_an_error_belongs_to_its_job_and_the_next_one_is_fine(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    gate.open()
    with trio.fail_after(10):
        async with DeviceJob(device, "bad") as bad, DeviceJob(device, "good") as good:
            bad.submit(Program("a", log, "out of memory"), Program("b", log), Program("c", log))
            good.submit(Program("d", log))
            with pytest.raises(
                InternalError, match="bad ran out of memory on device fake: RuntimeError: out of memory"
            ):
                await bad.next()
            await good.next()
        async with DeviceJob(device, "bad again") as again:
            await again.call(Program("e", log))
    assert log[-1] == "e"
    assert device.statistics().failures == 1
    assert device.state is DeviceState.READY


async def test_a_job_has_one_waiter(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job, trio.open_nursery() as nursery:
            nursery.start_soon(job.call, Program("a", log))
            await gate.wait_dispatched(1)
            with pytest.raises(RuntimeError, match="used by two tasks at once"):
                await job.call(Program("b", log))
            gate.open()


async def test_b5_b6_abandoned_job_ends_now_and_late_completions_are_dropped(
    device: DeviceThread, gate: DeviceGate
) -> None:
    log: list[str] = []

    async def use() -> None:
        async with DeviceJob(device, "job") as job:
            job.submit(*(Program(label, log) for label in "abc"))
            await job.next()

    async def work(scope: trio.CancelScope) -> None:
        with scope, pytest.raises(Unavailable, match="does not come back"):
            await use()

    scope = trio.CancelScope()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, scope)
            await gate.wait_dispatched(WINDOW)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            device.abandon("it does not come back")
        assert device.state is DeviceState.DEAD
        with pytest.raises(Unavailable, match="device fake is dead; reload the model"):
            async with DeviceJob(device, "next"):
                pass
        gate.open()  # and now it does
        await gate.wait_ended(2)
        await until(lambda: device.statistics().dropped >= 3)
    assert log == ["a", "b"]


def test_b6_completions_after_the_loop_has_ended_are_dropped() -> None:
    end = threading.Event()
    ended = threading.Event()

    class Late(Program):
        def wait(self) -> None:
            end.wait(10)
            ended.set()

    async def main() -> DeviceThread:
        device = DeviceThread("late")
        dispatched: list[str] = []
        async with DeviceJob(device, "job") as job:
            job.submit(Late("a", dispatched))
            await until(lambda: dispatched)
            device.abandon("it does not come back")
        device.close()
        return device

    device = trio.run(main)
    end.set()
    assert ended.wait(10)
    device._thread.join(10)
    assert not device._thread.is_alive()
    assert device.statistics().dropped == 1


async def test_device_time_is_not_counted_twice(gate: DeviceGate) -> None:
    now = 0.0
    device = DeviceThread("fake", executor=gate, clock=lambda: now)
    log: list[str] = []
    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job:
            job.submit(*(Program(label, log) for label in "ab"))
            await gate.wait_dispatched(2)
            now = 3.0
            gate.let_end()
            first = await job.next()
            now = 5.0
            gate.let_end()
            second = await job.next()
    device.close()
    assert (first.seconds, second.seconds) == (3.0, 2.0)
    assert device.statistics().device_seconds == 5.0


async def test_a_dispatch_to_an_idle_device_is_a_bubble(device: DeviceThread, gate: DeviceGate) -> None:
    log: list[str] = []
    gate.open()
    with trio.fail_after(10):
        async with DeviceJob(device, "job") as job:
            await job.call(Program("a", log))
            assert device.statistics().bubbles == 0  # the first one has nothing to follow
            await job.call(Program("b", log))
    assert device.statistics().bubbles == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_device_thread_that_dies_is_not_waited_for() -> None:
    class Exit(Program):
        def wait(self) -> None:
            raise SystemExit

    device = DeviceThread("dying")
    with trio.fail_after(10), pytest.raises(Unavailable, match="its thread ended with SystemExit"):
        async with DeviceJob(device, "job") as job:
            await job.call(Exit("a", []))
    device.close()
    device._thread.join(10)


# For how long the device may go on


@asynccontextmanager
async def behind(
    device: DeviceThread, gate: DeviceGate, *, expected: float | None = None
) -> AsyncIterator[tuple[DeviceJob, DeviceJob]]:
    """Two jobs with a program on the device each, the second behind the first."""
    log: list[str] = []
    async with (
        DeviceJob(device, "first", owner="A") as first,
        DeviceJob(device, "second", owner="B") as second,
    ):
        first.submit(Program("a0", log), Program("a1", log, expected=expected))
        await gate.wait_dispatched(2)
        second.submit(Program("b0", log, expected=expected))
        gate.let_end()
        await gate.wait_dispatched(3)
        await until(lambda: device._at_work is not None and device._at_work.turn.label == "a1")  # type: ignore[attr-defined]
        assert log == ["a0", "a1", "b0"]
        try:
            yield first, second
        finally:
            gate.open()


async def test_who_is_behind_what_somebody_wants_has_time(
    device: DeviceThread, gate: DeviceGate, mock_clock: MockClock
) -> None:
    async with behind(device, gate):
        mock_clock.jump(100)
        assert device.seconds_left("B", 8, 0) == 8
        assert device.seconds_left("A", 8, 0) == 0
        # Its turn begins when the one before it has ended.
        gate.let_end()
        await until(lambda: device._at_work is not None and device._at_work.turn.label == "b0")  # type: ignore[attr-defined]
        assert device.seconds_left("B", 8, 0) == 8
        mock_clock.jump(5)
        assert device.seconds_left("B", 8, 0) == 3
        mock_clock.jump(5)
        assert device.seconds_left("B", 8, 0) == 0


async def test_a_program_may_take_what_it_is_known_to_take_and_the_limit(
    device: DeviceThread, gate: DeviceGate, mock_clock: MockClock
) -> None:
    async with behind(device, gate, expected=20):
        mock_clock.jump(8)
        assert device.seconds_left("A", 8, 0) == 20


async def test_who_is_behind_what_nobody_wants_has_the_limit(
    device: DeviceThread, gate: DeviceGate, mock_clock: MockClock
) -> None:
    async with behind(device, gate) as (first, _), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def leave() -> None:
            with scope:
                await first.next()  # a0
                await first.next()

        nursery.start_soon(leave)
        await trio.testing.wait_all_tasks_blocked()
        # Whose task is elsewhere does not wait for the device, whatever is there.
        assert (device.holds("A"), device.holds("B"), device.holds("C")) == (True, False, False)
        scope.cancel()
        assert first.draining
        mock_clock.jump(5)
        assert device.seconds_left("B", 8, 0) == 3
        # Somebody has seen that for four of them nobody could run.
        assert device.seconds_left("B", 8, 4) == 7
        # As others have, but nobody has it longer than from now.
        assert device.seconds_left("B", 8, 4) == 8
        assert device.seconds_left("B", 8, 0) == 8
        gate.open()


async def test_nobody_has_time_on_a_dead_device(device: DeviceThread, gate: DeviceGate) -> None:
    async with behind(device, gate):
        device.abandon("it does not come back")
        assert device.seconds_left("B", 8, 0) == 0


async def test_a_program_that_runs_in_its_dispatch_has_its_time_counted(gate: DeviceGate) -> None:
    """As small programs of a CPU do: they seemed to take no time, and the load's warning of slow steps was missed."""
    now = 0.0

    class Inline(Program):
        def dispatch(self) -> bool:
            nonlocal now
            now += 3.0
            return super().dispatch()

    gate.open()
    thread = DeviceThread("fake", executor=gate, clock=lambda: now)
    async with DeviceJob(thread, "job") as job:
        turn = Inline("a", [])
        await job.call(turn)
    assert turn.seconds == 3.0
    assert thread.statistics().device_seconds == 3.0
    thread.close()


async def test_who_tries_again_and_again_on_a_dead_device_lets_others_run(device: DeviceThread) -> None:
    """A loop that catches errors stood in everybody's way, and no signal ended the server."""
    tries = 0
    scope = trio.CancelScope()

    async def somebody_else() -> None:
        scope.cancel()

    async with DeviceJob(device, "job") as job, trio.open_nursery() as nursery:
        device.abandon("it does not come back")
        nursery.start_soon(somebody_else)
        with scope:
            while tries < 100:
                tries += 1
                with contextlib.suppress(Unavailable):
                    await job.call(Program("a", []))
    assert scope.cancelled_caught
    assert tries < 5
