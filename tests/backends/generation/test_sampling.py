"""Sampling: what may be drawn, how often, and what a draw depends on."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from triton_trio.backends.jax.generation.sampling import Sampling, log_probability, sample

VOCAB = 50
LOGITS = np.float32(np.random.default_rng(0).normal(0, 2, VOCAB))
DRAW = jax.jit(partial(sample, host_predicates=True))


def draw(logits: np.ndarray, count: int = 4000, **settings: float) -> np.ndarray:
    """So many draws at so many positions."""

    def rows(name: str, default: float, dtype: type) -> np.ndarray:
        return np.full(count, settings.get(name, default), dtype)

    sampling = Sampling(
        rows("temperature", 1.0, np.float32), rows("top_k", 0, np.int32), rows("top_p", 1.0, np.float32),
        rows("seed", 1, np.uint32),
    )  # fmt: skip
    positions = np.arange(count, dtype=np.int32)
    return np.asarray(DRAW(np.broadcast_to(logits, (count, len(logits))), sampling, positions, np.ones(count, bool)))


def probabilities(logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """By sorting."""
    weights = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-weights)
    if top_k:
        weights[order[top_k:]] = 0
    share = np.cumsum(weights[order]) / weights.sum()
    weights[order[np.searchsorted(share, top_p) + 1 :]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_k": 8, "top_p": 0.7, "temperature": 1.5},
    ],
)
def test_draws_follow_the_filtered_distribution(settings: dict[str, float]) -> None:
    expected = probabilities(LOGITS, **settings)
    counts = np.bincount(draw(LOGITS, **settings), minlength=VOCAB)
    assert not counts[expected == 0].any()
    assert counts[expected > 0.01].all()
    # Five standard deviations of each count.
    spread = np.sqrt(4000 * expected * (1 - expected))
    assert (np.abs(counts - 4000 * expected) <= 5 * spread + 1e-9).all()


def test_the_likeliest_token_without_temperature_or_alternatives() -> None:
    best = LOGITS.argmax()
    for settings in ({"temperature": 0.0, "top_k": 3}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-4}):
        assert (draw(LOGITS, 50, **settings) == best).all(), settings


def test_equal_tokens_are_kept_together() -> None:
    logits = np.float32([0, 3, 3, 3, 1])
    assert set(draw(logits, top_k=2)) == {1, 2, 3}


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = np.where(np.arange(VOCAB) % 3 == 0, -np.inf, LOGITS).astype(np.float32)
    for settings in ({}, {"temperature": 1000.0}, {"temperature": 1000.0, "top_k": 49}, {"top_p": 0.9999}):
        assert (draw(logits, **settings) % 3 != 0).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.999}])
def test_a_temperature_whose_reciprocal_is_no_normal_number_draws_fairly(settings: dict[str, float]) -> None:
    """-inf times a reciprocal that was flushed to 0 is no number, and the draw was the same each time."""
    logits = np.float32([-np.inf, 1, 5, -np.inf, 2])
    for hot in (1e30, 1e38, 3e38):
        counts = np.bincount(draw(logits, temperature=hot, **settings), minlength=5)
        assert counts[[0, 3]].tolist() == [0, 0]
        assert counts[[1, 2, 4]].min() > 4000 / 3 - 150  # five standard deviations
    for cold in (1e-45, 1e-40, 1e-38, 1e-30):
        assert (draw(logits, temperature=cold, **settings) == 2).all()


def test_a_draw_depends_on_seed_and_position_and_on_no_other_row() -> None:
    rng = np.random.default_rng(1)
    logits = np.float32(rng.normal(0, 2, (64, VOCAB)))
    positions = np.int32(rng.integers(0, 1000, 64))
    sampling = Sampling(
        np.full(64, 1.0, np.float32),
        np.zeros(64, np.int32),
        np.full(64, 1.0, np.float32),
        np.arange(64).astype(np.uint32),
    )
    live = np.ones(64, bool)
    among = np.asarray(DRAW(logits, sampling, positions, live))
    # Others filter, are greedy, or are not there at all: other branches of the program.
    filtering = sampling._replace(top_k=np.where(np.arange(64) % 2, 4, 0).astype(np.int32))
    np.testing.assert_array_equal(np.asarray(DRAW(logits, filtering, positions, live))[::2], among[::2])
    greedy = sampling._replace(temperature=np.where(np.arange(64) % 2, 0, 1).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(DRAW(logits, greedy, positions, live))[::2], among[::2])
    order = rng.permutation(64)
    shuffled = Sampling(*(rows[order] for rows in sampling))
    np.testing.assert_array_equal(np.asarray(DRAW(logits[order], shuffled, positions[order], live)), among[order])
    # And it does depend on these two.
    assert (np.asarray(DRAW(logits, sampling, positions + 1, live)) != among).sum() > 20
    assert (np.asarray(DRAW(logits, sampling._replace(seed=sampling.seed + 64), positions, live)) != among).sum() > 20


def test_large_vocabularies_with_a_hopeless_tail() -> None:
    """49,152 tokens, all but three impossible: sums over them may round, the draw may not go astray."""
    logits = np.full(49_152, -np.inf, np.float32)
    logits[[3, 20_000, 49_151]] = [1.0, 2.0, 1.5]
    counts = np.bincount(draw(logits, 300, temperature=1.0), minlength=49_152)
    assert np.flatnonzero(counts).tolist() == [3, 20_000, 49_151]


def test_log_probability_is_of_the_unfiltered_model() -> None:
    logits = np.stack([LOGITS, LOGITS * 3])
    tokens = np.array([4, 9], np.int32)
    expected = [np.log(probabilities(row)[token]) for row, token in zip(logits, tokens, strict=True)]
    np.testing.assert_allclose(np.asarray(log_probability(logits, tokens)), expected, atol=1e-5)
