"""Text to ids and back: no half characters, no half conversations."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from triton_trio.backends.jax.generation import Tokenizer
from triton_trio.backends.jax.generation.chat import ChatTemplate
from triton_trio.backends.jax.generation.tokenizer import tokenizer_from_directory
from triton_trio.backends.jax.generation.vocabularies import (
    Vocabulary,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)
from triton_trio.errors import InvalidArgument

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("12", "3"), ("å", "Ĭ")]
TOKENS = [*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)]


def make(splits: str = "smollm", **settings: Any) -> Tokenizer:
    arguments: dict[str, Any] = {
        "tokens": TOKENS,
        "control": [0, 1, 2],
        "user_defined": [],
        "begin": None,
        "names": {"bos_token": "<|im_start|>"},
        "template": None,
        "where": "tiny.gguf",
    }
    merges = settings.pop("merges", MERGES)
    return byte_level_tokenizer(Vocabulary(**arguments | settings), merges, splits)


TINY = make()


def names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[token] for token in tokenizer.encode(text)]


def test_merges_and_the_rules_by_which_text_is_cut_first() -> None:
    assert names(TINY, "the the") == ["t", "he", "Ġthe"]
    assert names(TINY, "123") == ["1", "2", "3"]
    assert names(make(splits="gpt-2"), "1234") == ["123", "4"]
    assert names(make(splits="llama-bpe"), "0123") == ["0", "12", "3"]  # by threes: 012, 3


@pytest.mark.parametrize("splits", ["llama-bpe", "llama3", "llama-v3"])
def test_what_is_a_token_of_llama_3_needs_no_merges(splits: str) -> None:
    """Some of its tokens are made by none."""
    merges = [pair for pair in MERGES if pair != ("12", "3")]
    assert names(make(splits=splits, merges=merges), "123") == ["123"]
    assert names(make(splits="gpt-2", merges=merges), "123") == ["12", "3"]


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


def test_a_text_that_goes_on_begins_as_it_would_there() -> None:
    """Tokens of SentencePiece have their spaces in front, and the first one of all loses it."""
    tokenizer, tokens = sentencepiece()
    the = tokens.index("\N{LOWER ONE EIGHTH BLOCK}the")
    assert tokenizer.stream().add(the) == "the"
    assert tokenizer.stream(tokenizer.encode("by")).add(the) == " the"
    fox = [tokens.index(f"<0x{byte:02X}>") for byte in "\N{FOX FACE}".encode()]
    stream = tokenizer.stream(fox[:2])
    assert [stream.add(fox[2]), stream.add(fox[3])] == ["", "\N{FOX FACE}"]


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = tokenizer.stream(prompt)
    return "".join([*map(stream.add, ids), stream.finish()])


def test_a_text_does_not_begin_with_its_prompts_end() -> None:
    """Which is no whole character, or looks like none."""
    tokenizer, _ = sentencepiece()
    assert streamed(TINY, TINY.encode("he \ufffd"), TINY.encode("the")) == "the"
    assert streamed(TINY, TINY.encode("🦊")[:2], TINY.encode("the")) == "the"
    assert streamed(tokenizer, tokenizer.encode("by \ufffd"), tokenizer.encode("the")) == " the"
    # Each character has three tokens, so the last eight begin within one.
    assert streamed(tokenizer, tokenizer.encode("狐狐狐狐狐"), tokenizer.encode("狐")[1:]) == "狐"


@given(st.lists(st.sampled_from(["\ufffd", "🦊", "the", "é"]), max_size=30).map("".join))
def test_a_text_of_replacement_characters_is_not_held_back(text: str) -> None:
    """They look like the beginning of a character.  A real one is not cut, wherever it stands."""
    stream, shown = TINY.stream(), ""
    for number, token in enumerate(ids := TINY.encode(text), 1):
        shown += stream.add(token)
        assert text.startswith(shown)
        assert len(shown) >= len(TINY.decode(ids[: max(0, number - 3)])) - 1
    assert shown + stream.finish() == text


def test_a_text_of_nothing_costs_the_same_with_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    special = TINY.token_id("<|im_start|>")
    assert special is not None
    broken = TINY.encode("🦊")[0]
    stream = TINY.stream()
    for token in [special] * 100 + [broken, *[special] * 100] + TINY.encode("\ufffd") * 100:
        stream.add(token)
    assert max(lengths) < 40
    assert len(lengths) < 10 * 500


@given(st.lists(st.integers(0, 600 - 1), max_size=12), st.data())
def test_bytes_that_are_no_text_are_replaced_and_the_text_goes_on(ids: list[int], data: st.DataObject) -> None:
    """Bytes that were a character are none once another has come."""
    tokenizer, tokens = sentencepiece()
    fox = [tokens.index(f"<0x{byte:02X}>") for byte in "\N{FOX FACE}".encode()]
    broken = [*fox, tokens.index("<0xFF>"), tokens.index("a")]
    at = data.draw(st.integers(0, len(ids)))
    stream = tokenizer.stream()
    text = "".join([*map(stream.add, ids[:at] + broken + ids[at:]), stream.finish()])
    assert "\ufffd" in text
    assert "a" in text


def test_a_text_that_the_library_panics_at_is_its_clients_error() -> None:
    """Onigmo gives up after ten million steps, and the panic of Rust is no Exception: it would end the server."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), behavior="isolated")
    tokenizer = Tokenizer(library, begin=None, template=ChatTemplate(None, {}, "tiny.gguf"))
    assert tokenizer.encode("xx") == [0]
    with pytest.raises(InvalidArgument, match=r"the text cannot be cut into tokens: PanicException: Onig"):
        tokenizer.encode("x" * 30)


