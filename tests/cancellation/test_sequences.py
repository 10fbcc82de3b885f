"""A sequence is cancelled with any of its requests, wherever they are; its slot comes back once, and to the right one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.scheduling.sequences import DIRECT, OLDEST, SumBackend, World, playing, sum_config, total
from triton_trio import InferenceRequest, InvalidArgument, Model, Outcome, Reason, RequestCancelled, TritonError
from triton_trio.testing import Victim, open_test_server, orders, sweep
from triton_trio.testing.fixtures import Serve

STRATEGIES = pytest.mark.parametrize("strategy", [DIRECT, OLDEST], ids=["direct", "oldest"])


def cancelled_with_its_sequence(error: TritonError | None, because: str) -> bool:
    return (
        isinstance(error, RequestCancelled)
        and error.reason == "sequence_cancelled"
        and error.message.endswith(f"sequence 1 of model 'm' was cancelled: {because}")
    )


# One timeline each


@STRATEGIES
@pytest.mark.parametrize("who", [0, 1, 2], ids=["executing", "first queued", "last queued"])
async def test_A3_any_member_takes_all_others_along_while_the_device_is_busy(
    serve: Serve, autojump_clock: MockClock, strategy: str, who: int
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        await world.begin(1, 2)
        await world.call("busy", 2)
        neighbour = await world.call("neighbour", 2, "end", value=10)
        calls = [await world.call(label, 1) for label in ("executing", "b", "c")]
        world.backend.running[0].finish()
        await wait_all_tasks_blocked()
        assert sorted(world.backend.rows[-1]) == [1, 2]  # both sequences in one execution
        calls[who].leave()
        where = "executing" if who == 0 else "queued"
        for call in calls:
            assert call.outcome is Outcome.CANCELLED  # now, not when the device lets go
        await wait_all_tasks_blocked()
        because = f"request '{calls[who].request.request_id}' was cancelled while {where} (client_reset)"
        for call in calls:
            assert call is calls[who] or cancelled_with_its_sequence(call.error, because)
        assert world.statistics.in_slots == 2
        late = await world.call("late", 1)
        assert isinstance(late.error, InvalidArgument)
        assert "must specify the START flag on the first request" in late.error.message
        await world.finish()
        assert total(neighbour) == 12
        assert sorted(world.ends) == [(1, "cancelled"), (2, "end")]


@STRATEGIES
async def test_A3_a_cancel_in_the_backlog_is_settled_while_the_slot_is_taken(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy.replace("4", "1"), max_batch_size=1)) as world:
        holder = await world.call("holder", 2, "start end")
        backlog = [await world.call("a", 1, "start"), await world.call("b", 1)]
        other = await world.call("other", 3, "start end")
        backlog[1].leave()
        assert [call.outcome for call in backlog] == [Outcome.CANCELLED] * 2
        assert world.statistics.in_backlog == 1
        await wait_all_tasks_blocked()
        assert cancelled_with_its_sequence(backlog[0].error, "request 'b' was cancelled while queued (client_reset)")
        assert (world.statistics.sequences, world.model.counters.failures["CANCELED"]) == (2, 2)
        await world.finish()
        await world.finish()
        assert (total(holder), total(other)) == (1, 1)
        assert world.backend.rows == [(-2,), (-3,)]


@STRATEGIES
async def test_a_deadline_of_one_request_is_a_cancel_of_its_sequence(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        late = world.start("late", 1, "start")
        late.scope.deadline = trio.current_time() + 2
        await wait_all_tasks_blocked()
        mate = await world.call("mate", 1)
        await trio.sleep(3)
        assert late.outcome is Outcome.DEADLINE
        assert cancelled_with_its_sequence(mate.error, "request 'late' was cancelled while executing (deadline)")


@STRATEGIES
async def test_B2_after_a_cancel_and_an_idle_time_two_sequences_have_two_slots(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    # core#341: the cancel freed the slot, the reaper freed it again, and two clients shared one state.
    async with playing(serve, sum_config(strategy.replace("4", "2"), max_batch_size=2, idle=5)) as world:
        calls = [await world.call(f"{n}", 1, "start" if n == 0 else "") for n in range(4)]
        calls[0].leave()
        await trio.sleep(8)
        sums: dict[int, list[float]] = {2: [], 3: []}
        for turn in range(4):
            pair = [
                await world.call(f"{n}.{turn}", n, "start" if turn == 0 else "end" if turn == 3 else "", n)
                for n in (2, 3)
            ]
            assert len(set(world.slots.values()) | {"m_0_0:0"}) <= 2
            assert len(world.slots) == len(set(world.slots.values()))
            await world.finish()
            await world.finish()
            for call, n in zip(pair, (2, 3), strict=True):
                sums[n].append(total(call))
        assert sums == {2: [2, 4, 6, 8], 3: [3, 6, 9, 12]}
        assert world.ends[0] == (1, "cancelled")


@STRATEGIES
async def test_B4_the_slot_is_not_taken_before_the_device_has_let_go(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy.replace("4", "1"), max_batch_size=1)) as world:
        world.backend.misbehaviour.ignore_release = True
        executing = await world.call("executing", 1, "start")
        waiting = await world.call("waiting", 2, "start end", value=5)
        executing.leave()
        await trio.sleep(1)
        assert (world.slots, world.statistics.in_backlog) == ({1: "m_0_0:0"}, 1)
        world.backend.executions[0].let_go()
        await wait_all_tasks_blocked()
        assert world.slots == {2: "m_0_0:0"}
        await world.finish()
        assert total(waiting) == 5


@STRATEGIES
async def test_B7_a_late_cancel_of_an_old_sequence_does_not_touch_its_successor(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        world.backend.misbehaviour.ignore_release = True
        old = await world.call("old", 1, "start")
        end = await world.call("old end", 1, "end")
        new = await world.call("new", 1, "start", value=5)  # reconnected, while the old one is at work
        end.leave()  # late: its ID belongs to another now
        await wait_all_tasks_blocked()
        assert cancelled_with_its_sequence(old.error, "request 'old end' was cancelled while queued (client_reset)")
        assert new.outcome is None
        more = await world.call("more", 1, "end", value=6)  # and it still does
        assert world.statistics.in_slots == 1
        world.backend.misbehaviour.ignore_release = False
        world.backend.executions[0].let_go()
        await wait_all_tasks_blocked()
        for _ in range(2):
            await world.finish()
        assert (total(new), total(more)) == (5, 11)


@STRATEGIES
async def test_B8_reconnecting_again_and_again_with_one_ID_takes_one_slot(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        world.backend.misbehaviour.ignore_release = True
        calls = [await world.call(f"{n}", 1, "start", value=n) for n in range(5)]
        assert (world.statistics.sequences, world.statistics.in_slots) == (2, 1)
        world.backend.misbehaviour.ignore_release = False
        world.backend.executions[0].let_go()
        await wait_all_tasks_blocked()
        await world.finish()
        assert [call.outcome for call in calls] == [Outcome.CANCELLED] * 4 + [Outcome.OK]
        assert total(calls[4]) == 4
        await trio.sleep(6)
        assert world.ends == [(1, "restarted"), (1, "idle")]


# One tick

Act = Callable[[World, MockClock], None]


def submit(world: World, label: str, flags: str, value: float) -> None:
    """A request that is queued before this returns."""
    model = world.model
    request = model.request(
        {"INPUT0": np.full((1, 2), value, np.float32)},
        request_id=label,
        sequence_id=1,
        sequence_start="start" in flags,
        sequence_end="end" in flags,
    )
    model._admitted(request)
    try:
        model._check(request)
        model._enqueue(request)
    except TritonError as exc:
        request.fail_nowait(exc)  # if it was not told already
    else:
        world.callers._nursery.start_soon(read, request)


async def read(request: InferenceRequest) -> None:
    """The caller's side of :func:`submit`."""
    with suppress(TritonError), request:
        response = await request.receive()
        assert response.outputs["OUTPUT0"].flat[0] in SUMS[request.request_id]


