"""Sequences under everything that can happen to them at random: no slot is shared or lost, no two states are ever mixed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from tests.scheduling.sequences import sum_config
from triton_trio import InvalidArgument, Model, RequestCancelled
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.scheduling import SequenceBatcher
from triton_trio.scopes import SequenceEnd
from triton_trio.testing import open_test_server

LIVE = 1000
IDLE = 5.0


class Ledger(Backend, BackendModel, BackendInstance):
    """One instance that keeps a state of its own by correlation ID, as some models do, and compares it with the server's."""

    def __init__(self, rng: random.Random, *, rows_are_slots: bool) -> None:
        self.sums: dict[int, float] = {}
        self.rows: dict[int, int] = {}  #: the row of each sequence
        self.starts = self.ends = 0
        self.causes: set[str] = set()
        self.batcher: SequenceBatcher | None = None
        self.peak = 0
        self._rng = rng
        self._rows_are_slots = rows_are_slots

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[Ledger]:
        yield self

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[Ledger]:
        yield self

    async def execute(self, batch: Batch) -> None:
        columns = {name: batch.stack(name) for name in ("ID", "START", "READY", "SUM_IN", "INPUT0")}
        for member in batch.members:
            who, starts, ready, before, value = (float(column[member.start, 0]) for column in columns.values())
            assert bool(ready) == member.ready
            if ready:
                self._book(int(who), bool(starts), member.start, before, value)
        self._check_slots()
        await trio.sleep(self._rng.uniform(0.01, 0.3))
        total = columns["SUM_IN"] + columns["INPUT0"]
        for member in batch.live():
            rows = total[member.start : member.stop]
            batch.respond(member, {"OUTPUT0": rows, "SUM_OUT": rows})
            if self._rng.random() < 0.1:
                await batch.checkpoint()

    def _book(self, who: int, starts: bool, row: int, before: float, value: float) -> None:
        if starts:
            assert who not in self.sums, "two sequences of one ID are on the device"
            assert not (self._rows_are_slots and row in self.rows.values()), "two sequences have one row"
            self.sums[who], self.rows[who] = 0.0, row
            self.starts += 1
        assert self.sums[who] == before, "the state is another sequence's"
        assert not self._rows_are_slots or self.rows[who] == row, "a sequence was moved"
        self.sums[who] += value

    def _check_slots(self) -> None:
        assert self.batcher is not None
        (slots,) = self.batcher._slots.values()
        assert {sequence.sequence_id for sequence in slots.taken.values()} == set(self.sums)
        assert len(slots.taken) == len(self.sums) <= slots.count
        self.peak = max(self.peak, self.batcher.statistics().sequences)

    def on_sequence_end(self, end: SequenceEnd) -> None:
        assert isinstance(end.sequence_id, int)
        del self.sums[end.sequence_id], self.rows[end.sequence_id]
        self.ends += 1
        self.causes.add(end.cause.value)


class Client:
    """Plays sequences of one ID, one after the other, and compares every answer with what it has sent."""

    def __init__(self, model: Model, number: int, rng: random.Random) -> None:
        self.model = model
        self.number = number
        self.answers = 0
        self.refusals: list[str] = []
        self._rng = rng
        self._sent = 0.0

    async def run(self) -> None:
        for _ in range(2):
            await self.play()
            await trio.sleep(self._rng.choice([0, 0, 0.1, 2 * IDLE]))
        # What the last one has left ends by being idle.

    async def play(self) -> None:
        self._sent = 0.0
        alive = await self.send("start")
        for _ in range(self._rng.randrange(3)):
            if not alive:
                return
            match self._rng.randrange(8):
                case 0:
                    await trio.sleep(self._rng.uniform(0, 2 * IDLE))
                case 1:
                    await self.send_and_leave(self._rng.uniform(0, 0.4))
                case 2:
                    async with trio.open_nursery() as nursery:  # two at a time, and one of them leaves
                        nursery.start_soon(self.send_and_leave, self._rng.uniform(0, 0.3))
                        nursery.start_soon(self.send)
                case _:
                    alive = await self.send()
        if self._rng.random() < 0.7:
            await self.send("end")

    async def send(self, flags: str = "") -> bool:
        """False if the sequence is gone."""
        value = float(self._rng.randrange(1, 100))
        request = self.model.request(
            {"INPUT0": np.full((1, 2), value, np.float32)},
            sequence_id=self.number,
            sequence_start=flags == "start",
            sequence_end=flags == "end",
        )
        try:
            response = await self.model.infer(request)
        except (RequestCancelled, InvalidArgument) as exc:
            self.refusals.append(exc.message)
            return False
        self._sent += value
        assert (response.outputs["OUTPUT0"] == self._sent).all(), "a sum of another sequence"
        self.answers += 1
        return True

    async def send_and_leave(self, after: float) -> None:
        with trio.move_on_after(after):
            await self.send()


STRATEGIES = {
    "direct": ("direct { }", LIVE),
    "oldest": (f"oldest {{ max_candidate_sequences: {LIVE} }}", 64),
    "oldest with a backlog": (f"oldest {{ max_candidate_sequences: {LIVE // 2} }}", 64),
}


@pytest.mark.parametrize("name", STRATEGIES)
async def test_B2_B3_a_thousand_live_sequences_on_one_instance(
    tmp_path: Path, autojump_clock: MockClock, name: str
) -> None:
    rng = random.Random(name)
    strategy, rows = STRATEGIES[name]
    ledger = Ledger(rng, rows_are_slots=name == "direct")
    config = sum_config(strategy, idle=IDLE, max_batch_size=rows)
    async with open_test_server(tmp_path, {"m": config}, ledger, limit=10_000) as server:
        model = server.model("m")
        assert isinstance(model, ScheduledModel)
        assert isinstance(model.scheduler, SequenceBatcher)
        ledger.batcher = model.scheduler
        clients = [Client(model, number, rng) for number in range(1, LIVE + 1)]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.run, name=f"client {client.number}")
        await trio.sleep(3 * IDLE)
        assert model.scheduler.statistics().sequences == 0
    assert ledger.peak >= LIVE
    assert ledger.starts == ledger.ends == 2 * LIVE  # every one was told of, once
    assert not ledger.sums
    assert ledger.causes == {"end", "cancelled", "idle", "restarted"}
    assert sum(client.answers for client in clients) > 2 * LIVE
    for refusal in (refusal for client in clients for refusal in client.refusals):
        assert "was cancelled" in refusal or "must specify the START flag" in refusal
