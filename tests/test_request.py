"""A request by itself: its places are stand-ins, its model is the test."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from triton_trio.errors import DeadlineExceeded, InternalError, RequestCancelled, TritonError, Unavailable
from triton_trio.lifecycle import Event, LifecycleError, Outcome, Stage
from triton_trio.request import RESPONSE_BUFFER, InferenceRequest, InferenceResponse, Place
from triton_trio.scopes import Reason


class Queue:
    """A place that remembers who left."""

    def __init__(self) -> None:
        self.left: list[tuple[InferenceRequest, Reason]] = []

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        self.left.append((request, reason))


class Books:
    def __init__(self) -> None:
        self.settled: list[tuple[Outcome | None, Place | None]] = []

    def __call__(self, request: InferenceRequest, place: Place | None) -> None:
        self.settled.append((request.outcome, place))


def new_request(place: Place | None = None, books: Books | None = None) -> InferenceRequest:
    request = InferenceRequest({"IN": np.zeros(2, np.float32)}, request_id="r")
    request.admit("m", 1, books or Books())
    request.place = place or Queue()
    return request


def executing(request: InferenceRequest) -> InferenceRequest:
    request.advance(Event.ENQUEUE)
    request.advance(Event.BIND)
    return request


def answer(value: float = 1, *, final: bool = True) -> InferenceResponse:
    return InferenceResponse({"OUT": np.full(2, value)}, final=final)


async def one_response(request: InferenceRequest) -> InferenceResponse:
    with request:
        return await request.receive()


class Caller:
    """A task that waits for one response, and how that ended."""

    def __init__(self, request: InferenceRequest, call: Callable[..., object] = one_response) -> None:
        self.request = request
        self.call = call
        self.result: InferenceResponse | None = None
        self.error: TritonError | None = None
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            try:
                self.result = await self.call(self.request)
            except TritonError as exc:
                self.error = exc


@asynccontextmanager
async def calling(request: InferenceRequest, call: Callable[..., object] = one_response) -> AsyncIterator[Caller]:
    caller = Caller(request, call)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller.run, name="caller")
        await wait_all_tasks_blocked()
        yield caller


async def test_a_response_reaches_its_waiting_caller_and_the_request_is_ok() -> None:
    books = Books()
    request = executing(new_request(books=books))
    request.place = None  # served
    async with calling(request) as caller:
        response = answer()
        request.deliver_nowait(response)
        assert request.outcome is None  # delivered, and not received yet: a cancel could still win
    assert caller.result is response
    assert request.outcome is Outcome.OK
    assert books.settled == [(Outcome.OK, None)]


@pytest.mark.parametrize("how", ["request.cancel", "the caller's scope"])
async def test_law_3_a_cancel_is_decided_when_the_cancelling_call_returns(how: str) -> None:
    place, books = Queue(), Books()
    request = new_request(place, books)
    request.advance(Event.ENQUEUE)
    async with calling(request) as caller:
        if how == "request.cancel":
            request.cancel(Reason.ADMIN)
        else:
            caller.scope.cancel(reason=Reason.CLIENT_RESET.value)
        # Not one task has run since.
        assert request.outcome is Outcome.CANCELLED
        assert request.reason is (Reason.ADMIN if how == "request.cancel" else Reason.CLIENT_RESET)
        assert place.left == [(request, request.reason)]
        assert request.place is None
        assert books.settled == [(Outcome.CANCELLED, place)]
    assert caller.result is None
    # Whoever is still there is told; whoever left knows.
    assert isinstance(caller.error, RequestCancelled) is (how == "request.cancel")


async def test_a_cancel_does_not_wait_for_a_caller_who_is_busy_elsewhere() -> None:
    place = Queue()
    request = executing(new_request(place))
    gate = trio.Event()

    async def call(request: InferenceRequest) -> None:
        with request:
            with trio.CancelScope(shield=True):
                await gate.wait()  # such as a frame on its way to a slow client
            await request.receive()

    async with calling(request, call) as caller:
        request.cancel(Reason.SLOW_CONSUMER)
        assert request.outcome is Outcome.CANCELLED
        assert place.left == [(request, Reason.SLOW_CONSUMER)]
        gate.set()
    assert isinstance(caller.error, RequestCancelled)
    assert caller.error.reason == "slow_consumer"


async def test_A5_a_request_that_is_cancelled_before_anybody_took_it() -> None:
    request = InferenceRequest({})
    request.cancel(Reason.ADMIN)
    assert request.is_cancelled
    assert request.outcome is None  # nobody counts it yet
    books, place = Books(), Queue()
    request.admit("m", 1, books)
    request.place = place
    with pytest.raises(
        RequestCancelled, match=r"^\[request id: <id_unknown>\] request cancelled while received: admin$"
    ):
        await one_response(request)
    assert books.settled == [(Outcome.CANCELLED, place)]
    assert place.left == [(request, Reason.ADMIN)]


async def test_a_deadline_is_an_outcome_of_its_own(autojump_clock: MockClock) -> None:
    request = executing(new_request())
    request.scope.deadline = trio.current_time() + 2
    with pytest.raises(DeadlineExceeded, match="Deadline Exceeded while executing"):
        await one_response(request)
    assert (request.outcome, request.reason) == (Outcome.DEADLINE, Reason.DEADLINE)
    assert request.ended_at - request.received_at == 2


async def test_a_deadline_of_the_caller_is_one_too(autojump_clock: MockClock) -> None:
    request = new_request()
    with trio.move_on_after(3) as scope:
        await one_response(request)
    assert scope.cancelled_caught
    assert (request.outcome, request.reason) == (Outcome.DEADLINE, Reason.DEADLINE)


async def test_law_8_a_deadline_that_passed_unseen_is_not_ok(mock_clock: MockClock) -> None:
    request = executing(new_request())
    request.scope.deadline = trio.current_time() + 1
    with pytest.raises(DeadlineExceeded):
        with request:
            request.deliver_nowait(answer())
            await request.receive()
            mock_clock.jump(1)  # and no checkpoint before the block ends
    assert (request.outcome, request.reason) == (Outcome.DEADLINE, Reason.DEADLINE)


async def test_law_8_a_response_of_the_same_tick_does_not_make_a_cancelled_request_ok() -> None:
    for first, second in ("rc", "cr"):
        acts = {"r": lambda r: r.deliver_nowait(answer()), "c": lambda r: r.cancel(Reason.ADMIN)}
        request = executing(new_request())
        async with calling(request) as caller:
            acts[first](request)
            acts[second](request)
        assert request.outcome is Outcome.CANCELLED
        assert caller.result is None
        assert isinstance(caller.error, RequestCancelled)


async def test_law_8_nor_one_whose_caller_s_scope_was_cancelled_in_that_tick() -> None:
    request = executing(new_request())
    async with calling(request) as caller:
        request.deliver_nowait(answer())
        caller.scope.cancel(reason="client_reset")
    assert caller.result is None
    assert (request.outcome, request.reason) == (Outcome.CANCELLED, Reason.CLIENT_RESET)


@pytest.mark.parametrize("event", [Event.FAIL, Event.REJECT])
async def test_B1_an_error_and_a_cancel_of_the_same_tick_have_one_outcome_and_one_story(event: Event) -> None:
    books = Books()
    request = new_request(books=books)
    request.advance(Event.ENQUEUE)
    async with calling(request) as caller:
        request.fail_nowait(Unavailable("too late"), event)
        request.cancel(Reason.ADMIN)
    # The error was first, so the caller reads the error and the books say the same.
    assert request.outcome is (Outcome.ERROR if event is Event.FAIL else Outcome.REJECTED)
    assert isinstance(caller.error, Unavailable)
    assert str(caller.error) == "too late"
    assert len(books.settled) == 1


async def test_B1_after_a_cancel_an_error_is_a_no_op() -> None:
    books = Books()
    request = executing(new_request(books=books))
    async with calling(request) as caller:
        request.cancel(Reason.ADMIN)
        request.fail_nowait(InternalError("boom"))
        assert not request.settle(Event.FAIL)
        request.cancel(Reason.CLIENT_RESET)  # who comes second does not even change the reason
    assert request.reason is Reason.ADMIN
    assert isinstance(caller.error, RequestCancelled)
    assert len(books.settled) == 1


async def test_B6_a_late_response_to_a_settled_request_is_dropped() -> None:
    request = executing(new_request())
    async with calling(request):
        request.cancel()
    request.deliver_nowait(answer())
    request.fail_nowait(InternalError("late"))
    assert request._buffer is None
    assert request.stage is Stage.EXECUTING


async def test_a_second_final_response_is_dropped() -> None:
    request = executing(new_request())
    with request:
        request.deliver_nowait(answer(1))
        request.deliver_nowait(answer(2))
        assert (await request.receive()).outputs["OUT"][0] == 1
        with pytest.raises(trio.EndOfChannel):
            await request.receive()
    assert request.outcome is Outcome.OK


async def test_responses_come_in_order_and_the_one_before_an_error_is_not_lost() -> None:
    request = executing(new_request())
    with pytest.raises(InternalError, match="broke"), request:
        for value in range(3):
            request.deliver_nowait(answer(value, final=False))
        request.fail_nowait(InternalError("broke"))
        assert request.outcome is Outcome.ERROR
        for value in range(3):
            assert (await request.receive()).outputs["OUT"][0] == value
        await request.receive()


async def test_a_cancelled_stream_does_not_look_like_one_that_has_ended() -> None:
    request = executing(new_request())
    received = []
    with pytest.raises(RequestCancelled):
        with request:
            request.deliver_nowait(answer(0, final=False))
            request.deliver_nowait(answer(1, final=False))
            received.append(await request.receive())
            request.cancel()
            try:
                received.append(await request.receive())
            except trio.EndOfChannel:
                pytest.fail("EndOfChannel means: complete")
    assert len(received) == 1
    assert request._buffer is None


async def test_leaving_before_the_final_response_is_a_cancel() -> None:
    place = Queue()
    request = executing(new_request(place))
    with request:
        request.deliver_nowait(answer(final=False))
        await request.receive()
    assert (request.outcome, request.reason) == (Outcome.CANCELLED, Reason.CALLER)
    assert place.left == [(request, Reason.CALLER)]


async def test_leaving_with_the_final_response_unread_is_not_ok_either() -> None:
    request = executing(new_request())
    with request:
        request.deliver_nowait(answer())
    assert request.outcome is Outcome.CANCELLED


async def test_C2_an_error_in_the_caller_s_block_is_the_request_s_error_and_goes_on() -> None:
    request = executing(new_request())
    with pytest.raises(ZeroDivisionError):
        with request:
            raise ZeroDivisionError
    assert request.outcome is Outcome.ERROR


async def test_a_cancel_inside_an_exception_group_is_a_cancel() -> None:
    request = executing(new_request())

    async def fail() -> None:
        await wait_all_tasks_blocked()
        try:
            request.cancel(Reason.ADMIN)
        finally:
            raise ValueError

    with pytest.RaisesGroup(ValueError):
        with request:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                await request.receive()
    assert (request.outcome, request.reason) == (Outcome.CANCELLED, Reason.ADMIN)


async def test_D6_a_sender_waits_for_a_reader_who_is_behind() -> None:
    request = executing(new_request())
    sent = 0

    async def send() -> None:
        nonlocal sent
        while request.outcome is None:
            await request.wait_can_send()
            request.deliver_nowait(answer(final=False))
            sent += 1

    async with trio.open_nursery() as nursery:
        with request:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            assert sent == RESPONSE_BUFFER
            assert not request.can_send
            for _ in range(3):
                await request.receive()
            await wait_all_tasks_blocked()
            assert sent == RESPONSE_BUFFER + 3
        # The reader is gone: the sender is released at once, and what it sends goes nowhere.
    assert request._buffer is None


async def test_law_2_is_cancelled_is_a_view_of_the_scope() -> None:
    request = new_request()
    assert not request.is_cancelled
    request.scope.deadline = -math.inf
    assert request.is_cancelled
    with pytest.raises(AttributeError):
        request.is_cancelled = False


async def test_a_request_is_for_one_inference() -> None:
    request = new_request()
    with pytest.raises(ValueError, match="make a new request for every inference"):
        request.admit("m", 1, Books())


async def test_B7_the_server_s_identity_of_a_request_is_not_the_client_s() -> None:
    first, second = InferenceRequest({}, request_id="same"), InferenceRequest({}, request_id="same")
    assert first.generation != second.generation
    assert len({first, second}) == 2


async def test_a_stage_is_not_an_end_and_an_end_is_not_a_stage() -> None:
    request = new_request()
    with pytest.raises(LifecycleError, match="use settle"):
        request.advance(Event.CANCEL)
    with pytest.raises(LifecycleError, match="use advance"):
        request.settle(Event.ENQUEUE)


@pytest.mark.parametrize("reason", Reason)
async def test_D1_every_reason_is_told_in_a_message_that_is_never_empty(reason: Reason) -> None:
    request = new_request()
    async with calling(request) as caller:
        request.cancel(reason)
    assert caller.error is not None
    assert caller.error.message.startswith("[request id: r] ")
    kind = {
        Reason.DEADLINE: DeadlineExceeded,
        Reason.MODEL_UNLOADING: Unavailable,
        Reason.SERVER_DRAIN: Unavailable,
    }.get(reason, RequestCancelled)
    assert type(caller.error) is kind
    assert request.outcome is (Outcome.DEADLINE if reason is Reason.DEADLINE else Outcome.CANCELLED)


async def test_law_14_an_error_is_kept_as_text_and_pins_nothing() -> None:
    request = executing(new_request())
    array = np.zeros(1000)
    alive = weakref.ref(array)

    def fail(tensor: np.ndarray) -> None:
        try:
            raise InternalError("no")
        except InternalError as exc:
            request.fail_nowait(exc)

    gc.disable()
    try:
        fail(array)
        del array
        assert alive() is None
    finally:
        gc.enable()
    with pytest.raises(InternalError, match="no"):
        await one_response(request)


async def test_the_caller_s_own_scope_can_be_the_request_s() -> None:
    with trio.CancelScope() as scope:
        request = InferenceRequest({}, scope=scope)
        request.admit("m", 1, Books())
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                request.cancel(Reason.ADMIN)

            nursery.start_soon(cancel)
            await one_response(request)
    assert scope.cancelled_caught  # by its owner: the request leaves the cancel to it
    assert request.outcome is Outcome.CANCELLED
