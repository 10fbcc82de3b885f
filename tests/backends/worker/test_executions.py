"""Executions in a worker: what its server, its clients and its backend see.  The worker is a task; see world.py."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InvalidArgument, Model, Outcome
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch
from triton_trio.instance import InstanceState
from triton_trio.request import RESPONSE_BUFFER
from triton_trio.scopes import SequenceEndCause
from triton_trio.testing import ScriptedBackend, open_test_server, scripted_config

from .world import Workers, workers

PLAIN = scripted_config()
BATCHING = scripted_config(max_batch_size=8, batching="max_queue_delay_microseconds: 1000")
DECOUPLED = scripted_config(max_batch_size=8, batching="max_queue_delay_microseconds: 1000", decoupled=True)


async def test_a_request_is_answered_and_its_time_counted(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(lambda stacked: stacked * 2)
    async with workers(tmp_path, PLAIN, hosted) as (server, _), calling(server.model("m")) as callers:
        a = await callers.call("a", value=3)
        execution = await hosted.wait_execution()
        execution.call(lambda: setattr(execution.batch, "compute_infer_at", trio.current_time()))
        await trio.sleep(5)
        execution.call(lambda: execution.batch.charge(execution.batch.members[0], 4.5))
        execution.finish()
        await a.ended.wait()
        assert a.output.tolist() == [6, 6]
        await wait_all_tasks_blocked()
        counters = server.model("m").counters
        assert counters.compute_infer.seconds == pytest.approx(5)
        assert (counters.device_seconds_useful, counters.device_seconds_wasted) == (4.5, 0)


def refuse() -> None:
    raise InvalidArgument("no")


@pytest.mark.parametrize("end", ["finish", "fail"])
async def test_law_14_tensors_are_free_when_their_execution_has_ended(
    tmp_path: Path, autojump_clock: MockClock, end: str
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, BATCHING, hosted) as (server, _), calling(server.model("m")) as callers:
        gc.disable()
        try:
            a, b = [await callers.call(label, rows=1) for label in "ab"]
            execution = await hosted.wait_execution()
            arrays = [weakref.ref(member.inputs["INPUT0"]) for member in execution.batch.members]
            a.leave()
            if end == "finish":
                execution.finish()
            else:
                execution.call(refuse)  # not fail(), which keeps what it raises
            await b.ended.wait()
            await wait_all_tasks_blocked()
            assert [array() is None for array in arrays] == [True, True]
        finally:
            gc.enable()


async def test_law_7_who_leaves_a_batch_in_a_worker_disturbs_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(lambda stacked: stacked + 1)
    async with workers(tmp_path, BATCHING, hosted) as (server, _), calling(server.model("m")) as callers:
        a, b, c = [await callers.call(label, value=rows, rows=rows) for rows, label in enumerate("abc", 1)]
        execution = await hosted.wait_execution()
        execution.step()
        await wait_all_tasks_blocked()
        b.leave()
        assert b.outcome is Outcome.CANCELLED  # at this instant
        execution.step()
        execution.finish()
        await a.ended.wait()
        await c.ended.wait()
        assert execution.live == [("a", "b", "c"), ("a", "c")]
        assert a.output.tolist() == [[2, 2]]
        assert c.output.tolist() == [[4, 4]] * 3


async def test_law_6_when_the_last_has_left_the_instance_waits_for_the_worker(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()
    hosted.misbehaviour.ignore_release = True
    async with workers(tmp_path, BATCHING, hosted) as (server, backend), calling(server.model("m")) as callers:
        (instance,) = server.model("m").instances
        a, b = [await callers.call(label, rows=1) for label in "ab"]
        execution = await hosted.wait_execution()
        a.leave()
        await wait_all_tasks_blocked()
        assert execution.cancelled_after is None
        b.leave()
        await wait_all_tasks_blocked()
        assert (a.ended.is_set(), b.ended.is_set(), execution.cancelled_after) == (True, True, 0)
        assert instance.state is InstanceState.EXECUTING
        execution.let_go()
        await wait_all_tasks_blocked()
        assert instance.state is InstanceState.IDLE
        assert not backend.child.killed


async def test_law_16_device_seconds_of_those_who_left_come_across(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, BATCHING, hosted) as (server, _), calling(server.model("m")) as callers:
        a, b = [await callers.call(label, rows=1) for label in "ab"]
        execution = await hosted.wait_execution()
        members = execution.batch.members

        def account() -> None:
            execution.batch.charge(members[0], 1.0)
            execution.batch.charge(members[1], 2.0)
            members[0].saved_seconds, members[0].steps_after_cancel = 3.0, 4
            members[0].release()

        a.leave()
        await wait_all_tasks_blocked()
        (member, _) = server.model("m").instances[0].batch.members
        assert not member.released
        execution.call(account)
        await wait_all_tasks_blocked()
        assert member.released and member.steps_after_cancel == 4
        members[0].steps_after_cancel = 6
        execution.finish()
        await b.ended.wait()
        await wait_all_tasks_blocked()
        counters = server.model("m").counters
        seconds = (counters.device_seconds_useful, counters.device_seconds_wasted, counters.device_seconds_saved)
        assert seconds == (2.0, 1.0, 3.0)
        assert member.steps_after_cancel == 6


async def test_an_error_in_the_worker_is_the_requests_error(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted) as (server, backend), calling(server.model("m")) as callers:
        a = await callers.call("a")
        (await hosted.wait_execution()).fail(InvalidArgument("the model does not like it"))
        b = await callers.call("b")
        (await hosted.wait_execution(1)).fail(ZeroDivisionError("by zero"))
        await b.ended.wait()
        assert isinstance(a.error, InvalidArgument) and a.error.message == "the model does not like it"
        assert b.error.message == "model 'm' failed: ZeroDivisionError: by zero"
        assert not backend.child.killed


LONG = {"text": "\x01" * 11_300_000}  # six bytes each, as JSON


async def test_law_7_who_has_too_long_a_text_is_refused_alone(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(lambda stacked: stacked + 1)
    async with workers(tmp_path, BATCHING, hosted) as (server, backend), calling(server.model("m")) as callers:
        a, b, c = [
            callers.start(label, value=rows, rows=rows, parameters=LONG if label == "b" else {"text": "x" * 1000})
            for rows, label in enumerate("abc", 1)
        ]
        await b.ended.wait()
        assert isinstance(b.error, InvalidArgument)
        assert b.error.message == (
            "[request id: b] the ids and parameters of this request have 11300005 characters together, and model 'm', "
            "which is in a worker process, takes 1048576; send long texts as BYTES tensors"
        )
        execution = await hosted.wait_execution()
        execution.step()
        execution.finish()
        await a.ended.wait()
        await c.ended.wait()
        assert (len(execution.live[0]), execution.rows) == (2, 6)
        assert (a.output.tolist(), c.output.tolist()) == ([[2, 2]], [[4, 4]] * 3)
        assert len(backend.children) == 1


async def test_a_batch_of_which_all_are_refused_is_not_executed(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, PLAIN, hosted) as (server, backend), calling(server.model("m")) as callers:
        a = callers.start("a", parameters=LONG)
        b = callers.start("b" * ((1 << 20) + 1))
        c = callers.start("c" * (1 << 20))
        for call in (a, b, c):
            await call.ended.wait()
        assert isinstance(a.error, InvalidArgument) and isinstance(b.error, InvalidArgument)
        assert c.outcome is Outcome.OK
        assert (len(hosted.executions), len(backend.children)) == (1, 1)


async def test_no_batch_is_too_long_if_none_of_its_requests_is(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, BATCHING, hosted) as (server, backend), calling(server.model("m")) as callers:
        text = "\N{GRINNING FACE}" * 1_000_000  # twelve bytes each, as JSON
        calls = [callers.start(str(number), rows=1, parameters={"text": text}) for number in range(6)]
        for call in calls:
            await call.ended.wait()
        assert {call.outcome for call in calls} == {Outcome.OK}
        assert (len(hosted.executions), len(backend.children)) == (1, 1)


# Readers


async def test_law_12_a_slow_reader_holds_back_its_row_in_the_worker_and_nobody_else(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, DECOUPLED, hosted) as (server, _):
        model = server.model("m")
        one = model.request({"INPUT0": np.float32([[1, 1]])}, request_id="slow")
        other = model.request({"INPUT0": np.float32([[2, 2]])}, request_id="quick")
        read = 0

        async def quick() -> None:
            nonlocal read
            async with model.open_responses(other) as responses:
                async for _ in responses:
                    read += 1

        async with trio.open_nursery() as nursery, model.open_responses(one) as slow:
            nursery.start_soon(quick)
            execution = await hosted.wait_execution()
            first, second = execution.batch.members
            if first.request.request_id == "quick":
                first, second = second, first
            for _ in range(5 * RESPONSE_BUFFER):
                while first.can_send:
                    execution.batch.respond(first, execution.answer(first), final=False)
                    await wait_all_tasks_blocked()
                execution.batch.respond(second, execution.answer(second), final=False)
                await wait_all_tasks_blocked()
                assert second.can_send
            assert read == 5 * RESPONSE_BUFFER
            waiting = len(one._buffer)
            assert RESPONSE_BUFFER <= waiting <= 2 * RESPONSE_BUFFER
            for _ in range(waiting):
                await anext(slow)
            await wait_all_tasks_blocked()
            assert first.can_send
            execution.finish()
            assert [response.final async for response in slow] == [True]


async def test_a_sender_in_the_worker_waits_until_its_reader_has_caught_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, DECOUPLED, hosted) as (server, _):
        async with server.model("m").open_responses({"INPUT0": np.float32([[1, 1]])}) as responses:
            execution = await hosted.wait_execution()
            for index in range(100):
                execution.emit(final=index == 99)
            execution.end()
            await wait_all_tasks_blocked()
            assert not execution.ended.is_set()
            assert len([response async for response in responses]) == 100


# The rest of what a backend can do


SEQUENCES = scripted_config(
    max_batch_size=4,
    sequences="""oldest { max_candidate_sequences: 4 } iterative_sequence: true
      control_input [{ name: "START", control [{ kind: CONTROL_SEQUENCE_START, int32_false_true: [0, 1] }] }]""",
)


async def test_sequences_are_scheduled_again_and_their_end_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, SEQUENCES, hosted) as (server, _), calling(server.model("m")) as callers:
        a = await callers.call("a", rows=1, sequence_id=5, sequence_start=True, sequence_end=True)
        first = await hosted.wait_execution()
        assert first.batch.members[0].inputs["START"].tolist() == [[1]]
        first.reschedule()
        second = await hosted.wait_execution(1)
        assert second.batch.members[0].inputs["START"].tolist() == [[0]]
        second.finish()
        await a.ended.wait()
        await wait_all_tasks_blocked()
        ((name, end),) = hosted.sequence_ends
        assert (name, end.sequence_id, end.cause) == ("m_0_0", 5, SequenceEndCause.END)


async def test_the_end_of_a_sequence_whose_id_is_too_long_is_not_told(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend(automatic=True)
    config = scripted_config(max_batch_size=2, sequences="direct {}")
    async with workers(tmp_path, config, hosted) as (server, _), calling(server.model("m")) as callers:
        for sequence_id in ("x" * (1 << 20) + "x", "x" * (1 << 19)):
            a = await callers.call("a", rows=1, sequence_id=sequence_id, sequence_start=True, sequence_end=True)
            await a.ended.wait()
            await wait_all_tasks_blocked()
        assert [len(end.sequence_id) for _, end in hosted.sequence_ends] == [1 << 19]


async def test_a_row_that_nobody_fills_is_one_in_the_worker_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    config = scripted_config(max_batch_size=2, sequences="direct {}")
    hosted = ScriptedBackend()
    async with workers(tmp_path, config, hosted) as (server, _), calling(server.model("m")) as callers:
        start = {"rows": 1, "sequence_start": True}
        a = await callers.call("a", sequence_id=1, value=1, **start)
        (await hosted.wait_execution(0)).finish()
        b = await callers.call("b", sequence_id=2, value=2, sequence_end=True, **start)
        execution = await hosted.wait_execution(1)
        assert [member.ready for member in execution.batch.members] == [False, True]
        execution.finish()
        await b.ended.wait()
        assert b.output.tolist() == [[2, 2]]
        c = await callers.call("c", sequence_id=1, rows=1, sequence_end=True)
        (await hosted.wait_execution(2)).finish()
        await c.ended.wait()
        assert a.outcome is Outcome.OK


@dataclass(frozen=True)
class Bucket:
    k: int


@dataclass(frozen=True)
class Counts:
    executions: int
    buckets: tuple[Bucket, ...]
    ms: float | None


async def test_lanes_requests_that_wait_and_statistics(tmp_path: Path, autojump_clock: MockClock) -> None:
    seen: list[int] = []

    async def read(model: Model) -> None:
        async with model.open_responses({"INPUT0": np.float32([1, 2])}) as responses:
            async for _ in responses:
                pass

    class Lanes(Backend):
        """Two lanes; two steps an execution, when they are let."""

        def __init__(self) -> None:
            self.steps = trio.lowlevel.ParkingLot()

        @asynccontextmanager
        async def open_model(self, context: ModelContext) -> AsyncIterator[BackendModel]:
            backend = self

            class Model(BackendModel):
                def lanes(self, placement: Placement) -> int:
                    return 2

                @asynccontextmanager
                async def open_instance(self, placement: Placement) -> AsyncIterator[BackendInstance]:
                    yield Instance()

            class Instance(BackendInstance):
                executions = 0

                async def execute(self, batch: Batch) -> None:
                    self.executions += 1
                    for _ in range(2):
                        await backend.steps.park()
                        seen.append(context.waiting())
                        batch.respond(batch.members[0], {}, final=False)

                def statistics(self) -> Counts:
                    return Counts(self.executions, (Bucket(1), Bucket(2)), None)

            yield Model()

    hosted = Lanes()
    async with trio.open_nursery() as nursery:
        backend = Workers(hosted, nursery)
        async with open_test_server(
            tmp_path, {"m": scripted_config(decoupled=True)}, backend, limit=math.inf
        ) as server:
            model = server.model("m")
            assert [instance.name for instance in model.instances] == ["m_0_0_0", "m_0_0_1"]
            async with trio.open_nursery() as clients:
                for _ in range(3):
                    clients.start_soon(read, model)
                    await wait_all_tasks_blocked()
                for _ in range(4):
                    await wait_all_tasks_blocked()
                    hosted.steps.unpark_all()
            assert seen == [0, 0, 1, 1, 0, 0]
            for instance in model.instances:
                instance.statistics()
            await wait_all_tasks_blocked()
            one, other = [instance.statistics().backend for instance in model.instances]
            assert one.pid == other.pid == 1000
            assert one.backend.executions + other.backend.executions == 3
            assert [bucket.k for bucket in one.backend.buckets] == [1, 2]
            assert (type(one.backend).__name__, type(one.backend.buckets[0]).__name__) == ("Counts", "Bucket")
            await wait_all_tasks_blocked()
