"""The vocabulary of cancellation, by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from triton_trio.scopes import BatchScope, Reason, SequenceScope


async def delivered(cancel: Callable[[trio.CancelScope], None]) -> trio.Cancelled:
    """The exception that arrives after ``cancel(scope)``."""
    with trio.CancelScope() as scope:
        cancel(scope)
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as exc:
            found = exc
            raise
    return found


@pytest.mark.parametrize("reason", Reason)
async def test_a_reason_travels_with_the_exception(reason: Reason) -> None:
    exc = await delivered(lambda scope: scope.cancel(reason=reason.value))
    assert Reason.of(exc) is reason


async def test_the_reason_of_a_deadline_is_trio_s_own() -> None:
    def expire(scope: trio.CancelScope) -> None:
        scope.deadline = -math.inf

    assert Reason.of(await delivered(expire)) is Reason.DEADLINE


@pytest.mark.parametrize("text", [None, "", "bored"])
async def test_whoever_cancels_without_a_reason_of_ours_is_the_caller(text: str | None) -> None:
    assert Reason.of(await delivered(lambda scope: scope.cancel(reason=text))) is Reason.CALLER


async def test_the_last_to_leave_cancels_the_work_with_its_reason() -> None:
    scope = BatchScope("abc")
    assert not scope.leave("a", Reason.CLIENT_RESET)
    assert not scope.leave("b", Reason.DEADLINE)
    assert not scope.cancel_scope.cancel_called
    assert list(scope) == ["c"]
    assert scope.leave("c", Reason.ADMIN)
    assert scope.cancel_scope.cancel_called
    assert not scope.join("d")
    assert repr(scope) == "<BatchScope cancelled>"


async def test_to_be_served_is_no_reason_to_cancel_the_work() -> None:
    scope = BatchScope("ab")
    scope.discard("a")
    scope.discard("b")
    assert len(scope) == 0
    assert not scope.cancel_scope.cancel_called


async def test_B2_to_leave_twice_is_to_leave_once() -> None:
    scope = BatchScope("ab")
    assert not scope.leave("a", Reason.ADMIN)
    assert not scope.leave("a", Reason.ADMIN)
    assert not scope.leave("x", Reason.ADMIN)
    scope.discard("x")
    assert not scope.cancel_scope.cancel_called


async def test_law_7_leaving_raises_nothing_in_the_work_until_the_last_has_left() -> None:
    scope = BatchScope("ab")
    log: list[str] = []

    async def work() -> None:
        try:
            with scope.cancel_scope:
                await trio.sleep_forever()
        finally:
            log.append("ended")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await wait_all_tasks_blocked()
        scope.leave("a", Reason.CLIENT_RESET)
        await wait_all_tasks_blocked()
        assert log == []
        scope.leave("b", Reason.CLIENT_RESET)
        assert log == []  # decided synchronously; the work ends when it is its turn
        await wait_all_tasks_blocked()
        assert log == ["ended"]


@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "discard"]), st.integers(0, 4))))
def test_a_batch_scope_is_cancelled_when_a_leaver_leaves_it_empty_and_never_otherwise(
    operations: list[tuple[str, int]],
) -> None:
    scope: BatchScope[int] = BatchScope(range(3))
    members, cancelled = {0, 1, 2}, False

    async def main() -> None:  # a scope's cancel needs a clock
        nonlocal cancelled
        for operation, who in operations:
            if operation == "join":
                assert scope.join(who) is not cancelled
                members.update({who} if not cancelled else ())
            elif operation == "discard":
                scope.discard(who)
                members.discard(who)
            else:
                last = members == {who}
                assert scope.leave(who, Reason.ADMIN) is last
                members.discard(who)
                cancelled |= last
            assert set(scope) == members
            assert scope.cancel_scope.cancel_called is cancelled

    trio.run(main, clock=MockClock(autojump_threshold=0))


class Mate:
    """A member of a sequence that notes its cancel, and says so to its scope, as a request does."""

    def __init__(self, scope: SequenceScope[Mate]) -> None:
        self.scope = scope
        self.cancels: list[tuple[Reason, str]] = []
        scope.join(self)

    def cancel(self, reason: Reason, why: str) -> None:
        self.cancels.append((reason, why))
        assert self.scope.cancel_scope.cancel_called
        assert not self.scope.leave(self, reason)


async def test_whoever_leaves_a_sequence_takes_all_others_along_at_that_instant() -> None:
    scope: SequenceScope[Mate] = SequenceScope()
    first, second, third = (Mate(scope) for _ in range(3))
    assert scope.leave(second, Reason.CLIENT_RESET, "second was cancelled")
    expected = [(Reason.SEQUENCE_CANCELLED, "second was cancelled")]
    assert (first.cancels, second.cancels, third.cancels) == (expected, [], expected)
    assert len(scope) == 0
    assert not scope.join(Mate(SequenceScope()))
    assert repr(scope) == "<SequenceScope cancelled>"


async def test_whoever_was_served_is_no_member_any_more() -> None:
    scope: SequenceScope[Mate] = SequenceScope()
    served, waiting = Mate(scope), Mate(scope)
    scope.discard(served)
    assert list(scope) == [waiting]
    assert scope.cancel(Reason.ADMIN, "why not")
    assert not scope.cancel(Reason.ADMIN)
    assert (served.cancels, waiting.cancels) == ([], [(Reason.SEQUENCE_CANCELLED, "why not")])


@pytest.mark.parametrize("reason", [Reason.MODEL_UNLOADING, Reason.SERVER_DRAIN])
async def test_what_ends_everything_is_every_member_s_own_reason(reason: Reason) -> None:
    scope: SequenceScope[Mate] = SequenceScope()
    mate = Mate(scope)
    scope.cancel(reason)
    assert mate.cancels == [(reason, "")]


async def test_B2_to_leave_a_sequence_twice_is_to_leave_it_once() -> None:
    scope: SequenceScope[Mate] = SequenceScope()
    gone, mate = Mate(scope), Mate(scope)
    assert scope.leave(gone, Reason.ADMIN)
    assert not scope.leave(gone, Reason.CLIENT_RESET)
    assert not scope.leave(mate, Reason.CLIENT_RESET)
    assert len(mate.cancels) == 1


async def test_a_sequence_s_task_sees_the_reason_of_the_first() -> None:
    scope: SequenceScope[Mate] = SequenceScope()
    mate = Mate(scope)
    seen = []

    async def live() -> None:
        with scope.cancel_scope:
            try:
                await trio.sleep_forever()
            except trio.Cancelled as exc:
                seen.append(Reason.of(exc))
                raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await wait_all_tasks_blocked()
        scope.leave(mate, Reason.DEADLINE)
        scope.cancel(Reason.ADMIN)
    assert seen == [Reason.DEADLINE]
