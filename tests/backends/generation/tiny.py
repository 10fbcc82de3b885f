"""A language model of 20,000 random numbers, its slots, and a plain reference for what they should say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from triton_trio.backends.jax.generation import (
    NO_TOKEN,
    Emitted,
    LlamaConfig,
    LlamaPrograms,
    Placement,
    PromptChunk,
    SlotSpec,
)
from triton_trio.backends.jax.generation.llama import Params
from triton_trio.backends.jax.generation.weights import NORMS, WEIGHTS, weight_shapes

CONFIG = LlamaConfig(
    vocab_size=96,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=48,
    context=128,
    rope_theta=1000.0,
    rope_divisors=(1.0, 1.0, 2.5, 4.0),
)
#: Of blocks of 16, so that a text crosses some; and a last block that is not full.
SPEC = SlotSpec(CONFIG, slots=4, context=120, end_tokens=(7, 11), block=16)
CHUNK = 32


def random_tensors(config: LlamaConfig, seed: int = 0) -> dict[tuple[str, int | None], np.ndarray]:
    """By name and layer; matrices ``[out, in]``, as in files.  Large enough that the next token is not a close call."""
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(config)

    def matrix(name: str) -> np.ndarray:
        out, width = shapes[name]
        return np.float32(rng.normal(0, 1.5 / width**0.5, (out, width)))

    def norm() -> np.ndarray:
        return np.float32(rng.uniform(0.5, 1.5, config.width))

    tensors: dict[tuple[str, int | None], np.ndarray] = {
        ("embed", None): np.float32(rng.normal(0, 1, shapes["embed"])),
        ("unembed", None): matrix("unembed") * 2,
        ("norm", None): norm(),
    }
    for layer in range(config.layers):
        tensors |= {(name, layer): matrix(name) for name in WEIGHTS} | {(name, layer): norm() for name in NORMS}
    return tensors


def params_of(config: LlamaConfig, tensors: Mapping[tuple[str, int | None], np.ndarray]) -> Params:
    """As the programs take them, on the host."""

    def one(name: str, layer: int | None = None) -> np.ndarray:
        array = tensors[name, layer]
        return np.ascontiguousarray(array.T) if array.ndim == 2 and name != "embed" else array

    params: Params = {name: one(name) for name in ("embed", "unembed", "norm")}
    params["layers"] = tuple({name: one(name, layer) for name in (*WEIGHTS, *NORMS)} for layer in range(config.layers))
    return params


class Machine:
    """The programs of a model, and texts as their owners would read them.  Compiles when first asked for a size."""

    def __init__(self, spec: SlotSpec, params: Params, placement: Placement | None = None) -> None:
        self.spec = spec
        self.placement = placement or Placement.on(jax.devices()[:1])
        self.params = self.placement.put_params(params)
        self.programs = LlamaPrograms(spec, self.placement, self.params)
        self.prefill = cache(self.programs.prefill)
        self.decode = cache(self.programs.decode)
        self.reset()

    def reset(self) -> None:
        self.state = self.programs.state()
        self.texts: dict[int, list[int]] = defaultdict(list)
        self.log_probabilities: dict[int, list[float]] = defaultdict(list)
        self.ended: set[int] = set()

    def start(self, slot: int, owner: int, prompt: Sequence[int], *, chunk: int = CHUNK, **settings: Any) -> None:
        """The whole prompt, and with it the first token."""
        for start in range(0, len(prompt), chunk):
            piece = PromptChunk(slot=slot, tokens=np.array(prompt[start : start + chunk]), start=start)
            self.feed(piece, chunk) if start + chunk < len(prompt) else self.feed(
                PromptChunk(slot=slot, tokens=piece.tokens, start=start, owner=owner, **settings), chunk
            )

    def feed(self, piece: PromptChunk, chunk: int = CHUNK) -> Emitted:
        self.state, emitted = self.prefill(chunk)(self.params, self.state, *piece.pack(self.spec, chunk))
        return self._read(emitted)

    def run(self, steps: int = 1, *, evict: Mapping[int, int] | None = None, hold: Sequence[int] = ()) -> Emitted:
        """One program; ``evict`` is slot → owner."""
        leaving, held = np.zeros(self.spec.slots, np.int32), np.zeros(self.spec.slots, bool)
        for slot, owner in (evict or {}).items():
            leaving[slot] = owner
        held[list(hold)] = True
        self.state, emitted = self.decode(steps)(self.params, self.state, leaving, held)
        return self._read(emitted)

    def finish(self, steps: int = 1) -> None:
        """Until every slot is free."""
        while np.asarray(self.state.owner).any():
            self.run(steps)

    def text(self, prompt: Sequence[int], *, slot: int = 0, **settings: Any) -> tuple[list[int], list[float]]:
        """One text with nobody else there, and its tokens' log-probabilities."""
        self.reset()
        self.start(slot, 1, prompt, **settings)
        self.finish()
        return self.texts[1], self.log_probabilities[1]

    def _read(self, emitted: Emitted) -> Emitted:
        emitted = Emitted(*map(np.asarray, emitted))  # type: ignore[arg-type]
        for slot, owner in enumerate(emitted.owner):
            for token, log, ended in zip(
                emitted.tokens[:, slot], emitted.log_probabilities[:, slot], emitted.ended[:, slot], strict=True
            ):
                if token == NO_TOKEN:
                    continue
                assert owner, "a token for nobody"
                self.texts[int(owner)].append(int(token))
                self.log_probabilities[int(owner)].append(float(log))
                if ended:
                    self.ended.add(int(owner))
        return emitted


@cache
def machine(spec: SlotSpec = SPEC) -> Machine:
    """Shared, because compiling takes a second; start with ``reset()``."""
    return Machine(spec, params_of(spec.config, random_tensors(spec.config)))


def prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(12, CONFIG.vocab_size, length)]


def reference_logits(
    config: LlamaConfig, tensors: Mapping[tuple[str, int | None], np.ndarray], ids: Sequence[int]
) -> np.ndarray:
    """The model as its paper has it: float64, one text at once, no cache.  ``[positions, vocab]``."""

    def matrix(name: str, layer: int | None = None) -> np.ndarray:
        return tensors[name, layer].astype(np.float64)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * weight

    count, half = len(ids), config.head_dim // 2
    frequencies = config.rope_theta ** -(np.arange(half) / half) / np.array(config.rope_divisors or (1.0,) * half)
    spin = np.exp(1j * np.arange(count)[:, None] * frequencies)

    def heads(x: np.ndarray, *, rotated: bool) -> np.ndarray:
        split = x.reshape(count, -1, config.head_dim).swapaxes(0, 1)
        if rotated:
            complex_pairs = (split[..., :half] + 1j * split[..., half:]) * spin
            split = np.concatenate([complex_pairs.real, complex_pairs.imag], -1)
        return split

    x = matrix("embed")[list(ids)]
    for layer in range(config.layers):
        normed = norm(x, matrix("attn_norm", layer))
        q = heads(normed @ matrix("q", layer).T, rotated=True)
        k = heads(normed @ matrix("k", layer).T, rotated=True)
        v = heads(normed @ matrix("v", layer).T, rotated=False)
        mixed = []
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            scores = q[head] @ k[shared].T / np.sqrt(config.head_dim)
            scores[np.triu_indices(count, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[shared])
        x = x + np.concatenate(mixed, -1) @ matrix("o", layer).T
        normed = norm(x, matrix("mlp_norm", layer))
        gate = normed @ matrix("gate", layer).T
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ matrix("up", layer).T)) @ matrix("down", layer).T
    return norm(x, matrix("norm")) @ matrix("unembed").T


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
