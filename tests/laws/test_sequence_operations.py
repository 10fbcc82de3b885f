"""Random operations on a few sequences, in any order and several in one tick; what must hold is checked after each."""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call
from tests.scheduling.sequences import SumBackend, sum_config, total
from triton_trio import InternalError, Outcome
from triton_trio.request import InferenceRequest
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.scheduling import InferenceSequence, SequenceBatcher
from triton_trio.testing import assert_quiescent, open_test_server

RELEASE_LIMIT = 10.0
NARROW = 'parameters [{ key: "executing_cancel_ends_sequence" value: { string_value: "false" } }]'
CONFIGS = st.sampled_from(
    [
        sum_config("direct { }", max_batch_size=2),
        sum_config("direct { }", max_batch_size=2, instances=2),
        sum_config("direct { max_queue_delay_microseconds: 2000000 minimum_slot_utilization: 1 }", max_batch_size=2),
        sum_config("oldest { max_candidate_sequences: 2 }", max_batch_size=2),
        sum_config("oldest { max_candidate_sequences: 3 preserve_ordering: true }", max_batch_size=1, instances=2),
        sum_config("oldest { max_candidate_sequences: 2 }", max_batch_size=2, more="iterative_sequence: true"),
        sum_config("direct { }", max_batch_size=2) + NARROW,
        sum_config("oldest { max_candidate_sequences: 1 }", max_batch_size=2) + NARROW,
    ]
)
index = st.integers(0, 20)
submit = st.tuples(
    st.just("submit"),
    st.integers(0, 3),
    st.sampled_from(["", "start", "start", "end", "start end"]),
    st.sampled_from([0, 0, 3_000_000]),
)
OPERATIONS = st.lists(
    st.one_of(
        submit,
        submit,
        submit,
        st.tuples(st.sampled_from(["leave", "cancel", "finish", "finish", "fail", "reschedule", "let go"]), index),
        st.tuples(st.just("deadline"), index, st.sampled_from([0, 1, 4])),
        st.tuples(st.just("stick"), st.booleans()),
        st.tuples(st.just("advance"), st.sampled_from([0.5, 2, 6, 11])),
        st.tuples(st.just("settle down")),
        st.tuples(st.just("stop")),
    ),
    max_size=22,
)


