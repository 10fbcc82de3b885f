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
from .weights import Checkpoint, halves_from_pairs

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
        ends = (self._optional(f"tokenizer.ggml.{name}_token_id") for name in _ENDS)
        self.end_tokens = tuple(dict.fromkeys(int(end) for end in ends if end is not None))

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
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        kinds: list[int] = self._optional("tokenizer.ggml.token_type") or [1] * len(tokens)
        begin = self._optional("tokenizer.ggml.bos_token_id")
        begins = self._optional("tokenizer.ggml.add_bos_token")
        if begins is None:
            begins = model == "llama" or splits in LLAMA_3_SPLITS
        vocabulary = Vocabulary(
            tokens=tokens,
            control=[token for token, kind in enumerate(kinds) if kind == _CONTROL],
            user_defined=[token for token, kind in enumerate(kinds) if kind == _USER_DEFINED],
            begin=int(begin) if begin is not None and begins else None,
            names={
                f"{name}_token": tokens[int(self._field(f"tokenizer.ggml.{name}_token_id"))]
                for name in ("bos", "eos")
                if self._optional(f"tokenizer.ggml.{name}_token_id") is not None
            },
            template=self._optional("tokenizer.chat_template"),
            where=str(self.path),
        )
        if model == "llama":
            unknown = next((token for token, kind in enumerate(kinds) if kind == _UNKNOWN_TOKEN), None)
            prefix = self._optional("tokenizer.ggml.add_space_prefix")
            return sentencepiece_tokenizer(
                vocabulary, self._field("tokenizer.ggml.scores"), unknown=unknown, prefix=prefix is None or bool(prefix)
            )
        if splits in (None, "default"):
            splits = "gpt-2"
            LOGGER.warning(
                "%s: it does not say by which rule its tokenizer cuts text (tokenizer.ggml.pre); GPT-2's is taken, and if that "
                "is not it, texts suffer: convert the model anew, or load it from its original directory",
                self.path,
            )
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        return byte_level_tokenizer(vocabulary, merges, str(splits))

    def _config(self) -> LlamaConfig:
        def number(key: str) -> int:
            return self._one_for_all(f"llama.{key}", self._field(f"llama.{key}"))

        for key in _UNKNOWN:
            if self._optional(f"llama.{key}"):
                self._refuse(f"it has llama.{key}, which is not known here")
        # Files from before there were types have a factor alone.
        scaling = self._optional("llama.rope.scaling.type")
        if scaling is None:
            scaling = "linear" if self._optional("llama.rope.scaling.factor") else "none"
        if scaling not in ("none", "linear"):
            self._refuse(f"its rope scaling '{scaling}' is not known here")
        heads = number("attention.head_count")
        width = number("embedding_length")
        head_dim = int(self._optional("llama.attention.key_length") or width // heads)
        if (rotated := int(self._optional("llama.rope.dimension_count") or head_dim)) != head_dim:
            self._refuse(f"it rotates {rotated} of {head_dim} dimensions of a head; only all are known here")
        if (length := int(self._optional("llama.attention.value_length") or head_dim)) != head_dim:
            self._refuse(
                f"its values have {length} dimensions in a head and its keys {head_dim}; only equal ones are known here"
            )
        divisors: tuple[float, ...] = ()
        if scaling == "linear":
            divisors = (float(self._field("llama.rope.scaling.factor")),) * (head_dim // 2)
        if "rope_freqs.weight" in self._tensors:  # how Llama 3.1's scaling is stored
            divisors = tuple(float(one) for one in self._tensors["rope_freqs.weight"].data)
        return self.checked_config(
            vocab_size=int(self._optional("llama.vocab_size") or len(self._field("tokenizer.ggml.tokens"))),
            width=width,
            layers=number("block_count"),
            heads=heads,
            kv_heads=self._one_for_all(
                "llama.attention.head_count_kv", self._optional("llama.attention.head_count_kv") or heads
            ),
            head_dim=head_dim,
            hidden=number("feed_forward_length"),
            context=number("context_length"),
            rope_theta=float(self._optional("llama.rope.freq_base") or 10_000.0),
            rope_divisors=divisors,
            norm_epsilon=float(self._field("llama.attention.layer_norm_rms_epsilon")),
        )

    def _one_for_all(self, key: str, value: Any) -> int:
        if isinstance(value, list):
            self._refuse(f"it has a {key} for each layer; only one for all is known here")
        if not isinstance(value, int) or value < 1:
            self._refuse(f"its {key} must be a whole number, 1 or more, got {value!r}")
        return value

    def _field(self, key: str) -> Any:
        value = self._optional(key)
        if value is None:
            self._refuse(f"its metadata has no '{key}'")
        return value

    def _optional(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _refuse(self, text: str) -> NoReturn:
        raise InvalidArgument(f"{self.path}: {text}")
