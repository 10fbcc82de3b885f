"""form_batch, table by table: the queue as text, the batch as text, no loop."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.scheduling.requests import admitted, labels, make
from triton_trio.request import InferenceRequest
from triton_trio.scheduling import DefaultScheduler, DynamicBatcher, QueuePolicy, RequestQueue, Seat, TimeoutAction

INF = float("inf")


def batcher(waiting: str, **options: Any) -> DynamicBatcher:
    """``"a b3 c@2 d/x"``: a, b with three rows, c queued at 2 s, d of another shape."""
    made = DynamicBatcher(RequestQueue(), **{"max_batch_size": 4, **options})
    for word in waiting.split():
        label, rows, at, shape = re.fullmatch(r"([a-z])(\d*)(?:@([\d.]+))?(?:/(.+))?", word).groups()  # type: ignore[union-attr]
        request = make(label, rows=int(rows or 1), at=float(at or 0), shape=shape)
        made.queue.append(request, request.enqueued_at)
    return made


@pytest.mark.parametrize(
    ("queue", "options", "now", "formed", "again_at"),
    [
        # Without a delay, whatever is there goes.
        ("", {}, 0, "", INF),
        ("a", {}, 0, "a", INF),
        ("a b c", {}, 0, "abc", INF),
        ("a b c d e f", {}, 0, "abcd", INF),
        # Rows count, not requests.
        ("a3 b2", {}, 0, "a", INF),
        ("a2 b2 c", {}, 0, "ab", INF),
        ("a4 b", {}, 0, "a", INF),
        # With one, it waits for company, as long as the oldest has waited.
        ("a@1", {"max_queue_delay": 5}, 2, "", 6),
        ("a@1 b@3", {"max_queue_delay": 5}, 5.9, "", 6),
        ("a@1 b@3", {"max_queue_delay": 5}, 6, "ab", INF),
        ("a b c d", {"max_queue_delay": 5}, 0, "abcd", INF),
        # The next does not fit: no more company to come.
        ("a3 b2", {"max_queue_delay": 5}, 0, "a", INF),
        ("a b/x", {"max_queue_delay": 5}, 0, "a", INF),
        # One shape a batch.
        ("a/x b/x c/y d/x", {}, 0, "ab", INF),
        # Preferred sizes: the largest one met on the way.
        ("a b", {"preferred_sizes": [2, 4], "max_queue_delay": 5}, 0, "ab", INF),
        ("a b c", {"preferred_sizes": [2, 4], "max_queue_delay": 5}, 0, "ab", INF),
        ("a b c d", {"preferred_sizes": [2, 4], "max_queue_delay": 5}, 0, "abcd", INF),
        ("a", {"preferred_sizes": [2], "max_queue_delay": 5}, 0, "", 5),
        ("a", {"preferred_sizes": [2], "max_queue_delay": 5}, 5, "a", INF),
        ("a b c", {"preferred_sizes": [4], "max_queue_delay": 5}, 4, "", 5),
        ("a3", {"preferred_sizes": [2], "max_queue_delay": 5}, 0, "a", INF),  # past every preferred size
        ("a b2", {"preferred_sizes": [2], "max_queue_delay": 5}, 0, "a", INF),  # the next goes past it
        # No preferred size, no delay: the greedy batch.
        ("a b c", {"preferred_sizes": [2]}, 0, "ab", INF),
    ],
)
def test_form_batch(queue: str, options: dict[str, Any], now: float, formed: str, again_at: float) -> None:
    scheduler = batcher(queue, **options)
    before = labels(scheduler.queue)
    taken, again = scheduler.form_batch(now, Seat())
    assert (labels(taken), again) == (formed, again_at)
    assert labels(scheduler.queue) == before[len(formed) :]


#: Triton's scenarios: preferred sizes 2 and 6, batches of at most 8 rows, ten seconds for company.
L0_BATCHER = [
    ("static_batch_preferred", "a2", 0, "a", INF),
    ("static_batch_lt_any_preferred", "a1", 0, "", 10),
    ("static_batch_not_preferred", "a3", 0, "", 10),
    ("static_batch_gt_max_preferred", "a7", 0, "a", INF),
    ("multi_batch_different_shape", "a b/x", 0, "a", INF),
    ("multi_batch_not_preferred", "a b3@1", 1, "", 10),
    ("multi_batch_not_preferred, later", "a b3@1", 10, "ab", INF),
    ("multi_batch_not_preferred_different_shape", "a b3 c@1/x", 1, "ab", INF),
    ("multi_batch_preferred_different_shape", "c/x d5/x", 1, "cd", INF),
    ("multi_batch_gt_max_preferred", "a3 b7@1", 1, "a", INF),
    ("multi_batch_sum_gt_max_preferred", "a3 b4@1", 1, "a", INF),
    ("multi_batch_delayed_sum_gt_max_preferred", "b4@1", 1, "", 11),
    ("multi_batch_delayed_use_max_batch", "a3 b4 c@10", 10, "abc", INF),
    ("multi_batch_use_biggest_preferred", "a b c d e f", 0, "abcdef", INF),
    ("multi_batch_use_best_preferred", "a b c@1", 1, "ab", INF),
    ("multi_batch_use_best_preferred, later", "c@1", 1, "", 11),
]


@pytest.mark.parametrize(("name", "queue", "now", "formed", "again_at"), L0_BATCHER)
def test_L0_batcher(name: str, queue: str, now: float, formed: str, again_at: float) -> None:
    scheduler = batcher(queue, max_batch_size=8, preferred_sizes=[2, 6], max_queue_delay=10)
    taken, again = scheduler.form_batch(now, Seat())
    assert (labels(taken), again) == (formed, again_at)


def test_who_left_is_not_company_and_does_not_count_as_oldest() -> None:
    scheduler = batcher("a@0 b@3 c@4", max_queue_delay=5)
    first = next(iter(scheduler.queue))
    scheduler.queue.remove(first)
    assert scheduler.form_batch(5, Seat()) == ((), 8)
    taken, _ = scheduler.form_batch(8, Seat())
    assert labels(taken) == "bc"


def test_priorities_go_first_and_share_a_batch() -> None:
    queue = RequestQueue(levels=2, default_level=2)
    for label, priority in (("a", 2), ("b", 1), ("c", 2), ("d", 1), ("e", 2)):
        queue.append(make(label, priority=priority), 0)
    scheduler = DynamicBatcher(queue, max_batch_size=3)
    assert labels(scheduler.form_batch(0, Seat())[0]) == "bda"
    assert labels(scheduler.form_batch(0, Seat())[0]) == "ce"


def test_a_delayed_request_is_served_last_and_not_for_ever_last() -> None:
    queue = RequestQueue(policy=QueuePolicy(TimeoutAction.DELAY, default_timeout=1))
    for label in "ab":
        queue.append(make(label), 0)
    scheduler = DynamicBatcher(queue, max_batch_size=1)
    queue.expire(1)
    queue.append(make("c"), 1)
    assert [labels(scheduler.form_batch(1, Seat())[0]) for _ in range(3)] == ["c", "a", "b"]


def test_the_default_scheduler_takes_one_at_a_time() -> None:
    scheduler = DefaultScheduler()
    for label in "abc":
        scheduler.queue.append(make(label), 0)
    assert [labels(scheduler.form_batch(0, Seat())[0]) for _ in range(4)] == ["a", "b", "c", ""]


@pytest.mark.parametrize(
    ("queue", "options", "rows", "joining"),
    [
        ("", {}, 4, ""),
        ("a b c", {}, 2, "ab"),
        ("a2 b c", {}, 4, "abc"),
        # Nobody overtakes: the first that does not fit keeps all behind it waiting.
        ("a2 b c", {}, 1, ""),
        ("a b2 c", {}, 2, "a"),
        ("a/x b", {}, 4, ""),
        ("a b/x c", {}, 4, "a"),
        # The execution goes on anyway: no reason to wait for company, or for a size.
        ("a", {"max_queue_delay": 5, "preferred_sizes": [4]}, 3, "a"),
    ],
)
def test_those_at_the_head_join(queue: str, options: dict[str, Any], rows: int, joining: str) -> None:
    scheduler = batcher(queue, **options)
    way_in = scheduler.joining(Seat())
    everybody = way_in.take_nowait(None, rows, all_or_none=True)
    assert labels(everybody) == (joining if len(joining) == len(queue.split()) else "")
    if not everybody:
        assert labels(way_in.take_nowait(None, rows)) == joining
    assert len(scheduler) == len(queue.split()) - len(joining)


async def test_a_request_that_comes_before_the_wait_for_one_ends_it(autojump_clock: MockClock) -> None:
    scheduler = DynamicBatcher(RequestQueue(), max_batch_size=4)
    way_in = scheduler.joining(Seat())
    assert not way_in.take_nowait(None, 1)
    scheduler.enqueue(admitted(make("a", rows=2)))
    await way_in.wait_arrival()
    assert not way_in.take_nowait(None, 1)
    with trio.move_on_after(1):  # nothing new: it does not fit
        await way_in.wait_arrival()
        pytest.fail("nobody came")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(way_in.wait_arrival)
        await wait_all_tasks_blocked()
        scheduler.enqueue(admitted(make("b")))


class Counting(RequestQueue):
    """Counts the requests that a scheduler looks at."""

    looked_at = 0

    def __iter__(self) -> Any:
        for request in super().__iter__():
            self.looked_at += 1
            yield request


@pytest.mark.parametrize("waiting", [10, 1000])
def test_the_cost_of_a_batch_does_not_grow_with_the_queue(waiting: int) -> None:
    queue = Counting()
    for _ in range(waiting):
        queue.append(make(), 0)
    DynamicBatcher(queue, max_batch_size=4).form_batch(0, Seat())
    assert queue.looked_at <= 5


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from("xy"), st.integers(0, 5)), max_size=20),
    st.sets(st.integers(1, 4)),
    st.sampled_from([0.0, 2.0, 10.0]),
)
def test_every_batch_fits_and_nobody_is_lost(
    requests: list[tuple[int, str, int]], preferred: set[int], delay: float
) -> None:
    scheduler = DynamicBatcher(
        RequestQueue(), max_batch_size=4, preferred_sizes=sorted(preferred), max_queue_delay=delay
    )
    waiting: list[InferenceRequest] = []
    for rows, shape, at in sorted(requests, key=lambda request: request[2]):
        waiting.append(make(rows=rows, shape=shape, at=at))
        scheduler.queue.append(waiting[-1], at)
    now = 5.0
    while waiting:
        taken, again_at = scheduler.form_batch(now, Seat())
        if not taken:
            assert now < again_at <= max(request.enqueued_at for request in waiting) + delay
            now = again_at
            continue
        assert list(taken) == waiting[: len(taken)]  # in order
        assert sum(request.batch_size for request in taken) <= 4
        assert len({request.signature for request in taken}) == 1
        del waiting[: len(taken)]
    assert scheduler.form_batch(now, Seat()) == ((), INF)
