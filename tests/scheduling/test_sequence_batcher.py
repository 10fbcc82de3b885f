"""What belongs to which sequence, and the ways in which a sequence ends: the same for both strategies."""

from __future__ import annotations

import logging
import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.scheduling.sequences import DIRECT, OLDEST, playing, sum_config, total
from triton_trio import InternalError, InvalidArgument, Outcome, Reason, RequestCancelled, Unavailable
from triton_trio.config import parse_model_config
from triton_trio.observe import tree
from triton_trio.observe.statistics import FailureReason
from triton_trio.scheduling import make_scheduler
from triton_trio.scopes import SequenceEnd
from triton_trio.testing.fixtures import Serve

STRATEGIES = pytest.mark.parametrize("strategy", [DIRECT, OLDEST], ids=["direct", "oldest"])
MUST_START = (
    "inference request for sequence {} to model 'm' must specify the START flag on the first request of the sequence"
)


# Which sequence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_id": 7}, MUST_START.format(7)),
        ({"sequence_id": 7, "sequence_end": True}, MUST_START.format(7)),
        (
            {"sequence_start": True},
            "inference request to model 'm' must specify a non-zero or non-empty correlation ID",
        ),
        (
            {"sequence_id": "", "sequence_start": True},
            "inference request to model 'm' must specify a non-zero or non-empty correlation ID",
        ),
        (
            {"sequence_id": 7, "sequence_start": True, "rows": 2},
            "inference request to model 'm' must specify batch-size 1 due to requirements of sequence batcher",
        ),
    ],
)
async def test_requests_of_no_sequence_are_refused_in_triton_s_words(
    serve: Serve, autojump_clock: MockClock, options: dict[str, object], message: str
) -> None:
    async with playing(serve, sum_config()) as world:
        call = world.callers.start("a", **{"rows": 1, **options})
        await call.ended.wait()
        assert isinstance(call.error, InvalidArgument)
        assert call.error.message == message
        assert world.model.counters.failures == {FailureReason.OTHER: 1}


async def test_an_ID_the_model_cannot_be_told_starts_nothing(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config()) as world:
        call = await world.call("a", "seven", "start")
        assert isinstance(call.error, InvalidArgument)
        assert world.statistics.sequences == 0


@STRATEGIES
async def test_B8_a_START_on_a_live_ID_ends_the_old_sequence_first(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        await world.begin(7)
        executing = await world.call("executing", 7, value=10)
        queued = await world.call("queued", 7, value=20)
        again = await world.call("again", 7, "start", value=5)
        for call in (executing, queued):
            assert isinstance(call.error, RequestCancelled)
            assert call.request.reason is Reason.SEQUENCE_CANCELLED
            assert call.error.message.endswith(
                "sequence 7 of model 'm' was cancelled: a START came for its correlation ID"
            )
        assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
            "sequence 7 for model 'm' has a conflict. The previous sequence did not end before this sequence start. "
            "Previous sequence will be terminated early."
        ]
        assert world.ends == [(7, "restarted")]
        await world.finish()
        assert total(again) == 5  # a new state
        assert world.backend.rows == [(-7,), (7,), (-7,)]
        await trio.sleep(6)
        assert world.ends == [(7, "restarted"), (7, "idle")]


