"""Slots: the state of all generations that run side by side, and the two programs that move it on.

``prefill`` puts a piece of one prompt into one slot; with the last piece the slot starts to generate.  ``decode`` makes
some tokens for every slot that generates.  Both take the whole state, donated, and give it back with an :class:`Emitted`,
which is not donated and may be read while the next program runs.

Who a slot belongs to is a number on the device, its *owner*; 0 is nobody.  An eviction names an owner, not a slot, and what
was emitted names the owner it was emitted for.  So a late eviction cannot hit the slot's next owner, and a late token
cannot reach them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ....errors import InvalidArgument
from .config import SlotSpec
from .llama import Cache, Params, Rotation, View, attend, embed, layer, unembed
from .sampling import Sampling, log_probability, sample

#: Stands in :attr:`Emitted.tokens` where a row emitted nothing.
NO_TOKEN = -1


class SlotState(NamedTuple):
    """On the device.  Rows are slots; int32 unless noted."""

    keys: tuple[Cache, ...]  #: one for each layer, ``[slots, kv_heads, places, head_dim]``
    values: tuple[Cache, ...]
    owner: jax.Array  #: 0 if the slot does not generate
    token: jax.Array  #: the last one, which is not in the cache yet
    position: jax.Array  #: where it will be
    remaining: jax.Array  #: tokens it may still make
    reluctant: jax.Array  #: tokens it must make before it may end
    sampling: Sampling


class Emitted(NamedTuple):
    """What one program made."""

    owner: jax.Array  #: int32 ``[slots]``: who the columns below belong to
    tokens: jax.Array  #: int32 ``[steps, slots]``, :data:`NO_TOKEN` where there is none
    log_probabilities: jax.Array  #: float32 ``[steps, slots]``; NaN if the model computed nonsense
    ended: jax.Array  #: bool ``[steps, slots]``: with this token the text ended, and the slot is free


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """A piece of a prompt, on the host.

    Args:
      slot: which.  Whoever had it is out with the first chunk.
      tokens: ids; at least one, at most as many as the program takes.
      start: position of the first of them: how many tokens of the prompt are in the slot already.
      owner: 0 if more chunks follow.  With the last one, the number of the new owner: 1 or more, unlike any other in use.
      max_tokens: how many tokens it may make, an end token included.  Only with the last chunk, as all that follows.
      min_tokens: how many tokens it makes before the first end token.  ``max_tokens`` means: ignore end tokens.
    """

    slot: int
    tokens: np.ndarray
    start: int = 0
    owner: int = 0
    max_tokens: int = 1
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def pack(self, spec: SlotSpec, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments of a :func:`prefill` of ``length`` tokens: int32 ids, int32 numbers, float32 numbers.

        Raises:
          InvalidArgument: the chunk does not fit.
        """
        count = len(self.tokens)
        if not 0 <= self.slot < spec.slots:
            raise InvalidArgument(f"there are slots 0 to {spec.slots - 1}, got {self.slot}")
        if not 1 <= count <= length:
            raise InvalidArgument(f"a chunk of a prompt has 1 to {length} tokens, got {count}")
        if self.start < 0 or self.start + count > spec.context:
            raise InvalidArgument(
                f"the prompt does not fit: its tokens {self.start} to {self.start + count - 1} are beyond "
                f"the context of {spec.context}"
            )
        if self.owner and self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens must be 1 or more, got {self.max_tokens}")
        tokens = np.zeros(length, np.int32)
        tokens[:count] = self.tokens
        if tokens.min() < 0 or tokens.max() >= spec.config.vocab_size:
            raise InvalidArgument(
                f"token ids are 0 to {spec.config.vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
            )
        # Of 64 bits, so that those beyond 32 count, too.
        seed = np.uint32((self.seed ^ (self.seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF).view(np.int32)
        numbers = [self.slot, self.start, count, self.owner, self.max_tokens, self.min_tokens, self.top_k, seed]
        return tokens, np.array(numbers, np.int32), np.array([self.temperature, self.top_p], np.float32)


def empty_state(spec: SlotSpec) -> SlotState:
    """Nobody anywhere.  Jit it, with shardings, to have it made on the device."""
    config = spec.config
    shape = (spec.slots, config.kv_heads, spec.places, config.head_dim)

    def caches() -> tuple[Cache, ...]:
        return tuple(jnp.zeros(shape, spec.dtype) for _ in range(config.layers))

    def numbers(dtype: Any = np.int32) -> jax.Array:
        return jnp.zeros(spec.slots, dtype)

    sampling = Sampling(numbers(np.float32), numbers(), numbers(np.float32), numbers(np.uint32))
    return SlotState(caches(), caches(), numbers(), numbers(), numbers(), numbers(), numbers(), sampling)


def prefill(
    spec: SlotSpec, params: Params, state: SlotState, tokens: jax.Array, numbers: jax.Array, fractions: jax.Array
) -> tuple[SlotState, Emitted]:
    """One chunk of one prompt; the arguments after ``state`` are what :meth:`PromptChunk.pack` makes.

    Returns:
      the state, and one step's :class:`Emitted`: with the last chunk, the first token of the text, else nothing.
    """
    slot, start, count, owner, max_tokens, min_tokens, top_k, seed = numbers
    temperature, top_p = fractions
    offsets = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    positions = start + offsets
    # Beyond the chunk's end the tokens are padding: written outside of the cache, so dropped, and seen by nobody.
    places = jnp.where(offsets < count, positions, spec.places)
    group = spec.config.group
    last = jnp.minimum(positions, start + count - 1)
    view = View(lambda cache, number: _block_of(spec, cache, number, slot), jnp.repeat(last, group)[None])

    def place(cache: Cache, heads: jax.Array) -> Cache:
        return cache.at[slot, :, places].set(heads, mode="drop")

    def look(queries: jax.Array, keys: Cache, values: Cache) -> jax.Array:
        folded = queries.reshape(-1, spec.config.kv_heads, group, spec.config.head_dim).transpose(1, 0, 2, 3)
        folded = folded.reshape(1, spec.config.kv_heads, -1, spec.config.head_dim)
        looked = attend(spec, folded, keys, values, view)
        looked = looked.reshape(spec.config.kv_heads, -1, group, spec.config.head_dim).transpose(1, 0, 2, 3)
        return looked.reshape(queries.shape)

    x, keys, values = _layers(spec, params, state, tokens, positions, place, look)
    row = Sampling(temperature[None], top_k[None], top_p[None], jax.lax.bitcast_convert_type(seed, jnp.uint32)[None])
    arms = owner != 0
    end = start + count

    def first() -> tuple[jax.Array, jax.Array]:
        return _next_token(spec, params, x[count - 1][None], row, end[None], arms[None], min_tokens[None] > 0)

    if spec.host_predicates:
        none = (jnp.full(1, NO_TOKEN, jnp.int32), jnp.zeros(1, jnp.float32))
        token, log_probability = jax.lax.cond(arms, first, lambda: none)
    else:
        token, log_probability = first()
    ended = arms & _ends(spec, token[0], max_tokens - 1, end)
    here = jnp.arange(spec.slots) == slot
    emitted = Emitted(
        owner=jnp.where(here, owner, 0),
        tokens=jnp.where(here & arms, token[0], NO_TOKEN)[None],
        log_probabilities=jnp.where(here, log_probability[0], 0)[None],
        ended=(here & ended)[None],
    )
    state = SlotState(
        keys=keys,
        values=values,
        owner=state.owner.at[slot].set(jnp.where(ended, 0, owner)),
        token=state.token.at[slot].set(token[0]),
        position=state.position.at[slot].set(end),
        remaining=state.remaining.at[slot].set(max_tokens - 1),
        reluctant=state.reluctant.at[slot].set(jnp.maximum(min_tokens - 1, 0)),
        sampling=jax.tree.map(lambda rows, one: rows.at[slot].set(one[0]), state.sampling, row),
    )
    return state, emitted


def decode(
    spec: SlotSpec, params: Params, state: SlotState, evict: jax.Array, hold: jax.Array, *, steps: int
) -> tuple[SlotState, Emitted]:
    """``steps`` tokens for every slot that generates.

    Args:
      evict: int32 ``[slots]``: the owner who has to leave this slot, before the first step; 0: nobody.
      hold: bool ``[slots]``: does not move in this program, and stays.
    """
    state = state._replace(owner=jnp.where(state.owner == evict, 0, state.owner))
    owner = state.owner

    def one(state: SlotState, _: None) -> tuple[SlotState, tuple[jax.Array, jax.Array, jax.Array]]:
        return _decode_step(spec, params, state, hold)

    state, (tokens, log_probabilities, ended) = jax.lax.scan(one, state, None, length=steps)
    return state, Emitted(owner, tokens, log_probabilities, ended)


def _decode_step(
    spec: SlotSpec, params: Params, state: SlotState, hold: jax.Array
) -> tuple[SlotState, tuple[jax.Array, jax.Array, jax.Array]]:
    live = (state.owner != 0) & ~hold
    rows = jnp.arange(spec.slots)
    # A row that does not move writes outside of the cache: the write is dropped, and so it can touch nobody.
    places = jnp.where(live, state.position, spec.places)
    view = View(lambda cache, number: _block_of(spec, cache, number), jnp.where(live, state.position, 0)[:, None])
    view = view._replace(last=jnp.repeat(view.last, spec.config.group, axis=1))

    def place(cache: Cache, heads: jax.Array) -> Cache:
        return cache.at[rows, :, places].set(heads, mode="drop")

    def look(queries: jax.Array, keys: Cache, values: Cache) -> jax.Array:
        folded = queries.reshape(spec.slots, spec.config.kv_heads, spec.config.group, spec.config.head_dim)
        return attend(spec, folded, keys, values, view).reshape(queries.shape)

    x, keys, values = _layers(spec, params, state, state.token, state.position, place, look)
    following = state.position + 1
    token, log_probability = _next_token(spec, params, x, state.sampling, following, live, state.reluctant > 0)
    moved = live.astype(jnp.int32)
    remaining = state.remaining - moved
    ended = live & _ends(spec, token, remaining, following)
    state = state._replace(
        keys=keys,
        values=values,
        owner=jnp.where(ended, 0, state.owner),
        token=jnp.where(live, token, state.token),
        position=state.position + moved,
        remaining=remaining,
        reluctant=jnp.maximum(state.reluctant - moved, 0),
    )
    return state, (jnp.where(live, token, NO_TOKEN), jnp.where(live, log_probability, 0), ended)


def _layers(
    spec: SlotSpec, params: Params, state: SlotState, tokens: jax.Array, positions: jax.Array, place: Any, look: Any
) -> tuple[jax.Array, tuple[Cache, ...], tuple[Cache, ...]]:
    # Unrolled: a scan over layers would copy each layer's cache in and out.
    x = embed(params, tokens, spec.dtype)
    rotation = Rotation.at(spec.config, positions)
    caches = []
    for weights, keys, values in zip(params["layers"], state.keys, state.values, strict=True):

        def store(k: jax.Array, v: jax.Array, keys: Cache = keys, values: Cache = values) -> tuple[Cache, Cache]:
            return place(keys, k), place(values, v)

        x, keys, values = layer(spec, weights, x, rotation, store, look)
        caches.append((keys, values))
    return x, tuple(keys for keys, _ in caches), tuple(values for _, values in caches)


def _block_of(spec: SlotSpec, cache: Cache, number: Any, slot: jax.Array | None = None) -> jax.Array:
    """One block of all slots or of one, ``[rows, kv_heads, block, head_dim]``."""
    _, kv_heads, _, head_dim = cache.shape
    zero = jnp.int32(0)
    rows = spec.slots if slot is None else 1
    start = (zero if slot is None else slot, zero, jnp.int32(number * spec.block), zero)
    return jax.lax.dynamic_slice(cache, start, (rows, kv_heads, spec.block, head_dim))


def _next_token(
    spec: SlotSpec,
    params: Params,
    x: jax.Array,
    sampling: Sampling,
    positions: jax.Array,
    live: jax.Array,
    must_go_on: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    logits = unembed(params, x, spec.config.norm_epsilon)
    allowed = logits
    if spec.end_tokens:
        ends = np.isin(np.arange(spec.config.vocab_size), spec.end_tokens)
        allowed = jnp.where(must_go_on[:, None] & ends, -jnp.inf, logits)
    token = sample(allowed, sampling, positions, live, host_predicates=spec.host_predicates)
    return token, log_probability(logits, token)


def _ends(spec: SlotSpec, token: jax.Array, remaining: jax.Array, position: jax.Array) -> jax.Array:
    at_end = jnp.zeros(token.shape, bool)
    for end in spec.end_tokens:
        at_end |= token == end
    # Without room for its position, the token is the last one: nothing can be computed from it.
    return at_end | (remaining <= 0) | (position >= spec.context)
