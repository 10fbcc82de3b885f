"""Rows that are needed move to a smaller bucket: fewer row-steps, the same bits, and answers that find their owner."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from triton_trio.backends.jax import Turn
from triton_trio.backends.jax.options import JaxOptions
from triton_trio.lifecycle import Outcome
from triton_trio.testing.device import DeviceGate

from .test_sequences import SUM_BY_STEPS, open_slots, sum_config, x
from .world import (
    COUNTDOWN,
    COUNTDOWN_CONFIG,
    TICKER,
    TICKER_CONFIG,
    World,
    countdown,
    open_world,
    ticks,
    until,
    write_model,
)

STEPS = 12
BATCH = [countdown(STEPS, seed) for seed in range(8)]


class Widths(DeviceGate):
    """A gate that knows how many rows each chunk had, and that can act at the moment when a chunk is dispatched.

    What ``before`` does, it does between two chunks: in the device thread, while the Trio thread stands still.
    """

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.before: Callable[[int], None] = lambda chunk: None
        self.armed = threading.Event()

    def open(self) -> None:
        self.armed.set()
        super().open()

    def dispatch(self, turn: Turn) -> bool:
        self.armed.wait()
        trio.from_thread.run_sync(self.before, len(self.widths) + 1, trio_token=self._token)
        done = super().dispatch(turn)
        if done and turn.steps:
            self.widths.append(turn.width)
        return done

    @property
    def row_steps(self) -> int:
        return sum(steps * width for steps, width in zip(filter(None, self.steps), self.widths, strict=True))


@asynccontextmanager
async def compacting(
    tmp_path: Path, code: str = COUNTDOWN, config: str = COUNTDOWN_CONFIG, **parameters: object
) -> AsyncIterator[tuple[World, Widths]]:
    gate = Widths()
    gate.open()
    context = write_model(tmp_path, code, config, **{"ladder": 1, "buckets": "2,4,8", **parameters})
    async with open_world(context, gate=gate) as world:
        yield world, gate
        assert world.placed.compiles_after_load == 0
        assert world.device.jobs == 0


async def execute(
    world: World, gate: Widths, inputs: list[dict[str, np.ndarray]], leave: dict[int, list[int]]
) -> tuple[list[list[bytes]], list[int]]:
    """Run a batch; ``leave`` says who is cancelled just before which chunk.  What each got, and the chunks' widths."""
    gate.widths.clear()
    gate.steps.clear()
    gate.armed.clear()
    async with world.running(inputs) as run:
        gate.before = lambda chunk: run.cancel(*leave.get(chunk, ()))
        gate.armed.set()
    gate.before = lambda chunk: None
    assert run.error is None
    for index in {index for indices in leave.values() for index in indices}:
        assert bool(run.responses[index]) == (run.requests[index].outcome is not Outcome.CANCELLED)
    got = [[outputs[name].tobytes() for outputs in each for name in sorted(outputs)] for each in run.responses]
    return got, list(gate.widths)


async def test_who_stays_moves_to_the_bucket_that_fits(tmp_path: Path) -> None:
    """Timeline: two chunks of 8 rows; 6 leave; two more chunks of 8 in case the others go, too; then chunks of 2."""
    async with compacting(tmp_path, max_steps=STEPS) as (world, gate):
        whole, widths = await execute(world, gate, BATCH, {})
        assert widths == [8] * 12
        assert gate.row_steps == 96
        some, widths = await execute(world, gate, BATCH, {3: [0, 1, 2, 4, 5, 7]})
        assert widths == [8, 8, 8, 8] + [2] * 8
        assert gate.row_steps == 48
        assert [some[index] for index in (3, 6)] == [whole[index] for index in (3, 6)]
        assert world.device.row_steps == 96 + 48


async def test_law_7_a_cancel_at_every_point_of_a_move(tmp_path: Path) -> None:
    # The move is made together with chunk 5: the second wave is seen before it, by it, or by the first small chunks.
    async with compacting(tmp_path, max_steps=STEPS) as (world, gate):
        whole, _ = await execute(world, gate, BATCH, {})
        for chunk in range(4, 9):
            some, widths = await execute(world, gate, BATCH, {3: [0, 2, 4, 6], chunk: [1, 7]})
            assert [some[index] for index in (3, 5)] == [whole[index] for index in (3, 5)]
            assert widths[-1] == 2
            assert widths == sorted(widths, reverse=True)


async def test_c6_all_leave_at_every_point_of_a_move(tmp_path: Path) -> None:
    async with compacting(tmp_path, max_steps=STEPS) as (world, gate):
        for chunk in range(4, 9):
            got, widths = await execute(world, gate, BATCH, {3: [0, 1, 2, 4, 5, 7], chunk: list(range(8))})
            assert not any(got)
            assert len(widths) == chunk - 1
        whole, _ = await execute(world, gate, BATCH, {})
        assert all(whole)