@STRATEGIES
async def test_B7_the_ID_is_free_when_the_END_is_queued_and_the_two_never_meet(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        old = [await world.call("old 1", 7, "start", value=1), await world.call("old 2", 7, "end", value=2)]
        late = await world.call("late", 7)
        assert isinstance(late.error, InvalidArgument)
        assert late.error.message == MUST_START.format(7)
        new = [await world.call("new 1", 7, "start", value=10), await world.call("new 2", 7, "end", value=20)]
        newer = await world.call("newer", 7, "start end", value=100)
        assert world.slots == {7: "m_0_0:0"}  # though there are three more
        for _ in range(5):
            await world.finish()
        assert [total(call) for call in (*old, *new, newer)] == [1, 3, 10, 30, 100]
        assert world.backend.rows == [(-7,), (7,), (-7,), (7,), (-7,)]


@STRATEGIES
async def test_a_request_s_own_error_leaves_its_sequence_alive(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        await world.begin(7)
        failing = await world.call("failing", 7, value=10)
        next_one = await world.call("next", 7, "end", value=20)
        world.backend.running[0].fail(InternalError("the device failed"))
        await wait_all_tasks_blocked()
        await world.finish()
        assert failing.outcome is Outcome.ERROR
        assert total(next_one) == 21  # what failed has left no trace in the state


# The end by itself


@STRATEGIES
async def test_an_idle_sequence_ends_silently_and_a_busy_one_is_not_idle(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy, idle=5)) as world:
        await world.begin(7)
        await trio.sleep(4)
        call = await world.call("a", 7)
        await trio.sleep(20)  # on the device
        await world.finish()
        assert total(call) == 2
        await trio.sleep(4.9)
        assert world.statistics.sequences == 1
        await trio.sleep(0.2)
        assert world.statistics.sequences == 0
        assert world.ends == [(7, "idle")]
        late = await world.call("b", 7)
        assert late.error is not None
        assert late.error.message == MUST_START.format(7)
        assert caplog.records == []


async def test_what_waits_for_a_slot_is_not_idle(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config(max_batch_size=1, idle=5)) as world:
        holder = await world.call("holder", 1, "start end")
        waiting = [await world.call("a", 2, "start", value=3), await world.call("b", 2, "end", value=4)]
        await trio.sleep(50)
        for _ in range(3):
            await world.finish()
        assert [total(call) for call in (holder, *waiting)] == [1, 3, 7]


@STRATEGIES
async def test_a_sequence_that_gets_no_slot_in_time_is_turned_away_whole(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy.replace("4", "1"), max_batch_size=1)) as world:
        holder = await world.call("holder", 1, "start", timeout_us=1_000_000)
        first = await world.call("a", 2, "start")
        second = await world.call("b", 2, timeout_us=3_000_000)
        other = await world.call("c", 3, "start end")
        await trio.sleep(2.9)
        assert not second.ended.is_set()
        await trio.sleep(0.2)
        for call in (first, second):
            assert isinstance(call.error, Unavailable)
            assert call.error.message == "timeout of the corresponding sequence has been expired"
            assert call.outcome is Outcome.REJECTED
        assert world.model.counters.failures == {FailureReason.REJECTED: 2}
        late = await world.call("late", 2)
        assert isinstance(late.error, InvalidArgument)
        more = await world.call("more", 1, "end", timeout_us=1_000_000)
        await trio.sleep(20)  # for who has a slot it does not count
        for _ in range(3):
            await world.finish()
        assert [total(call) for call in (holder, more, other)] == [1, 2, 1]
        assert world.ends == [(1, "end"), (3, "end")]  # it was never executed, so the model knows nothing of it


# What the model is told


@STRATEGIES
async def test_a_model_is_told_of_every_end_before_the_slot_is_taken_again(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy.replace("4", "2"), max_batch_size=2)) as world:
        await world.begin(1, 2)
        log: list[object] = []
        world.backend.rows = log  # type: ignore[assignment]
        world.model.instances[0].seat.on_sequence_end = log.append
        await world.call("busy", 1)
        leaver, stays = await world.call("leaves", 1), await world.call("stays", 2)
        waiting = await world.call("3", 3, "start end")
        await world.finish()
        assert len(log) == 2
        leaver.leave()
        await trio.sleep(60)
        assert len(log) == 2  # its row is on the device, with another's
        await world.finish()
        told = log[2]
        assert isinstance(told, SequenceEnd)
        assert (told.sequence_id, told.cause, told.reason) == (1, "cancelled", "client_reset")
        assert log[3:] == [(-3,)]
        await world.finish()
        await trio.sleep(6)
        causes = [(end.sequence_id, end.cause) for end in log if isinstance(end, SequenceEnd)]
        assert causes == [(1, "cancelled"), (3, "end"), (2, "idle")]
        assert (total(stays), total(waiting)) == (2, 1)


async def test_a_hook_that_fails_changes_nothing(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(end: SequenceEnd) -> None:
        raise ValueError("no such sequence")

    async with playing(serve, sum_config(max_batch_size=1)) as world:
        world.model.instances[0].seat.on_sequence_end = fail
        calls = [await world.call(f"{n}", n, "start end") for n in (1, 2)]
        await world.finish()
        await world.finish()
        assert [total(call) for call in calls] == [1, 1]
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        f"model m failed in on_sequence_end of sequence {n}" for n in (1, 2)
    ]


# Instances and models that end


