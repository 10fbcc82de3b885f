"""Hugging Face's format: a directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ....errors import InvalidArgument
from .config import LlamaConfig, llama3_divisors
from .extra import require
from .tokenizer import Tokenizer, tokenizer_from_directory
from .weights import Checkpoint, is_positive

_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "unembed": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
#: Settings with which the network is the one that is known here.
_USUAL = {
    "hidden_act": "silu",
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
}
_INDEX = "model.safetensors.index.json"
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


class SafetensorsCheckpoint(Checkpoint):
    """The files of one model, mapped into memory.

    Args:
      path: the directory, or one file in it: then only that file.

    Raises:
      InvalidArgument: a file is missing or broken, or the model is none of Llama's type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = path if path.is_dir() else path.parent
        self._settings = self._json("config.json")
        self.config = self._config()
        # Transformers ends texts by the second, where a chat's end of turn often is alone.
        generation = self._json("generation_config.json") if self._has("generation_config.json") else {}
        ends = (*self._ends("config.json", self._settings), *self._ends("generation_config.json", generation))
        self.end_tokens = tuple(dict.fromkeys(ends))
        library = require("safetensors")
        self._files: dict[str, Any] = {}
        for file in self._parts() if path.is_dir() else [path]:
            try:
                opened = library.safe_open(file, framework="numpy")
            except (library.SafetensorError, OSError) as exc:
                raise InvalidArgument(f"{file}: not a readable safetensors file, or cut short: {exc}") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.tied = bool(self._settings.get("tie_word_embeddings", False))
        # The rotary frequencies, which follow from config.json, are in some old files, too.
        self.check_names(name for name in self._files if not name.endswith("rotary_emb.inv_freq"))

    def _parts(self) -> list[Path]:
        """The files that the model's index names: others may have the same weights by other names."""
        if not self._has(_INDEX):
            return sorted(self.path.glob("*.safetensors"))
        try:
            names = sorted(set(self._json(_INDEX)["weight_map"].values()))
            return [self.path / name for name in names]
        except (KeyError, AttributeError, TypeError):
            self._refuse(f"{_INDEX} has no weight_map from tensors to files")

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        stored = self.name_of(name, layer)
        if stored not in self._files:
            self._refuse(f"tensor '{stored}' is missing")
        array: np.ndarray = self._files[stored].get_tensor(stored)
        if array.dtype.kind not in "fV":
            self._refuse(f"tensor '{stored}' has dtype {array.dtype}; only floating-point weights are known here")
        return array

    def name_of(self, name: str, layer: int | None = None) -> str:
        return f"{'' if layer is None else f'model.layers.{layer}.'}{_NAMES[name]}.weight"

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_directory(self._directory)

    def _config(self) -> LlamaConfig:
        architectures = self._settings.get("architectures") or ["none"]
        if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
            self._refuse(f"config.json: 'architectures' must be a list of names, got {architectures!r:.40}")
        if architectures[0] not in _ARCHITECTURES:
            self._refuse(f"its architecture is {architectures[0]}, only {' and '.join(_ARCHITECTURES)} are known here")
        for key, usual in _USUAL.items():
            for settings in (self._settings, self._rope()):
                if settings.get(key, usual) not in (usual, None):
                    self._refuse(f"its {key} is {settings[key]!r}, which is not known here")
        if self._settings.get("quantization_config"):
            self._refuse("it has a quantization_config; load the original weights, or a GGUF file")
        heads = self._count("num_attention_heads")
        width = self._count("hidden_size")
        config = self.checked_config(
            vocab_size=self._count("vocab_size"),
            width=width,
            layers=self._count("num_hidden_layers"),
            heads=heads,
            kv_heads=self._count("num_key_value_heads", heads),
            head_dim=self._count("head_dim", width // heads),
            hidden=self._count("intermediate_size"),
            context=self._count("max_position_embeddings"),
            rope_theta=self._number(self._settings | self._rope(), "rope_theta", 10_000.0),
            norm_epsilon=self._number(self._settings, "rms_norm_eps", 1e-6),
        )
        return replace(config, rope_divisors=self._divisors(config))

    def _divisors(self, config: LlamaConfig) -> tuple[float, ...]:
        rope = self._rope()
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return ()
        if kind not in ("linear", "llama3"):
            self._refuse(f"its rope scaling '{kind}' is not known here")
        factor = self._number(rope, "factor", None)
        if kind == "linear":
            return (factor,) * (config.head_dim // 2)
        low, high = (self._number(rope, f"{which}_freq_factor", None) for which in ("low", "high"))
        if low >= high:
            self._refuse(f"config.json: 'low_freq_factor' must be below 'high_freq_factor', {high:g}, got {low:g}")
        return llama3_divisors(
            config,
            factor=factor,
            low=low,
            high=high,
            trained_context=int(self._number(rope, "original_max_position_embeddings", None)),
        )

    def _rope(self) -> dict[str, Any]:
        # Transformers 5 writes rope_parameters, older ones rope_scaling beside rope_theta.
        rope = self._settings.get("rope_parameters") or self._settings.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            self._refuse(f"config.json: its rope scaling must be an object, got {rope!r}")
        return rope

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._settings.get(key)
        if value is None:
            value = default
        if value is None:
            self._refuse(f"config.json has no '{key}'")
        if type(value) is not int or value < 1:
            self._refuse(f"config.json: '{key}' must be a whole number, 1 or more, got {value!r}")
        return value

    def _number(self, settings: dict[str, Any], key: str, default: float | None) -> float:
        value = settings.get(key)
        if value is None:
            value = default
        if value is None:
            self._refuse(f"config.json: its rope scaling has no '{key}'")
        if not is_positive(value):
            self._refuse(f"config.json: '{key}' must be a finite number above 0, got {value!r:.40}")
        return float(value)

    def _ends(self, name: str, settings: dict[str, Any]) -> Sequence[int]:
        found = settings.get("eos_token_id")
        ends = found if isinstance(found, list) else [] if found is None else [found]
        for end in ends:
            if type(end) is not int:
                self._refuse(f"{name}: 'eos_token_id' must be a token id or a list of them, got {found!r}")
            if not 0 <= end < self.config.vocab_size:
                self._refuse(
                    f"{name}: 'eos_token_id': end token {end} is not among the model's {self.config.vocab_size} tokens"
                )
        return ends

    def _has(self, name: str) -> bool:
        return (self._directory / name).is_file()

    def _json(self, name: str) -> dict[str, Any]:
        try:
            parsed = json.loads((self._directory / name).read_text(encoding="utf-8"))
        except OSError as exc:
            self._refuse(f"{name} cannot be read: {exc.strerror}")
        except (ValueError, RecursionError) as exc:
            self._refuse(f"{name} is not JSON: {exc}")
        if not isinstance(parsed, dict):
            self._refuse(f"{name} is not a JSON object")
        return parsed

    def _refuse(self, text: str) -> NoReturn:
        raise InvalidArgument(f"{self.path}: {text}")