def result(world: World, clock: MockClock) -> None:
    batch = world.model.instances[0].batch
    if batch is not None:
        for member in batch.live():
            batch.respond(member, world.backend.answer(batch, member))
        for execution in world.backend.running:
            execution.end()


def cancel(world: World, clock: MockClock) -> None:
    for call in world.callers.calls:
        if call.request.request_id == "victim":
            call.leave()


def end(world: World, clock: MockClock) -> None:
    submit(world, "end", "end", 100)


def start(world: World, clock: MockClock) -> None:
    submit(world, "restart", "start", 1000)


def idle(world: World, clock: MockClock) -> None:
    clock.jump(6)


def unload(world: World, clock: MockClock) -> None:
    world.model.begin_unload()
    world.model.stop()


ACTS: dict[str, Act] = {act.__name__: act for act in (result, cancel, end, start, idle, unload)}
#: What an answer may be: 1 was the first request of the sequence, 10 is the victim.
SUMS = {
    "start 1": {1},
    "before": {1},
    "victim": {11},
    "end": {101, 111, 1100},
    "restart": {1000},
    "neighbour": {7},
}


@STRATEGIES
@pytest.mark.parametrize("stage", ["queued", "executing", "idle"])
@pytest.mark.parametrize("order", orders(ACTS), ids="-".join)
async def test_B1_two_things_in_one_tick(
    serve: Serve, mock_clock: MockClock, strategy: str, stage: str, order: tuple[str, ...]
) -> None:
    async with playing(serve, sum_config(strategy, idle=5)) as world:
        await world.begin(1)
        if stage == "queued":
            await world.call("before", 1, value=0)
        if stage != "idle":
            await world.call("victim", 1, value=10)
        neighbour = await world.call("neighbour", 2, "start end", value=7)
        for act in order:
            ACTS[act](world, mock_clock)
        await wait_all_tasks_blocked()
        for _ in range(4):
            await world.finish()
        mock_clock.jump(6)
        await wait_all_tasks_blocked()
        for call in world.callers.calls:
            if call.output is not None:
                assert total(call) in SUMS[call.request.request_id]
        assert neighbour.outcome is (Outcome.CANCELLED if "unload" in order else Outcome.OK)
        assert world.statistics.sequences == world.statistics.in_slots == 0
        assert world.model.counters.in_flight == 0
        generations = [end.generation for _, end in world.backend.sequence_ends]
        assert len(generations) == len(set(generations))  # told once
        if "unload" in order:
            await world.server.unload_model("m")


