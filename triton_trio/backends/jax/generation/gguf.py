"""llama.cpp's file format: one file with configuration, weights and vocabulary."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ....errors import InvalidArgument
from ..device import LOGGER
from .config import LlamaConfig
from .extra import require
from .tokenizer import NoTokenizer, Tokenizer
from .vocabularies import LLAMA_3_SPLITS, Vocabulary, byte_level_tokenizer, sentencepiece_tokenizer
from .weights import Checkpoint, halves_from_pairs, is_positive

_NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "unembed": "output",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
#: Settings that make another network of it.
_UNKNOWN = (
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "rope.scale_linear",
    "use_parallel_residual",
)
_UNKNOWN_TOKEN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_KINDS = {str: "texts", int: "whole numbers", float: "numbers"}
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn in a conversation, of a message in a turn


class GgufCheckpoint(Checkpoint):
    """A ``.gguf`` file, mapped into memory.  Quantised tensors become float32 as they are read.

    Raises:
      InvalidArgument: not such a file, cut short, or of an architecture other than ``llama``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = require("gguf")
        try:
            self._reader: Any = self._library.GGUFReader(path)
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as exc:
            # What NumPy says when the mapped bytes are not what the header promises.
            raise InvalidArgument(f"{path}: not a readable GGUF file, or cut short: {exc}") from None
        architecture = self._field("general.architecture")
        if architecture != "llama":
            self._refuse(f"its architecture is '{architecture}', only 'llama' is known here")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.tied = "output.weight" not in self._tensors
        self.config = self._config()
        self.check_names(self._tensors, "rope_freqs.weight")
        ends = (self._token_id(name, self.config.vocab_size) for name in _ENDS)
        self.end_tokens = tuple(dict.fromkeys(end for end in ends if end is not None))

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        stored = self.name_of(name, layer)
        tensor = self._tensors.get(stored)
        if tensor is None:
            self._refuse(f"tensor '{stored}' is missing")
        try:
            array: np.ndarray = self._library.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            self._refuse(f"tensor '{stored}': its encoding {tensor.tensor_type.name} cannot be read here")
        if name in ("q", "k"):
            heads = self.config.heads if name == "q" else self.config.kv_heads
            if array.shape[0] == heads * self.config.head_dim:  # else the caller says what is wrong with it
                array = halves_from_pairs(array, heads)
        return array

    def name_of(self, name: str, layer: int | None = None) -> str:
        return f"{'' if layer is None else f'blk.{layer}.'}{_NAMES[name]}.weight"

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        made = self._make_tokenizer()
        # Nobody asks for a field any more, and the library has an array for each token in there.
        self._reader.fields.clear()
        return made

    def _make_tokenizer(self) -> Tokenizer:
        model = self._optional("tokenizer.ggml.model")
        if model in (None, "no_vocab"):
            return NoTokenizer(f"'{self.path}' has no vocabulary")
        if model not in ("gpt2", "llama"):
            self._refuse(
                f"its tokenizer is of the kind '{model}', only byte-level BPE ('gpt2') and SentencePiece's BPE ('llama') are "
                "read from GGUF; load the model from its original directory, with tokenizer.json"
            )
        splits = self._optional("tokenizer.ggml.pre")
        tokens: list[str] = self._list("tokenizer.ggml.tokens", str)
        kinds: list[int] = [1] * len(tokens)
        if self._optional("tokenizer.ggml.token_type") is not None:
            kinds = self._list("tokenizer.ggml.token_type", int)
        if len(kinds) != len(tokens):
            self._refuse(f"its tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
        special = {name: self._token_id(name, len(tokens)) for name in ("bos", "eos")}
        begins = self._optional("tokenizer.ggml.add_bos_token")
        if begins is None:
            begins = model == "llama" or splits in LLAMA_3_SPLITS
        vocabulary = Vocabulary(
            tokens=tokens,
            control=[token for token, kind in enumerate(kinds) if kind == _CONTROL],
            user_defined=[token for token, kind in enumerate(kinds) if kind == _USER_DEFINED],
            begin=special["bos"] if begins else None,
            names={f"{name}_token": tokens[token] for name, token in special.items() if token is not None},
            template=self._optional("tokenizer.chat_template"),
            where=str(self.path),
        )
        if model == "llama":
            unknown = next((token for token, kind in enumerate(kinds) if kind == _UNKNOWN_TOKEN), None)
            prefix = self._optional("tokenizer.ggml.add_space_prefix")
            return sentencepiece_tokenizer(
                vocabulary,
                self._list("tokenizer.ggml.scores", float),
                unknown=unknown,
                prefix=prefix is None or bool(prefix),
            )
        if splits in (None, "default"):
            splits = "gpt-2"
            LOGGER.warning(
                "%s: it does not say by which rule its tokenizer cuts text (tokenizer.ggml.pre); GPT-2's is taken, and if that "
                "is not it, texts suffer: convert the model anew, or load it from its original directory",
                self.path,
            )
        merges = [tuple(merge.split(" ", 1)) for merge in self._list("tokenizer.ggml.merges", str)]
        return byte_level_tokenizer(vocabulary, merges, str(splits))

    def _config(self) -> LlamaConfig:
        for key in _UNKNOWN:
            if self._optional(f"llama.{key}"):
                self._refuse(f"it has llama.{key}, which is not known here")
        # Files from before there were types have a factor alone.
        scaling = self._optional("llama.rope.scaling.type")
        if scaling is None:
            scaling = "linear" if self._optional("llama.rope.scaling.factor") else "none"
        if scaling not in ("none", "linear"):
            self._refuse(f"its rope scaling '{scaling}' is not known here")
        if self._optional("llama.vocab_size") is None:
            vocab_size = len(self._list("tokenizer.ggml.tokens", str))
        else:
            vocab_size = self._count("llama.vocab_size")
        heads = self._count("llama.attention.head_count")
        width = self._count("llama.embedding_length")
        head_dim = self._count("llama.attention.key_length", width // heads)
        if (rotated := self._count("llama.rope.dimension_count", head_dim)) != head_dim:
            self._refuse(f"it rotates {rotated} of {head_dim} dimensions of a head; only all are known here")
        if (length := self._count("llama.attention.value_length", head_dim)) != head_dim:
            self._refuse(
                f"its values have {length} dimensions in a head and its keys {head_dim}; only equal ones are known here"
            )
        divisors: tuple[float, ...] = ()
        if scaling == "linear":
            divisors = (self._number("llama.rope.scaling.factor"),) * (head_dim // 2)
        if "rope_freqs.weight" in self._tensors:  # how Llama 3.1's scaling is stored
            divisors = tuple(float(one) for one in np.ravel(self._tensors["rope_freqs.weight"].data))
            if not all(map(is_positive, divisors)):
                self._refuse("its tensor 'rope_freqs.weight' must have finite numbers above 0")
        return self.checked_config(
            vocab_size=vocab_size,
            width=width,
            layers=self._count("llama.block_count"),
            heads=heads,
            kv_heads=self._count("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            hidden=self._count("llama.feed_forward_length"),
            context=self._count("llama.context_length"),
            rope_theta=self._number("llama.rope.freq_base", 10_000.0),
            rope_divisors=divisors,
            norm_epsilon=self._number("llama.attention.layer_norm_rms_epsilon"),
        )

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if isinstance(value, list):
            self._refuse(f"it has a {key} for each layer; only one for all is known here")
        if not isinstance(value, int) or value < 1:
            self._refuse(f"its {key} must be a whole number, 1 or more, got {value!r}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._field(key, default)
        if not is_positive(value):
            self._refuse(f"its {key} must be a finite number above 0, got {value!r:.40}")
        return float(value)

    def _list(self, key: str, kind: type) -> list[Any]:
        value = self._field(key)
        # One look is enough: what is in an array of this format is of one type.
        if not isinstance(value, list) or not all(type(one) is kind for one in value[:1]):
            self._refuse(f"its {key} must be a list of {_KINDS[kind]}, got {value!r:.40}")
        return value

    def _token_id(self, name: str, tokens: int) -> int | None:
        """Of a special token; None if the file has no such one."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._optional(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < tokens:
            self._refuse(f"its {key} must be one of its {tokens} tokens, got {value!r:.40}")
        return value

    def _field(self, key: str, default: Any = None) -> Any:
        value = self._optional(key)
        if value is None:
            value = default
        if value is None:
            self._refuse(f"its metadata has no '{key}'")
        return value

    def _optional(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as exc:
            self._refuse(f"its {key} is not UTF-8: {exc}")

    def _refuse(self, text: str) -> NoReturn:
        raise InvalidArgument(f"{self.path}: {text}")