@STRATEGIES
async def test_B5_a_quarantined_instance_s_sequences_end_and_the_backlog_goes_to_another(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    strategy = strategy.replace("4", "2")
    async with playing(serve, sum_config(strategy, max_batch_size=2, instances=2), release_limit=3.0) as world:
        stuck = [await world.call("stuck", 1, "start")]
        (execution,) = world.backend.running
        mates = [await world.call("mate", 2, "start"), await world.call("mate's next", 2)]
        backlog = [await world.call(f"{n}", n, "start end") for n in (3, 4)]
        world.backend.misbehaviour.ignore_release = True
        stuck[0].leave()
        await trio.sleep(3.1)
        world.backend.misbehaviour.ignore_release = False
        broken = execution.instance
        assert world.ends == [(1, "cancelled")]
        again = await world.call("again", 1, "start end", value=9)
        for _ in range(4):
            await world.finish()
        assert {execution.instance for execution in world.backend.executions[1:]} != {broken}
        assert [total(call) for call in (*mates, *backlog, again)] == [1, 2, 1, 1, 9]
        await trio.sleep(6)
        assert world.statistics.in_slots == 0


async def test_B5_what_waits_behind_a_quarantined_instance_is_told(serve: Serve, autojump_clock: MockClock) -> None:
    strategy = "oldest { max_candidate_sequences: 2 }"
    async with playing(serve, sum_config(strategy, max_batch_size=1), release_limit=3.0) as world:
        await world.begin(1, 2)
        world.backend.misbehaviour.ignore_release = True
        stuck = await world.call("stuck", 1)
        behind = await world.call("behind", 2)
        backlog = await world.call("backlog", 3, "start")
        stuck.leave()
        await trio.sleep(2.9)
        assert not behind.ended.is_set()
        await trio.sleep(0.2)
        assert isinstance(behind.error, Unavailable)
        assert behind.error.message == (
            "sequence 2 of model 'm' has ended: its instance m_0_0 is quarantined; start it again"
        )
        assert isinstance(backlog.error, Unavailable)
        assert "all are quarantined" in backlog.error.message
        assert {behind.outcome, backlog.outcome} == {Outcome.REJECTED}
        assert sorted(world.ends) == [(1, "cancelled"), (2, "quarantined")]
        assert world.statistics.sequences == 0


@STRATEGIES
async def test_an_unload_lets_live_sequences_end_and_no_new_ones_begin(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy)) as world:
        await world.begin(1, 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.server.unload_model, "m")
            await wait_all_tasks_blocked()
            refused = await world.call("new", 3, "start")
            assert isinstance(refused.error, Unavailable)
            assert refused.error.message.endswith(
                "Server is stopping, scheduler for model has stopped accepting new inference requests"
            )
            unknown = await world.call("unknown", 3)
            assert isinstance(unknown.error, InvalidArgument)
            last = await world.call("last", 1, "end")
            await world.finish()
            assert total(last) == 2
            assert world.model.state == "UNLOADING"
            await trio.sleep(6)
            assert world.model.state == "UNAVAILABLE"  # 2 was idle
        assert world.ends == [(1, "end"), (2, "idle")]


@STRATEGIES
async def test_an_unload_ends_what_is_live_after_its_grace(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy, idle=1000), limit=math.inf) as world:
        await world.begin(1, 2)
        executing, queued = await world.call("executing", 1), await world.call("queued", 1)
        world.model.begin_unload()
        world.model.stop()
        assert {call.request.reason for call in (executing, queued)} == {Reason.MODEL_UNLOADING}
        await world.model.wait_stopped()
        assert sorted(world.ends) == [(1, "unloading"), (2, "unloading")]
        assert world.statistics.sequences == 0
        await world.server.unload_model("m")
        for call in (executing, queued):
            assert isinstance(call.error, Unavailable)


# Triton's narrower rule

NARROW = 'parameters [{ key: "executing_cancel_ends_sequence" value: { string_value: "false" } }]'


