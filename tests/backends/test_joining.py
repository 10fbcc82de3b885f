"""Queued requests take rows of a batch under way: the same bits for everybody, whoever comes and goes when."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import triton_trio
from triton_trio import InferenceRequest, InternalError, Outcome, Reason, RequestCancelled
from triton_trio.backends.jax import JaxBackend, PlacedStatistics
from triton_trio.batch import Batch
from triton_trio.testing import assert_quiescent

from .test_compaction import Widths
from .world import COUNTDOWN, COUNTDOWN_CONFIG, TICKER, TICKER_CONFIG, countdown, ticks, until, write_model

#: Trio runs the tasks of a tick in any order; what comes in one tick has its row by its priority.
BATCHING = "dynamic_batching { priority_levels: 9 default_priority_level: 9 }"
#: Whole numbers, so that a row's bits do not depend on the bucket.
MIXER = """
def init(params, inputs):
    return {"x": inputs["X"], "left": inputs["STEPS"][0]}

def step(params, carry):
    return {"x": carry["x"] * 1103515245 + 12345, "left": carry["left"] - 1}

def done(carry):
    return carry["left"] <= 0

def finish(params, carry):
    return {"Y": carry["x"]}
"""
MIXER_CONFIG = """
input [{ name: "X" data_type: TYPE_INT32 dims: [2] }, { name: "STEPS" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [2] }]
"""


def mixed(x: np.ndarray, steps: int) -> list[Any]:
    with np.errstate(over="ignore"):
        for _ in range(steps):
            x = x * np.int32(1103515245) + np.int32(12345)
    return x.tolist()


class Stage:
    """A served model, its gate, and clients."""

    def __init__(self, server: triton_trio.InferenceServer, gate: Widths, clients: trio.Nursery) -> None:
        self.server = server
        self.model = server.model("m")
        self.gate = gate
        self.made: dict[InferenceRequest, dict[str, np.ndarray]] = {}
        self.errors: dict[InferenceRequest, str] = {}
        self._clients = clients

    def start(self, inputs: dict[str, np.ndarray], *, priority: int = 0) -> InferenceRequest:
        request = self.model.request(inputs, priority=priority)
        self._clients.start_soon(self._call, request)
        return request

    async def _call(self, request: InferenceRequest) -> None:
        try:
            self.made[request] = dict((await self.model.infer(request)).outputs)
        except (RequestCancelled, InternalError) as exc:
            self.errors[request] = exc.message

    def start_all(self, *inputs: dict[str, np.ndarray]) -> list[InferenceRequest]:
        """In this order."""
        return [self.start(each, priority=index) for index, each in enumerate(inputs, 1)]

    async def queued(self, inputs: dict[str, np.ndarray]) -> InferenceRequest:
        """It waits in the queue, or is executed, when this returns."""
        request = self.start(inputs)
        await wait_all_tasks_blocked()
        return request

    async def all_ended(self, requests: Iterable[InferenceRequest]) -> list[bytes]:
        """The bytes of each answer; empty for one without."""
        requests = list(requests)
        await until(lambda: all(request in self.made or request in self.errors for request in requests))
        await until(lambda: self.model.instances[0].batch is None)
        return [
            b"".join(self.made[each][name].tobytes() for name in sorted(self.made[each])) if each in self.made else b""
            for each in requests
        ]

    async def together(self, *inputs: dict[str, np.ndarray]) -> list[bytes]:
        """What they get in a batch that is formed of all of them."""
        before = self.placed.joined
        answers = await self.all_ended(self.start_all(*inputs))
        assert self.placed.joined == before
        return answers

    @property
    def batch(self) -> Batch:
        batch = self.model.instances[0].batch
        assert batch is not None
        return batch

    @property
    def placed(self) -> PlacedStatistics:
        statistics = self.model.instances[0].statistics().backend
        assert isinstance(statistics, PlacedStatistics)
        return statistics


@asynccontextmanager
async def stage(
    tmp_path: Path, code: str = COUNTDOWN, config: str = COUNTDOWN_CONFIG, *, rows: int = 4, **parameters: object
) -> AsyncIterator[Stage]:
    """By default one bucket of ``rows`` rows, and chunks of one step.  The gate is closed."""
    parameters = {"buckets": rows, "ladder": 1, **parameters}
    write_model(tmp_path, code, config + BATCHING, max_batch_size=rows, **parameters)
    gate = Widths()
    gate.armed.set()
    backend = JaxBackend(executor=gate.executor)
    with trio.fail_after(30):
        async with triton_trio.open_server(tmp_path, backends={"jax": lambda: backend}) as server:
            (loaded,) = backend.statistics()
            try:
                async with trio.open_nursery() as clients:
                    yield Stage(server, gate, clients)
            finally:
                gate.open()
            model = server.model("m")
            await until(lambda: model.instances[0].batch is None)
            await wait_all_tasks_blocked()
            assert_quiescent(server)
            assert model.instances[0].statistics().backend.compiles_after_load == 0
            # E3: rows and executions add up, and so does the device's time.
            counters = model.counters
            assert counters.execution_count == sum(
                times.compute_infer.count for times in counters.by_batch_size.values()
            )
            (device,) = backend.statistics()
            charged = counters.device_seconds_useful + counters.device_seconds_wasted
            assert charged == pytest.approx(device.device_seconds - loaded.device_seconds, abs=1e-9)


async def test_law_7_one_joins_and_nobody_can_tell(tmp_path: Path) -> None:
    """Timeline: a and b run; c comes and joins at the next chunk boundary, and ends first; d takes its row."""
    a, b, c, d = (countdown(steps, seed) for seed, steps in enumerate((12, 12, 4, 6)))
    async with stage(tmp_path) as on:
        first = on.start_all(a, b)
        await on.gate.wait_dispatched(2)
        later = [await on.queued(c)]
        assert len(on.model.scheduler) == 1
        on.gate.let_end()
        await until(lambda: on.placed.joined == 1)
        assert (len(on.model.scheduler), len(on.batch.members)) == (0, 3)
        later.append(await on.queued(d))
        on.gate.open()
        got = await on.all_ended([*first, *later])
        # One after the other it would have been 12 + 6 chunks.
        assert len(on.gate.widths) < 18
        assert (on.placed.executions, on.placed.joined) == (1, 2)
        # Formed with the others in this bucket, each in the row where it was.
        assert got == await on.together(a, b, c, d)
        counters = on.model.counters
        assert counters.execution_count == 4
        assert counters.queue.count == counters.compute_infer.count == counters.success.count == 8


async def test_law_7_whoever_leaves_at_any_chunk_while_one_waits_for_a_row(tmp_path: Path) -> None:
    """Four run, a fifth waits.  One of the four leaves at chunk n, the fifth takes that row, and may leave, too."""
    inputs = [countdown(8, seed) for seed in range(4)]
    fifth = countdown(5, 9)
    async with stage(tmp_path) as on:
        on.gate.open()
        whole = await on.together(*inputs)
        instead = [await on.together(*inputs[:row], fifth, *inputs[row + 1 :]) for row in range(4)]
        for chunk in range(1, 10):
            for who, second in ((chunk % 4, None), ((chunk + 1) % 4, chunk + 2), ((chunk + 2) % 4, chunk + 4)):
                on.gate.widths.clear()
                requests = on.start_all(*inputs, fifth)

                def before(number: int, leaver: int = who, at: int = chunk, second: int | None = second) -> None:
                    if number == at:
                        requests[leaver].cancel(Reason.CLIENT_RESET)  # noqa: B023  (of this turn of the loop)
                    elif number == second:
                        requests[4].cancel(Reason.CLIENT_RESET)  # noqa: B023

                on.gate.before = before
                got = await on.all_ended(requests)
                on.gate.before = lambda chunk: None
                for index in range(4):
                    expected = (b"", whole[index]) if index == who else (whole[index],)
                    assert got[index] in expected
                # In the row of the one who left, or, if that one had its answer before, in a batch of its own.
                answers = {instead[row][row] for row in range(4)}
                assert got[4] in (answers if second is None else {b"", *answers})
                assert requests[4].outcome in (Outcome.OK, Outcome.CANCELLED)
                if second is None:
                    assert requests[4].outcome is Outcome.OK


async def test_B4_a_row_changes_hands_while_programs_with_its_last_owner_are_on_the_device(tmp_path: Path) -> None:
    """Timeline: chunks 1 and 2 have a; a leaves; b joins before chunk 2 has ended, and gets nothing of what that made."""
    got: dict[str, list[int]] = {}
    async with stage(tmp_path, TICKER, TICKER_CONFIG, rows=2) as on, trio.open_nursery() as clients:

        async def read(label: str, steps: int) -> None:
            async with on.model.open_responses(ticks(steps)) as responses:
                got[label] = []
                async for response in responses:
                    if response.outputs:
                        got[label].append(response.outputs["MADE"].item())

        leaving = trio.CancelScope()

        async def read_a() -> None:
            with leaving:
                await read("a", 8)

        clients.start_soon(read_a)
        clients.start_soon(read, "long", 12)
        await on.gate.wait_dispatched(2)
        clients.start_soon(read, "b", 5)
        await wait_all_tasks_blocked()
        leaving.cancel(reason="client_reset")
        on.gate.let_end()
        await until(lambda: on.placed.joined == 1)
        assert on.gate.ended == 1  # chunk 2 is on the device, with a in it
        on.gate.open()
    assert got == {"a": [], "long": list(range(1, 13)), "b": [1, 2, 3, 4, 5]}


async def test_one_who_leaves_between_the_join_and_the_device_was_never_there(tmp_path: Path) -> None:
    """Timeline: c joins while two chunks are on the device; it leaves before the next is made; d has its row at once."""
    async with stage(tmp_path, rows=2) as on:
        a = on.start(countdown(10, 0))
        await on.gate.wait_dispatched(2)
        c = await on.queued(countdown(4, 1))
        on.gate.let_end()
        await until(lambda: on.placed.joined == 1)
        member = on.batch.members[1]
        c.cancel(Reason.CLIENT_RESET)
        d = await on.queued(countdown(4, 2))
        on.gate.open()
        got = await on.all_ended([a, c, d])
        assert (member.useful_seconds, member.wasted_seconds, member.steps_after_cancel) == (0, 0, 0)
        assert member.released
        assert on.placed.joined == 2
        whole = await on.together(countdown(10, 0), countdown(4, 2))
        assert got == [whole[0], b"", whole[1]]


async def test_A2_the_last_one_who_joined_takes_the_execution_with_it(tmp_path: Path) -> None:
    async with stage(tmp_path, rows=2) as on:
        a = on.start(countdown(1000, 0))
        await on.gate.wait_dispatched(2)
        b = await on.queued(countdown(1000, 1))
        on.gate.let_end()
        await until(lambda: on.placed.joined == 1)
        a.cancel()
        on.gate.let_end(2)
        await on.gate.wait_ended(3)
        b.cancel()
        on.gate.open()
        assert await on.all_ended([a, b]) == [b"", b""]
        assert on.gate.dispatched < 8
        assert on.placed.cancels == 1


async def test_a_request_of_several_rows_joins_where_there_is_room(tmp_path: Path) -> None:
    """Rows 0 and 2 are free: a request of two has them both."""
    inputs = [countdown(steps, seed) for seed, steps in enumerate((3, 30, 3, 30))]
    both = countdown(6, 7, rows=2)
    async with stage(tmp_path) as on:
        on.gate.open()
        requests = on.start_all(*inputs, both)
        got = await on.all_ended(requests)
        assert (on.placed.executions, on.placed.joined) == (1, 1)
        one, two = ({name: values[row : row + 1] for name, values in both.items()} for row in range(2))
        whole = await on.together(one, inputs[1], two, inputs[3])
        assert [got[1], got[3]] == [whole[1], whole[3]]
        made = on.made[requests[4]]
        assert [made["Y"][row].tobytes() for row in range(2)] == [whole[row][4:] for row in (0, 2)]


async def test_a_failure_of_the_device_is_everybodys(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        a = on.start(countdown(9, 0))
        await on.gate.wait_dispatched(2)
        b = await on.queued(countdown(9, 1))
        on.gate.let_end()
        await until(lambda: on.placed.joined == 1)
        on.gate.fail(4, "the device failed")
        on.gate.open()
        await on.all_ended([a, b])
        assert all("the device failed" in on.errors[each] for each in (a, b))
        assert await on.together(countdown(9, 0)) != [b""]


async def test_one_joins_while_the_others_wait_for_their_readers(tmp_path: Path) -> None:
    """Timeline: a's reader does not read, so nothing is on the device; b comes, joins, and has all its answers."""
    async with stage(tmp_path, TICKER, TICKER_CONFIG, rows=2) as on:
        on.gate.open()
        async with on.model.open_responses(ticks(100)) as a:
            task = on.model.instances[0].task
            assert task is not None
            await until(lambda: task.child_nurseries)  # it waits for readers, and for nothing on the device
            async with on.model.open_responses(ticks(5)) as b:
                assert [each.outputs["MADE"].item() async for each in b if each.outputs] == [1, 2, 3, 4, 5]
            assert [each.outputs["MADE"].item() async for each in a if each.outputs] == list(range(1, 101))
        assert on.placed.joined == 1


