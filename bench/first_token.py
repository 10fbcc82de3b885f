"""(i) The first token of a live request behind long prompts that were cancelled, against an idle server.

SmolLM2-135M with 4 slots, prompts of 2,000 tokens.  They are cancelled in one tick, with the first of them in the middle of its
prompt, and at that moment a short request comes.  For comparison: the same with nobody cancelled.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np
import trio

from triton_trio import open_server
from triton_trio.scheduled_model import ScheduledModel

from .harness import machine, percentile, save, table
from .texts import Text, engine, models, prompts, read

LONG = 2000
PIECE = 64  #: the longest by default
CANCELLED = (0, 1, 10)
#: For comparison; they leave it a slot.
LIVE = 3


async def first_token(model: ScheduledModel, long: list[np.ndarray], short: np.ndarray, *, cancel: bool) -> float:
    """Seconds until a short request has its first token, behind ``long``."""
    live = Text()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as walkers:
            fed = engine(model).schedule.prompt_tokens
            for prompt in long:
                # Owner: this nursery; cancelled below, or it makes one token.
                (walkers if cancel else nursery).start_soon(read, model, prompt, 1, Text(), name="long")
            while long and engine(model).schedule.prompt_tokens - fed < 4 * PIECE:  # noqa: ASYNC110 - from outside
                await trio.sleep(0.005)
            walkers.cancel_scope.cancel(reason="everybody walks away")
            # Owner: this nursery; ends with its text.
            nursery.start_soon(read, model, short, 4, live, name="live")
    return live.first_seconds


async def measure(rounds: int) -> tuple[list[list[object]], bool, float]:
    long = prompts(max(CANCELLED), tokens=LONG)
    short = prompts(1, tokens=30)[0]
    assert len(short) <= PIECE
    took: dict[tuple[int, bool], list[float]] = {}
    piece: list[float] = []
    with models(long={"slots": 4, "context": 2304}) as root:
        async with open_server(root) as server:
            model = server.model("long")
            assert isinstance(model, ScheduledModel)
            await first_token(model, [], short, cancel=True)
            for _ in range(rounds):
                for count in CANCELLED:
                    took.setdefault((count, True), []).append(
                        await first_token(model, long[:count], short, cancel=True)
                    )
                # One piece of a prompt, as the device takes it: of a prompt on an idle server, by their number.
                alone = Text()
                await read(model, long[0], 1, alone)
                piece.append(alone.first_seconds / -(-len(long[0]) // PIECE))
            took[LIVE, False] = [await first_token(model, long[:LIVE], short, cancel=False)]
    idle, one_piece = percentile(took[0, True], 50), percentile(piece, 50)
    rows: list[list[object]] = []
    holds = True
    for (count, cancel), seconds in took.items():
        more = percentile(seconds, 50) - idle
        if cancel:
            holds &= more <= one_piece
        rows.append(
            [
                count,
                "cancelled" if cancel else "live",
                round(percentile(seconds, 50) * 1e3),
                round(max(seconds) * 1e3),
                round(more * 1e3),
                round(more / one_piece, 2),
            ]
        )
    return rows, holds, one_piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    before = machine() | {"device": str(jax.devices()[0])}
    rows, holds, piece = trio.run(measure, args.rounds)
    header = [
        "long prompts before it",
        "who are",
        "first token p50 ms",
        "max ms",
        "more than idle, ms",
        "in prefill pieces",
    ]
    text = (
        f"Median of {args.rounds} rounds; a piece of {PIECE} tokens of such a prompt takes {piece * 1e3:.0f} ms here.\n\n"
        + table(header, rows)
        + f"\n\n- {'PASS' if holds else 'FAIL'}: behind cancelled prompts the first token comes within one prefill piece of what "
        "it takes on an idle server."
    )
    save(
        "first_token",
        "python -m bench first_token",
        {"header": header, "rows": rows, "piece_seconds": piece},
        text,
        before,
    )


if __name__ == "__main__":
    main()
