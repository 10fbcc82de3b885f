"""(j) What readers who walk away cost those who stay: tokens a second at 0, 10, 30 and 60% of cancelled texts.

SmolLM2-135M with 8 slots and 12 readers in a closed loop, three times on one device, side by side: nobody leaves (*calm*), a
share of the texts is cancelled after some tokens (*leaving*), and the very same texts end after the same tokens by their own
limits (*control*).  The first two are what cancels change; the last two, what cancelling costs, for a text that is cut short
leaves less to read, whoever cuts it.

Their programs alternate on the device, so whatever the machine does meanwhile is in all three: in rounds, one after the other,
the same load differed by 5% from minute to minute.  The rate of each is its tokens by second of device time, wasted ones
included.  That would hide it if a cancel let the device run dry; so calm and leaving also run alone, each after the other, and
how much of the clock the device was busy is in the table.  How much is wasted is measured there, too, where a cancel finds the
device at work for its own model.
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

SLOTS, READERS = 8, 12
#: An answer in a conversation: with much shorter ones most of the time goes into prompts, and what is compared is their number.
#: They differ: texts that all begin and end together need fewer blocks of attention, until somebody leaves.
SHORTEST, LONGEST = 96, 288
SHARES = (0.1, 0.3, 0.6)
LOADS = ("calm", "leaving", "control")
#: The measured time is cut into so many parts, to see how far they differ.
PARTS = 4
CLAIM = 0.97


@dataclass(frozen=True)
class Reading:
    """Of one load, up to now."""

    at: float  #: on the clock, seconds
    tokens: int  #: read by somebody who was there
    seconds: float  #: of the device
    wasted: float  #: of these


@dataclass
class Load:
    """One of the three."""

    name: str
    model: ScheduledModel
    texts: list[tuple[Text, bool]] = field(default_factory=list)  #: and whether its reader stays
    readings: list[Reading] = field(default_factory=list)

    def look(self) -> None:
        schedule = engine(self.model).schedule
        spent = schedule.useful_seconds + schedule.wasted_seconds + schedule.unpaid_seconds
        tokens = sum(len(text.tokens) for text, _ in self.texts)
        self.readings.append(Reading(time.perf_counter(), tokens, spent, schedule.wasted_seconds))

    def rate(self, part: int | None = None) -> float:
        """Tokens by second of device time."""
        first, last = (0, -1) if part is None else (part, part + 1)
        return (self.readings[last].tokens - self.readings[first].tokens) / (
            self.readings[last].seconds - self.readings[first].seconds
        )

    def wasted(self) -> float:
        """Of its device time."""
        first, last = self.readings[0], self.readings[-1]
        return (last.wasted - first.wasted) / (last.seconds - first.seconds)

    def busy(self) -> float:
        """Device time by time on the clock."""
        first, last = self.readings[0], self.readings[-1]
        return (last.seconds - first.seconds) / (last.at - first.at)

    def gaps(self) -> list[float]:
        """Seconds between tokens of those who stayed."""
        stayed = [text.at for text, stays in self.texts if stays]
        return [after - at for times in stayed for at, after in itertools.pairwise(times) if after - at > 1e-4]


def plan(share: float) -> Iterator[tuple[int, int, int | None]]:
    """Of each text, in order: which prompt, how many tokens, and after how many its reader walks away, if at all."""
    rng = np.random.default_rng(0)
    for number in itertools.count():
        leaves = rng.random() < share
        tokens = int(rng.integers(SHORTEST, LONGEST + 1))
        after = int(rng.integers(1, tokens))
        yield number, tokens, after if leaves else None


async def reader(load: Load, asked: list[np.ndarray], texts: Iterator[tuple[int, int, int | None]]) -> None:
    while True:
        number, tokens, after = next(texts)
        text = Text()
        load.texts.append((text, after is None))
        prompt = asked[number % len(asked)]
        if load.name == "control" or after is None:
            await read(load.model, prompt, after or tokens, text)
        else:
            await read(load.model, prompt, tokens, text, leave_after=after)


async def side_by_side(loads: list[Load], share: float, warm: float, seconds: float) -> None:
    asked = prompts(64, tokens=30)
    async with trio.open_nursery() as nursery:
        for load in loads:
            texts = plan(0.0 if load.name == "calm" else share)
            for _ in range(READERS):
                nursery.start_soon(reader, load, asked, texts, name="reader")  # Owner: this nursery; cancelled below.
        await trio.sleep(warm)
        for load in loads:
            load.look()
        for _ in range(PARTS):
            await trio.sleep(seconds / PARTS)
            for load in loads:
                load.look()
        nursery.cancel_scope.cancel(reason="that was long enough")
    # The device still works for those who were cancelled with it.
    while any(instance.batch is not None for load in loads for instance in load.model.instances):  # noqa: ASYNC110
        await trio.sleep(0.001)


async def measure(shares: tuple[float, ...], warm: float, seconds: float) -> tuple[list[list[object]], float]:
    rows: list[list[object]] = []
    at_30 = float("nan")
    with models(**{name: {"slots": SLOTS, "context": 384} for name in LOADS}) as root:
        async with open_server(root) as server:

            def load(name: str) -> Load:
                model = server.model(name)
                assert isinstance(model, ScheduledModel)
                return Load(name, model)

            for share in shares:
                calm, leaving, control = loads = [load(name) for name in LOADS]
                await side_by_side(loads, share, warm, seconds)
                alone, calm_alone = load("leaving"), load("calm")
                for one in (alone, calm_alone):
                    await side_by_side([one], share, warm / 4, seconds / 4)
                parts = [leaving.rate(part) / calm.rate(part) for part in range(PARTS)]
                # On the clock, too: the share of it that the device worked is in the ratio.
                ratio = leaving.rate() / calm.rate() * alone.busy() / calm_alone.busy()
                if share == 0.3:
                    at_30 = ratio
                middle = percentile(calm.gaps(), 50)
                rows.append(
                    [
                        f"{share:.0%}",
                        *(round(load.rate(), 1) for load in loads),
                        round(ratio, 3),
                        f"{min(parts):.3f} to {max(parts):.3f}",
                        round(leaving.rate() / control.rate(), 3),
                        round(100 * alone.wasted(), 2),
                        f"{100 * calm_alone.busy():.2f} / {100 * alone.busy():.2f}",
                        round(percentile(leaving.gaps(), 50) / middle, 3),
                        round(percentile(leaving.gaps(), 99) / percentile(calm.gaps(), 99), 3),
                    ]
                )
    return rows, at_30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="that are measured of each share")
    parser.add_argument(
        "--warm", type=float, default=40.0, help="before them, until texts begin and end at different times"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of cancelled texts")
    args = parser.parse_args()
    before = machine() | {"device": str(jax.devices()[0])}
    rows, at_30 = trio.run(measure, tuple(args.shares), args.warm, args.seconds)
    header = [
        "cancelled",
        "calm, tokens by device second",
        "leaving",
        "control",
        "leaving × calm, on the clock",
        f"in {PARTS} parts of the time",
        "leaving × control",
        "device time wasted alone, %",
        "device busy alone, % of the clock, calm / leaving",
        "neighbours' next token, p50 × calm",
        "p99 × calm",
    ]
    text = (
        f"{SLOTS} slots, {READERS} readers, texts of {SHORTEST} to {LONGEST} tokens; calm, leaving and control side by side for "
        f"{args.seconds:g} s. Tokens are those that were read by somebody who was there; the control has the same texts as "
        "leaving, ended by their limits. A program's device time counts where it ends, so a busy device may show some "
        "hundredths of a percent over 100.\n\n"
        + table(header, rows)
        + f"\n\n- {'PASS' if at_30 >= CLAIM else 'FAIL'}: with 30% cancels, tokens/s is {at_30:.3f} of the rate without "
        f"cancels (at least {CLAIM})"
    )
    save("leaving", "python -m bench leaving", {"header": header, "rows": rows, "ratio_at_30": at_30}, text, before)


if __name__ == "__main__":
    main()
