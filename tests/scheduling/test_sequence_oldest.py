"""``oldest``: sequences share the batches of an instance, whoever has waited longest first."""

from __future__ import annotations

from unittest.mock import patch

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.scheduling.sequences import OLDEST, batcher, enqueue, playing, rows, sum_config, total
from triton_trio.scheduling import OldestBatcher, Seat
from triton_trio.scheduling.queue import INF
from triton_trio.testing.fixtures import Serve


async def test_one_request_of_a_sequence_at_a_time_and_each_finds_the_state_of_the_one_before(
    serve: Serve, autojump_clock: MockClock
) -> None:
    async with playing(serve, sum_config(OLDEST)) as world:
        first = [await world.call(f"1.{n}", 1, "start" if n == 0 else "end" if n == 2 else "", 10) for n in range(3)]
        second = [await world.call(f"2.{n}", 2, "start" if n == 0 else "end", 1) for n in range(2)]
        for _ in range(3):
            await world.finish()
        assert world.backend.rows == [(-1,), (-2, 1), (2, 1)]  # as each became ready
        assert [total(call) for call in first] == [10, 20, 30]
        assert [total(call) for call in second] == [1, 2]


async def test_no_more_sequences_than_candidates(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config("oldest { max_candidate_sequences: 2 }")) as world:
        calls = [await world.call(f"{n}", n, "start", n) for n in (1, 2, 3)]
        await world.finish()
        assert (world.statistics.in_slots, world.statistics.in_backlog) == (2, 1)
        calls += [await world.call(f"{n} end", n, "end", 10 * n) for n in (2, 1)]
        await world.finish()
        await world.finish()
        await world.finish()
        assert world.backend.rows == [(-1,), (-2,), (1, 2), (-3,)]
        assert [total(call) for call in calls] == [1, 2, 3, 22, 11]
        await trio.sleep(6)


async def test_a_batch_is_sent_when_a_preferred_size_is_reached_or_the_oldest_has_waited_long_enough() -> None:
    options = {"max_batch_size": 4, "preferred_sizes": [2, 4], "max_queue_delay": 3.0}
    async with batcher(OldestBatcher, slots=10, **options) as oldest:
        seat = Seat(release_limit=0)
        now = trio.current_time()
        enqueue(oldest, "a")
        formed, again_at = oldest.form_batch(now, seat)
        assert not formed
        assert 2.9 < again_at - now < 3.1
        assert oldest.ready_at(now, seat) == again_at
        enqueue(oldest, "b")
        enqueue(oldest, "c")
        assert oldest.ready_at(now, seat) == now
        assert rows(oldest.form_batch(now, seat)) == "ab"
        assert rows(oldest.form_batch(now, seat)) == ""
        assert rows(oldest.form_batch(now + 4, seat)) == "c"
        for label in "defghi":
            enqueue(oldest, label)
        assert rows(oldest.form_batch(now, seat)) == "defg"
        assert oldest.form_batch(now, seat)[0]
        assert oldest.form_batch(now, seat) == ((), INF)


async def test_another_shape_ends_a_batch() -> None:
    async with batcher(OldestBatcher, slots=10, max_batch_size=4, max_queue_delay=9.0) as oldest:
        for label, shape in (("a", "x"), ("b", "x"), ("c", "y")):
            enqueue(oldest, label, shape=shape)
        seat = Seat(release_limit=0)
        now = trio.current_time()
        assert rows(oldest.form_batch(now, seat)) == "ab"
        assert rows(oldest.form_batch(now, seat)) == ""


async def test_a_batch_looks_at_no_more_sequences_than_it_has_rows() -> None:
    async with batcher(OldestBatcher, slots=10_000, max_batch_size=4) as oldest:
        for number in range(2_000):
            enqueue(oldest, chr(1000 + number))
        seat = Seat(release_limit=0)
        with patch.object(oldest, "signature", wraps=oldest.signature) as looked_at:
            assert len(oldest.form_batch(trio.current_time(), seat)[0]) == 4
        assert looked_at.call_count <= 5


async def test_a_sequence_stays_on_its_instance_and_new_ones_go_to_whoever_is_free(
    serve: Serve, autojump_clock: MockClock
) -> None:
    async with playing(serve, sum_config("oldest { max_candidate_sequences: 1 }", instances=2)) as world:
        first = await world.call("1", 1, "start")
        second = await world.call("2", 2, "start")
        here, there = world.backend.running
        assert here.instance != there.instance
        third = await world.call("3", 3, "start end")
        more = await world.call("2 end", 2, "end")
        there.finish()
        await wait_all_tasks_blocked()
        # Where its state is, though another one waits for a slot.
        assert (world.backend.running[1].instance, world.backend.rows[2:]) == (there.instance, [(2,)])
        world.backend.running[1].finish()
        await wait_all_tasks_blocked()
        assert (world.backend.running[1].instance, world.backend.rows[3:]) == (there.instance, [(-3,)])
        await world.finish()
        assert [total(call) for call in (first, second, more, third)] == [1, 1, 2, 1]
        await trio.sleep(6)


async def test_preserve_ordering_is_by_the_order_in_which_instances_took_them(
    serve: Serve, autojump_clock: MockClock
) -> None:
    strategy = "oldest { max_candidate_sequences: 1 preserve_ordering: true }"
    async with playing(serve, sum_config(strategy, instances=2)) as world:
        calls = [await world.call(f"{n}", n, "start end") for n in (1, 2, 3)]
        world.backend.executions[1].finish()
        await wait_all_tasks_blocked()
        assert not calls[1].ended.is_set()  # its answer waits for that of the first
        assert world.backend.executions[2].members == ("3",)  # its slot does not
        calls[0].leave()
        await wait_all_tasks_blocked()
        assert total(calls[1]) == 1
        await world.finish()
        assert total(calls[2]) == 1
