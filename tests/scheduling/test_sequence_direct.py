"""``direct``: a sequence is a row, from its START until it ends."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.scheduling.sequences import batcher, enqueue, playing, rows, sum_config, total
from triton_trio.scheduling import DirectBatcher, Seat
from triton_trio.scheduling.queue import INF
from triton_trio.testing.fixtures import Serve


async def test_a_sequence_keeps_its_row_and_the_others_are_not_ready(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config()) as world:
        await world.begin(1, 2, 3)
        assert world.backend.rows == [(-1,), (0, -2), (0, 0, -3)]
        world.backend.rows.clear()
        third = await world.call("c", 3, value=10)
        await world.finish()
        first = await world.call("a", 1, value=20)
        await world.finish()
        assert world.backend.rows == [(0, 0, 3), (1,)]
        assert (total(third), total(first)) == (11, 21)
        await trio.sleep(6)


async def test_B9_whoever_leaves_a_batch_never_moves_its_neighbours(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config()) as world:
        await world.begin(1, 2, 3, 4)
        busy = await world.call("busy", 4, value=0)
        calls = [await world.call(f"{n}", n, value=n) for n in (1, 2, 3)]
        calls[1].leave()  # before the batch: its row is empty
        world.backend.rows.clear()
        await world.finish()
        assert world.backend.rows == [(1, 0, 3)]
        calls[0].leave()  # in the batch: its row stays, for the others are where they are
        await world.finish()
        assert total(calls[2]) == 4
        assert [call.output for call in calls[:2]] == [None, None]
        assert world.slots == {3: "m_0_0:2", 4: "m_0_0:3"}
        newcomer = await world.call("new", 5, "start", value=7)
        assert world.slots == {3: "m_0_0:2", 4: "m_0_0:3", 5: "m_0_0:0"}
        await world.finish()
        assert (total(busy), total(newcomer)) == (1, 7)
        await trio.sleep(6)


async def test_the_backlog_is_served_in_order_as_slots_become_free(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config(max_batch_size=2)) as world:
        await world.begin(1, 2)
        backlog = [await world.call(f"{n}", n, "start end", value=n) for n in (3, 4, 5)]
        assert (world.statistics.in_slots, world.statistics.in_backlog, len(world.batcher)) == (2, 3, 3)
        end = await world.call("end", 2, "end")
        await world.finish()
        assert (world.slots, world.statistics.in_backlog) == ({1: "m_0_0:0", 3: "m_0_0:1"}, 2)
        await world.finish()
        assert world.slots == {1: "m_0_0:0", 4: "m_0_0:1"}
        await trio.sleep(4)
        assert world.slots == {1: "m_0_0:0", 4: "m_0_0:1"}  # 1 is idle, but not long enough
        await trio.sleep(2)
        await world.finish()
        await world.finish()
        assert [total(call) for call in (end, *backlog)] == [2, 3, 4, 5]
        assert world.ends == [(2, "end"), (3, "end"), (1, "idle"), (4, "end"), (5, "end")]


async def test_without_a_batch_dimension_there_is_one_slot(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config(max_batch_size=0)) as world:
        await world.begin(1)
        other = await world.call("2", 2, "start end", value=5)
        last = await world.call("1", 1, "end")
        await world.finish()
        await world.finish()
        assert (total(last), total(other)) == (2, 5)


async def test_a_batch_waits_for_the_slots_it_was_told_to_wait_for(serve: Serve, autojump_clock: MockClock) -> None:
    strategy = "direct { max_queue_delay_microseconds: 2000000 minimum_slot_utilization: 0.5 }"
    async with playing(serve, sum_config(strategy, idle=60)) as world:
        began = trio.current_time()
        await world.begin(1)
        assert trio.current_time() - began == 2
        first = await world.call("1", 1, value=10)
        assert world.backend.running == []  # one of four slots is less than half
        await trio.sleep(1)
        second = await world.call("2", 2, "start", value=20)
        assert world.backend.rows[-1] == (1, -2)
        await world.finish()
        late = await world.call("1 again", 1, "end", value=30)
        await trio.sleep(1.9)
        assert world.backend.running == []
        await trio.sleep(0.2)
        assert world.backend.rows[-1] == (1,)
        await world.finish()
        assert [total(call) for call in (first, second, late)] == [11, 20, 41]
        await trio.sleep(61)


async def test_requests_of_one_shape_share_a_batch_and_the_oldest_decides_which() -> None:
    async with batcher(DirectBatcher, slots=4) as direct:
        for label, shape in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "y")):
            enqueue(direct, label, shape=shape)
        seat = Seat(release_limit=0)
        assert rows(direct.form_batch(0, seat)) == "ac"
        assert rows(direct.form_batch(0, seat)) == "--bd"
        assert direct.form_batch(0, seat) == ((), INF)
