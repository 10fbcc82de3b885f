"""Hugging Face's format: a directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ....errors import InvalidArgument
from .config import LlamaConfig, llama3_divisors
from .extra import require
from .tokenizer import Tokenizer, tokenizer_from_directory
from .weights import Checkpoint

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
        ends = self._settings.get("eos_token_id")
        self.end_tokens = tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)
        library = require("safetensors")
        self._files: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            try:
                opened = library.safe_open(file, framework="numpy")
            except (library.SafetensorError, OSError) as exc:
                raise InvalidArgument(f"{file}: not a readable safetensors file, or cut short: {exc}") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.tied = bool(self._settings.get("tie_word_embeddings", False))
        # The rotary frequencies, which follow from config.json, are in some old files, too.
        self.check_names(name for name in self._files if not name.endswith("rotary_emb.inv_freq"))

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
        if architectures[0] not in _ARCHITECTURES:
            self._refuse(f"its architecture is {architectures[0]}, only {' and '.join(_ARCHITECTURES)} are known here")
        for key, usual in _USUAL.items():
            if self._settings.get(key, usual) not in (usual, None):
                self._refuse(f"its {key} is {self._settings[key]!r}, which is not known here")
        if self._settings.get("quantization_config"):
            self._refuse("it has a quantization_config; load the original weights, or a GGUF file")
        heads = self._number("num_attention_heads")
        width = self._number("hidden_size")
        config = LlamaConfig(
            vocab_size=self._number("vocab_size"),
            width=width,
            layers=self._number("num_hidden_layers"),
            heads=heads,
            kv_heads=int(self._settings.get("num_key_value_heads") or heads),
            head_dim=int(self._settings.get("head_dim") or width // heads),
            hidden=self._number("intermediate_size"),
            context=self._number("max_position_embeddings"),
            rope_theta=float(self._rope().get("rope_theta") or self._settings.get("rope_theta") or 10_000.0),
            norm_epsilon=float(self._settings.get("rms_norm_eps") or 1e-6),
        )
        return replace(config, rope_divisors=self._divisors(config))

    def _divisors(self, config: LlamaConfig) -> tuple[float, ...]:
        rope = self._rope()
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return ()
        if kind not in ("linear", "llama3"):
            self._refuse(f"its rope scaling '{kind}' is not known here")
        try:
            if kind == "linear":
                return (float(rope["factor"]),) * (config.head_dim // 2)
            return llama3_divisors(
                config,
                factor=float(rope["factor"]),
                low=float(rope["low_freq_factor"]),
                high=float(rope["high_freq_factor"]),
                trained_context=int(rope["original_max_position_embeddings"]),
            )
        except KeyError as exc:
            self._refuse(f"its rope scaling '{kind}' has no {exc}")

    def _rope(self) -> dict[str, Any]:
        # Transformers 5 writes rope_parameters, older ones rope_scaling beside rope_theta.
        return self._settings.get("rope_parameters") or self._settings.get("rope_scaling") or {}

    def _number(self, key: str) -> int:
        if key not in self._settings:
            self._refuse(f"config.json has no '{key}'")
        return int(self._settings[key])

    def _json(self, name: str) -> dict[str, Any]:
        try:
            parsed = json.loads((self._directory / name).read_text())
        except OSError as exc:
            self._refuse(f"{name} cannot be read: {exc.strerror}")
        except ValueError as exc:
            self._refuse(f"{name} is not JSON: {exc}")
        if not isinstance(parsed, dict):
            self._refuse(f"{name} is not a JSON object")
        return parsed

    def _refuse(self, text: str) -> NoReturn:
        raise InvalidArgument(f"{self.path}: {text}")
