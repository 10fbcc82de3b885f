"""Slots: nobody disturbs a neighbour, whoever comes, leaves, waits or follows."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from triton_trio.backends.jax.generation import ProgramMemory, PromptChunk, SlotSpec
from triton_trio.errors import InvalidArgument

from .tiny import CHUNK, CONFIG, SPEC, machine, prompt


def settings(number: int) -> dict[str, float]:
    """Every second one draws, every fourth one filters."""
    return {
        "max_tokens": 20 + 7 * (number % 5),
        "temperature": float(number % 2),
        "top_p": 0.9 if number % 4 == 1 else 1.0,
        "seed": number,
    }


def test_law_7_a_text_is_the_same_alone_and_among_others() -> None:
    shared = machine()
    alone = {n: shared.text(prompt(n, 5 + 9 * n), **settings(n)) for n in range(1, 9)}

    shared.reset()
    waiting = list(range(1, 9))
    while waiting or np.asarray(shared.state.owner).any():
        for slot in np.flatnonzero(np.asarray(shared.state.owner) == 0)[: len(waiting)]:
            number = waiting.pop()
            shared.start(int(slot), number, prompt(number, 5 + 9 * number), **settings(number))
        shared.run()
    assert {n: (shared.texts[n], shared.log_probabilities[n]) for n in alone} == alone


def test_law_7_survivors_are_bit_equal_when_others_leave_and_slots_change_owners() -> None:
    shared = machine()

    def run(*, cancel: bool) -> tuple[list[list[int]], list[list[float]]]:
        shared.reset()
        for slot in range(4):
            shared.start(slot, slot + 1, prompt(slot, 20), **settings(slot) | {"max_tokens": 40, "min_tokens": 40})
        shared.run(8)
        if cancel:
            shared.run(1, evict={1: 2, 3: 4})
            # At once the next owner, in the slot with the old text.
            shared.start(3, 5, prompt(5, 50), max_tokens=30, temperature=1.0, top_k=3, seed=5)
            shared.run(8, evict={1: 2, 3: 4})  # too late, twice: these owners are gone
            shared.start(1, 6, prompt(6, 3), max_tokens=30)
        shared.finish()
        return [shared.texts[owner] for owner in (1, 3)], [shared.log_probabilities[owner] for owner in (1, 3)]

    undisturbed = run(cancel=False)
    assert run(cancel=True) == undisturbed
    assert len(shared.texts[2]) == 9  # one from its prompt, eight before it was evicted
    expected = {5: prompt(5, 50), 6: prompt(6, 3)}
    assert shared.texts[6] == shared.text(expected[6], max_tokens=30)[0]


def test_a_late_eviction_does_not_hit_the_next_owner() -> None:
    shared = machine()
    expected, _ = shared.text(prompt(1, 9), max_tokens=12, min_tokens=12)

    shared.reset()
    shared.start(0, 1, prompt(0, 9), max_tokens=50, min_tokens=50)
    shared.run()
    # Owner 1 is cancelled, owner 2 takes the slot over, and only then comes the program that was to evict owner 1.
    shared.start(0, 2, prompt(1, 9), max_tokens=12, min_tokens=12)
    emitted = shared.run(evict={0: 1})
    assert emitted.owner.tolist() == [2, 0, 0, 0]
    shared.finish()
    assert shared.texts[2] == expected
    assert len(shared.texts[1]) == 2


def test_the_first_chunk_of_a_prompt_puts_the_old_owner_out() -> None:
    shared = machine()
    shared.reset()
    shared.start(2, 1, prompt(0, 9), max_tokens=50, min_tokens=50)
    shared.feed(PromptChunk(slot=2, tokens=np.array(prompt(1, 32))))
    # The old owner would now write into the new prompt.
    emitted = shared.run(8)
    assert not emitted.owner.any()
    assert (emitted.tokens == -1).all()
    shared.feed(PromptChunk(slot=2, tokens=np.array(prompt(2, 5)), start=32, owner=3, max_tokens=10))
    shared.finish()
    made = shared.texts[3]
    assert made == shared.text(prompt(1, 32) + prompt(2, 5), max_tokens=10)[0]


def test_who_is_held_stays_as_they_are() -> None:
    shared = machine()
    expected = shared.text(prompt(1, 9), max_tokens=30, temperature=1.0, seed=4)

    shared.reset()
    shared.start(0, 1, prompt(1, 9), max_tokens=30, temperature=1.0, seed=4)
    shared.start(1, 2, prompt(2, 9), max_tokens=80, min_tokens=80)
    for turn in range(9):
        emitted = shared.run(8, hold=[0] if turn % 3 else [])
        if turn % 3:
            assert (emitted.tokens[:, 0] == -1).all()
            assert emitted.owner[0] == 1
    shared.finish()
    assert (shared.texts[1], shared.log_probabilities[1]) == expected


def test_law_7_idle_and_held_rows_write_nothing_and_what_they_hold_reaches_nobody() -> None:
    shared = machine()
    expected = {n: shared.text(prompt(n, 17), max_tokens=25, min_tokens=25) for n in (1, 2)}

    shared.reset()
    # A poisoned cache: whatever reads a place that was not written for its owner says NaN.
    shared.state = jax.tree.map(lambda leaf: leaf, shared.state)._replace(
        keys=tuple(jax.numpy.full_like(cache, np.nan) for cache in shared.state.keys),
        values=tuple(jax.numpy.full_like(cache, np.nan) for cache in shared.state.values),
    )
    shared.start(2, 1, prompt(1, 17), max_tokens=25, min_tokens=25)
    shared.run(8)
    for cache in (*shared.state.keys, *shared.state.values):
        written = ~np.isnan(np.asarray(cache)).any(axis=(1, 3))
        assert not written[[0, 1, 3]].any()
        assert written[2].tolist() == [True] * 25 + [False] * (SPEC.places - 25)
    before = np.asarray(shared.state.keys[1][2]).copy()
    shared.start(0, 2, prompt(2, 17), max_tokens=25, min_tokens=25)
    shared.run(8, hold=[2])
    np.testing.assert_array_equal(np.asarray(shared.state.keys[1][2]), before)
    shared.finish()
    assert {n: (shared.texts[n], shared.log_probabilities[n]) for n in (1, 2)} == expected


# The end of a text


def test_a_text_ends_at_max_tokens_and_frees_its_slot() -> None:
    shared = machine()
    shared.reset()
    shared.start(0, 1, prompt(1, 9), max_tokens=1, min_tokens=1)
    shared.start(1, 2, prompt(1, 9), max_tokens=6, min_tokens=6)
    assert 1 in shared.ended
    emitted = shared.run(8)
    assert emitted.owner.tolist() == [0, 2, 0, 0]
    assert emitted.ended[:, 1].tolist() == [False] * 4 + [True] + [False] * 3
    assert [len(shared.texts[1]), len(shared.texts[2])] == [1, 6]
    assert not np.asarray(shared.state.owner).any()


def test_a_text_ends_with_an_end_token_but_not_before_min_tokens() -> None:
    shared = machine()
    # Hot enough that an end token comes soon: 2 of 96.
    hot = {"temperature": 50.0, "seed": 1, "max_tokens": 90}
    made, _ = shared.text(prompt(1, 9), **hot)
    assert made[-1] in SPEC.end_tokens
    assert len(made) < 90
    later, _ = shared.text(prompt(1, 9), **hot, min_tokens=len(made))
    assert not set(later[: len(made)]) & set(SPEC.end_tokens)
    assert not set(shared.text(prompt(1, 9), **hot, min_tokens=90)[0]) & set(SPEC.end_tokens)


def test_a_text_ends_where_the_context_does() -> None:
    shared = machine()
    made, _ = shared.text(prompt(1, 100), max_tokens=500, min_tokens=500)
    assert len(made) == 21  # 20 places after the prompt, and one token that needs none
    (full,) = {len(shared.text(prompt(1, 120), max_tokens=9)[0])}
    assert full == 1


# The programs


def test_the_cache_is_updated_in_place() -> None:
    shared = machine()
    for program in (shared.prefill(CHUNK), shared.decode(8)):
        memory = ProgramMemory.of(program)
        assert memory.aliased >= SPEC.cache_bytes
        assert memory.temporary < SPEC.cache_bytes
    shared.reset()
    assert SPEC.cache_bytes == sum(cache.nbytes for cache in (*shared.state.keys, *shared.state.values))
    old = shared.state
    where = [cache.unsafe_buffer_pointer() for cache in old.keys]
    shared.start(0, 1, prompt(1, 40), max_tokens=9)
    shared.run(8)
    assert [cache.unsafe_buffer_pointer() for cache in shared.state.keys] == where
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_nothing_compiles_after_loading(caplog: pytest.LogCaptureFixture) -> None:
    shared = machine()
    shared.text(prompt(1, 40), max_tokens=9)  # also compiles what reads the state here
    with jax.log_compiles():
        shared.reset()
        shared.start(np.int64(1), 7, prompt(1, 40), max_tokens=np.int32(9), temperature=1, top_k=True, seed=-1)
        shared.start(2, np.int16(8), prompt(2, 3), max_tokens=30, temperature=np.float64(0.5))
        shared.finish()
    assert not [record.message for record in caplog.records if "ompil" in record.message]
    with pytest.raises(TypeError):  # not another program, but an error
        shared.decode(1)(shared.params, shared.state, np.zeros(4, np.int32), np.zeros(4, np.int32))


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (PromptChunk(slot=4, tokens=np.array([1])), "slots 0 to 3, got 4"),
        (PromptChunk(slot=0, tokens=np.array([], int)), "1 to 32 tokens, got 0"),
        (PromptChunk(slot=0, tokens=np.arange(33)), "1 to 32 tokens, got 33"),
        (PromptChunk(slot=0, tokens=np.arange(30), start=91), "tokens 91 to 120 are beyond the context of 120"),
        (PromptChunk(slot=0, tokens=np.array([96])), "token ids are 0 to 95"),
        (PromptChunk(slot=0, tokens=np.array([-1])), "token ids are 0 to 95"),
        (PromptChunk(slot=0, tokens=np.array([1]), owner=1, max_tokens=0), "max_tokens must be 1 or more"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(chunk: PromptChunk, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        chunk.pack(SPEC, 32)


def test_slots_that_make_no_sense_are_refused() -> None:
    for arguments, text in (
        ({"slots": 0, "context": 16}, "1 or more slots"),
        ({"slots": 1, "context": 129}, "between 1 and the 128 positions the model was trained for, got 129"),
        ({"slots": 1, "context": 16, "end_tokens": (96,)}, "end token 96"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            SlotSpec(CONFIG, **arguments)


def test_each_of_a_seeds_64_bits_counts() -> None:
    def packed(seed: int) -> int:
        _, numbers, _ = PromptChunk(slot=0, tokens=np.array([1]), owner=1, seed=seed).pack(SPEC, 16)
        return int(numbers.view(np.uint32)[-1])

    assert [packed(seed) for seed in (0, 5, 2**32 - 1)] == [0, 5, 2**32 - 1]
    for seed in (0, 77, 2**64 - 1):
        assert packed(seed) not in {packed(seed ^ 1 << bit) for bit in range(64)}
