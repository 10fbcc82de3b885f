"""Two things happen to a request in one scheduler tick, in both orders (B1): one outcome, told once, and nothing left."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call, calling
from triton_trio import InferenceServer, InternalError, Model, Outcome, Reason
from triton_trio.testing import ScriptedBackend, orders, scripted_config
from triton_trio.testing.fixtures import Serve


def result(server: InferenceServer, model: Model, call: Call) -> None:
    batch = model.instances[0].batch
    if batch is not None and call.request in [member.request for member in batch.members]:
        for member in batch.members:
            batch.respond(member, {"OUTPUT0": np.zeros((1, 2), np.float32)})


def device_error(server: InferenceServer, model: Model, call: Call) -> None:
    batch = model.instances[0].batch
    if batch is not None:
        for member in batch.members:
            batch.fail(member, InternalError("the device failed"))


def disconnect(server: InferenceServer, model: Model, call: Call) -> None:
    call.leave(Reason.CONNECTION_LOST)


def admin(server: InferenceServer, model: Model, call: Call) -> None:
    call.request.cancel(Reason.ADMIN)


def deadline(server: InferenceServer, model: Model, call: Call) -> None:
    call.scope.deadline = trio.current_time()
    assert call.scope.cancel_called  # to look is to make Trio notice that it has passed, now


def unload(server: InferenceServer, model: Model, call: Call) -> None:
    model.begin_unload()
    model.stop()


def quarantine(server: InferenceServer, model: Model, call: Call) -> None:
    instance = model.instances[0]
    instance.state = type(instance.state).QUARANTINED
    model.instance_quarantined(instance)


def queue_timeout(server: InferenceServer, model: Model, call: Call) -> None:
    if call.request in model.scheduler.queued():
        call.request.queue_deadline = trio.current_time()
        for generation, request in tuple(model.scheduler.queue._timed.items()):
            if request is call.request:
                model.scheduler.queue._deadlines[:] = [(trio.current_time(), generation)]
        model.scheduler._expire()


Act = Callable[[InferenceServer, Model, Call], None]
ACTS: dict[str, Act] = {
    act.__name__: act for act in (result, device_error, disconnect, admin, deadline, unload, quarantine, queue_timeout)
}
#: What a request may be after each, if it is first.
FIRST = {
    "result": {Outcome.OK, Outcome.CANCELLED, Outcome.DEADLINE},  # received is what counts: a cancel may still win
    "device_error": {Outcome.ERROR},
    "disconnect": {Outcome.CANCELLED},
    "admin": {Outcome.CANCELLED},
    "deadline": {Outcome.DEADLINE},
    "unload": {Outcome.CANCELLED},
    "quarantine": {Outcome.REJECTED},
    "queue_timeout": {Outcome.REJECTED},
}
#: What has an effect at each stage.
QUEUED = {"disconnect", "admin", "deadline", "unload", "quarantine", "queue_timeout"}
EXECUTING = {"result", "device_error", "disconnect", "admin", "deadline", "unload"}


@pytest.mark.parametrize("stage", ["queued", "executing"])
@pytest.mark.parametrize("order", orders(ACTS), ids="-".join)
async def test_B1_whoever_is_first_decides(
    serve: Serve, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, order: tuple[str, ...], stage: str
) -> None:
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    effective = [act for act in order if act in (QUEUED if stage == "queued" else EXECUTING)]
    backend = ScriptedBackend()
    policy = "default_queue_policy { default_timeout_microseconds: 1000000000 }"
    config = scripted_config(max_batch_size=1, batching=policy)
    async with serve({"m": config}, backend) as server:
        model = server.model("m")
        async with calling(model) as callers:
            other = await callers.call("other", rows=1) if stage == "queued" else None
            call = await callers.call("victim", rows=1)
            for act in order:
                ACTS[act](server, model, call)
            await wait_all_tasks_blocked()
            if effective:
                assert call.outcome in FIRST[effective[0]]
                if effective[0] == "result":
                    expected = effective[1:] == [] or effective[1] in ("result", "device_error")
                    assert (call.outcome is Outcome.OK) is expected
            else:
                assert call.outcome is None
                call.leave()
            if other is not None:
                other.leave()
            for execution in backend.running:
                execution.end()  # whom it had to serve has been served, or is gone
        await wait_all_tasks_blocked()
        assert sum(model.counters.outcomes.values()) == model.counters.started == len(callers.calls)
        lines = [record for record in caplog.records if record.name == "triton_trio.cancel"]
        cancelled = [
            call.request.request_id for call in callers.calls if call.outcome in (Outcome.CANCELLED, Outcome.DEADLINE)
        ]
        assert sorted(line.request_id for line in lines) == sorted(cancelled)  # one line each, and no more
        for instance in model.instances:
            if "quarantine" not in order and "unload" not in order:
                assert instance.statistics().state == "idle"
        if "quarantine" in order:
            await server.unload_model("m")