@STRATEGIES
async def test_where_the_model_says_so_the_cancel_of_an_executing_request_leaves_its_sequence_alive(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    config = sum_config(strategy) + NARROW
    async with playing(serve, config) as world:
        await world.begin(1)
        executing = await world.call("executing", 1, value=10)
        queued = await world.call("queued", 1, value=100)
        executing.leave()
        assert executing.outcome is Outcome.CANCELLED
        await world.finish()
        await world.finish()
        assert total(queued) == 111  # with what the cancelled one has added
        executing = await world.call("executing 2", 1)
        queued, mate = await world.call("queued 2", 1), await world.call("mate", 1)
        queued.leave()  # that one ends it, as in Triton, and what executes is answered
        assert (executing.outcome, mate.outcome) == (None, Outcome.CANCELLED)
        assert (world.statistics.in_slots, world.ends) == (1, [])
        await world.finish()
        assert total(executing) == 112
        assert world.ends == [(1, "cancelled")]


@STRATEGIES
async def test_and_what_is_rescheduled_after_its_sequence_has_ended_is_cancelled(
    serve: Serve, autojump_clock: MockClock, strategy: str
) -> None:
    async with playing(serve, sum_config(strategy, more="iterative_sequence: true") + NARROW) as world:
        executing, queued = await world.call("executing", 1, "start"), await world.call("queued", 1)
        queued.leave()
        world.backend.running[0].reschedule()
        await wait_all_tasks_blocked()
        assert isinstance(executing.error, RequestCancelled)
        assert (executing.request.reason, world.ends) == ("sequence_cancelled", [(1, "cancelled")])
        assert world.backend.running == []


def test_the_rule_is_true_or_false() -> None:
    config = parse_model_config(f'name: "m" {sum_config()} {NARROW.replace("false", "maybe")}')
    with pytest.raises(
        InvalidArgument, match=r"executing_cancel_ends_sequence .* must be 'true' or 'false', got 'maybe'"
    ):
        make_scheduler(config)


# Iterative sequences


async def test_an_iterative_request_without_an_ID_is_a_sequence_of_its_own(
    serve: Serve, autojump_clock: MockClock
) -> None:
    async with playing(serve, sum_config(max_batch_size=2, more="iterative_sequence: true")) as world:
        calls = [
            await world.call("a", 0, value=1),
            await world.call("b", 0, value=2),
            await world.call("c", 0, value=4),
        ]
        world.backend.running[0].reschedule()
        await wait_all_tasks_blocked()
        assert [execution.members for execution in world.backend.executions] == [("a",), ("a", "b")]
        assert [row > 0 for row in world.backend.rows[1]] == [True, False]  # START once
        assert (calls[0].request.stage, calls[2].request.stage) == ("executing", "queued")
        await world.finish()
        await world.finish()
        assert [total(call) for call in calls] == [1, 2, 4]
        assert world.statistics.sequences == 0
        assert len({sequence_id for sequence_id, _ in world.ends}) == 3


async def test_a_rescheduled_request_goes_before_the_rest_of_its_sequence(
    serve: Serve, autojump_clock: MockClock
) -> None:
    async with playing(serve, sum_config(OLDEST, more="iterative_sequence: true")) as world:
        first, second = await world.call("a", 7, "start"), await world.call("b", 7, "end", value=10)
        for _ in range(2):
            world.backend.running[0].reschedule()
            await wait_all_tasks_blocked()
        await world.finish()
        await world.finish()
        assert [execution.members for execution in world.backend.executions] == [("a",), ("a",), ("a",), ("b",)]
        assert (total(first), total(second)) == (1, 11)


async def test_A6_a_cancel_between_two_executions_of_a_request(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config(max_batch_size=1, more="iterative_sequence: true")) as world:
        call, other = await world.call("a", 0), await world.call("other", 0)
        batch = world.model.instances[0].batch
        assert batch is not None
        batch.reschedule(batch.members[0])
        assert call.request.stage == "queued"  # and its row is on the device
        call.leave()
        assert call.outcome is Outcome.CANCELLED
        assert [request.request_id for request in world.batcher.queued()] == ["other"]
        assert world.statistics.in_slots == 1
        world.backend.running[0].end()
        await wait_all_tasks_blocked()
        await world.finish()
        assert total(other) == 1
        assert [execution.members for execution in world.backend.executions] == [("a",), ("other",)]


async def test_a_request_that_was_on_the_device_for_longer_than_a_sequence_may_be_idle_is_not_executed_again(
    serve: Serve, autojump_clock: MockClock
) -> None:
    async with playing(serve, sum_config(idle=0.2, more="iterative_sequence: true")) as world:
        call = await world.call("a", 0)
        await trio.sleep(0.5)
        world.backend.running[0].reschedule()
        await wait_all_tasks_blocked()
        assert isinstance(call.error, InvalidArgument)
        assert "must specify the START flag on the first request of the sequence" in call.error.message
        assert world.statistics.sequences == 0


# What an operator sees


async def test_the_tree_shows_where_sequences_are(serve: Serve, autojump_clock: MockClock) -> None:
    async with playing(serve, sum_config(max_batch_size=1)) as world:
        calls = [await world.call(f"{n}", 42, "start" if n == 0 else "end" if n == 2 else "") for n in range(3)]
        calls.append(await world.call("next", 43, "start end"))
        lines = [line.strip("│├└─ ") for line in tree().splitlines()]
        position = lines.index("sequence 42 of m:1")
        assert lines[position : position + 4] == [
            "sequence 42 of m:1",
            "slot 0 of m_0_0, 2 waiting",
            "sequence 43 of m:1",
            "no slot, 1 waiting",
        ]
        statistics = world.model.statistics().scheduler
        assert (statistics.queue.queued, statistics.sequences, statistics.in_slots, statistics.in_backlog) == (
            3,
            2,
            1,
            1,
        )
        for _ in range(4):
            await world.finish()
        assert [total(call) for call in calls] == [1, 2, 3, 1]