def test_a_text_that_the_library_refuses_is_its_clients_error() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="[UNK]"))
    tokenizer = Tokenizer(library, begin=None, template=ChatTemplate(None, {}, "tiny.gguf"))
    with pytest.raises(InvalidArgument, match=r"the text cannot be cut into tokens: .*Missing \[UNK\]"):
        tokenizer.encode("y")


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


# SentencePiece


@cache
def sentencepiece() -> tuple[Tokenizer, list[str]]:
    written = json.loads(Path(__file__).with_name("sentencepiece.json").read_text())
    control = [token for token, kind in enumerate(written["kinds"]) if kind == 3]
    vocabulary = Vocabulary(
        tokens=written["tokens"],
        control=control,
        user_defined=[],
        begin=None,
        names={},
        template=None,
        where="tiny.gguf",
    )
    return sentencepiece_tokenizer(vocabulary, written["scores"], unknown=0, prefix=True), written["tokens"]


def test_texts_are_cut_as_sentencepiece_cuts_them() -> None:
    """``make_sentencepiece.py`` has asked SentencePiece itself."""
    tokenizer, _ = sentencepiece()
    cases = json.loads(Path(__file__).with_name("sentencepiece.json").read_text())["cases"]
    assert len(cases) == 9
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@given(st.text())
def test_every_text_survives_sentencepiece(text: str) -> None:
    tokenizer, _ = sentencepiece()
    # What looks like a token of a byte, or like the sign for a space, becomes one.
    text = text.replace("<0x", "").replace("\N{LOWER ONE EIGHTH BLOCK}", "")
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<s>", "").replace("</s>", "")


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
        ("{% if %}", TALK, "tiny.gguf: its chat template cannot be used: line 1: "),
        ("{{ messages.__class__.__mro__ }}", TALK, "tiny.gguf: its chat template fails.*unsafe"),
        ("{{ 1 // 0 }}", TALK, "tiny.gguf: its chat template fails on this conversation: ZeroDivisionError: "),
        ("{{ 10 ** 400 * 1.0 }}", TALK, "its chat template fails on this conversation: OverflowError: "),
        (
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            TALK,
            "its chat template fails on this conversation: RecursionError: ",
        ),
    ],
)
def test_conversations_that_cannot_be_rendered(template: str | None, messages: list[Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        ChatTemplate(template, {}, "tiny.gguf").render(messages)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("one line\n{% if %}", "line 2: "),
        ("{% break %}", "SyntaxError: 'break' outside loop"),  # of Python, which Jinja makes of it
        ("{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}", "RecursionError: "),
        (b"{{ '\xff' }}", "UnicodeDecodeError: "),
        (["{{ bos_token }}"], r"it must be a text, got \['{{ bos_token }}'\]"),
        (5, "it must be a text, got 5"),
    ],
)
def test_a_template_that_is_broken_is_told_at_load_and_texts_are_made_all_the_same(
    caplog: pytest.LogCaptureFixture, source: object, why: str
) -> None:
    problem = f"tiny.gguf: its chat template cannot be used: {why}"
    tokenizer = make(template=source)
    assert re.search(problem, caplog.text)
    assert tokenizer.encode("the")
    with pytest.raises(InvalidArgument, match=problem):
        tokenizer.encode_chat(TALK)