async def test_E3_an_execution_without_end_keeps_its_books_and_no_more_than_it_has_rows(tmp_path: Path) -> None:
    """One row goes on and on, others come and go.  What is over is counted, and forgotten, while it goes on."""
    async with stage(tmp_path, rows=3) as on:
        on.gate.open()
        endless, *others = on.start_all(*(countdown(20 if seed else 10**6, seed) for seed in range(25)))
        most = 0
        while not all(request.outcome for request in others):
            await trio.lowlevel.checkpoint()
            if (batch := on.model.instances[0].batch) is not None:
                most = max(most, len(batch.members))
        # The last of them may not have been forgotten yet; nor has who came together with the one that goes on.
        assert on.model.counters.inference_count == 24
        assert on.model.counters.queue.count >= 20
        assert on.placed.device_seconds > 0
        assert most <= 3 + 2 * 2
        endless.cancel()
        await on.all_ended([endless])
        assert (on.placed.executions, on.placed.joined) == (1, 22)


async def test_E3_who_is_cancelled_after_its_neighbour_was_served_is_counted_when_its_device_has_let_go(
    tmp_path: Path,
) -> None:
    """Timeline: a is served, and nothing is left to do for it; b goes on alone, and its cancel ends the execution."""
    async with stage(tmp_path, rows=2) as on:
        a, b = on.start_all(countdown(1, 0), countdown(400, 1))
        await on.gate.wait_dispatched(2)
        member = on.batch.members[1]
        on.gate.let_end(6)
        await until(lambda: member.cohort.unretired == 1)
        b.cancel()
        on.gate.open()
        await on.all_ended([a, b])
        assert a in on.made
        assert on.model.counters.device_seconds_after_cancel == member.seconds_after_cancel > 0


