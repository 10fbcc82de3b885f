"""Writes ``sentencepiece.json``: a small vocabulary that SentencePiece has learned, and how SentencePiece cuts some texts.

In an environment of its own, from the repository's root::

    python -m venv reference && reference/bin/pip install sentencepiece
    reference/bin/python tests/backends/generation/make_sentencepiece.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece

TEXTS = [
    "The sea is calm tonight.",
    "  two spaces before, and   three within ",
    "",
    " ",
    "naïve café — 你好 🦊🦊 Zürich",
    "line\nline\tand a tab\n\n",
    "aaaaaaa bbb lalala 1234567890 0.5%",
    "def f(x):\n    return x + 1\n",
    "requests request queue queues cancelled cancellation",
]
#: What gguf calls them.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def main() -> None:
    here = Path(__file__).parent
    root = here.parents[2]
    sentences = [line for name in ("README.md", "CONTRIBUTING.md") for line in (root / name).read_text().splitlines()]
    model = io.BytesIO()
    # As for Llama 2: nothing is normalised, and what has no token is bytes.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(library.get_piece_size())
    kinds = {
        one: UNKNOWN
        if library.is_unknown(one)
        else CONTROL
        if library.is_control(one)
        else BYTE
        if library.is_byte(one)
        else NORMAL
        for one in ids
    }
    written = {
        "version": sentencepiece.__version__,
        "tokens": [library.id_to_piece(one) for one in ids],
        "scores": [library.get_score(one) for one in ids],
        "kinds": list(kinds.values()),
        "cases": [{"text": text, "ids": library.encode(text)} for text in TEXTS],
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in written.items())
    (here / "sentencepiece.json").write_text(f"{{{lines}}}\n")


if __name__ == "__main__":
    main()