def test_templates_have_what_transformers_gives_them() -> None:
    def render(source: str) -> str:
        return ChatTemplate(source, {}, "tiny.gguf").render(TALK)

    assert render("{{ strftime_now('%Y') }}") >= "2026"
    assert (
        render("{% for m in messages %}{% generation %}{{ m.role }} {% endgeneration %}{% endfor %}") == "system user "
    )
    assert render("{{ messages[1] | tojson }}") == '{"role": "user", "content": "the?"}'
    assert render("{{ '<\u00fc>' | tojson }}") == '"<\u00fc>"'


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
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "he{{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several, "eos_token": "t"}))
    assert [TOKENS[one] for one in tokenizer_from_directory(tmp_path).encode_chat(TALK)] == ["<|endoftext|>", "he", "t"]
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


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        (b'"\xff"', "not JSON: 'utf-8' codec"),
        ("[]", "not a JSON object"),
        ({"bos_token": {"a": 1}}, r"'bos_token' must be a token, or an object with its 'content', got {'a': 1}"),
        ({"eos_token": ["</s>"]}, r"'eos_token' must be a token, or an object with its 'content', got \['</s>'\]"),
    ],
)
def test_settings_of_a_tokenizer_that_make_no_sense(tmp_path: Path, config: object, why: str) -> None:
    TINY._library.save(str(tmp_path / "tokenizer.json"))
    text = json.dumps(config) if isinstance(config, dict) else config
    (tmp_path / "tokenizer_config.json").write_bytes(text if isinstance(text, bytes) else str(text).encode())
    with pytest.raises(InvalidArgument, match=rf"tokenizer_config\.json: {why}"):
        tokenizer_from_directory(tmp_path)


@pytest.mark.parametrize(
    ("config", "jinja", "why"),
    [
        ({"chat_template": 5}, None, "tokenizer_config.json: .*it must be a text, got 5"),
        ({"chat_template": {"a": "b"}}, None, "tokenizer_config.json: .*it must be a text, got {'a': 'b'}"),
        ({"chat_template": ["a"]}, None, r"tokenizer_config.json: .*it must be a text, got \['a'\]"),
        ({"chat_template": [{"name": "default"}]}, None, "tokenizer_config.json: .*it must be a text, got"),
        ({"chat_template": "good"}, b"caf\xe9", "chat_template.jinja: .*UnicodeDecodeError: "),
    ],
)
def test_files_with_no_template_refuse_conversations_and_nothing_else(
    tmp_path: Path, config: object, jinja: bytes | None, why: str
) -> None:
    TINY._library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_bytes(jinja)
    tokenizer = tokenizer_from_directory(tmp_path)
    assert tokenizer.encode("the")
    with pytest.raises(InvalidArgument, match=why):
        tokenizer.encode_chat(TALK)


def test_files_are_utf_8_wherever_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LANG is C, an open() that is told no encoding may take ASCII."""
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, encoding="ascii", *more: read(self, encoding, *more))
    TINY._library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes('{"bos_token": "ü", "chat_template": "{{ bos_token }}é"}'.encode())
    assert tokenizer_from_directory(tmp_path).render(TALK) == "üé"
    (tmp_path / "chat_template.jinja").write_bytes("{{ bos_token }}ö".encode())
    assert tokenizer_from_directory(tmp_path).render(TALK) == "üö"


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
