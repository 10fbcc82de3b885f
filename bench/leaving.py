"""(j) What readers who walk away cost those who stay: tokens a second at 0, 10, 30 and 60% of cancelled texts.

SmolLM2-135M with 8 slots and 12 readers in a closed loop.  A text that is cancelled after n tokens leaves less to read than one
that is not, whatever the server does.  So each share of cancels is compared with a *control* in which the very same texts end
after the same tokens by their own limit: the work that is wanted is equal, and the difference is what cancelling costs.  Time is
cut into alternating rounds of both.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
import trio

from triton_trio import open_server
from triton_trio.scheduled_model import ScheduledModel

from .harness import machine, percentile, save, table
from .texts import Text, engine, models, prompts, read

#: A conversation's answer: with much shorter texts most of the time goes into prompts, and what is compared is their number.
SLOTS, READERS, TOKENS = 8, 12, 192
SHARES = (0.0, 0.1, 0.3, 0.6)
CLAIM = 0.97


@dataclass
class Tally:
    """What one setting has come to."""

    tokens: list[float] = field(default_factory=list)  #: a second that were read by somebody live, of each round
    neighbours: list[float] = field(default_factory=list)  #: seconds between tokens of those who stayed
    useful: float = 0.0  #: device seconds
    wasted: float = 0.0
    tokens_read: int = 0


def plan(share: float, seed: int) -> Iterator[tuple[int, int | None]]:
    """Of each text, in order: which prompt, and after how many tokens its reader walks away, if at all."""
    rng = np.random.default_rng(seed)
    for number in itertools.count():
        leaves = rng.random() < share
        after = int(rng.integers(1, TOKENS))
        yield number, after if leaves else None


async def one_round(
    model: ScheduledModel,
    asked: list[np.ndarray],
    texts: Iterator[tuple[int, int | None]],
    seconds: float,
    tally: Tally,
    *,
    control: bool,
) -> None:
    # The device still works for those who were cancelled with the last round.
    while any(instance.batch is not None for instance in model.instances):  # noqa: ASYNC110 - from outside
        await trio.sleep(0.001)
    before = engine(model).schedule
    read_texts: list[tuple[Text, bool]] = []
    began = time.perf_counter()

    async def reader() -> None:
        while True:
            number, after = next(texts)
            text = Text()
            read_texts.append((text, after is None))
            prompt = asked[number % len(asked)]
            if control or after is None:
                await read(model, prompt, after or TOKENS, text)
            else:
                await read(model, prompt, TOKENS, text, leave_after=after)

    async with trio.open_nursery() as nursery:
        for _ in range(READERS):
            nursery.start_soon(reader, name="reader")  # Owner: this nursery; cancelled when the round has ended.
        await trio.sleep(seconds)
        after_round = engine(model).schedule  # before those who read now are cancelled with the round
        nursery.cancel_scope.cancel(reason="the round has ended")
    # Without the first second, in which the slots fill, and what was read when the round had ended.
    start, stop = began + 1.0, began + seconds
    count = sum(start <= at < stop for text, _ in read_texts for at in text.at)
    tally.tokens.append(count / (stop - start))
    for text, stays in read_texts:
        if stays:
            tally.neighbours += [after - at for at, after in itertools.pairwise(text.at) if after - at > 1e-4]
    tally.useful += after_round.useful_seconds - before.useful_seconds
    tally.wasted += after_round.wasted_seconds - before.wasted_seconds
    tally.tokens_read += sum(len(text.tokens) for text, _ in read_texts)


async def measure(shares: tuple[float, ...], rounds: int, seconds: float) -> tuple[list[list[object]], float]:
    asked = prompts(64, tokens=30)
    tallies: dict[tuple[float, bool], Tally] = {}
    with models(shared={"slots": SLOTS, "context": 256, "prefill_chunk": "64", "ladder": "1"}) as root:
        async with open_server(root) as server:
            model = server.model("shared")
            assert isinstance(model, ScheduledModel)
            await one_round(model, asked, plan(0.0, 0), 4.0, Tally(), control=False)
            for number in range(rounds):
                for share in shares:
                    for control in (False, True) if share else (False,):
                        tally = tallies.setdefault((share, control), Tally())
                        await one_round(model, asked, plan(share, number), seconds, tally, control=control)
    rows: list[list[object]] = []
    without = percentile(tallies[0.0, False].neighbours, 50)
    at_30 = float("nan")
    for share in shares:
        mine, control = tallies[share, False], tallies.get((share, True), tallies[share, False])
        # Of neighbouring rounds: what the machine does meanwhile is then in both.
        ratio = percentile([a / b for a, b in zip(mine.tokens, control.tokens, strict=True)], 50)
        plain = percentile([a / b for a, b in zip(mine.tokens, tallies[0.0, False].tokens, strict=True)], 50)
        if share == 0.3:
            at_30 = plain
        rows.append(
            [
                f"{share:.0%}",
                round(percentile(mine.tokens, 50), 1),
                round(percentile(control.tokens, 50), 1) if share else "–",
                round(plain, 3) if share else "–",
                round(ratio, 3) if share else "–",
                round((mine.tokens_read / mine.useful) / (control.tokens_read / control.useful), 3) if share else "–",
                round(100 * mine.wasted / (mine.useful + mine.wasted), 2),
                round(percentile(mine.neighbours, 50) * 1e3, 1),
                round(percentile(mine.neighbours, 99) * 1e3, 1),
                round(percentile(mine.neighbours, 50) / without, 2),
            ]
        )
    return rows, at_30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=25.0, help="of each setting in each round")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of cancelled texts; with 0")
    args = parser.parse_args()
    before = machine() | {"device": str(jax.devices()[0])}
    rows, at_30 = trio.run(measure, tuple(args.shares), args.rounds, args.seconds)
    header = [
        "cancelled",
        "tokens/s",
        "control, tokens/s",
        "against no cancels",
        "against the control",
        "the same, per useful device second",
        "device time wasted, %",
        "neighbours' next token p50 ms",
        "p99 ms",
        "p50 against no cancels",
    ]
    text = (
        f"{SLOTS} slots, {READERS} readers, texts of {TOKENS} tokens, median of {args.rounds} rounds of {args.seconds:g} s. "
        "Tokens are those that were read by somebody who was there; the control has the same texts, ended by their limits.\n\n"
        + table(header, rows)
        + f"\n\n- {'PASS' if at_30 >= CLAIM else 'FAIL'}: with 30% cancels, tokens/s is {at_30:.3f} of the rate without "
        f"cancelling (at least {CLAIM})"
    )
    save("leaving", "python -m bench leaving", {"header": header, "rows": rows, "ratio_at_30": at_30}, text, before)


if __name__ == "__main__":
    main()
