"""Vocabularies that are written out, as in GGUF files, made into tokenizers of the library ``tokenizers``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import InvalidArgument
from .chat import ChatTemplate
from .extra import require
from .tokenizer import Tokenizer

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How text is cut before the merges, by GGUF's name for it: whether digits stand alone, and a pattern other than GPT-2's.
_SPLITS: Mapping[str, tuple[bool, str | None]] = {
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, _LLAMA_3),
    "llama3": (False, _LLAMA_3),
    "llama-v3": (False, _LLAMA_3),
}
#: Llama 3's, which begin every text with a special token unless the file says otherwise.
LLAMA_3_SPLITS = ("llama-bpe", "llama3", "llama-v3")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in SentencePiece's tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What all kinds have.

    Args:
      tokens: by id.
      control, user_defined: ids that are never made by merges; control ids have no text.
      begin: the id that stands before every text, if one does.
      names: special tokens by the names that templates use.
      template: of conversations, see :class:`~.chat.ChatTemplate`.
      where: the file, for messages.
    """

    tokens: Sequence[str]
    control: Sequence[int]
    user_defined: Sequence[int]
    begin: int | None
    names: Mapping[str, str]
    template: object
    where: str

    def tokenizer(self, library: Any) -> Tokenizer:
        """With the special tokens; of a ``tokenizers.Tokenizer``."""
        added = require("tokenizers").AddedToken
        library.add_special_tokens([added(self.tokens[one], normalized=False, special=True) for one in self.control])
        library.add_tokens([added(self.tokens[one], normalized=False) for one in self.user_defined])
        template = ChatTemplate(self.template, self.names, self.where)
        return Tokenizer(library, begin=self.begin, template=template)

    def model(self, merges: Iterable[Sequence[str]], **settings: Any) -> Any:
        """Byte pairs; raises :exc:`InvalidArgument` if the merges do not fit the tokens."""
        try:
            return require("tokenizers").models.BPE(
                vocab={token: number for number, token in enumerate(self.tokens)},
                merges=[(left, right) for left, right in merges],
                **settings,
            )
        except Exception as exc:  # noqa: BLE001  # the library raises nothing narrower
            raise InvalidArgument(f"{self.where}: its vocabulary and merges do not fit together: {exc}") from None


def byte_level_tokenizer(vocabulary: Vocabulary, merges: Iterable[Sequence[str]], splits: str) -> Tokenizer:
    """GPT-2's kind: byte pairs over an alphabet that stands for bytes.

    Args:
      splits: GGUF's name of the rule by which text is cut first.

    Raises:
      InvalidArgument: the rule is unknown, or the merges do not fit the vocabulary.
    """
    if splits not in _SPLITS:
        raise InvalidArgument(
            f"{vocabulary.where}: its tokenizer cuts text by the rule '{splits}', only {', '.join(_SPLITS)} are known here; "
            "load the model from its original directory, with tokenizer.json"
        )
    digits, pattern = _SPLITS[splits]
    tokenizers = require("tokenizers")
    pieces = tokenizers.pre_tokenizers
    library = tokenizers.Tokenizer(vocabulary.model(merges, ignore_merges=splits in LLAMA_3_SPLITS))
    before = [pieces.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        before.append(pieces.Split(tokenizers.Regex(pattern), behavior="isolated"))
    before.append(pieces.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    library.pre_tokenizer = pieces.Sequence(before)
    library.decoder = tokenizers.decoders.ByteLevel()
    return vocabulary.tokenizer(library)


def sentencepiece_tokenizer(
    vocabulary: Vocabulary, scores: Sequence[float], *, unknown: int | None, prefix: bool
) -> Tokenizer:
    """SentencePiece's byte pairs (Llama 2, TinyLlama, Mistral): spaces are part of tokens, and what has no token is bytes.

    Args:
      scores: by id; two pieces become one in the order of its score, the highest first.
      unknown: the id of what has no bytes either.
      prefix: a text is cut as if a space stood before it.

    Raises:
      InvalidArgument: there are not as many scores as tokens.
    """
    if len(scores) != len(vocabulary.tokens):
        raise InvalidArgument(
            f"{vocabulary.where}: its vocabulary has {len(vocabulary.tokens)} tokens and {len(scores)} scores"
        )
    tokenizers = require("tokenizers")
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    library = tokenizers.Tokenizer(
        vocabulary.model(
            _merges(vocabulary, scores),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    library.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    before_text = [decoders.Strip(" ", 1, 0)] if prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *before_text]
    )
    return vocabulary.tokenizer(library)


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair that makes a token, by its score; of one token's pairs, the one with the better parts first."""
    apart = {*vocabulary.control, *vocabulary.user_defined}
    known = {token: scores[one] for one, token in enumerate(vocabulary.tokens) if one not in apart}
    found = [
        (-score, -known[left], -known[right], left, right)
        for token, score in known.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in known and (right := token[cut:]) in known
    ]
    found.sort(key=lambda each: each[:3])
    return [(left, right) for *_, left, right in found]
