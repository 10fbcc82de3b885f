"""The queue: pure state, so no clock and no loop; times are numbers."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduling.requests import labels, make
from triton_trio.errors import Unavailable
from triton_trio.request import InferenceRequest
from triton_trio.scheduling import QueuePolicy, RequestQueue, TimeoutAction

INF = float("inf")
DELAY = TimeoutAction.DELAY


def queue_of(*requests: InferenceRequest, **kwargs: object) -> RequestQueue:
    queue = RequestQueue(**kwargs)  # type: ignore[arg-type]
    for request in requests:
        queue.append(request, request.enqueued_at)
    return queue


def test_first_in_first_out_and_anybody_may_leave() -> None:
    a, b, c = make("a"), make("b"), make("c")
    queue = queue_of(a, b, c)
    assert labels(queue) == "abc"
    assert queue.remove(b)
    assert labels(queue) == "ac"
    assert len(queue) == 2
    assert b not in queue


def test_B2_leaving_twice_is_leaving_once() -> None:
    a, b = make("a"), make("b")
    queue = queue_of(a, b)
    assert queue.remove(a)
    assert not queue.remove(a)
    assert len(queue) == 1


def test_priority_1_is_served_first_and_the_default_level_takes_who_names_none() -> None:
    queue = queue_of(
        make("a", priority=3), make("b"), make("c", priority=1), make("d", priority=9), make("e", priority=1),
        levels=3, default_level=2,
    )  # fmt: skip
    assert labels(queue) == "cebda"
    assert queue.statistics().by_level == {1: 2, 2: 2, 3: 1}


def test_A3_max_queue_size_counts_the_living() -> None:
    requests = [make(str(i)) for i in range(3)]
    queue = queue_of(*requests, policy=QueuePolicy(max_queue_size=3))
    with pytest.raises(Unavailable, match=r"\[request id: x\] Exceeds maximum queue size"):
        queue.append(make("x"), 0)
    assert len(queue) == 3
    queue.remove(requests[1])
    queue.append(make("y"), 0)
    assert labels(queue) == "02y"


def test_each_level_has_its_own_size() -> None:
    queue = queue_of(make(priority=1), levels=2, policies={1: QueuePolicy(max_queue_size=1)})
    with pytest.raises(Unavailable):
        queue.append(make(priority=1), 0)
    for _ in range(5):
        queue.append(make(priority=2), 0)
    assert queue.statistics().queued == 6


def test_reject_takes_out_what_is_due_and_nothing_else() -> None:
    queue = queue_of(make("a", at=0), make("b", at=1), policy=QueuePolicy(default_timeout=5))
    assert queue.next_deadline() == 5
    assert queue.expire(4.9) == []
    assert labels(queue.expire(5)) == "a"
    assert labels(queue) == "b"
    assert queue.next_deadline() == 6
    assert labels(queue.expire(100)) == "b"
    assert queue.next_deadline() == INF


def test_delay_puts_it_behind_everything_of_its_level_that_has_not_timed_out() -> None:
    policy = QueuePolicy(DELAY, default_timeout=5)
    queue = queue_of(make("a", at=0), make("b", at=3), levels=2, policies={1: policy})
    queue.append(make("z", priority=2), 0)
    assert queue.expire(5) == []
    assert labels(queue) == "baz"
    assert queue.statistics().delayed == 1
    assert queue.next_deadline() == 8  # a is never looked at again
    queue.expire(8)
    assert labels(queue) == "abz"
    assert queue.next_deadline() == INF


def test_a_delayed_request_still_counts_and_can_still_leave() -> None:
    a = make("a")
    queue = queue_of(a, policy=QueuePolicy(DELAY, default_timeout=1, max_queue_size=1))
    queue.expire(1)
    with pytest.raises(Unavailable):
        queue.append(make("b"), 1)
    assert queue.remove(a)
    assert queue.statistics().delayed == 0
    queue.append(make("b"), 1)


@pytest.mark.parametrize(
    ("default", "allowed", "asked", "deadline"),
    [
        (5, True, 2, 2),  # shortens
        (5, True, 9, 5),  # never lengthens
        (5, True, 0, 5),  # none asked for
        (5, False, 2, 5),  # not allowed
        (0, True, 2, 2),  # no default: the override applies
        (0, True, 0, INF),
        (0, False, 2, INF),
    ],
)
def test_allow_timeout_override(default: float, allowed: bool, asked: float, deadline: float) -> None:
    request = make(timeout=asked)
    queue = queue_of(request, policy=QueuePolicy(default_timeout=default, allow_timeout_override=allowed))
    assert queue.next_deadline() == deadline == request.queue_deadline


def test_C7_a_request_that_has_left_is_not_kept_until_its_timeout() -> None:
    queue = RequestQueue(policy=QueuePolicy(default_timeout=3600))
    array = np.zeros(10)
    alive = weakref.ref(array)
    request = InferenceRequest({"IN": array})
    queue.append(request, 0)
    gc.disable()
    try:
        queue.remove(request)
        del request, array
        assert alive() is None
    finally:
        gc.enable()


def test_law_12_what_is_remembered_of_those_who_left_is_bounded_by_those_who_are_there() -> None:
    queue = RequestQueue(policy=QueuePolicy(default_timeout=3600))
    for _ in range(10_000):
        request = make()
        queue.append(request, 0)
        queue.remove(request)
    assert len(queue._deadlines) <= 65
    assert not queue._timed


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 3), st.integers(0, 4)),
            st.tuples(st.just("remove"), st.integers(0, 20), st.just(0)),
            st.tuples(st.just("expire"), st.integers(0, 3), st.just(0)),
        ),
        max_size=40,
    )
)
def test_the_queue_is_what_a_naive_one_would_be(operations: list[tuple[str, int, int]]) -> None:
    policies = {
        1: QueuePolicy(default_timeout=4, allow_timeout_override=True, max_queue_size=3),
        2: QueuePolicy(DELAY, default_timeout=2),
    }
    queue = RequestQueue(levels=3, default_level=2, policies=policies)
    now = 0.0
    everybody: list[InferenceRequest] = []
    waiting: dict[int, list[InferenceRequest]] = {1: [], 2: [], 3: []}
    delayed: dict[int, list[InferenceRequest]] = {1: [], 2: [], 3: []}
    for operation, number, timeout in operations:
        if operation == "append":
            request = make(str(len(everybody)), priority=number, timeout=timeout, at=now)
            level = number or 2
            if level == 1 and len(waiting[1]) == 3:
                with pytest.raises(Unavailable):
                    queue.append(request, now)
                continue
            everybody.append(request)
            queue.append(request, now)
            waiting[level].append(request)
        elif operation == "remove" and everybody:
            request = everybody[number % len(everybody)]
            holder = next((held for held in (*waiting.values(), *delayed.values()) if request in held), None)
            assert queue.remove(request) is (holder is not None)
            if holder is not None:
                holder.remove(request)
        elif operation == "expire":
            now += number
            late = {n: [r for r in waiting[n] if r.queue_deadline <= now] for n in waiting}
            waiting = {n: [r for r in waiting[n] if r.queue_deadline > now] for n in waiting}
            delayed[2] += sorted(late[2], key=lambda r: (r.queue_deadline, r.generation))
            assert set(queue.expire(now)) == {*late[1], *late[3]}
        expected = [r for n in (1, 2, 3) for r in (*waiting[n], *delayed[n])]
        assert list(queue) == expected
        assert len(queue) == len(expected) == sum(queue.statistics().by_level.values())
        due = [r.queue_deadline for held in waiting.values() for r in held]
        assert queue.next_deadline() == min(due, default=INF)
