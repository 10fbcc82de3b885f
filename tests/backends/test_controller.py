"""K: near the target, quick to shrink, slow to grow, and never running away."""

from __future__ import annotations

import pytest

from triton_trio.backends.jax.controller import ChunkController, program_seconds

LADDER = (1, 2, 4, 8, 16, 32, 64)
TARGET = 2e-3


def settled(step: float) -> ChunkController:
    controller = ChunkController(TARGET, LADDER)
    for _ in range(60):
        controller.observe(controller.pick(), controller.pick() * step)
    return controller


@pytest.mark.parametrize(("step", "k"), [(1e-5, 64), (1e-4, 16), (2e-4, 8), (1.5e-3, 1), (5e-3, 1)])
def test_settles_at_the_largest_chunk_within_the_target(step: float, k: int) -> None:
    assert settled(step).k == k


def test_starts_with_the_smallest_chunk() -> None:
    assert ChunkController(TARGET, (4, 2, 8)).pick() == 2


def test_slows_down_at_once_and_speeds_up_slowly() -> None:
    controller = settled(1e-4)
    controller.observe(16, 16 * 8e-4)
    assert controller.k == 4
    controller.observe(4, 4 * 1e-4)
    assert controller.k == 4
    for _ in range(30):
        controller.observe(controller.k, controller.k * 1e-4)
    assert controller.k == 16


def test_a_chunk_that_was_not_alone_tells_how_quick_a_step_is_and_not_how_slow() -> None:
    # Requests join with every chunk, by a program that takes half a millisecond: chunks grow all the same.
    controller = ChunkController(TARGET, LADDER)
    for _ in range(60):
        controller.observe(controller.k, 5e-4 + controller.k * 1e-5, at_most=True)
    assert controller.k == 64
    controller.observe(64, 1.0, at_most=True)
    assert controller.k == 64
    assert not controller.too_slow


def test_never_more_steps_than_are_left() -> None:
    controller = settled(1e-5)
    assert [controller.pick(left) for left in (100, 64, 63, 5, 1)] == [64, 64, 32, 4, 1]
    assert ChunkController(TARGET, (4, 8)).pick(3) == 4  # the ladder does not go lower; the program masks the rest


def test_late_dispatch_is_not_device_time() -> None:
    # The trap: a device thread that is always 5 ms late.  Counting from the previous end, each lateness would make
    # the step look slower, until chunks have one step and the device idles nearly always.
    controller = ChunkController(TARGET, LADDER)
    now = done = 0.0
    for _ in range(100):
        dispatched = now = now + 5e-3
        k = controller.pick()
        now += k * 1e-4
        controller.observe(k, program_seconds(now, dispatched, done))
        done = now
    assert controller.k == 16
    assert controller.step_seconds == pytest.approx(1e-4)


def test_time_in_line_is_not_device_time() -> None:
    assert program_seconds(done=10.0, dispatched=3.0, previous_done=8.0) == 2.0
    assert program_seconds(done=10.0, dispatched=9.0, previous_done=8.0) == 1.0
    assert program_seconds(done=10.0, dispatched=10.1, previous_done=8.0) == 0.0


def test_knows_when_a_step_is_longer_than_the_target() -> None:
    assert settled(5e-3).too_slow
    assert not settled(1.5e-3).too_slow
    fresh = ChunkController(TARGET, LADDER)
    assert not fresh.too_slow
    fresh.observe(1, 5e-3)  # the first programs of a process are slow
    assert not fresh.too_slow
    disturbed = settled(1.5e-3)
    for _ in range(4):
        disturbed.observe(1, 9e-3)  # somebody else has the machine
    assert not disturbed.too_slow


@pytest.mark.parametrize(("target", "ladder"), [(0.0, (1,)), (1e-3, ()), (1e-3, (0, 1))])
def test_refuses_nonsense(target: float, ladder: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positive target"):
        ChunkController(target, ladder)
