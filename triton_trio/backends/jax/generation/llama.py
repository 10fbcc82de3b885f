"""The network: RMSNorm, rotary positions, grouped-query attention over a cache, SwiGLU.  Pure functions of its parameters.

Parameters are a pytree of plain dicts (:data:`Params`), matrices as ``[in, out]``.  Rotary pairs are the two halves of a head,
as in Hugging Face's files; readers of other layouts permute while they load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .config import LlamaConfig, SlotSpec

#: ``{"embed": [vocab, width], "layers": ({...}, ...), "norm": [width], "unembed": [width, vocab]}``.  ``unembed`` may be
#: missing: then the embedding is used for both ends.  A matrix is an array, or :class:`Int8`.
Params = dict[str, Any]
#: Keys or values of one layer: ``[slots, kv_heads, places, head_dim]``.
Cache = jax.Array

_NEVER = -1e30  # a score that exp() turns into an exact 0, and, unlike -inf, never into a NaN


class Int8(NamedTuple):
    """A matrix as int8 with one float32 scale for each column (for each row in the embedding)."""

    values: jax.Array
    scale: jax.Array


def embed(params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """``[..., width]`` of ids.  An id that is out of range reads as some token; whoever takes ids from outside checks."""
    table = params["embed"]
    if isinstance(table, Int8):
        return (table.values[tokens] * table.scale[tokens][..., None]).astype(dtype)
    plain: jax.Array = table[tokens].astype(dtype)
    return plain


def unembed(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Logits, float32 ``[rows, vocab]``."""
    x = rms_norm(x, params["norm"], epsilon)
    if "unembed" in params:
        return matmul(x, params["unembed"], jnp.float32)
    table = params["embed"]
    if isinstance(table, Int8):
        return matmul(x, Int8(table.values.T, table.scale), jnp.float32)
    return matmul(x, table.T, jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * weight).astype(x.dtype)


def matmul(x: jax.Array, weight: Any, dtype: Any = None) -> jax.Array:
    """``x @ weight`` as precisely as the weight is, summed in float32; on a CPU, :class:`Int8` in whole numbers."""
    dtype = x.dtype if dtype is None else dtype
    product: jax.Array
    if isinstance(weight, Int8):
        product = jax.lax.platform_dependent(x, weight.values, cpu=_whole_product, default=_widened_product)
        product = product * weight.scale
    elif weight.dtype == x.dtype:
        product = _product(x, weight)
    else:
        product = jax.lax.platform_dependent(x, weight, cpu=_narrow_product, default=_narrowed_product)
    return product.astype(dtype)


def _product(x: jax.Array, weight: jax.Array, total: Any = jnp.float32) -> jax.Array:
    product: jax.Array = jnp.matmul(x, weight, preferred_element_type=total)
    return product


def _widened_product(x: jax.Array, values: jax.Array) -> jax.Array:
    return _product(x, values.astype(x.dtype))


def _narrowed_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(x.astype(weight.dtype), weight)


def _narrow_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    # XLA:CPU multiplies narrow numbers quickly from two rows on; for one row it widens the matrix, each time.
    if len(x) > 1:
        return _narrowed_product(x, weight)
    return _narrowed_product(jnp.pad(x, ((0, 1), (0, 0))), weight)[:1]


def _whole_product(x: jax.Array, values: jax.Array) -> jax.Array:
    # Each row as two of int8, the second for what the first has rounded off: with one, 7 of 78 tokens of SmolLM2's texts
    # became others.  Sums of whole numbers are exact, in whatever order and beside whichever rows.
    unit = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127
    scaled = x / jnp.where(unit > 0, unit, 1)
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * 254)
    sums = _product(jnp.concatenate([high, low]).astype(jnp.int8), values, jnp.int32).astype(jnp.float32)
    return (sums[: len(x)] + sums[len(x) :] / 254) * unit


