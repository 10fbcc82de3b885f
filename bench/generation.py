"""(h) Tokens a second: slots that are shared in flight, against one request at a time, and against llama.cpp.

SmolLM2-135M on this machine's CPU, all in process, greedy texts of equal length, in alternating rounds.  llama.cpp runs the same
file in a process of its own, with as many slots and as many threads as there are cores, on its 4-bit weights as they are; ours
are dequantised at load, to each dtype that a model may have.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import trio

from triton_trio import open_server
from triton_trio.backends.jax.generation.weights import open_checkpoint
from triton_trio.scheduled_model import ScheduledModel

from .harness import Server, machine, percentile, save, serving, table
from .texts import Text, models, prompts, read, weights

STREAMS = (1, 4, 8)
CONTEXT = 256
DTYPES = ("float32", "bfloat16", "int8")
#: One request at a time: a model of one slot.
ALONE = {f"{dtype} one at a time": dtype for dtype in DTYPES[:2]}


async def ours(model: ScheduledModel, asked: list[np.ndarray], tokens: int) -> tuple[float, list[Text]]:
    texts = [Text() for _ in asked]
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for prompt, text in zip(asked, texts, strict=True):
            # Owner: this nursery; ends with its text.
            nursery.start_soon(read, model, prompt, tokens, text, name="reader")
    return time.perf_counter() - began, texts


async def measure(rounds: int, tokens: int, llamacpp: Server | None) -> tuple[list[list[object]], list[str]]:
    asked = prompts(max(STREAMS), tokens=40)
    slots = max(STREAMS)
    rates: dict[tuple[str, int], list[float]] = {}
    agreement: list[str] = []
    in_flight = {dtype: {"slots": slots, "context": CONTEXT, "dtype": dtype} for dtype in DTYPES}
    alone = {name: {"slots": 1, "context": CONTEXT, "dtype": dtype} for name, dtype in ALONE.items()}
    with models(**in_flight, **alone) as root:
        async with open_server(root) as server:
            for round_number in range(rounds + 1):
                for streams in STREAMS:
                    mine = asked[:streams]
                    made: dict[str, list[Text]] = {}
                    for name in (*DTYPES, *ALONE):
                        model = server.model(name)
                        assert isinstance(model, ScheduledModel)
                        seconds, made[name] = await ours(model, mine, tokens)
                        rates.setdefault((name, streams), []).append(streams * tokens / seconds)
                    if llamacpp is not None:
                        answer = await trio.to_thread.run_sync(
                            lambda mine=mine: llamacpp.ask(prompts=[p.tolist() for p in mine], tokens=tokens)
                        )
                        rates.setdefault(("llama.cpp", streams), []).append(streams * tokens / answer["seconds"])
                        if round_number == rounds and streams == slots:
                            agreement = [
                                f"{_agree(text, other)} of {len(other)}"
                                for text, other in zip(made["float32"], answer["texts"], strict=True)
                            ]
    names = [*DTYPES, *ALONE] + ["llama.cpp"] * (llamacpp is not None)
    rows: list[list[object]] = []
    for streams in STREAMS:
        found = {name: percentile(rates[name, streams][1:], 50) for name in names}  # without the first round
        rows.append(
            [
                streams,
                *(round(found[name], 1) for name in names),
                *(round(found[dtype] / found[name], 2) for name, dtype in ALONE.items()),
                *(round(found[dtype] / found["llama.cpp"], 2) for dtype in DTYPES if llamacpp is not None),
            ]
        )
    return rows, agreement


def _agree(text: Text, other: str) -> int:
    """How many characters the two have in common from the beginning."""
    stream = open_checkpoint(weights()).tokenizer().stream()
    mine = "".join(stream.add(token) for token in text.tokens) + stream.finish()
    return next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    before = machine() | {"device": str(jax.devices()[0])}
    environment = os.environ.get("LLAMA_CPP_VENV")
    with ExitStack() as stack:
        llamacpp = None
        if environment:
            llamacpp = stack.enter_context(
                serving(
                    "llama.cpp",
                    str(Path("bench/servers/llamacpp.py")),
                    str(weights()),
                    str(max(STREAMS)),
                    str(CONTEXT),
                    str(os.cpu_count()),
                    python=f"{environment}/bin/python",
                )
            )
        else:
            print("without llama.cpp: LLAMA_CPP_VENV is to be an environment with xllamacpp", file=sys.stderr)
        rows, agreement = trio.run(measure, args.rounds, args.tokens, llamacpp)
    header = ["streams", *DTYPES, *ALONE] + ["llama.cpp"] * (llamacpp is not None)
    header += [f"{dtype} × one at a time" for dtype in ALONE.values()]
    header += [f"{dtype} × llama.cpp" for dtype in DTYPES if llamacpp is not None]
    text = (
        f"Tokens a second, in texts of {args.tokens} after prompts of some 40; median of {args.rounds} rounds. By dtype: in "
        f"flight, in {max(STREAMS)} slots.\n\n" + table(header, rows)
    )
    if agreement:
        text += (
            "\n\nCharacters from the beginning in which a greedy text is llama.cpp's (its matrices are 4-bit and its activations "
            "8-bit when it multiplies, ours float32): " + ", ".join(agreement) + "."
        )
    save(
        "generation",
        "python -m bench generation",
        {"header": header, "rows": rows, "agreement": agreement},
        text,
        before,
    )


if __name__ == "__main__":
    main()
