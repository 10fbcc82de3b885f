"""(k) Ten thousand generations with random cancels: what must stay flat, and what must balance.

A language model of random numbers with eight slots, in process.  Readers come in a closed loop; four of ten walk away: before the
first token, after some, while they wait for a slot, or in the instant in which their text ends.  Every so often everybody is
waited for and the books are read: memory on the device and on the host, programs compiled, device seconds by request against
the device's own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tokenizers
import trio
import trio.testing
from safetensors.numpy import save_file

from triton_trio import open_server
from triton_trio.backends.jax import JaxBackend
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.testing import assert_quiescent

from .harness import RESULTS, machine, rss_bytes, save, table
from .texts import Text, engine, read

SLOTS, READERS, CONTEXT = 8, 12, 96
VOCABULARY, WIDTH, LAYERS, HEADS, HEAD_DIM, HIDDEN = 96, 32, 2, 4, 8, 48


@dataclass(frozen=True)
class Book:
    """What is read when nobody is there."""

    generations: int
    seconds: float
    live_mib: float  #: of all arrays of JAX's
    rss_mib: float
    compiles: int  #: by XLA, in this process, since the model was ready
    useful_seconds: float  #: of the device, for texts
    wasted_seconds: float
    unpaid_seconds: float  #: of programs behind an end that nobody could foresee; the next text pays them
    device_seconds: float  #: of the device, by its thread
    cancelled: int

    @property
    def charged_seconds(self) -> float:
        return self.useful_seconds + self.wasted_seconds + self.unpaid_seconds


def write_model(root: Path) -> None:
    """Random weights as Transformers would store them; token 12 is the word ``w12``."""
    rng = np.random.default_rng(0)
    kv = HEADS // 2 * HEAD_DIM

    def matrix(out: int, width: int) -> np.ndarray:
        return np.float32(rng.normal(0, 1.5 / width**0.5, (out, width)))

    tensors = {
        "model.embed_tokens.weight": np.float32(rng.normal(0, 1, (VOCABULARY, WIDTH))),
        "model.norm.weight": np.ones(WIDTH, np.float32),
        "lm_head.weight": matrix(VOCABULARY, WIDTH) * 2,
    }
    for layer in range(LAYERS):
        for name, (out, width) in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv, WIDTH),
            "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(out, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    version = root / "tiny" / "1"
    version.mkdir(parents=True)
    save_file(tensors, version / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 1000.0,
        "rms_norm_eps": 1e-5,
        "eos_token_id": [7],
        "hidden_act": "silu",
    }
    (version / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(version / "tokenizer.json"))
    settings = {"model_format": "llama", "slots": SLOTS, "context": CONTEXT, "prefill_chunk": "16", "ladder": "1,2,4"}
    (root / "tiny" / "config.pbtxt").write_text(
        'backend: "jax"\n'
        + "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in settings.items())
    )


async def one(model: ScheduledModel, rng: np.random.Generator) -> None:
    """One generation, whatever its reader does."""
    prompt = rng.integers(0, VOCABULARY, rng.integers(1, 60)).astype(np.int32)
    tokens = int(rng.integers(1, 30))
    fate = rng.random()
    leave_after = int(rng.integers(1, tokens + 1)) if fate < 0.2 else None  # often with the last token
    with trio.CancelScope() as scope:
        if 0.2 <= fate < 0.4:
            scope.deadline = trio.current_time() + rng.random() * 0.02  # in the queue, in its prompt, in its text
        await read(model, prompt, tokens, Text(), leave_after=leave_after)


async def soak(generations: int, *, books: int) -> list[Book]:
    """Serve so many, and read the books so often; the first is read after the warm-up.

    Raises:
      AssertionError: something was left when nobody was there.
    """
    compiles = 0

    def heard(event: str, seconds: float, **_: object) -> None:
        nonlocal compiles
        compiles += event == "/jax/core/compile/backend_compile_duration"

    read_books = []
    rng = np.random.default_rng(1)
    backend = JaxBackend()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        async with open_server(folder, backends={"jax": lambda: backend}) as server:
            model = server.model("tiny")
            assert isinstance(model, ScheduledModel)
            jax.monitoring.register_event_duration_secs_listener(heard)
            compiles = 0
            began = time.perf_counter()
            done = 0

            async def reader(until: int) -> None:
                nonlocal done
                while done < until:
                    done += 1
                    await one(model, rng)

            for book in range(books + 1):
                until = max(generations * book // books, 100)
                async with trio.open_nursery() as nursery:
                    for _ in range(READERS):
                        nursery.start_soon(reader, until, name="reader")  # Owner: this nursery; ends by itself.
                while any(instance.batch is not None for instance in model.instances):  # noqa: ASYNC110 - from outside
                    await trio.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked()
                assert_quiescent(server)
                schedule = engine(model).schedule
                gc.collect()
                read_books.append(
                    Book(
                        generations=done,
                        seconds=time.perf_counter() - began,
                        live_mib=sum(array.nbytes for array in jax.live_arrays()) / 2**20,
                        rss_mib=rss_bytes(os.getpid()) / 2**20,
                        compiles=compiles,
                        useful_seconds=schedule.useful_seconds,
                        wasted_seconds=schedule.wasted_seconds,
                        unpaid_seconds=schedule.unpaid_seconds,
                        device_seconds=backend.statistics()[0].device_seconds,
                        cancelled=sum(model.counters.reasons.values()),
                    )
                )
    return read_books


def verdicts(books: list[Book]) -> list[tuple[bool, str]]:
    """Whether it stayed flat from the first book to the last, and balances."""
    first, last = books[0], books[-1]
    # The device's thread has counted, since it was started, what loading ran, too.
    device = last.device_seconds - first.device_seconds
    charged = last.charged_seconds - first.charged_seconds
    grown = last.rss_mib - books[len(books) // 4].rss_mib
    return [
        (
            last.live_mib <= first.live_mib,
            f"device memory: {first.live_mib:.2f} MiB at first, {last.live_mib:.2f} at last",
        ),
        (grown < 8, f"host memory: {grown:+.1f} MiB in the last three quarters"),
        (last.compiles == 0, f"programs compiled while serving: {last.compiles}"),
        (
            abs(charged / device - 1) < 0.005,
            f"device seconds charged to texts: {charged:.2f} of {device:.2f} ({100 * charged / device:.2f}%)",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=10_000)
    args = parser.parse_args()
    before = machine() | {"device": str(jax.devices()[0])}
    books = trio.run(lambda: soak(args.generations, books=10))
    said = [f"{'PASS' if holds else 'FAIL'}: {what}" for holds, what in verdicts(books)]
    header = [
        "generations",
        "of them cancelled",
        "seconds",
        "device MiB",
        "host MiB",
        "compiles",
        "useful device s",
        "wasted",
    ]
    rows = [
        [
            book.generations,
            book.cancelled,
            round(book.seconds, 1),
            round(book.live_mib, 3),
            round(book.rss_mib, 1),
            book.compiles,
            round(book.useful_seconds, 2),
            round(book.wasted_seconds, 3),
        ]
        for book in books
    ]
    RESULTS.mkdir(exist_ok=True)
    text = (
        f"{SLOTS} slots, {READERS} readers; the server was quiescent at each line.\n\n"
        + table(header, rows)
        + "\n\n"
        + "\n".join(f"- {line}" for line in said)
    )
    save("soak", "python -m bench soak", {"header": header, "rows": rows, "verdicts": said}, text, before)


if __name__ == "__main__":
    main()