class Rotation(NamedTuple):
    """Cosines and sines of some positions, ``[positions, 1, head_dim // 2]``."""

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at(cls, config: LlamaConfig, positions: jax.Array) -> Rotation:
        angles = positions[:, None, None].astype(jnp.float32) * config.rope_frequencies()
        return cls(jnp.cos(angles), jnp.sin(angles))

    def turn(self, heads: jax.Array) -> jax.Array:
        """``[positions, heads, head_dim]``, rotated."""
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return jnp.concatenate(turned, axis=-1).astype(heads.dtype)


class View(NamedTuple):
    """Which part of a cache some queries see.

    Attributes:
      block: from a cache and a block's number to that block, ``[rows, kv_heads, block, head_dim]``.
      last: int32 ``[rows, queries]``: the last position that each query sees.
    """

    block: Callable[[Cache, Any], jax.Array]
    last: jax.Array


def attend(spec: SlotSpec, queries: jax.Array, keys: Cache, values: Cache, view: View) -> jax.Array:
    """Attention, block by block with a running maximum.

    A block that a query does not see adds exactly nothing to its result.  So a row's bits do not depend on how many blocks are
    visited for its neighbours' sake, nor on what an earlier owner of its slot has left there, NaNs included.

    Args:
      queries: ``[rows, kv_heads, queries, head_dim]``, scaled.

    Returns:
      the same shape.
    """
    rows, kv_heads, count, head_dim = queries.shape
    last = view.last[:, None, :, None]
    farthest = jnp.max(view.last, axis=-1)[:, None, None, None]
    offsets = jnp.arange(spec.block, dtype=jnp.int32)

    def visit(number: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, mass, total = carry
        positions = number * spec.block + offsets
        scores = jnp.einsum("rkqd,rktd->rkqt", queries, view.block(keys, number), preferred_element_type=jnp.float32)
        scores = jnp.where(positions <= last, scores, _NEVER)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        fade = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top)
        visible = jnp.where(positions[:, None] <= farthest, view.block(values, number), 0)
        mixed = jnp.einsum("rkqt,rktd->rkqd", weights.astype(spec.dtype), visible, preferred_element_type=jnp.float32)
        return new_top, mass * fade + jnp.sum(weights, axis=-1, keepdims=True), total * fade + mixed

    shape = (rows, kv_heads, count)
    carry = (
        jnp.full((*shape, 1), _NEVER, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    blocks: Any = spec.places // spec.block
    if spec.host_predicates:
        blocks = jnp.minimum(blocks, jnp.max(view.last) // spec.block + 1)
    _, mass, total = jax.lax.fori_loop(0, blocks, visit, carry)
    looked: jax.Array = (total / mass).astype(queries.dtype)
    return looked


def layer(
    spec: SlotSpec,
    weights: Params,
    x: jax.Array,
    rotation: Rotation,
    store: Callable[[jax.Array, jax.Array], tuple[Cache, Cache]],
    look: Callable[[jax.Array, Cache, Cache], jax.Array],
) -> tuple[jax.Array, Cache, Cache]:
    """One layer over ``x``, ``[positions, width]``.

    Args:
      store: puts the positions' keys and values, ``[positions, kv_heads, head_dim]``, into the cache.
      look: attention of queries ``[positions, heads, head_dim]``, scaled, over the cache.
    """
    config = spec.config
    positions = x.shape[0]
    normed = rms_norm(x, weights["attn_norm"], config.norm_epsilon)
    q = matmul(normed, weights["q"]).reshape(positions, config.heads, config.head_dim)
    k = matmul(normed, weights["k"]).reshape(positions, config.kv_heads, config.head_dim)
    v = matmul(normed, weights["v"]).reshape(positions, config.kv_heads, config.head_dim)
    keys, values = store(rotation.turn(k), v)
    looked = look(rotation.turn(q) * config.head_dim**-0.5, keys, values)
    x = x + matmul(looked.reshape(positions, config.heads * config.head_dim), weights["o"])
    normed = rms_norm(x, weights["mlp_norm"], config.norm_epsilon)
    x = x + matmul(jax.nn.silu(matmul(normed, weights["gate"])) * matmul(normed, weights["up"]), weights["down"])
    return x, keys, values
