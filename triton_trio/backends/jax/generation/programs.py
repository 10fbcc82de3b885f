"""Compiled programs of one model on its devices.  Everything is compiled ahead of time: none of these can compile again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import aval
from .config import LlamaConfig, SlotSpec
from .llama import Params
from .placement import Placement
from .slots import Emitted, SlotState, decode, empty_state, prefill

Compiled = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class ProgramMemory:
    """Bytes that one program needs on one device."""

    arguments: int  #: parameters and state
    aliased: int  #: of them, what is updated in place: the state
    outputs: int  #: beside the state
    temporary: int  #: beyond these, while it runs
    code: int

    @classmethod
    def of(cls, compiled: Any) -> ProgramMemory:
        found = compiled.memory_analysis()
        return cls(
            arguments=found.argument_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            outputs=max(found.output_size_in_bytes - found.alias_size_in_bytes, 0),
            temporary=found.temp_size_in_bytes,
            code=found.generated_code_size_in_bytes,
        )


def slot_spec(
    config: LlamaConfig,
    placement: Placement,
    *,
    slots: int,
    context: int,
    end_tokens: tuple[int, ...] = (),
    dtype: Any = None,
) -> SlotSpec:
    """What suits these devices.

    Raises:
      InvalidArgument: the model cannot be cut over so many, or the numbers make no sense.
    """
    placement.check(config)
    on_cpu = placement.platform == "cpu"
    if dtype is None:
        dtype = jnp.float32 if on_cpu else jnp.bfloat16
    return SlotSpec(config, slots, context, end_tokens, dtype=dtype, block=min(128, context), host_predicates=on_cpu)


class LlamaPrograms:
    """Makes programs.  Each takes seconds to compile: call from a worker thread, when the model is loaded.

    Args:
      params: on the devices of ``placement``.
    """

    def __init__(self, spec: SlotSpec, placement: Placement, params: Params) -> None:
        self.spec = spec
        self._placement = placement
        self._params = jax.tree.map(lambda leaf: self._aval(leaf, leaf.sharding), params)
        state = jax.eval_shape(partial(empty_state, spec))
        self._state_shardings = placement.state(state)
        self.state_avals = jax.tree.map(self._aval, state, self._state_shardings)  #: with shardings
        whole: Any = placement.whole()
        self._emitted = Emitted(whole, whole, whole, whole)
        self._empty = jax.jit(partial(empty_state, spec), out_shardings=self._state_shardings).lower().compile()

    def state(self) -> SlotState:
        """A new state, on the devices: at the start, and when an error has taken the old one."""
        state: SlotState = self._empty()
        return state

    def prefill(self, length: int) -> Compiled:
        """``(params, state, *PromptChunk.pack(spec, length))`` → ``(state, Emitted)``; the old state is gone."""
        return self._compile(
            partial(prefill, self.spec),
            self._whole(length, np.int32),
            self._whole(8, np.int32),
            self._whole(2, np.float32),
        )

    def decode(self, steps: int) -> Compiled:
        """``(params, state, evict, hold)`` → ``(state, Emitted)``; the old state is gone.

        ``evict`` is int32 ``[slots]``, ``hold`` bool ``[slots]``, both NumPy; another dtype is a TypeError.
        """
        slots = self.spec.slots
        return self._compile(
            partial(decode, self.spec, steps=steps), self._whole(slots, np.int32), self._whole(slots, np.bool_)
        )

    def _compile(self, function: Callable[..., Any], *inputs: Any) -> Compiled:
        # Pinned output shardings: with others than the input's, the state could not be donated to the next program.
        jitted = jax.jit(function, donate_argnums=1, out_shardings=(self._state_shardings, self._emitted))
        compiled: Compiled = jitted.lower(self._params, self.state_avals, *inputs).compile()
        return compiled

    def _whole(self, size: int, dtype: Any) -> Any:
        return aval((size,), dtype, sharding=self._placement.whole())

    @staticmethod
    def _aval(leaf: Any, sharding: Any) -> Any:
        return aval(leaf.shape, leaf.dtype, sharding=sharding)
