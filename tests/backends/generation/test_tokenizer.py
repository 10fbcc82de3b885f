"""Text to ids and back: no half characters, no half conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from triton_trio.backends.jax.generation import Tokenizer
from triton_trio.backends.jax.generation.chat import ChatTemplate
from triton_trio.backends.jax.generation.tokenizer import byte_level_tokenizer, tokenizer_from_directory
from triton_trio.errors import InvalidArgument

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("12", "3"), ("å", "Ĭ")]
TOKENS = [*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)]


def make(**settings: Any) -> Tokenizer:
    arguments: dict[str, Any] = {
        "tokens": TOKENS,
        "merges": MERGES,
        "control": [0, 1, 2],
        "user_defined": [],
        "splits": "smollm",
        "begin": None,
        "names": {"bos_token": "<|im_start|>"},
        "template": None,
        "where": "tiny.gguf",
    }
    return byte_level_tokenizer(**arguments | settings)


TINY = make()


def names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[token] for token in tokenizer.encode(text)]


def test_merges_and_the_rules_by_which_text_is_cut_first() -> None:
    assert names(TINY, "the the") == ["t", "he", "Ġthe"]
    assert names(TINY, "123") == ["1", "2", "3"]
    assert names(make(splits="gpt-2"), "1234") == ["123", "4"]
    assert names(make(splits="llama-bpe"), "0123") == ["0", "12", "3"]  # by threes: 012, 3


@given(st.text())
def test_every_text_survives(text: str) -> None:
    assert TINY.decode(TINY.encode(text)) == text


@given(st.text())
def test_a_stream_has_whole_characters_only(text: str) -> None:
    stream = TINY.stream()
    pieces = [stream.add(token) for token in TINY.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


@given(st.lists(st.integers(0, len(TOKENS) - 1)))
def test_a_stream_of_anything_is_its_text(ids: list[int]) -> None:
    stream = TINY.stream()
    assert "".join([*map(stream.add, ids), stream.finish()]) == TINY.decode(ids)


def test_a_character_comes_with_its_last_byte_and_half_of_one_at_the_end() -> None:
    first, *rest = ids = TINY.encode("🦊")
    assert len(ids) == 4
    stream = TINY.stream()
    assert [stream.add(first), stream.add(rest[0]), stream.add(rest[1]), stream.add(rest[2])] == ["", "", "", "🦊"]
    assert stream.add(first) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_ids_but_no_text() -> None:
    ids = TINY.encode("<|im_start|>he<|im_end|>")
    assert [TOKENS[token] for token in ids] == ["<|im_start|>", "he", "<|im_end|>"]
    assert TINY.decode(ids) == "he"
    assert TINY.token_id("<|im_end|>") == 2
    assert TINY.token_id("nonsense") is None
    assert TINY.vocab_size == len(TOKENS)


def test_a_token_that_stands_before_every_text_stands_there_once() -> None:
    beginning = make(begin=1)
    assert beginning.encode("he")[0] == 1
    assert beginning.encode("") == [1]
    assert beginning.encode("<|im_start|>he") == beginning.encode("he")


# Conversations

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the?"}]


def test_conversations_are_chatml_unless_the_model_says_otherwise() -> None:
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe?<|im_end|>\n<|im_start|>assistant\n"
    assert TINY.encode_chat(TALK) == TINY.encode(text)
    own = (
        "{{ bos_token }}{% for message in messages %}\n  {%- if loop.first %}\n    {%- continue %}\n  {%- endif %}"
        "[{{ message['content'] }}]{% endfor %}"
    )
    assert make(template=own).encode_chat(TALK) == TINY.encode("<|im_start|>[the?]")


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (None, [], "one message or more"),
        (None, [{"role": "user"}], "message 0 of the conversation has no text 'content'"),
        (None, [*TALK, "hi"], "message 2 of the conversation is not an object with 'role' and 'content'"),
        (
            None,
            [{"role": "user", "content": "\ud83d"}],
            "the conversation is not Unicode text: .*surrogates not allowed",
        ),
        (None, [*TALK, {"role": 3, "content": ""}], "message 2 of the conversation has no text 'role'"),
        ("{{ raise_exception('system is not allowed') }}", TALK, "refuses this conversation: system is not allowed"),
        ("{{ messages[7].content }}", TALK, "tiny.gguf: its chat template fails"),
        ("{% if %}", TALK, "tiny.gguf: its chat template fails"),
        ("{{ messages.__class__.__mro__ }}", TALK, "tiny.gguf: its chat template fails.*unsafe"),
    ],
)
def test_conversations_that_cannot_be_rendered(template: str | None, messages: list[Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        ChatTemplate(template, {}, "tiny.gguf").render(messages)


# Files


def test_a_directory_as_transformers_writes_it(tmp_path: Path) -> None:
    library = TINY._library
    library.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $0", None, [("<|endoftext|>", 0)])
    try:
        library.save(str(tmp_path / "tokenizer.json"))
    finally:
        library.post_processor = tokenizers.processors.ByteLevel()
    assert [TOKENS[one] for one in tokenizer_from_directory(tmp_path).encode("he")] == ["<|endoftext|>", "he"]

    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ bos_token }}the"})
    )
    assert [TOKENS[one] for one in tokenizer_from_directory(tmp_path).encode_chat(TALK)] == ["<|endoftext|>", "t", "he"]
    (tmp_path / "chat_template.jinja").write_text("he")
    assert [TOKENS[one] for one in tokenizer_from_directory(tmp_path).encode_chat(TALK)] == ["<|endoftext|>", "he"]


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"tiny.gguf: its tokenizer cuts text by the rule 'qwen2'"):
        make(splits="qwen2")
    with pytest.raises(InvalidArgument, match=r"tiny.gguf: its vocabulary and merges do not fit together"):
        make(merges=[("x", "nothing")])
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json: cannot be read"):
        tokenizer_from_directory(tmp_path)


def test_a_model_without_a_tokenizer_takes_and_gives_ids(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_directory(tmp_path)
    stream = tokenizer.stream()
    assert [stream.add(1), stream.add(2), stream.finish(), tokenizer.decode([1, 2])] == [""] * 4
    for what, ask in (
        ("text_input", lambda: tokenizer.encode("the")),
        ("messages", lambda: tokenizer.encode_chat(TALK)),
        ("stop", lambda: tokenizer.check_text("stop")),
    ):
        with pytest.raises(
            InvalidArgument, match=rf"{what} needs the model's tokenizer, and '.*' has no tokenizer\.json"
        ):
            ask()
    TINY.check_text("stop")