async def test_a_small_batch_takes_all_who_wait_or_runs_dry_for_a_larger_one(tmp_path: Path) -> None:
    """Timeline: in a bucket of 2, b ends, and c, which waits alone, joins; c ends, and of d, e and f nobody does."""
    async with stage(tmp_path, buckets="2,4") as on:
        requests = on.start_all(countdown(400, 0), countdown(3, 1))
        await on.gate.wait_dispatched(2)
        requests.append(await on.queued(countdown(100, 2)))
        on.gate.let_end(8)
        await until(lambda: on.placed.joined == 1)
        for seed in range(3):
            requests.append(await on.queued(countdown(5, seed)))
        on.gate.open()
        await on.all_ended(requests)
        assert (on.placed.executions, on.placed.joined) == (2, 1)


async def test_a_model_may_say_that_nobody_joins(tmp_path: Path) -> None:
    async with stage(tmp_path, join="false", rows=2) as on:
        on.gate.open()
        requests = [on.start(countdown(4 + 4 * (seed % 2), seed)) for seed in range(6)]
        await on.all_ended(requests)
        assert (on.placed.executions, on.placed.joined) == (3, 0)


@pytest.mark.parametrize(("buckets", "late"), [("8", "false"), ("2,4,8", "false"), ("2,4,8", "true")])
async def test_law_7_many_come_and_go_while_the_batch_moves(tmp_path: Path, buckets: str, late: str) -> None:
    chance = random.Random(buckets)
    parameters = {"buckets": buckets, "ladder": "1,2,4", "late_enqueue": late}
    async with stage(tmp_path, MIXER, MIXER_CONFIG, rows=8, **parameters) as on:
        on.gate.open()
        requests: dict[InferenceRequest, list[Any]] = {}
        cancelled = set()
        for seed in range(150):
            rows, steps = chance.choice((1, 1, 1, 2, 3)), chance.choice((0, 3, 10, 40, 90))
            x = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, 2), np.int32)
            request = on.start({"X": x, "STEPS": np.full((rows, 1), steps, np.int32)})
            requests[request] = mixed(x, steps)
            for _ in range(chance.choice((0, 0, 2, 30, 200))):
                await trio.lowlevel.checkpoint()
            if chance.random() < 0.5:
                victim = chance.choice(list(requests))
                if victim.outcome is None:
                    victim.cancel(Reason.CLIENT_RESET)
                    cancelled.add(victim)
        await on.all_ended(requests)
        assert on.placed.joined > 10
        for request, expected in requests.items():
            if request not in cancelled:
                assert on.made[request]["Y"].tolist() == expected
