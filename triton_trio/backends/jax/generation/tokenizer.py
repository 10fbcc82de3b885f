"""Text to token ids and back.  The library ``tokenizers`` does the work; here is what it needs from a model's files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ....errors import InvalidArgument
from .chat import ChatTemplate
from .extra import require

#: How text is cut before the merges, by GGUF's name for it: whether digits stand alone, and a pattern other than GPT-2's.
_SPLITS: Mapping[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (
        False,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


class Tokenizer:
    """One model's vocabulary.  Methods are plain computation, some 10 µs a hundred tokens.

    Args:
      library: a ``tokenizers.Tokenizer``.
      begin: the id that stands before every text; None if the model wants none.
      template: of a conversation.
    """

    def __init__(self, library: Any, *, begin: int | None, template: ChatTemplate) -> None:
        self._library = library
        self._begin = begin
        self._template = template
        self._streams = require("tokenizers").decoders

    @property
    def vocab_size(self) -> int:
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text.  What looks like a special token in it becomes one."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        if self._begin is not None and ids[:1] != [self._begin]:
            return [self._begin, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the model's answer begins.

        Args:
          messages: ``{"role": "user", "content": "..."}`` each.

        Raises:
          InvalidArgument: a message is malformed, or the model's template wants none of it.
        """
        return self.encode(self._template.render(messages))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out.  Bytes that are no UTF-8 become U+FFFD."""
        text: str = self._library.decode(list(ids), skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary: ``<|im_end|>``."""
        found: int | None = self._library.token_to_id(token)
        return found

    def stream(self) -> TextStream:
        """A new text, to which tokens are added one by one."""
        return TextStream(self, self._library, self._streams.DecodeStream(skip_special_tokens=True))

    def check_text(self, what: str) -> None:
        """Raises :exc:`InvalidArgument` if the model knows ids only, and ``what`` needs text."""


class NoTokenizer(Tokenizer):
    """Of a model whose files have none: ids go in and ids come out, and all text is empty.

    Args:
      missing: what the files would need, for messages: ``'/models/m/1' has no tokenizer.json``.
    """

    def __init__(self, missing: str) -> None:
        self.missing = missing

    @property
    def vocab_size(self) -> int:
        return 0

    def encode(self, text: str) -> NoReturn:
        self._refuse("text_input")

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> NoReturn:
        self._refuse("messages")

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def token_id(self, token: str) -> None:
        return None

    def stream(self) -> TextStream:
        return NoText()

    def check_text(self, what: str) -> None:
        self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidArgument(
            f"{what} needs the model's tokenizer, and {self.missing}; send input_ids, without stop strings"
        )


class TextStream:
    """Text as its tokens come.  A character whose bytes are spread over tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer, library: Any, stream: Any) -> None:
        self._tokenizer = tokenizer
        self._library = library
        self._stream = stream
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this token; often empty."""
        self._held.append(token)
        text: str | None = self._stream.step(self._library, token)
        if text is None:
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """What is left when no more tokens come: nothing, or U+FFFD for the beginning of a character."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held)


class NoText(TextStream):
    """Of a model without a tokenizer."""

    def __init__(self) -> None:
        """It has nothing."""

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def byte_level_tokenizer(
    *,
    tokens: Sequence[str],
    merges: Iterable[Sequence[str]],
    control: Iterable[int],
    user_defined: Iterable[int],
    splits: str,
    begin: int | None,
    names: Mapping[str, str],
    template: str | None,
    where: str,
) -> Tokenizer:
    """GPT-2's kind: byte pairs over an alphabet that stands for bytes.

    Args:
      control, user_defined: ids that are never made by merges; control ids have no text.
      splits: GGUF's name of the rule by which text is cut first.
      names: special tokens by the names that templates use.
      where: the file, for messages.

    Raises:
      InvalidArgument: the rule is unknown, or the merges do not fit the vocabulary.
    """
    if splits not in _SPLITS:
        raise InvalidArgument(
            f"{where}: its tokenizer cuts text by the rule '{splits}', only {', '.join(_SPLITS)} are known here; "
            "load the model from its original directory, with tokenizer.json"
        )
    digits, pattern = _SPLITS[splits]
    library = require("tokenizers")
    pieces = library.pre_tokenizers
    try:
        model = library.models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(left, right) for left, right in merges],
            ignore_merges=splits == "llama-bpe",
        )
    except Exception as exc:  # noqa: BLE001  # the library raises nothing narrower
        raise InvalidArgument(f"{where}: its vocabulary and merges do not fit together: {exc}") from None
    tokenizer = library.Tokenizer(model)
    before = [pieces.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        before.append(pieces.Split(library.Regex(pattern), behavior="isolated"))
    before.append(pieces.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pieces.Sequence(before)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens([library.AddedToken(tokens[one], normalized=False, special=True) for one in control])
    tokenizer.add_tokens([library.AddedToken(tokens[one], normalized=False) for one in user_defined])
    return Tokenizer(tokenizer, begin=begin, template=ChatTemplate(template, names, where))


def tokenizer_from_directory(directory: Path) -> Tokenizer:
    """Hugging Face's ``tokenizer.json``, with ``tokenizer_config.json`` and ``chat_template.jinja`` where they exist.

    Without a ``tokenizer.json`` it is a :class:`NoTokenizer`.

    Raises:
      InvalidArgument: one of them cannot be read.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return NoTokenizer(f"'{directory}' has no tokenizer.json")
    try:
        library = require("tokenizers").Tokenizer.from_file(str(file))
    except Exception as exc:  # noqa: BLE001  # the library raises nothing narrower
        raise InvalidArgument(f"{file}: cannot be read: {exc}") from None
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text())
    except FileNotFoundError:
        config = {}
    except ValueError as exc:
        raise InvalidArgument(f"{directory / 'tokenizer_config.json'}: not JSON: {exc}") from None
    names = {key: _content(config[key]) for key in ("bos_token", "eos_token") if config.get(key)}
    template = config.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text()
    if isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    # Whether a text begins with the special token is a rule inside tokenizer.json; the empty text shows it.
    begin = library.encode("", add_special_tokens=True).ids[:1]
    return Tokenizer(library, begin=begin[0] if begin else None, template=ChatTemplate(template, names, str(directory)))


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
