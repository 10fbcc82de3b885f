"""Triton's scenarios of queue policies (L0_model_queue, L0_batcher), to the second, on a clock that takes no time.

Preferred sizes 4 and 8, ten seconds for company: so a batch of five rows waits, and one of four goes at once.
"""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call, Callers, calling
from triton_trio import Outcome, Unavailable
from triton_trio.observe.statistics import FailureReason
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve


def config(policy: str, preferred: str = "4, 8", delay: str = "max_queue_delay_microseconds: 10000000") -> str:
    return scripted_config(max_batch_size=32, batching=f"preferred_batch_size: [ {preferred} ] {delay} {policy}")


def took(call: Call) -> float:
    """Seconds from its arrival to its end, whatever that was."""
    return round(call.request.ended_at - call.request.received_at, 3)


def rejected(call: Call) -> bool:
    """Turned away by a timeout, with Triton's text and status and its reason in the metrics."""
    if call.outcome is not Outcome.REJECTED:
        return False
    assert isinstance(call.error, Unavailable)
    assert call.error.message == "Request timeout expired"
    assert call.model.counters.failures[FailureReason.REJECTED] == 1
    return True


async def calls_of(callers: Callers, *rows_and_pause: tuple[int, float], **options: object) -> list[Call]:
    """Calls with so many rows each, and a pause before it."""
    calls = []
    for rows, pause in rows_and_pause:
        await trio.sleep(pause)
        calls.append(await callers.call(str(len(callers.calls)), rows=rows, **options))
    return calls


async def test_L0_model_queue_max_queue_size(serve: Serve) -> None:
    backend = ScriptedBackend()
    limited = config("default_queue_policy { max_queue_size: 8 }", delay="")
    async with serve({"m": limited}, backend) as server, calling(server.model("m")) as callers:
        await callers.call("busy", rows=8)
        calls = [await callers.call(str(n), rows=1) for n in range(10)]
        turned_away = [call for call in calls if call.outcome is Outcome.REJECTED]
        assert turned_away == calls[8:]
        for call in turned_away:
            assert isinstance(call.error, Unavailable)
            assert call.error.message == f"[request id: {call.request.request_id}] Exceeds maximum queue size"
        assert callers.model.counters.failures == {FailureReason.REJECTED: 2}
        backend.automatic = True
        backend.executions[0].finish()


async def test_L0_model_queue_policy_delay(serve: Serve, autojump_clock: MockClock) -> None:
    policy = "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 100000 }"
    async with serve({"m": config(policy)}) as server, calling(server.model("m")) as callers:
        first, second, third = await calls_of(callers, (1, 0), (2, 0.2), (2, 0))
        for call in (first, second, third):
            await call.ended.wait()
        assert [took(call) for call in (first, second, third)] == [10, 0, 0]


async def test_L0_model_queue_policy_reject(serve: Serve, autojump_clock: MockClock) -> None:
    policy = "default_queue_policy { default_timeout_microseconds: 100000 }"
    async with serve({"m": config(policy)}) as server, calling(server.model("m")) as callers:
        first, second, third = await calls_of(callers, (1, 0), (2, 0.2), (2, 0))
        await third.ended.wait()
        assert rejected(first)
        assert [took(call) for call in (first, second, third)] == [0.1, 0, 0]


OVERRIDE = "default_queue_policy { allow_timeout_override: true default_timeout_microseconds: 1000000 }"


async def test_L0_model_queue_timeout_override(serve: Serve, autojump_clock: MockClock) -> None:
    async with serve({"m": config(OVERRIDE)}) as server, calling(server.model("m")) as callers:
        first = await callers.call("a", rows=1, timeout_us=100_000)
        second, third = await calls_of(callers, (2, 0.2), (2, 0))
        await third.ended.wait()
        assert rejected(first)
        assert [took(call) for call in (first, second, third)] == [0.1, 0, 0]


@pytest.mark.parametrize("timeout_us", [10_000_000, 0])
async def test_L0_model_queue_timeout_override_never_lengthens(
    serve: Serve, autojump_clock: MockClock, timeout_us: int
) -> None:
    """The first is turned away after a second; what is left has a preferred size and is sent at that moment."""
    async with serve({"m": config(OVERRIDE)}) as server, calling(server.model("m")) as callers:
        first = await callers.call("a", rows=1, timeout_us=timeout_us)
        second, third = await calls_of(callers, (2, 0.2), (2, 0))
        await third.ended.wait()
        assert rejected(first)
        assert [took(call) for call in (first, second, third)] == [1, 0.8, 0.8]


async def test_what_a_cancelled_request_leaves_behind_is_a_batch_at_once(
    serve: Serve, autojump_clock: MockClock
) -> None:
    async with serve({"m": config("")}) as server, calling(server.model("m")) as callers:
        first, second, third = await calls_of(callers, (1, 0), (2, 0), (2, 0))
        await trio.sleep(1)
        assert third.outcome is None  # five rows: waits for company
        first.leave()
        await third.ended.wait()
        assert [took(call) for call in (second, third)] == [1, 1]


