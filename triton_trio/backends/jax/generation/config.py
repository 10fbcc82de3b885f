"""What a Llama-type model looks like, and how much of it is on the device: two frozen values that programs are built from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ....errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The numbers of one model.

    Raises:
      InvalidArgument: they contradict each other.
    """

    vocab_size: int
    width: int  #: of the residual stream
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  #: of the feed-forward
    context: int  #: positions the model was trained for
    rope_theta: float = 10_000.0
    rope_divisors: tuple[float, ...] = ()  #: of each rotary frequency (``head_dim // 2`` of them); empty: all 1
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "context"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} of a language model must be 1 or more, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise InvalidArgument(
                f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads: not a multiple"
            )
        if self.head_dim % 2:
            raise InvalidArgument(f"rotary positions need an even head_dim, got {self.head_dim}")
        if self.rope_divisors and len(self.rope_divisors) != self.head_dim // 2:
            raise InvalidArgument(
                f"rope_divisors must have one number for each of {self.head_dim // 2} frequencies, "
                f"got {len(self.rope_divisors)}"
            )

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def rope_frequencies(self) -> np.ndarray:
        """float32 ``[head_dim // 2]``, radians per position."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        divisors = np.asarray(self.rope_divisors or 1.0, np.float64)
        return np.asarray(self.rope_theta**-exponents / divisors, np.float32)


def llama3_divisors(
    config: LlamaConfig, *, factor: float, low: float, high: float, trained_context: int
) -> tuple[float, ...]:
    """Llama 3.1's way to stretch a context: long wavelengths by ``factor``, short ones not, a ramp between."""
    turns = trained_context * config.rope_frequencies().astype(np.float64) / (2 * math.pi)
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(one) for one in 1.0 / ((1 - ramp) / factor + ramp))


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """How many generations run side by side, and how long each may be: everything static about the programs.

    Args:
      slots: rows of the state.
      context: positions of one slot, prompt and text together.  At most ``config.context``.
      end_tokens: ids that end a text; the model's own.
      dtype: of activations and of the KV cache; matrices have their own.  float32 on a CPU, where a cache in bfloat16 would be
        widened as a whole with each token; bfloat16 needs half the memory, and is fastest elsewhere.
      block: keys that attention looks at in one go.
      host_predicates: a condition inside a program costs nothing to look at.  True on a CPU.  On CUDA the host reads each
        one back, so there the programs compute both sides and whole contexts.
    """

    config: LlamaConfig
    slots: int
    context: int
    end_tokens: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    block: int = 128
    host_predicates: bool = True

    def __post_init__(self) -> None:
        config = self.config
        if self.slots < 1:
            raise InvalidArgument(f"generation needs 1 or more slots, got {self.slots}")
        if not 1 <= self.context <= config.context:
            raise InvalidArgument(
                f"a slot's context must be between 1 and the {config.context} positions the model was trained for, "
                f"got {self.context}"
            )
        if self.block < 1:
            raise InvalidArgument(f"attention looks at blocks of 1 or more keys, got {self.block}")
        for token in self.end_tokens:
            if not 0 <= token < config.vocab_size:
                raise InvalidArgument(f"end token {token} is not among the model's {config.vocab_size} tokens")
        # jnp.float32 and np.dtype("float32") would make two specs, and two programs, of one.
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def places(self) -> int:
        """Positions that a slot has in the cache: ``context`` in whole blocks.  Also the first place outside of it."""
        return -(-self.context // self.block) * self.block

    @property
    def slot_bytes(self) -> int:
        """Bytes of KV cache that one slot takes for as long as the model is loaded."""
        config = self.config
        return 2 * config.layers * config.kv_heads * self.places * config.head_dim * int(self.dtype.itemsize)

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV cache of all slots."""
        return self.slots * self.slot_bytes
