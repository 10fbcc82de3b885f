"""Text to token ids and back.  The library ``tokenizers`` does the work; here is what it needs from a model's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ....errors import InvalidArgument, no_panic
from .chat import ChatTemplate
from .extra import require

#: Tokens of a prompt that the text behind it is decoded after.
BEFORE = 8
#: Bytes that are no UTF-8, in a decoded text.
BROKEN = "\N{REPLACEMENT CHARACTER}"
#: Tokens that a character may be short of its last byte with: it has four bytes, and a token one or more.
UNFINISHED = 3
#: Tokens that are held back at most, whatever they are: each one is decoded again with the next.
MOST_HELD = 16


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
        #: Bytes of the longest token, at least.
        self.longest = max((len(token.encode()) for token in library.get_vocab(with_added_tokens=True)), default=1)

    @property
    def vocab_size(self) -> int:
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text.  What looks like a special token in it becomes one.

        Raises:
          InvalidArgument: the library cannot cut it.
        """
        with no_panic("the text cannot be cut into tokens", InvalidArgument):
            try:
                # Of a batch, for there the library lets other threads run meanwhile.
                (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=False)
            except Exception as exc:  # noqa: BLE001  # the library raises nothing narrower
                raise InvalidArgument(f"the text cannot be cut into tokens: {exc}") from None
        ids: list[int] = encoding.ids
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
        return self.encode(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The same as text; raises the same."""
        return self._template.render(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out.  Bytes that are no UTF-8 become U+FFFD."""
        text: str = self._library.decode(list(ids), skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary: ``<|im_end|>``."""
        found: int | None = self._library.token_to_id(token)
        return found

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A new text, to which tokens are added one by one; what comes before it decides whether it begins with a space."""
        return TextStream(self, prompt)

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

    def render(self, messages: Sequence[Mapping[str, str]]) -> NoReturn:
        self._refuse("messages")

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def token_id(self, token: str) -> None:
        return None

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        return NoText()

    def check_text(self, what: str) -> None:
        self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidArgument(
            f"{what} needs the model's tokenizer, and {self.missing}; send input_ids, without stop strings"
        )


class TextStream:
    """Text as its tokens come.  A character whose bytes are spread over tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []  #: tokens whose text is not out
        before = [int(token) for token in prompt[-BEFORE:]]
        starts = range(min(len(prompt) - len(before), UNFINISHED) + 1)  # it may have been cut within a character
        whole = (start for start in starts if not tokenizer.decode(before[start:]).startswith(BROKEN))
        self._begin(before[next(whole, 0) :])

    def add(self, token: int) -> str:
        """The text that is complete with this token; often empty."""
        self._held.append(token)
        text = self._decode(self._held)
        if text and not text.endswith(BROKEN):
            return self._take(len(self._held), text)
        # A character may be under way, and then within the last tokens.  What is before them will not change any more.
        for unfinished in range(UNFINISHED, 0, -1) if len(self._held) > UNFINISHED else ():
            done = self._decode(self._held[:-unfinished])
            if done and done + self._tokenizer.decode(self._held[-unfinished:]) == text:
                return self._take(len(self._held) - unfinished, done)
        if self._held == [token] and not text and not self._prefix.endswith(BROKEN):
            self._held.clear()  # a special token
        return self._take(len(self._held), text) if len(self._held) >= MOST_HELD else ""

    def finish(self) -> str:
        """What is left when no more tokens come: nothing, or U+FFFD for the beginning of a character."""
        return self._take(len(self._held), self._decode(self._held))

    def _take(self, count: int, text: str) -> str:
        if count:
            self._begin(self._held[:count])
            del self._held[:count]
        return text

    def _begin(self, before: list[int]) -> None:
        """What comes now comes after ``before``, which may decide whether it begins with a space."""
        self._before = before
        self._prefix = self._tokenizer.decode(before)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(self._before + tokens)
        if text.startswith(self._prefix):
            return text[len(self._prefix) :]
        if self._prefix.endswith(BROKEN):  # the prompt's end, a character that is complete only now
            return text.removeprefix(self._prefix.rstrip(BROKEN))
        # Tokens of single bytes: together they are no text any more, and what is out stays as it is.
        return self._tokenizer.decode(tokens)


class NoText(TextStream):
    """Of a model without a tokenizer."""

    def __init__(self) -> None:
        """It has nothing."""

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def tokenizer_from_directory(directory: Path) -> Tokenizer:
    """Hugging Face's ``tokenizer.json``, with ``tokenizer_config.json`` and ``chat_template.jinja`` where they exist.

    Without a ``tokenizer.json`` it is a :class:`NoTokenizer`.

    Raises:
      InvalidArgument: one of them cannot be read.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return NoTokenizer(f"'{directory}' has no tokenizer.json")
    kind = require("tokenizers").Tokenizer
    with no_panic(f"{file}: cannot be read", InvalidArgument):
        try:
            library = kind.from_file(str(file))
            # Whether a text begins with the special token is a rule in there; the empty text shows it.
            begin = library.encode("", add_special_tokens=True).ids[:1]
        except Exception as exc:  # noqa: BLE001  # the library raises nothing narrower
            raise InvalidArgument(f"{file}: cannot be read: {exc}") from None
    config = _config(where := directory / "tokenizer_config.json")
    names = {key: _token(config[key], f"{where}: '{key}'") for key in ("bos_token", "eos_token") if config.get(key)}
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _default(template)
    if (directory / "chat_template.jinja").is_file():
        where = directory / "chat_template.jinja"
        template = where.read_bytes()
    return Tokenizer(library, begin=begin[0] if begin else None, template=ChatTemplate(template, names, str(where)))


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"{file}: not JSON: {exc}") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"{file}: not a JSON object")
    return config


def _token(found: Any, what: str) -> str:
    content = found.get("content") if isinstance(found, dict) else found
    if not isinstance(content, str):
        raise InvalidArgument(f"{what} must be a token, or an object with its 'content', got {found!r:.40}")
    return content


def _default(templates: list[Any]) -> object:
    """The one that is used, of several; all of them if they are not by name, and then they are no template."""
    try:
        return {one["name"]: one["template"] for one in templates}.get("default")
    except (KeyError, TypeError):
        return templates
