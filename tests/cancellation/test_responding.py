"""Blocking place: a response that waits for its reader, or for its turn."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.callers import Call, calling
from triton_trio import InferenceRequest, InternalError, Model, Outcome, Reason, RequestCancelled, Stage
from triton_trio.request import RESPONSE_BUFFER
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

DECOUPLED = scripted_config(decoupled=True)
ORDERED = scripted_config(max_batch_size=1, batching="preserve_ordering: true", instances=3)


class Reader:
    """A client of a decoupled model, who reads when told to."""

    def __init__(self, model: Model, label: str = "r") -> None:
        self.request: InferenceRequest = Call(model, label).request
        self.model = model
        self.received = 0
        self.ended = ""
        self.error: Exception | None = None
        self.scope = trio.CancelScope()
        self._may_read = trio.Semaphore(0)

    def read(self, count: int = 1) -> None:
        for _ in range(count):
            self._may_read.release()

    async def run(self) -> None:
        self.ended = "cancelled"
        try:
            with self.scope:
                async with self.model.open_responses(self.request) as responses:
                    await self._may_read.acquire()
                    async for _ in responses:
                        self.received += 1
                        await self._may_read.acquire()
                self.ended = "complete"
        except (RequestCancelled, InternalError) as exc:
            self.error = exc
            self.ended = "error"


async def test_a_stream_is_read_to_its_end(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": DECOUPLED}, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("m"))
        nursery.start_soon(reader.run, name="reader")
        execution = await backend.wait_execution()
        for _ in range(3):
            execution.emit()
        execution.end()  # the final response is the server's
        reader.read(5)
        await wait_all_tasks_blocked()
        assert (reader.received, reader.ended) == (4, "complete")
        assert reader.request.outcome is Outcome.OK


@pytest.mark.parametrize("who", ["reader", "admin"])
async def test_law_12_a_reader_who_is_behind_holds_the_model_back_and_leaves_at_once(serve: Serve, who: str) -> None:
    backend = ScriptedBackend()
    async with serve({"m": DECOUPLED}, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("m"))
        nursery.start_soon(reader.run, name="reader")
        execution = await backend.wait_execution()
        sent = []
        for number in range(RESPONSE_BUFFER + 5):
            execution.emit()
            execution.call(lambda number=number: sent.append(number))
        await wait_all_tasks_blocked()
        assert len(sent) == RESPONSE_BUFFER
        assert reader.request.stage is Stage.RESPONDING
        if who == "reader":
            reader.scope.cancel(reason=Reason.CLIENT_RESET.value)
            # It waits for something of its own, so it is settled when its block is left: in the next tick.
        else:
            reader.request.cancel(Reason.SLOW_CONSUMER)
            assert reader.request.outcome is Outcome.CANCELLED
        await wait_all_tasks_blocked()
        assert execution.ended.is_set()
        assert len(sent) == RESPONSE_BUFFER
        assert reader.received == 0
        assert reader.request.outcome is Outcome.CANCELLED
        assert server.model("m").counters.reasons == {
            ("client_reset" if who == "reader" else "slow_consumer", "responding"): 1
        }
        if who == "admin":
            assert isinstance(reader.error, RequestCancelled)
            assert "while responding: slow_consumer" in str(reader.error)


async def test_D1_a_stream_cut_by_a_cancel_is_not_complete(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": DECOUPLED}, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("m"))
        nursery.start_soon(reader.run, name="reader")
        execution = await backend.wait_execution()
        execution.emit()
        execution.emit()
        reader.read(1)
        await wait_all_tasks_blocked()
        reader.request.cancel(Reason.ADMIN)
        reader.read(10)
        await wait_all_tasks_blocked()
        assert (reader.received, reader.ended) == (1, "error")
        # Nothing comes after it.
        execution.emit()
        await wait_all_tasks_blocked()
        assert reader.received == 1


async def test_at_most_one_response_more_is_made_after_the_cancel(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": DECOUPLED}, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("m"))
        nursery.start_soon(reader.run, name="reader")
        execution = await backend.wait_execution()
        made = []
        reader.read(100)
        execution.emit()
        await wait_all_tasks_blocked()
        for number in range(50):
            execution.emit()
            execution.call(lambda number=number: made.append(number))
        reader.scope.cancel()
        await wait_all_tasks_blocked()
        assert len(made) <= 1


async def test_what_was_sent_before_the_model_failed_is_read_before_the_error(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": DECOUPLED}, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("m"))
        nursery.start_soon(reader.run, name="reader")
        execution = await backend.wait_execution()
        for _ in range(3):
            execution.emit()
        execution.fail(ValueError("broke"))
        await wait_all_tasks_blocked()
        reader.read(10)
        await wait_all_tasks_blocked()
        assert (reader.received, reader.ended) == (3, "error")
        assert str(reader.error) == "model 'm' failed: ValueError: broke"


async def test_C4_a_stream_that_is_abandoned_half_way_is_cancelled_there(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": DECOUPLED}, backend) as server:
        model = server.model("m")
        request = Call(model, "r").request

        async def emit() -> None:
            execution = await backend.wait_execution()
            for _ in range(5):
                execution.emit()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(emit, name="emit")
            async with model.open_responses(request) as responses:
                async for _ in responses:
                    break
        assert (request.outcome, request.reason) == (Outcome.CANCELLED, Reason.CALLER)
        await wait_all_tasks_blocked()
        assert backend.executions[0].ended.is_set()


async def test_preserve_ordering_holds_an_answer_until_its_turn(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": ORDERED}, backend) as server, calling(server.model("m")) as callers:
        a, b, c = await callers.call_all("abc", rows=1)
        backend.executions[2].finish()
        backend.executions[1].finish()
        await wait_all_tasks_blocked()
        assert [call.outcome for call in (a, b, c)] == [None] * 3
        assert len(backend.running) == 1  # the others are free for more
        backend.executions[0].finish()
    assert [call.outcome for call in (a, b, c)] == [Outcome.OK] * 3


@pytest.mark.parametrize("stage", ["executing", "queued", "with its answer waiting"])
async def test_preserve_ordering_who_is_cancelled_holds_nobody_back(serve: Serve, stage: str) -> None:
    backend = ScriptedBackend()
    config = ORDERED if stage != "queued" else ORDERED.replace("count: 3", "count: 1")
    async with serve({"m": config}, backend) as server, calling(server.model("m")) as callers:
        a, b, c = await callers.call_all("abc", rows=1)
        if stage == "queued":
            b.leave()
            backend.automatic = True
            backend.executions[0].finish()
            await c.ended.wait()
            assert a.outcome is Outcome.OK
        elif stage == "executing":
            backend.executions[1].finish()
            backend.executions[2].finish()
            await wait_all_tasks_blocked()
            a.leave()
            await wait_all_tasks_blocked()
            assert [call.outcome for call in (a, b, c)] == [Outcome.CANCELLED, Outcome.OK, Outcome.OK]
        else:
            backend.executions[1].finish()
            await wait_all_tasks_blocked()
            b.leave()
            assert b.outcome is Outcome.CANCELLED
            backend.executions[2].finish()
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            assert [call.outcome for call in (a, b, c)] == [Outcome.OK, Outcome.CANCELLED, Outcome.OK]


async def test_preserve_ordering_an_error_waits_for_its_turn_as_well(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": ORDERED}, backend) as server, calling(server.model("m")) as callers:
        a, b = await callers.call_all("ab", rows=1)
        backend.executions[1].fail(ValueError("no"))
        await wait_all_tasks_blocked()
        assert b.outcome is None
        backend.executions[0].finish()
        await wait_all_tasks_blocked()
        assert (a.outcome, b.outcome) == (Outcome.OK, Outcome.ERROR)