async def test_rows_that_are_done_go_as_those_that_are_cancelled(tmp_path: Path) -> None:
    inputs = [countdown(40 if index in (2, 5) else 3, index) for index in range(8)]
    async with compacting(tmp_path / "moves") as (world, gate):
        moved, widths = await execute(world, gate, inputs, {})
        assert widths[-1] == 2
        assert gate.row_steps < 8 * 40 // 2
    async with compacting(tmp_path / "stays", compact_to=8) as (world, gate):
        assert moved == (await execute(world, gate, inputs, {}))[0]
        assert set(gate.widths) == {8}


async def test_a_request_of_several_rows_moves_as_a_whole(tmp_path: Path) -> None:
    inputs = [countdown(STEPS, seed, rows) for seed, rows in enumerate((3, 2, 3))]
    async with compacting(tmp_path, max_steps=STEPS) as (world, gate):
        whole, _ = await execute(world, gate, inputs, {})
        some, widths = await execute(world, gate, inputs, {2: [0, 1]})
        assert widths[-1] == 4
        assert some == [[], [], whole[2]]


async def test_streams_go_on_where_they_were(tmp_path: Path) -> None:
    inputs = [ticks(10 * index) for index in range(8)]
    async with compacting(tmp_path, TICKER, TICKER_CONFIG) as (world, gate):
        got, widths = await execute(world, gate, inputs, {3: [0, 1, 2, 3, 4]})
        assert widths[-1] == 2  # 4 of 8 first, and 2 when no more are left
        for index in (5, 6, 7):
            assert [int.from_bytes(each, "little") for each in got[index]] == list(range(1, 10 * index + 1))


async def test_a_parked_row_moves_too(tmp_path: Path) -> None:
    """Timeline: one row's reader stops; 6 others leave; the row moves, parked; the reader goes on and misses nothing."""
    async with compacting(tmp_path, TICKER, TICKER_CONFIG) as (world, gate):
        async with world.running([ticks(60) for _ in range(8)], read=False) as run, trio.open_nursery() as nursery:
            for index in (*range(6), 7):
                nursery.start_soon(run.read, index, name=f"client {index}")
            await until(lambda: not run.requests[6].can_send)
            run.cancel(*range(6))
            await until(lambda: gate.widths[-1] == 2)
            nursery.start_soon(run.read, 6, name="client 6")
        for index in (6, 7):
            assert [outputs["MADE"].item() for outputs in run.responses[index]] == list(range(1, 61))


async def test_a_sequences_state_stays_in_its_slot(tmp_path: Path) -> None:
    # 8 slots of which 2 have a request: no row is live that no request fills.
    gate = Widths()
    gate.open()
    context = write_model(tmp_path, SUM_BY_STEPS, sum_config(), ladder=1)
    empty = (None,) * 8
    async with open_slots(context, slots=8, gate=gate) as sequences:
        await sequences.execute(*(x(1 + index) for index in range(8)), start=True)
        gate.widths.clear()
        answers = await sequences.execute(*empty[:3], x(20), *empty[4:6], x(30), *empty[7:])
        assert gate.widths[-1] == 2
        assert answers == [*empty[:3], 10244, *empty[4:6], 10377, *empty[7:]]
        sums = [1001, 1002, 1003, 1024, 1005, 1006, 1037, 1008]
        assert await sequences.execute(*(x(0) for _ in sums)) == [10 * made + slot for slot, made in enumerate(sums, 1)]


async def test_law_7_random_leavers_at_random_chunks(tmp_path: Path) -> None:
    chance = random.Random(1)
    async with compacting(tmp_path, ladder="1,2") as (world, gate):
        for turn in range(48):
            if turn % 8 == 0:
                inputs = [countdown(chance.randint(1, 30), index) for index in range(8)]
                whole, _ = await execute(world, gate, inputs, {})
            leave: dict[int, list[int]] = {}
            for index in chance.sample(range(8), chance.randint(0, 8)):
                leave.setdefault(chance.randint(1, 25), []).append(index)
            some, widths = await execute(world, gate, inputs, leave)
            assert widths == sorted(widths, reverse=True)
            # Who was to leave after its own end has its answer; everybody has what it would have had, or nothing.
            stayed = set(range(8)).difference(*leave.values())
            assert all(
                got == whole[index] if index in stayed else got in ([], whole[index]) for index, got in enumerate(some)
            )


@pytest.mark.parametrize(
    ("parameters", "bucket", "rows", "wanted"),
    [
        ({}, 8, 5, None),
        ({}, 8, 4, 4),
        ({}, 8, 3, 4),
        ({}, 8, 2, 2),
        ({}, 8, 1, 2),  # a bucket of 1 rounds differently
        ({}, 2, 1, None),
        ({"compact_to": "1"}, 8, 1, 1),
        ({"compact_to": "3"}, 8, 1, 4),
        ({"compact_to": "8"}, 8, 1, None),
        ({"buckets": "2,6,8"}, 6, 3, None),  # the next bucket that fits is the one where they are
        ({"buckets": "2,6,8"}, 8, 4, 6),
    ],
)
def test_the_bucket_to_move_to(
    tmp_path: Path, parameters: dict[str, str], bucket: int, rows: int, wanted: int | None
) -> None:
    options = JaxOptions.read(write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, **parameters).config)
    assert options.compacted(bucket, rows) == wanted
