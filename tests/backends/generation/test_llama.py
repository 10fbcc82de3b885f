"""The network says what the reference says, however its prompt is cut and its tokens are counted out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from triton_trio.backends.jax.generation import PromptChunk, llama
from triton_trio.backends.jax.generation.llama import Int8, matmul
from triton_trio.backends.jax.generation.weights import quantise

from .tiny import (
    CONFIG,
    SPEC,
    Machine,
    log_softmax,
    machine,
    params_of,
    prompt,
    random_tensors,
    reference_logits,
)

SHALLOW = replace(CONFIG, layers=1)
SHALLOW_SPEC = replace(SPEC, config=SHALLOW)


@pytest.mark.parametrize("length", [1, 2, 16, 31, 32, 33, 90])
def test_greedy_text_is_the_references(length: int) -> None:
    ids = prompt(length, length)
    made, logs = machine().text(ids, max_tokens=20, min_tokens=20)

    table = log_softmax(reference_logits(CONFIG, random_tensors(CONFIG), ids + made))
    predicted = table[length - 1 : -1]
    for end in SPEC.end_tokens:
        predicted[:, end] = -np.inf  # min_tokens
    assert made == predicted.argmax(-1).tolist()
    np.testing.assert_allclose(logs, predicted.max(-1), atol=2e-5)


def test_log_probabilities_of_a_drawn_text_are_the_references() -> None:
    # A hot text visits unlikely tokens, so this compares logits from top to bottom.
    ids = prompt(1, 10)
    made, logs = machine().text(ids, max_tokens=60, min_tokens=60, temperature=3.0, seed=5)
    assert len(set(made)) > 25
    table = log_softmax(reference_logits(CONFIG, random_tensors(CONFIG), ids + made))
    np.testing.assert_allclose(logs, table[9:-1][np.arange(60), made], atol=5e-5)


def test_a_prompt_may_be_cut_anywhere() -> None:
    shared, ids = machine(), prompt(2, 60)
    whole, _ = shared.text(ids, chunk=64, max_tokens=30)
    assert shared.text(ids, chunk=32, max_tokens=30)[0] == whole
    shared.reset()
    shared.feed(PromptChunk(slot=0, tokens=np.array(ids[:23])))
    shared.feed(PromptChunk(slot=0, tokens=np.array(ids[23:24]), start=23))
    shared.feed(PromptChunk(slot=0, tokens=np.array(ids[24:50]), start=24))
    shared.feed(PromptChunk(slot=0, tokens=np.array(ids[50:]), start=50, owner=1, max_tokens=30))
    shared.finish()
    assert shared.texts[1] == whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eight_steps_at_once_are_eight_steps(temperature: float) -> None:
    shared = machine()
    shared.reset()
    for steps in (1, 8):
        shared.start(0, steps, prompt(3, 20), max_tokens=29, min_tokens=29, temperature=temperature, seed=9)
        shared.finish(steps)
    assert len(shared.texts[1]) == 29
    assert shared.texts[1] == shared.texts[8]
    assert shared.log_probabilities[1] == shared.log_probabilities[8]


def test_programs_for_accelerators_say_the_same() -> None:
    """Where the host cannot look into a program for free, it computes both sides of everything and all blocks."""
    other = machine(replace(SPEC, host_predicates=False))
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"temperature": 1.0, "seed": 3}):
        expected, logs = machine().text(prompt(4, 40), max_tokens=30, **settings)
        made, other_logs = other.text(prompt(4, 40), max_tokens=30, **settings)
        assert made == expected
        np.testing.assert_allclose(other_logs, logs, atol=1e-5)


def assert_first_tokens(model: Machine, tensors: Mapping[tuple[str, int | None], np.ndarray], atol: float) -> None:
    """The first tokens of a dozen hot texts have the probabilities that the reference gives them."""
    for length in range(3, 27, 2):
        ids = prompt(length, length)
        (token,), (log,) = model.text(ids, max_tokens=1, min_tokens=1, temperature=2.0, seed=length)
        expected = log_softmax(reference_logits(model.spec.config, tensors, ids))[-1, token]
        np.testing.assert_allclose(log, expected, atol=atol)


def test_without_a_last_matrix_the_embedding_serves_twice() -> None:
    tensors = random_tensors(SHALLOW)
    tensors["unembed", None] = tensors["embed", None]
    params = params_of(SHALLOW, tensors)
    del params["unembed"]
    assert_first_tokens(Machine(SHALLOW_SPEC, params), tensors, 5e-5)


def test_int8_is_the_reference_with_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(SHALLOW)
    tensors["unembed", None] = tensors["embed", None]
    rounded = dict(tensors)
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            short = quantise(tensor, axis=1)
            rounded[key] = np.asarray(short.values) * np.asarray(short.scale)[:, None]
            assert np.abs(rounded[key] - tensor).max() <= np.abs(tensor).max() / 127

    def convert(path: tuple[jax.tree_util.DictKey, ...], leaf: np.ndarray) -> object:
        return leaf if leaf.ndim < 2 else quantise(leaf, axis=1 if path[-1].key == "embed" else 0)

    params = jax.tree_util.tree_map_with_path(convert, params_of(SHALLOW, tensors))
    assert isinstance(params["layers"][0]["down"], Int8)
    del params["unembed"]
    # Here activations are rounded, too, to 1/32,258 of their row's largest; accelerators widen the weights instead.
    assert_first_tokens(Machine(SHALLOW_SPEC, params), rounded, 1e-3)
    monkeypatch.setattr(llama, "_whole_product", llama._widened_product)
    assert_first_tokens(Machine(SHALLOW_SPEC, params), rounded, 5e-5)


def test_law_7_with_int8_a_row_has_the_same_bits_beside_any_others() -> None:
    rng = np.random.default_rng(0)
    weight = jax.tree.map(jax.numpy.asarray, quantise(rng.standard_normal((96, 64), np.float32), axis=0))
    rows = rng.standard_normal((9, 96), np.float32) * np.float32(10) ** np.arange(-6, 3, dtype=np.float32)[:, None]
    rows[4] = 0
    product = jax.jit(matmul)
    together = np.asarray(product(rows, weight))
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(product(row[None], weight)[0], together[number])
        np.testing.assert_array_equal(product(rows[number:], weight)[0], together[number])
    exact = rows.astype(np.float64) @ (np.asarray(weight.values) * np.asarray(weight.scale, np.float64))
    size = np.abs(exact).max(axis=-1, keepdims=True).clip(1e-30)  # one row is of zeros
    np.testing.assert_allclose(together / size, exact / size, atol=1e-4)


def test_on_a_cpu_only_matrices_are_bfloat16() -> None:
    """With a cache of bfloat16, too, the whole of it would be widened with each token."""
    tensors = random_tensors(SHALLOW)
    rounded = {
        key: tensor.astype(ml_dtypes.bfloat16).astype(np.float32) if tensor.ndim == 2 else tensor
        for key, tensor in tensors.items()
    }
    params = jax.tree.map(
        lambda leaf: leaf.astype(ml_dtypes.bfloat16) if leaf.ndim == 2 else leaf, params_of(SHALLOW, tensors)
    )
    model = Machine(SHALLOW_SPEC, params)
    assert model.state.keys[0].dtype == np.float32
    assert_first_tokens(model, rounded, 0.05)


def test_bfloat16_is_the_reference_within_its_precision() -> None:
    tensors = random_tensors(SHALLOW)
    params = jax.tree.map(
        lambda leaf: leaf.astype(ml_dtypes.bfloat16) if leaf.ndim == 2 else leaf, params_of(SHALLOW, tensors)
    )
    model = Machine(replace(SHALLOW_SPEC, dtype=ml_dtypes.bfloat16), params)
    assert model.state.keys[0].dtype == ml_dtypes.bfloat16
    assert_first_tokens(model, tensors, 0.3)
