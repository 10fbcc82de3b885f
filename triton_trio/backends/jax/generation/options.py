"""What ``parameters`` in config.pbtxt say to a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import jax.numpy as jnp

from ....errors import InvalidArgument
from ..options import parse_count, parse_counts, parse_flag, parse_mebibytes, parse_milliseconds
from .weights import find_weights

if TYPE_CHECKING:
    from ....config import ModelConfig

T = TypeVar("T")

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": None}


@dataclass(frozen=True, slots=True)
class TextOptions:
    """One model's settings.

    The parameters of config.pbtxt, beside ``model_format: "llama"``; all optional:

    ``weights``
        a file or directory, relative to the version's directory, which is the default; or ``package:NAME``: the file inside
        an installed Python package.
    ``slots``
        texts that are made side by side, 4 by default.  Each takes memory for its context as long as the model is loaded.
    ``context``
        tokens of one prompt and its text together, by default 1024, or what the model was trained for if that is less.
    ``prefill_chunk``
        lengths of the pieces of prompts, ``16,32,64`` by default.  A cancel waits for at most two; a text that is being made
        stands still for one.
    ``ladder``
        tokens that are made for each text in one program, ``1,2,4,8`` by default.
    ``target_chunk_ms``
        device time of such a program, 20 by default: more than one token only where they fit.
    ``late_enqueue``
        by default the next program is decided on just before the running one ends: a cancel, and a prompt that comes, wait
        for one program.  ``false``: one is always queued, and they wait for two; the device then never runs dry, not even
        for a moment where times vary.
    ``tensor_parallel``
        devices that share the model, each with its part of every matrix and of the cache, 1 by default: the GPU that ``gpus``
        lists and those behind it, or with KIND_CPU the first ones for the first instance, those behind for the next.  Where
        there are several processes, all of their devices are one model's: see :mod:`.hosts`.
    ``device_memory_limit_mb``
        MiB on each device that parameters, the KV cache of all slots and one program may take; what needs more is refused at
        load, with the figures.  No limit by default.
    ``warmup``
        ``false``: do not run the programs when the model is loaded.  By default each is run once, and how long a cancel waits
        is logged: one token at least.  Never where there are several processes.
    ``dtype``
        of matrices: ``float32`` (default on a CPU), ``bfloat16`` (elsewhere), or ``int8``.  All else is float32 on a CPU, and
        elsewhere bfloat16 unless it is float32 that is asked for.
    """

    weights: str | None
    slots: int
    context: int
    prefill: tuple[int, ...]
    ladder: tuple[int, ...]
    target: float  #: seconds
    late_enqueue: bool
    devices: int
    memory_limit: float | None  #: bytes
    warmup: bool
    dtype: str | None

    @classmethod
    def read(cls, config: ModelConfig) -> TextOptions:
        """Raises :exc:`InvalidArgument` for a parameter that makes no sense."""

        def parameter(name: str, parse: Callable[[str], T], what: str, default: T) -> T:
            text = config.parameters.get(name)
            if text is None:
                return default
            try:
                return parse(text)
            except ValueError:
                raise InvalidArgument(
                    f"model '{config.name}': parameter {name} in config.pbtxt must be {what}, got '{text}'"
                ) from None

        devices = parameter("tensor_parallel", parse_count, "a number of devices, 1 or more", 1)
        check_gpus(config, devices)
        return cls(
            weights=config.parameters.get("weights"),
            slots=parameter("slots", parse_count, "a number of slots, 1 or more", 4),
            context=parameter("context", parse_count, "a number of tokens, 1 or more", 1024),
            prefill=parameter("prefill_chunk", parse_counts, "numbers of tokens such as '16,64'", (16, 32, 64)),
            ladder=parameter("ladder", _counts_from_1, "numbers of tokens such as '1,2,4,8', with 1", (1, 2, 4, 8)),
            target=parameter("target_chunk_ms", parse_milliseconds, "a positive number of milliseconds", 20e-3),
            late_enqueue=parameter("late_enqueue", parse_flag, "'true' or 'false'", True),
            devices=devices,
            memory_limit=parameter("device_memory_limit_mb", parse_mebibytes, "a positive number of MiB", None),
            warmup=parameter("warmup", parse_flag, "'true' or 'false'", True),
            dtype=parameter("dtype", _dtype, f"one of {', '.join(_DTYPES)}", None),
        )

    @property
    def int8(self) -> bool:
        return self.dtype == "int8"

    def find_weights(self, version_directory: Path) -> Path:
        """Raises :exc:`NotFound` if the package is not installed."""
        if self.weights is None:
            return version_directory
        kind, _, name = self.weights.partition(":")
        return find_weights(name) if kind == "package" else version_directory / self.weights

    def activations(self) -> object:
        """The dtype of everything but matrices; None: what suits the device."""
        return jnp.float32 if self.dtype == "float32" else None

    def matrices(self) -> object:
        """Their dtype, if they are not int8; None: that of activations."""
        return None if self.dtype is None else _DTYPES[self.dtype]


def check_gpus(config: ModelConfig, devices: int) -> None:
    """Raises :exc:`InvalidArgument` if GPUs that are listed are among those behind another."""
    for group in config.instance_groups:
        for first, other in pairwise(sorted(group.gpus)):
            if other - first < devices > 1:
                raise InvalidArgument(
                    f"model '{config.name}': gpus {list(group.gpus)} in instance_group does not suit tensor_parallel={devices}: "
                    f"each instance has {devices} of them, counted from the one listed; list {first} and leave out {other}"
                )


def _counts_from_1(text: str) -> tuple[int, ...]:
    counts = parse_counts(text)
    if counts[0] != 1:
        raise ValueError
    return counts


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError
    return text