@dataclass
class World:
    model: ScheduledModel
    batcher: SequenceBatcher
    backend: SumBackend
    nursery: trio.Nursery
    calls: list[Call] = field(default_factory=list)

    async def do(self, name: str, *args: Any) -> None:
        """One operation; most of them do not let any task run, so that several fall into one tick."""
        alive = [call for call in self.calls if call.outcome is None]
        running = self.backend.running
        if name == "submit":
            sequence_id, flags, timeout_us = args
            number = len(self.calls)
            call = Call(
                self.model,
                f"{number}",
                value=2.0**number,  # an answer tells of which requests it is the sum
                rows=1,
                sequence_id=sequence_id,
                sequence_start="start" in flags,
                sequence_end="end" in flags,
                timeout_us=timeout_us,
            )
            self.calls.append(call)
            self.nursery.start_soon(call.run, name=f"client {number}")
        elif name in ("leave", "cancel", "deadline") and alive:
            call = alive[args[0] % len(alive)]
            if name == "leave":
                call.leave()
            elif name == "cancel":
                call.request.cancel()
            else:
                call.scope.deadline = trio.current_time() + args[1]
        elif name in ("finish", "fail", "reschedule", "let go") and running:
            execution = running[args[0] % len(running)]
            if name == "fail":
                execution.fail(InternalError("the device failed"))
            else:
                {"finish": execution.finish, "reschedule": execution.reschedule, "let go": execution.let_go}[name]()
        elif name == "stick":
            self.backend.misbehaviour.ignore_release = args[0]
        elif name == "advance":
            await trio.sleep(args[0])
        elif name == "settle down":
            await wait_all_tasks_blocked()
        elif name == "stop":
            self.model.stop()

    def check(self) -> None:
        batcher, counters = self.batcher, self.model.counters
        assert counters.started == sum(counters.outcomes.values()) + len(self.model._live)
        sequences = set(batcher._sequences)
        with_slot: list[tuple[int | str, InferenceSequence]] = []
        for slots in batcher._slots.values():
            assert len(slots.taken) <= slots.count
            for slot, sequence in slots.taken.items():
                assert (sequence.slots, sequence.slot) == (slots, slot)
                with_slot.append((sequence.sequence_id, sequence))
            for sequence in slots.ready:
                assert sequence.ready
                assert slots.taken[sequence.slot] is sequence
        assert sequences >= {sequence for _, sequence in with_slot}
        assert len({sequence_id for sequence_id, _ in with_slot}) == len(with_slot)  # one of each ID
        for sequence in batcher._backlog:
            assert sequence in sequences
            assert sequence.ready
            assert sequence.slots is None
            assert sequence.first_of_its_id
        for sequence_id, sequence in batcher._live.items():
            assert sequence in sequences
            assert sequence.sequence_id == sequence_id
            assert sequence.ended is None
        # A request is in one place, and alive wherever it waits.
        waiting: list[InferenceRequest] = []
        for sequence in sequences:
            if sequence.ended is not None:
                assert not sequence.waiting
            waiting += sequence.waiting
            for request in sequence.waiting:
                assert request.outcome is None
                assert request in sequence.scope
                assert batcher._sequence_of[request] is sequence
        assert sorted(r.generation for r in waiting) == sorted(r.generation for r in batcher.queued())
        for request in batcher._sequence_of:
            assert request.outcome is None
            assert request in self.model._live
        executing = {
            member.request
            for instance in self.model.instances
            if instance.batch is not None
            for member in instance.batch.members
            if member.ready and not member.released
        }
        assert set(batcher._on_device) == executing

    def check_sum(self, call: Call) -> None:
        """Bit ``n`` of an answer is request ``n``: all are of one sequence, which has one START."""
        answer = int(total(call))
        parts = [other.request for number, other in enumerate(self.calls) if answer >> number & 1]
        assert call.request in parts
        assert len({part.sequence_id for part in parts}) == 1  # one without an ID was given one of its own
        assert sum(part.sequence_start for part in parts) <= 1
        if call.request.sequence_start:
            assert parts == [call.request]


async def run(config: str, operations: list[tuple[Any, ...]], root: Path) -> None:
    backend = SumBackend()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            open_test_server(root, {"m": config}, backend, release_limit=RELEASE_LIMIT, limit=1000)
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        model = server.model("m")
        assert isinstance(model, ScheduledModel)
        assert isinstance(model.scheduler, SequenceBatcher)
        world = World(model, model.scheduler, backend, nursery)
        for operation in operations:
            await world.do(*operation)
            world.check()
        await wait_all_tasks_blocked()
        world.check()
        # Everybody goes home: what runs is finished, what waits is served, what sticks is quarantined, what is left is idle.
        backend.misbehaviour.ignore_release = False
        backend.automatic = True
        for execution in backend.running:
            execution.finish()
        await trio.sleep(3 * RELEASE_LIMIT)
        for call in world.calls:
            if not call.ended.is_set():
                call.leave()
        for execution in backend.running:
            execution.let_go()
        await trio.sleep(RELEASE_LIMIT)
        world.check()
        for call in world.calls:
            call.check()
            if call.outcome is Outcome.OK:
                world.check_sum(call)
        ends = [end.generation for _, end in backend.sequence_ends]
        assert len(ends) == len(set(ends))
        assert_quiescent(server)


@settings(max_examples=200, deadline=None)
@given(CONFIGS, OPERATIONS)
def test_the_laws_hold_for_sequences_after_every_operation(config: str, operations: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        trio.run(run, config, operations, Path(root), clock=MockClock(autojump_threshold=0))
