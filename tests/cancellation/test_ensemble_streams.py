"""Blocking place: between the steps of an ensemble, where responses wait for their turn, for room and for a slot (A4, D6)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.callers import Call, calling
from tests.ensemble.world import Steps, ensemble_config, in_flight, reasons, step
from triton_trio import InferenceResponse, InternalError, Model, Outcome, Reason
from triton_trio.ensemble import EnsembleModel
from triton_trio.ensemble.flow import BRANCHES
from triton_trio.request import RESPONSE_BUFFER
from triton_trio.testing import Execution, ScriptedBackend, Victim, open_test_server, orders, scripted_config, sweep
from triton_trio.testing.fixtures import Serve

STREAM = {
    "source": scripted_config(decoupled=True),
    "after": scripted_config(instances=4),
    "e": ensemble_config(step("source", "INPUT0", "x"), step("after", "x", "OUTPUT0")),
}
#: ``source`` answers one request several times, ``again`` each of these several times.
CHAIN = {
    **STREAM,
    "again": scripted_config(decoupled=True),
    "e": ensemble_config(step("source", "INPUT0", "x"), step("again", "x", "y"), step("after", "y", "OUTPUT0")),
}
ZERO = np.zeros(2, np.float32)


class Reader:
    """A client of a decoupled model, and what it has read."""

    def __init__(self, model: Model, request_id: str = "") -> None:
        self.request = model.request({"INPUT0": ZERO}, request_id=request_id)
        self.read: list[InferenceResponse] = []
        self.error: str | None = None
        self.scope = trio.CancelScope()
        self.reading = trio.Event()
        self.reading.set()
        self._model = model

    @property
    def values(self) -> list[float]:
        return [float(response.outputs["OUTPUT0"][0]) for response in self.read if response.outputs]

    async def run(self) -> None:
        try:
            with self.scope:
                async with self._model.open_responses(self.request) as responses:
                    await self.reading.wait()
                    async for response in responses:
                        self.read.append(response)
        except InternalError as exc:
            self.error = exc.message


def counting() -> Callable[[np.ndarray], np.ndarray]:
    """Ten times the input, and how many answers there have been: what came from what can be read off the digits."""
    numbers = itertools.count()
    return lambda stacked: stacked * 10 + next(numbers)


async def emit(execution: Execution, count: int = 1, *, final: bool = False) -> None:
    for number in range(count):
        execution.emit(final=final and number == count - 1)
        await wait_all_tasks_blocked()


async def test_responses_leave_in_the_order_of_the_step_that_made_them(serve: Serve) -> None:
    backend = ScriptedBackend(counting())
    steps = Steps(backend)
    async with serve(STREAM, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"))
        nursery.start_soon(reader.run)
        await emit(await backend.wait_execution(), 3)
        first, second, third = steps.of("after")  # of 0, 1 and 2
        for execution in (third, second):
            execution.finish()
            await wait_all_tasks_blocked()
        assert reader.values == []
        first.finish()
        await wait_all_tasks_blocked()
        assert reader.values == [5, 14, 23]
        steps.of("source")[0].end()
        await wait_all_tasks_blocked()
        assert [response.final for response in reader.read] == [False, False, False, True]
        assert reader.request.outcome is Outcome.OK
        assert server.model("e").config.decoupled  # though its config.pbtxt does not say so


async def test_the_last_response_with_outputs_is_the_final_one(serve: Serve) -> None:
    backend = ScriptedBackend(counting())
    steps = Steps(backend)
    async with serve(STREAM, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"))
        nursery.start_soon(reader.run)
        await emit(await backend.wait_execution(), 2, final=True)
        await steps.finish("after")  # the second one, which must wait
        assert reader.values == []
        steps.of("after")[0].finish()
        steps.of("source")[0].end()
        await wait_all_tasks_blocked()
        assert [response.final for response in reader.read] == [False, True]


async def test_a_step_without_responses_makes_an_ensemble_without(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(CHAIN, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"))
        nursery.start_soon(reader.run)
        (await backend.wait_execution()).end()
        await wait_all_tasks_blocked()
        assert [(response.outputs, response.final) for response in reader.read] == [({}, True)]


async def test_decoupled_steps_in_a_row(serve: Serve) -> None:
    backend = ScriptedBackend(counting())
    steps = Steps(backend)
    async with serve(CHAIN, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"))
        nursery.start_soon(reader.run)
        await emit(await backend.wait_execution(), 2)  # 0, 1
        steps.of("source")[0].end()
        # One at a time: what comes of the second response must not keep the first one's from its model.
        assert server.model("again").counters.started == 1
        await emit(steps.of("again")[0], 2)  # 02, 03
        steps.of("again")[0].end()
        for execution in reversed(steps.of("after")):
            execution.finish()
            await wait_all_tasks_blocked()
        assert reader.values == [25, 34]
        await emit(steps.of("again")[1])  # 16
        steps.of("again")[1].end()
        await steps.finish_everything()
        assert reader.values == [25, 34, 167]
        assert reader.read[-1].final


async def test_D6_a_reader_who_does_not_read_holds_the_first_step_back(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(STREAM, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"))
        reader.reading = trio.Event()
        nursery.start_soon(reader.run)
        source = await backend.wait_execution()
        sent = []
        for number in range(100):
            source.emit()
            source.call(lambda number=number: sent.append(number))  # type: ignore[misc]
        backend.automatic = True
        await wait_all_tasks_blocked()
        # Read by nobody; on their way; sent by the model, and not yet taken.
        assert len(sent) <= RESPONSE_BUFFER + BRANCHES + RESPONSE_BUFFER + 2
        reader.reading.set()
        source.end()
        await wait_all_tasks_blocked()
        assert len(sent) == len(reader.values) == 100
        assert reader.request.outcome is Outcome.OK


async def test_A4_a_cancel_of_a_stream_that_waits_everywhere(serve: Serve) -> None:
    """Branches in execution, branches that wait for their turn, a step that waits for room, and a model behind it."""
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with serve(STREAM, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"), "victim")
        nursery.start_soon(reader.run)
        source = await backend.wait_execution()
        for _ in range(30):
            source.emit()
        await wait_all_tasks_blocked()
        steps.of("after")[1].finish()
        await wait_all_tasks_blocked()
        assert in_flight(server) == {"e": 1, "source": 1, "after": BRANCHES - 1}
        done = len(backend.executions)
        reader.scope.cancel(reason=Reason.CLIENT_RESET.value)
        # The task that reads from ``source`` waits for room behind it, and says so when it runs.
        assert in_flight(server).keys() <= {"source"}
        await wait_all_tasks_blocked()
        assert in_flight(server) == {}
        assert backend.running == []
        assert len(backend.executions) == done
        assert {reason for each in reasons(server).values() for reason, _ in each} == {"client_reset"}


async def test_a_branch_that_fails_ends_the_stream_with_one_error_after_what_came_before(serve: Serve) -> None:
    backend = ScriptedBackend(counting())
    steps = Steps(backend)
    async with serve(STREAM, backend) as server, trio.open_nursery() as nursery:
        reader = Reader(server.model("e"))
        nursery.start_soon(reader.run)
        await emit(await backend.wait_execution(), 3)
        await steps.finish_first("after")
        steps.of("after")[1].fail(InternalError("no"))
        await wait_all_tasks_blocked()
        assert reader.values == [3]
        assert reader.error == "in ensemble 'e', no"
        assert backend.running == []
        assert steps.of("source")[0].cancelled_after == 0
        assert reasons(server) == {
            "source": {("sibling_failed", "responding")},
            "after": {("sibling_failed", "executing")},
        }
        assert server.model("e").counters.failures == {"BACKEND": 1}


async def test_the_failure_of_a_step_does_not_cancel_what_the_reader_is_doing(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve(STREAM, backend) as server:
        model = server.model("e")
        finished = False
        with pytest.raises(InternalError, match="in ensemble 'e', no"):
            async with model.open_responses({"INPUT0": ZERO}) as responses:
                backend.automatic = False
                source = await backend.wait_execution()
                source.fail(InternalError("no"))
                await wait_all_tasks_blocked()
                await trio.lowlevel.checkpoint()  # it may be writing to its client
                finished = True
                async for _ in responses:
                    pytest.fail("there is nothing to read")
        assert finished


async def test_leaving_the_block_cancels_the_rest(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(STREAM, backend) as server:
        async with server.model("e").open_responses({"INPUT0": ZERO}):
            await backend.wait_execution()
        await wait_all_tasks_blocked()
        assert backend.running == []
        assert reasons(server) == {"e": {("caller", "executing")}, "source": {("caller", "executing")}}


async def test_A7_a_cancel_at_every_scheduling_point_of_a_stream(tmp_path: Path) -> None:
    directories = (tmp_path / str(number) for number in range(10_000))

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend()
        async with open_test_server(next(directories), CHAIN, backend) as server:
            reader = Reader(server.model("e"))

            async def drive() -> None:
                for number in itertools.count():
                    execution = await backend.wait_execution(number)
                    if not execution.instance.startswith("after"):
                        execution.emit()
                        execution.emit()
                        execution.end()
                    else:
                        execution.finish()

            async with trio.open_nursery() as drivers:
                drivers.start_soon(drive)
                with victim:
                    await reader.run()
                done = len(backend.executions)
                await wait_all_tasks_blocked()
                assert len(backend.executions) == done
                drivers.cancel_scope.cancel()
            assert reader.request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)
            assert victim.cancelled or len(reader.values) == 4

    assert await sweep(scenario) > 20


# max_inflight_requests


def limited(count: int) -> dict[str, str]:
    return {
        "m": scripted_config(instances=4),
        "e": ensemble_config(step("m", "INPUT0", "OUTPUT0"), max_inflight_requests=count),
    }


async def test_A4_the_limit_is_never_exceeded_and_a_waiter_leaves_at_once(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(limited(2), backend) as server:
        ensemble, model = server.model("e"), server.model("m")
        assert isinstance(ensemble, EnsembleModel)
        async with calling(ensemble) as callers:
            first, second, waiter, next_one = await callers.call_all("abcd")
            assert (ensemble.inflight, model.counters.started) == ((2,), 2)
            waiter.leave()
            assert waiter.outcome is Outcome.CANCELLED
            await wait_all_tasks_blocked()
            assert waiter.ended.is_set()
            assert (ensemble.inflight, model.counters.started) == ((2,), 2)
            backend.executions[0].finish()
            await wait_all_tasks_blocked()
            assert (ensemble.inflight, model.counters.started) == ((2,), 3)
            for execution in backend.running:
                execution.finish()
        assert [call.outcome for call in (first, second, next_one)] == [Outcome.OK] * 3
        assert ensemble.inflight == (0,)
        assert [execution.members for execution in backend.executions] == [("a",), ("b",), ("d",)]


@pytest.mark.parametrize("order", orders(["grant", "cancel"]), ids="-".join)
async def test_A4_a_cancel_in_the_tick_of_the_grant(serve: Serve, order: tuple[str, ...]) -> None:
    backend = ScriptedBackend()
    async with serve(limited(1), backend) as server:
        ensemble = server.model("e")
        assert isinstance(ensemble, EnsembleModel)
        assert ensemble._limits is not None
        async with calling(ensemble) as callers:
            _, waiter, next_one = await callers.call_all("hwn")
            for act in order:
                if act == "grant":
                    ensemble._limits[0].total_tokens = 2  # one more: whoever waits has it at this instant
                    assert ensemble.inflight == (2,)
                else:
                    waiter.leave()
            await wait_all_tasks_blocked()
            # If the waiter had the slot, it went on to the next one, once.
            assert ensemble.inflight == (2 if "grant" in order else 1,)
            assert server.model("m").counters.started == ensemble.inflight[0]
            for _ in range(2):
                for execution in backend.running:
                    execution.finish()
                await wait_all_tasks_blocked()
        assert next_one.outcome is Outcome.OK
        assert (waiter.outcome is Outcome.CANCELLED) == ("cancel" in order)
        assert ensemble.inflight == (0,)


async def test_A4_a_limit_under_cancels_at_every_scheduling_point(tmp_path: Path) -> None:
    directories = (tmp_path / str(number) for number in range(10_000))

    async def scenario(victim: Victim) -> None:
        backend = ScriptedBackend(automatic=True)
        async with open_test_server(next(directories), limited(1), backend) as server:
            ensemble = server.model("e")
            assert isinstance(ensemble, EnsembleModel)
            others: list[Call] = []
            async with calling(ensemble) as callers:
                others += [callers.start("before"), callers.start("also before")]
                request = ensemble.request({"INPUT0": ZERO})
                with victim:
                    await ensemble.infer(request)
                others.append(callers.start("after"))
            assert [call.outcome for call in others] == [Outcome.OK] * 3
            assert request.outcome is (Outcome.CANCELLED if victim.cancelled else Outcome.OK)
            assert ensemble.inflight == (0,)

    assert await sweep(scenario) > 10


async def test_a_limit_behind_a_decoupled_step_holds_it_back(serve: Serve) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    models = {**STREAM, "e": STREAM["e"].replace("max_inflight_requests: 0", "max_inflight_requests: 2")}
    async with serve(models, backend) as server, trio.open_nursery() as nursery:
        ensemble = server.model("e")
        assert isinstance(ensemble, EnsembleModel)
        reader = Reader(ensemble)
        nursery.start_soon(reader.run)
        source = await backend.wait_execution()
        for _ in range(32):
            source.emit()
        await wait_all_tasks_blocked()
        assert ensemble.inflight == (1, 2)
        assert len(steps.of("after")) == 2
        await steps.finish_first("after")
        assert ensemble.inflight == (1, 2)
        assert len(reader.values) == 1
        reader.scope.cancel(reason=Reason.CLIENT_RESET.value)
        await wait_all_tasks_blocked()
        assert ensemble.inflight == (0, 0)
        assert len(steps.of("after")) == 3