async def test_a_request_that_is_delayed_leaves_a_batch_behind_too(serve: Serve, autojump_clock: MockClock) -> None:
    policy = "default_queue_policy { timeout_action: DELAY allow_timeout_override: true }"
    async with serve({"m": config(policy)}) as server, calling(server.model("m")) as callers:
        first = await callers.call("a", rows=1, timeout_us=1_000_000)
        second, third = await calls_of(callers, (2, 0), (2, 0))
        for call in (second, third, first):
            await call.ended.wait()
        assert [took(call) for call in (first, second, third)] == [10, 1, 1]


@pytest.mark.parametrize("default", [0, 2, 1 << 32], ids=["none", "the default level", "max_priority_levels"])
async def test_L0_model_queue_priority_levels(serve: Serve, autojump_clock: MockClock, default: int) -> None:
    levels = config("priority_levels: 2 default_priority_level: 2")
    async with serve({"m": levels}) as server, calling(server.model("m")) as callers:
        (first,) = await calls_of(callers, (2, 0))
        (second,) = await calls_of(callers, (1, 0.1), priority=default)
        (third,) = await calls_of(callers, (2, 0.2), priority=1)
        for call in (third, first, second):
            await call.ended.wait()
        assert [took(call) for call in (first, second, third)] == [0.3, 10, 0]


async def test_L0_model_queue_priority_with_policy(serve: Serve, autojump_clock: MockClock) -> None:
    policy = "allow_timeout_override: true default_timeout_microseconds: 11000000"
    levels = (
        "priority_levels: 2 default_priority_level: 2 "
        f"default_queue_policy {{ timeout_action: DELAY {policy} }} "
        f"priority_queue_policy {{ key: 2 value {{ timeout_action: REJECT {policy} }} }}"
    )
    backend = ScriptedBackend(automatic=True)
    async with serve({"m": config(levels, preferred="4, 8, 32")}, backend) as server:
        async with calling(server.model("m")) as callers:
            a = await callers.call("a", rows=1, priority=1)
            b = await callers.call("b", rows=2, priority=1, timeout_us=1_000_000)
            d = await callers.call("d", rows=2, priority=2, timeout_us=2_000_000)
            await trio.sleep(2.5)
            assert rejected(d)
            # b's time has passed, too, and its level delays: it is served after those of its level that are in time.
            c = await callers.call("c", rows=2, priority=1)
            await trio.sleep(1)
            assert (a.outcome, b.outcome, c.outcome) == (None, None, None)
            e = await callers.call("e", rows=3, priority=2)
            await e.ended.wait()
        assert [execution.members for execution in backend.executions] == [("a", "c", "b", "e")]
        assert [took(call) for call in (a, b, c, d, e)] == [3.5, 3.5, 1, 2, 0]


async def test_L0_batcher_default_queue_policy_timeout_prompt_response(serve: Serve, autojump_clock: MockClock) -> None:
    """The only instance is busy and stays so: the timeout is answered when it is due."""
    policy = "default_queue_policy { default_timeout_microseconds: 3000000 }"
    backend = ScriptedBackend()
    async with serve({"m": config(policy, delay="")}, backend) as server, calling(server.model("m")) as callers:
        await callers.call("saturate", rows=1)
        await trio.sleep(2)
        call = await callers.call("x", rows=1)
        await call.ended.wait()
        assert rejected(call)
        assert took(call) == 3
        backend.executions[0].finish()


async def test_L0_batcher_multi_batch_preserve_ordering(serve: Serve) -> None:
    """Twelve requests on three instances that finish in the wrong order."""
    backend = ScriptedBackend()
    ordered = scripted_config(max_batch_size=1, batching="preserve_ordering: true", instances=3)
    async with serve({"m": ordered}, backend) as server, calling(server.model("m")) as callers:
        calls = [await callers.call(f"{n:x}", rows=1) for n in range(12)]
        while backend.running:
            backend.running[-1].finish()
            await wait_all_tasks_blocked()
            answered = [call.ended.is_set() for call in calls]
            assert answered == sorted(answered, reverse=True)
            first = min(int(execution.members[0], 16) for execution in backend.running) if backend.running else 12
            assert answered.count(True) == first  # everybody before the first that is still out


async def test_a_model_without_priorities_has_one_level_and_the_default_policy(serve: Serve) -> None:
    limited = config("default_queue_policy { max_queue_size: 2 }", delay="")
    backend = ScriptedBackend()
    async with serve({"m": limited}, backend) as server, calling(server.model("m")) as callers:
        await callers.call("busy", rows=1)
        calls = [await callers.call(str(n), rows=1, priority=n) for n in range(3)]
        assert [call.outcome for call in calls] == [None, None, Outcome.REJECTED]
        backend.automatic = True
        backend.executions[0].finish()