async def test_B1_a_request_in_the_tick_in_which_the_idle_time_is_over_is_in_time(
    serve: Serve, mock_clock: MockClock
) -> None:
    async with playing(serve, sum_config(idle=5)) as world:
        await world.begin(1)
        idle(world, mock_clock)
        end(world, mock_clock)
        await wait_all_tasks_blocked()
        await world.finish()
        assert world.ends == [(1, "end")]


# Every moment


@STRATEGIES
@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
async def test_A6_B3_B9_a_cancel_at_every_scheduling_point_of_a_sequence(
    tmp_path: Path, autojump_clock: MockClock, strategy: str, position: int
) -> None:
    directories = iter(tmp_path / str(n) for n in range(1000))
    stages = set()

    async def scenario(victim: Victim) -> None:
        backend = SumBackend()
        async with open_test_server(next(directories), {"m": sum_config(strategy, idle=5)}, backend) as server:
            model = server.model("m")
            sums: dict[tuple[int, int], float] = {}

            async def sequence(number: int) -> None:
                async with trio.open_nursery() as nursery:
                    for index in range(3):
                        nursery.start_soon(one, number, index)
                        await wait_all_tasks_blocked()

            async def one(number: int, index: int) -> None:
                request = play(model, number, index)
                if (number, index) == (1, position):
                    with victim:
                        sums[number, index] = await value(model, request)
                    assert request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)
                    stages.add(request.stage.value)
                    return
                try:
                    sums[number, index] = await value(model, request)
                except RequestCancelled:
                    assert (number, request.reason) == (1, Reason.SEQUENCE_CANCELLED)
                except InvalidArgument:
                    assert number == 1

            async with trio.open_nursery() as drivers:
                drivers.start_soon(drive, backend)
                async with trio.open_nursery() as nursery:
                    for number in (0, 1, 2):
                        nursery.start_soon(sequence, number + 0, name=f"sequence {number}")
                drivers.cancel_scope.cancel()
            await trio.sleep(6)  # a sequence whose END was refused is idle
            for number in (0, 2):
                assert [sums[number, index] for index in range(3)] == [number + 1, 2 * number + 3, 3 * number + 6]
            for index in range(3):
                assert sums.get((1, index)) in (None, [2, 5, 9][index])
            assert victim.cancelled or len(sums) == 9

    assert await sweep(scenario) > 5
    assert stages >= ({"executing"} if position == 0 else {"queued", "executing"})


def play(model: Model, number: int, index: int) -> InferenceRequest:
    return model.request(
        {"INPUT0": np.full((1, 2), number + index + 1, np.float32)},
        request_id=f"{number}.{index}",
        sequence_id=number + 10,
        sequence_start=index == 0,
        sequence_end=index == 2,
    )


async def value(model: Model, request: InferenceRequest) -> float:
    return float((await model.infer(request)).outputs["OUTPUT0"][0, 0])


async def drive(backend: SumBackend) -> None:
    number = 0
    while True:
        execution = await backend.wait_execution(number)
        await wait_all_tasks_blocked()
        execution.step()
        await wait_all_tasks_blocked()
        execution.finish()
        number += 1


@STRATEGIES
@pytest.mark.parametrize("how", ["answered", "cancelled while executing", "cancelled while queued"])
async def test_C7_a_live_sequence_keeps_no_request_s_tensors(
    serve: Serve, autojump_clock: MockClock, strategy: str, how: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        await world.begin(1)
        gc.disable()  # a cycle would keep them until some later day
        try:
            alive = []
            for label in ("a", "b"):
                call = await world.call(label, 1)
                alive.append(weakref.ref(call.request.inputs["INPUT0"]))
            if how != "answered":
                world.callers.calls[-1 if "queued" in how else -2].leave()
            del call
            await world.finish()
            await world.finish()
            world.callers.calls.clear()
            await wait_all_tasks_blocked()
            assert [array() for array in alive] == [None, None]
        finally:
            gc.enable()
        await trio.sleep(6)
