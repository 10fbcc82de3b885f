"""A batch by itself: the test is the backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from triton_trio.batch import Batch, Member
from triton_trio.errors import InternalError
from triton_trio.lifecycle import Event, Outcome, Stage
from triton_trio.request import RESPONSE_BUFFER, InferenceRequest
from triton_trio.scopes import Reason


def queued(rows: int = 1, label: str = "", outputs: tuple[str, ...] = ()) -> InferenceRequest:
    request = InferenceRequest({"IN": np.full((rows, 2), rows)}, request_id=label, requested_outputs=outputs)
    request.batch_size = rows
    request.admit("m", 1, lambda request, place: None)
    request.advance(Event.ENQUEUE)
    return request


class Waiting:
    """A queue whose requests may all join."""

    def __init__(self, *requests: InferenceRequest) -> None:
        self.requests = list(requests)
        self.arrived = trio.Event()

    def take_nowait(self, signature: object, rows: int, *, all_or_none: bool) -> list[InferenceRequest]:
        taken, self.requests = self.requests, []
        assert sum(request.batch_size for request in taken) <= rows
        return taken

    async def wait_arrival(self) -> None:
        await self.arrived.wait()


class Record:
    def __init__(self) -> None:
        self.released: list[str] = []
        self.ended: list[tuple[int, list[str]]] = []
        self.abandoned = 0

    def batch(
        self, requests: Sequence[InferenceRequest], decoupled: bool = False, waiting: Waiting | None = None
    ) -> Batch:
        def abandoned(batch: Batch) -> None:
            self.abandoned += 1

        return Batch(
            requests,
            name="m_0",
            decoupled=decoupled,
            output_names=("OUT",),
            on_released=lambda member: self.released.append(member.request.request_id),
            on_abandoned=abandoned,
            on_ended=lambda cohort, members: self.ended.append(
                (cohort.rows, [member.request.request_id for member in members])
            ),
            joining=waiting,  # type: ignore[arg-type]
        )


async def test_rows_are_in_the_order_of_the_queue() -> None:
    batch = Record().batch([queued(2), queued(1), queued(3)])
    assert [(member.start, member.stop) for member in batch.members] == [(0, 2), (2, 3), (3, 6)]
    assert batch.rows == 6
    assert batch.stack("IN")[:, 0].tolist() == [2, 2, 1, 3, 3, 3]
    assert all(member.request.stage is Stage.EXECUTING for member in batch.members)
    assert repr(batch) == "<Batch m_0 3/3 live, 6 rows>"


async def test_law_7_who_leaves_is_gone_for_the_backend_and_nobody_else_notices() -> None:
    record = Record()
    requests = [queued(label=label) for label in "abc"]
    batch = record.batch(requests)
    requests[1].cancel(Reason.CLIENT_RESET)
    await batch.checkpoint()
    assert [member.request.request_id for member in batch.live()] == ["a", "c"]
    assert [(member.start, member.stop) for member in batch.live()] == [(0, 1), (2, 3)]
    assert not record.abandoned


async def test_A2_the_last_to_leave_cancels_the_execution() -> None:
    record = Record()
    requests = [queued(), queued()]
    batch = record.batch(requests)
    with batch.scope.cancel_scope as scope:
        requests[0].cancel()
        await batch.checkpoint()
        assert not record.abandoned
        requests[1].cancel(Reason.SLOW_CONSUMER)
        assert record.abandoned == 1
        await batch.checkpoint()
        pytest.fail("the checkpoint is where a cancelled execution ends")
    assert scope.cancelled_caught


async def test_a_member_who_was_served_is_no_reason_to_go_on_and_none_to_stop() -> None:
    record = Record()
    requests = [queued(), queued()]
    batch = record.batch(requests)
    batch.respond(batch.members[0], {"OUT": np.zeros(1)})
    await batch.checkpoint()
    requests[1].cancel()
    assert record.abandoned == 1
    requests[0].cancel()  # its response has not been received: it is cancelled, and not in this batch any more
    assert requests[0].outcome is Outcome.CANCELLED
    assert record.abandoned == 1


async def test_a_scope_of_the_member_s_own_is_cancelled_with_it() -> None:
    request = queued()
    batch = Record().batch([request, queued()])
    with trio.CancelScope() as scope:
        batch.members[0].scope = scope
        request.cancel(Reason.ADMIN)
        await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_B2_device_resources_are_released_once() -> None:
    record = Record()
    batch = record.batch([queued(label="a"), queued(label="b")])
    for member in (*batch.members, batch.members[0]):
        member.release()
    assert record.released == ["a", "b"]


async def test_law_5_a_member_is_answered_once() -> None:
    request = queued()
    batch = Record().batch([request])
    (member,) = batch.members
    with request:
        batch.respond(member, {"OUT": np.array([1])})
        batch.respond(member, {"OUT": np.array([2])})
        batch.fail(member, InternalError("late"))
        batch.finish(member)
        assert (await request.receive()).outputs["OUT"] == 1
    assert request.outcome is Outcome.OK


async def test_only_the_requested_outputs_are_sent() -> None:
    request = queued(outputs=("B",))
    batch = Record().batch([request])
    with request:
        batch.respond(batch.members[0], {"A": np.zeros(1), "B": np.ones(1)})
        assert set((await request.receive()).outputs) == {"B"}


async def failed(request: InferenceRequest) -> str:
    with pytest.raises(InternalError) as caught, request:
        await request.receive()
    assert request.outcome is Outcome.ERROR
    return str(caught.value)


async def test_an_output_that_was_requested_and_not_made_fails_that_member_only() -> None:
    request, other = queued(outputs=("B",), label="7"), queued()
    batch = Record().batch([request, other])
    for member in batch.members:
        batch.respond(member, {"OUT": np.zeros(1)})
    assert await failed(request) == "[request id: 7] model 'm' did not produce requested output 'B'"
    assert other.outcome is None


async def test_an_output_that_the_configuration_promises_must_be_there() -> None:
    request = queued()
    batch = Record().batch([request])
    batch.respond(batch.members[0], {})
    assert (await failed(request)).endswith("model 'm' did not produce output 'OUT'")


async def test_law_8_a_partial_response_is_not_a_result() -> None:
    request = queued()
    batch = Record().batch([request])
    batch.respond(batch.members[0], {"OUT": np.zeros(1)}, final=False)
    assert "is not decoupled" in await failed(request)


async def test_D6_a_reader_who_is_behind_holds_back_its_own_row_only() -> None:
    slow, fast = queued(label="slow"), queued(label="fast")
    batch = Record().batch([slow, fast], decoupled=True)
    for _ in range(RESPONSE_BUFFER):
        await batch.send(batch.members[0], {"OUT": np.zeros(1)})
    assert [member.can_send for member in batch.members] == [False, True]
    await batch.wait_can_send()  # somebody can be served

    sent = 0

    async def send(member: Member) -> None:
        nonlocal sent
        await batch.send(member, {"OUT": np.zeros(1)})
        sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, batch.members[0])
        await wait_all_tasks_blocked()
        assert sent == 0
        with slow:
            await slow.receive()
            await wait_all_tasks_blocked()
            assert sent == 1


@pytest.mark.parametrize("how", ["reads", "leaves"])
async def test_an_execution_that_can_serve_nobody_waits_until_one_of_them_reads_or_leaves(how: str) -> None:
    requests = [queued(), queued()]
    batch = Record().batch(requests, decoupled=True)
    for member in batch.members:
        for _ in range(RESPONSE_BUFFER):
            batch.respond(member, {"OUT": np.zeros(1)}, final=False)
    ready = False

    async def wait() -> None:
        nonlocal ready
        await batch.wait_can_send()
        ready = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not ready
        if how == "reads":
            await requests[1].receive()
        else:
            requests[1].cancel()
        await wait_all_tasks_blocked()
        assert ready


async def test_a_sender_whose_reader_leaves_is_not_interrupted() -> None:
    slow, other = queued(), queued()
    batch = Record().batch([slow, other], decoupled=True)
    for _ in range(RESPONSE_BUFFER):
        batch.respond(batch.members[0], {"OUT": np.zeros(1)}, final=False)
    async with trio.open_nursery() as nursery:
        with batch.scope.cancel_scope as scope:

            async def cancel() -> None:
                await wait_all_tasks_blocked()
                slow.cancel(Reason.SLOW_CONSUMER)

            nursery.start_soon(cancel)
            await batch.send(batch.members[0], {"OUT": np.zeros(1)})
    assert not scope.cancelled_caught
    assert [member.live for member in batch.members] == [False, True]


async def test_a_decoupled_member_may_end_without_any_output() -> None:
    request = queued()
    batch = Record().batch([request], decoupled=True)
    with request:
        batch.finish(batch.members[0])
        response = await request.receive()
        assert response.final and not response.outputs
    assert request.outcome is Outcome.OK


async def test_who_joins_has_rows_among_those_that_came_with_it() -> None:
    record, waiting = Record(), Waiting(queued(2), queued(1))
    batch = record.batch([queued(3)], waiting=waiting)
    joined = batch.join(5)
    assert batch.members[1:] == joined
    assert [(member.start, member.stop) for member in joined] == [(0, 2), (2, 3)]
    assert batch.stack("IN").shape == (3, 2)
    assert batch.stack_of(joined[0].cohort, "IN")[:, 0].tolist() == [2, 2, 1]
    assert all(member.request.stage is Stage.EXECUTING for member in joined)
    assert repr(batch) == "<Batch m_0 3/3 live, 6 rows>"
    assert batch.join(2) == ()


async def test_A2_who_joins_keeps_the_execution_alive() -> None:
    record, last = Record(), queued()
    first = queued()
    batch = record.batch([first], waiting=Waiting(last))
    batch.join(1)
    first.cancel()
    assert not record.abandoned
    last.cancel(Reason.CLIENT_RESET)
    assert record.abandoned == 1
    assert batch.scope.cancel_scope.cancel_called


@pytest.mark.parametrize("how", ["served", "cancelled"])
async def test_nobody_joins_an_execution_that_nobody_waits_for(how: str) -> None:
    waiting, first = Waiting(queued()), queued()
    batch = Record().batch([first], waiting=waiting)
    if how == "served":
        batch.respond(batch.members[0], {"OUT": np.zeros(1)})
    else:
        first.cancel()
    assert batch.join(7) == ()
    assert waiting.requests


async def test_E3_a_cohort_is_counted_when_its_last_member_is_and_then_forgotten() -> None:
    record = Record()
    batch = record.batch([queued(label="a"), queued(label="b")], waiting=Waiting(queued(3, label="c")))
    a, b = batch.members
    (c,) = batch.join(3)
    assert batch.retire(a) == ()
    assert batch.members == (a, b, c)
    assert batch.retire(c) == [c]
    assert batch.retire(b) == [a, b]
    assert record.ended == [(3, ["c"]), (2, ["a", "b"])]
    assert batch.members == () and batch.rows == 0
    for member in (a, b, c):
        member.request.cancel()  # a late one: nothing to leave any more, and nothing breaks


async def test_E3_a_member_that_is_retired_again_is_not_taken_for_its_neighbour() -> None:
    record = Record()
    batch = record.batch([queued(label="a"), queued(label="b")])
    a, b = batch.members
    assert batch.retire(a) == batch.retire(a) == ()
    assert not record.ended
    assert batch.retire(b) == [a, b]
    assert batch.retire(b) == ()
    assert record.ended == [(2, ["a", "b"])]


async def test_an_execution_that_can_serve_nobody_waits_for_one_who_may_join_too() -> None:
    waiting = Waiting()
    batch = Record().batch([queued()], decoupled=True, waiting=waiting)
    for _ in range(RESPONSE_BUFFER):
        batch.respond(batch.members[0], {"OUT": np.zeros(1)}, final=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: batch.wait_can_send(or_arrival=True))
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        waiting.arrived.set()
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks
