"""``python -m triton_trio.demo.llm``: conversations with a language model, one of which is left in mid-sentence.

Three have a slot, the fourth waits.  When a reader walks away, the fourth is in that slot a few programs later, and the
others do not notice.  Each line with a tick is checked; the exit status is 0 only if all hold.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import trio

from ..backends.jax.generation.engine import EngineStatistics
from ..errors import TritonError
from ..scheduled_model import ScheduledModel
from ..server import open_server

MODELS = Path(__file__).parent / "llm_models"
QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "Tell me a long story about a lighthouse keeper and a whale.",
    "Give me three tips for learning to play the piano.",
    "What is the capital of France, and what is it known for?",
)
#: The reader of this one walks away after so many tokens.
LEAVER, PATIENCE = 1, 25
TOKENS = 70
#: Characters of a line of text.
WIDTH = 90


class Conversation:
    """One question, and what its reader has seen."""

    def __init__(self, number: int, question: str) -> None:
        self.name = "ABCD"[number]
        self.question = question
        self.tokens = 0
        self._line = ""
        self.slot = ""
        self.first_at = 0.0
        self.left_at = 0.0
        self.reason = ""

    async def hold(self, model: ScheduledModel, scope: trio.CancelScope, patience: int) -> None:
        """Read to the end, or until patience does."""
        messages = json.dumps([{"role": "user", "content": self.question}]).encode()
        request = model.request({"messages": np.array([messages], object), "max_tokens": np.array([TOKENS], np.int32)})
        with scope:
            async with model.open_responses(request) as responses:
                async for response in responses:
                    if not response.outputs:
                        continue
                    if not self.tokens:
                        self.first_at = time.perf_counter()
                        self.slot = next(
                            instance.name.rpartition("_")[2]
                            for instance in model.instances
                            if instance.batch is not None and instance.batch.members[0].request is request
                        )
                        say(f"{self.name} has slot {self.slot}: {self.question}")
                    self.tokens += len(response.outputs["token_id"])
                    self._show(response.outputs["text_output"][0].decode())
                    self.reason = response.outputs["finish_reason"][0].decode()
                    if self.tokens >= patience:
                        self.left_at = time.perf_counter()
                        scope.cancel(reason="the reader walked away")
        self._show("\n" if self.reason == "stop" else " ...\n")
        if scope.cancelled_caught:
            say(f"{self.name} walks away in mid-sentence, after {self.tokens} tokens")

    def _show(self, text: str) -> None:
        """Whole lines, as soon as they are whole."""
        self._line += text
        while "\n" in self._line or len(self._line) > WIDTH:
            line, end, rest = self._line.partition("\n")
            if len(line) > WIDTH:
                cut = max(line.rfind(" ", 0, WIDTH), 1)
                line, rest = line[:cut], line[cut:].lstrip() + end + rest
            self._line = rest
            if line.strip():
                say(f"   {self.name} │ {line.strip()}")


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


async def run() -> bool:
    """The whole demonstration; whether all that was claimed held.  **Cancellation:** leaves nothing behind."""
    say("loading SmolLM2-135M-Instruct and compiling its programs: some 15 seconds ...")
    async with open_server(MODELS) as server:
        model = server.model("smollm2")
        assert isinstance(model, ScheduledModel)
        conversations = [Conversation(number, question) for number, question in enumerate(QUESTIONS)]
        began = time.perf_counter()
        async with trio.open_nursery() as readers:
            for number, conversation in enumerate(conversations):
                patience = PATIENCE if number == LEAVER else TOKENS + 1
                # Owner: this nursery; ends with its conversation.
                readers.start_soon(
                    conversation.hold, model, trio.CancelScope(), patience, name=f"reader {conversation.name}"
                )
                # In this order; the last one finds no slot free.
                while len(model.scheduler) + sum(i.batch is not None for i in model.instances) <= number:  # noqa: ASYNC110
                    await trio.sleep(0.001)
        seconds = time.perf_counter() - began
        engine = model.instances[0].statistics().backend
        assert isinstance(engine, EngineStatistics)
    left, last = conversations[LEAVER], conversations[-1]
    schedule = engine.schedule
    say("")
    claims = (
        (left.slot == last.slot, f"{last.name} took over slot {left.slot}, {left.name}'s"),
        (
            last.first_at > left.left_at,
            f"its first token came {1e3 * (last.first_at - left.left_at):.0f} ms after {left.name} had left "
            f"(a token of all slots takes {engine.step_ms or 0:.0f} ms, the question has to be read, too)",
        ),
        (
            all(c.reason in ("stop", "length") for c in conversations if c is not left),
            "the other conversations went on to their ends",
        ),
        (schedule.slots_in_use == 0, "every slot is free again"),
        (
            schedule.wasted_seconds < 1.0,
            f"the device worked {schedule.useful_seconds:.1f} s for readers and {schedule.wasted_seconds * 1e3:.0f} ms "
            "for one who had left",
        ),
    )
    for holds, claim in claims:
        say(f"{'✓' if holds else '✗'} {claim}")
    say(f"{schedule.tokens} tokens in {seconds:.1f} s: {schedule.tokens / seconds:.0f} tokens/s")
    return all(holds for holds, _ in claims)


def main() -> int:
    """Returns the exit status."""
    try:
        return 0 if trio.run(run) else 1
    except TritonError as exc:
        print(f"triton_trio.demo.llm: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
