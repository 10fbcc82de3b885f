"""What the cache keeps and for how long, without a loop; and what makes two requests the same."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_trio.request import InferenceRequest
from triton_trio.response_cache import ResponseCache
from triton_trio.response_cache.cache import Answer, digest


def answer(value: float = 0, size: int = 100) -> Answer:
    return Answer({"OUT": np.full(size, value, np.float32)}, {"p": 1})


ENTRY = answer().size()


def test_an_answer_comes_back_as_it_was_and_nobody_can_write_to_it() -> None:
    cache = ResponseCache(10_000)
    given = answer(7)
    kept = cache.put((1, b"k"), given)
    given.outputs["OUT"][:] = 0
    found = cache.get((1, b"k"))
    assert found is kept and found is not None
    assert (found.outputs["OUT"] == 7).all() and found.parameters == {"p": 1}
    one, other = found.outputs_for_one(), found.outputs_for_one()
    with pytest.raises(ValueError, match="read-only"):
        one["OUT"][0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        one["OUT"].flags.writeable = True
    del one["OUT"]
    assert (other["OUT"] == 7).all()
    assert cache.get((1, b"other")) is None
    assert (cache.statistics().hits, cache.statistics().misses) == (1, 1)


def test_the_least_recently_used_goes_first() -> None:
    cache = ResponseCache(3 * ENTRY)
    for key in b"abc":
        cache.put((1, bytes([key])), answer())
    cache.get((1, b"a"))
    cache.put((1, b"d"), answer())
    assert [key for _, key in cache._entries] == [b"c", b"a", b"d"]
    assert cache.statistics().evictions == 1


def test_what_is_larger_than_the_cache_is_not_kept_and_nobody_has_to_go_for_it() -> None:
    cache = ResponseCache(2 * ENTRY)
    cache.put((1, b"a"), answer())
    assert cache.put((1, b"b"), answer(size=10_000)) is None
    assert len(cache) == 1


ANSWERS = {
    "nothing much": lambda number: answer(number, 1),
    "many outputs": lambda number: Answer({f"OUT{i}": np.zeros(3, np.float32) for i in range(50)}, {}),
    "text": lambda number: Answer({"OUT": np.array([b"x" * size for size in range(50)], object)}, {}),
    "parameters": lambda number: Answer({}, {f"p{i}": f"{number}" * 100 for i in range(20)}),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_law_12_an_entry_weighs_what_it_says(what: str) -> None:
    cache = ResponseCache(1 << 30)
    tracemalloc.start()
    try:
        for number in range(500):
            cache.put((1, number.to_bytes(32, "big")), ANSWERS[what](number))
        weight = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.5 < weight / cache.statistics().used < 1.1


def test_the_entries_of_one_load_are_dropped_and_no_others() -> None:
    cache = ResponseCache(10 * ENTRY)
    for owner, key in ((1, b"a"), (2, b"a"), (1, b"b")):
        cache.put((owner, key), answer())
    cache.drop_all_of(1)
    assert list(cache._entries) == [(2, b"a")]
    assert cache.statistics().used == ENTRY


def test_an_entry_keeps_no_more_than_its_own_bytes_alive_and_those_die_with_it() -> None:
    cache = ResponseCache(2 * ENTRY)
    batch = np.zeros((64, 100), np.float32)
    whole = weakref.ref(batch)
    kept = cache.put((1, b"a"), Answer({"OUT": batch[3:4]}, {}))
    assert kept is not None
    array = weakref.ref(kept.outputs["OUT"])
    del batch, kept
    assert whole() is None and array() is not None
    gc.disable()
    try:
        cache.drop((1, b"a"))
        assert array() is None
    finally:
        gc.enable()


@given(
    st.integers(0, 5 * ENTRY),
    st.lists(st.tuples(st.sampled_from(["put", "get", "drop", "drop all"]), st.integers(0, 9), st.integers(0, 400))),
)
def test_law_12_never_more_than_it_may_hold(capacity: int, operations: list[tuple[str, int, int]]) -> None:
    cache = ResponseCache(capacity)
    for name, number, size in operations:
        key = (number % 3, bytes([number]))
        if name == "put":
            kept = cache.put(key, answer(number, size))
            assert (kept is None) == (answer(size=size).size() > capacity)
        elif name == "get":
            found = cache.get(key)
            assert found is None or (found.outputs["OUT"] == number).all()
        elif name == "drop":
            cache.drop(key)
        else:
            cache.drop_all_of(key[0])
        statistics = cache.statistics()
        assert statistics.used == sum(size for _, size in cache._entries.values()) <= capacity
        assert statistics.entries == len(cache._entries)


def request(inputs: dict[str, Any], **options: Any) -> InferenceRequest:
    return InferenceRequest({name: np.asarray(value) for name, value in inputs.items()}, **options)


BASE = {"A": np.float32([[1, 2]]), "B": np.array([b"x", b"y"], object)}
SAME = {
    "who asks, and how urgently": request(BASE, request_id="other", priority=2, timeout_us=5),
    "the order of inputs": request(dict(reversed(BASE.items()))),
    "memory layout": request({**BASE, "A": np.asfortranarray(BASE["A"])}),
}
DIFFERENT = {
    "a value": request({**BASE, "A": np.float32([[1, 3]])}),
    "a shape": request({**BASE, "A": np.float32([[1], [2]])}),
    "a datatype": request({**BASE, "A": np.float32([[1, 2]]).view(np.int32)}),
    "a name": request({"A": BASE["A"], "C": BASE["B"]}),
    "where one string ends": request({**BASE, "B": np.array([b"xy", b""], object)}),
    "an input left out": request({"A": BASE["A"]}),
    "requested outputs": request(BASE, requested_outputs=("OUT",)),
    "a parameter": request(BASE, parameters={"temperature": 0.5}),
}


@pytest.mark.parametrize("what", SAME)
def test_requests_that_ask_the_same_in_spite_of(what: str) -> None:
    assert digest(SAME[what]) == digest(request(BASE))


@pytest.mark.parametrize("what", DIFFERENT)
def test_requests_that_differ_by(what: str) -> None:
    assert digest(DIFFERENT[what]) != digest(request(BASE))


def test_requested_outputs_are_a_set() -> None:
    one, other = (request(BASE, requested_outputs=names) for names in (("P", "Q"), ("Q", "P")))
    assert digest(one) == digest(other)
