"""A worker that dies, hangs or talks nonsense, and the one that takes its place.  Workers are tasks; see world.py."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InvalidArgument, Outcome, TritonError, Unavailable
from triton_trio.backends import Availability
from triton_trio.backends.worker.messages import (
    Account,
    Ended,
    Finish,
    Hello,
    InstanceOpened,
    Lingers,
    Message,
    ModelOpened,
    Refused,
    Released,
)
from triton_trio.instance import InstanceState
from triton_trio.testing import ScriptedBackend, scripted_config

from .world import LIMITS, PanicException, workers

PLAIN = scripted_config()
BATCHING = scripted_config(max_batch_size=8, batching="max_queue_delay_microseconds: 1000")
DECOUPLED = scripted_config(max_batch_size=8, decoupled=True)


async def test_law_6_a_worker_that_does_not_let_go_is_killed_and_the_queue_served(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()
    hosted.misbehaviour.ignore_release = True
    config = scripted_config(instances=2)
    async with workers(tmp_path, config, hosted, release_limit=7) as (server, backend):
        model = server.model("m")
        async with calling(model) as callers:
            a, b, c = [await callers.call(label) for label in "abc"]
            began = trio.current_time()
            a.leave()
            await b.ended.wait()
            assert trio.current_time() - began == 7
            assert isinstance(b.error, Unavailable)
            assert b.error.message == (
                "the worker process of model 'm' was killed, for its device did not let go in time after a cancel; it is "
                "being restarted"
            )
            assert backend.child.killed
            assert not c.ended.is_set() and model.ready
            (await hosted.wait_execution(2)).finish()
            await c.ended.wait()
            assert c.outcome is Outcome.OK
            assert [child.pid for child in backend.children] == [1000, 1001]
            await wait_all_tasks_blocked()
            assert [instance.state for instance in model.instances] == [InstanceState.IDLE] * 2
            assert (hosted.open_models, hosted.open_instances) == (1, 2)


async def test_law_6_a_worker_that_does_not_let_go_behind_its_last_answer_is_killed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted, release_limit=7) as (server, backend):
        async with calling(server.model("m")) as callers:
            a, b = [await callers.call(label) for label in "ab"]
            first = await hosted.wait_execution()
            first.emit(final=True)
            await a.ended.wait()
            assert a.outcome is Outcome.OK
            began = trio.current_time()
            first.call(lambda: first.batch and first.batch.watch_release(3))  # and it never returns
            second = await hosted.wait_execution(1)
            assert trio.current_time() - began >= 7 + 3  # the limit, behind what its program takes
            assert backend.children[0].killed
            second.finish()
            await b.ended.wait()
            assert b.outcome is Outcome.OK


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (7, "ended with exit code 7"),
        (-11, "was killed by SIGSEGV"),
        (-9, "was killed by SIGKILL (not by this server: perhaps memory ran out)"),
    ],
)
async def test_a_worker_that_dies_is_replaced_and_its_requests_are_told_how_it_ended(
    tmp_path: Path, autojump_clock: MockClock, code: int, how: str
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted) as (server, backend), calling(server.model("m")) as callers:
        (instance,) = server.model("m").instances
        a, b, c = [await callers.call(label) for label in "abc"]
        loading = trio.Event()
        go_on = trio.Event()

        async def wait(name: str) -> None:
            loading.set()
            await go_on.wait()

        hosted.on_open_model = wait
        backend.child.die(code)
        await a.ended.wait()
        assert isinstance(a.error, Unavailable)
        assert a.error.message == f"the worker process of model 'm' {how}; it is being restarted"
        await loading.wait()
        await wait_all_tasks_blocked()
        assert instance.state is InstanceState.RECOVERING
        b.leave()  # in the queue, meanwhile
        await b.ended.wait()
        assert len(server.model("m").scheduler) == 1
        go_on.set()
        (await hosted.wait_execution()).finish()
        await c.ended.wait()
        assert c.outcome is Outcome.OK
        statistics = instance.statistics().backend
        assert (statistics.restarts, statistics.last_end) == (1, how)


async def test_law_1_requests_do_not_wait_in_an_instance_whose_worker_is_lost(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, BATCHING, hosted) as (server, backend), calling(server.model("m")) as callers:
        go_on = trio.Event()
        hosted.on_open_model = lambda name: go_on.wait()
        backend.child.lingers = 0.5
        backend.child.die(1)
        await wait_all_tasks_blocked()
        a, b = [await callers.call(label, rows=1, value=1) for label in "ab"]
        await trio.sleep(1)
        assert len(server.model("m").scheduler) == 2
        go_on.set()
        execution = await hosted.wait_execution()
        assert execution.members == ("a", "b")  # one batch: nobody was taken early
        execution.finish()
        await a.ended.wait()
        await b.ended.wait()


async def test_a_worker_that_is_lost_too_often_is_given_up_without_any_traffic(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, PLAIN, hosted, explicit=True, load_models=["m"]) as (server, backend):
        model = server.model("m")
        restarted = []
        for _ in range(LIMITS.restarts):
            backend.child.die(3)
            began = trio.current_time()
            await wait_all_tasks_blocked()
            await model.infer({"INPUT0": np.float32([1, 2])})
            restarted.append(trio.current_time() - began)
            assert model.ready
        assert restarted == [0, 1, 2]
        backend.child.die(3)
        await wait_all_tasks_blocked()
        assert not model.ready and not server.ready
        why = (
            "the worker process of model 'm' was lost 4 times within 60 s; the last one ended with exit code 3; reload "
            "the model"
        )
        (line,) = await server.repository.index()
        assert (line.state, line.reason) == ("UNAVAILABLE", f"model 'm' has no instance left: {why}")
        with pytest.raises(Unavailable, match="lost 4 times"):
            await model.infer({"INPUT0": np.float32([1, 2])})
        await server.load_model("m")
        assert server.model("m").ready


async def test_a_worker_that_is_lost_now_and_then_is_not_given_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, PLAIN, hosted) as (server, backend):
        for _ in range(3 * LIMITS.restarts):
            backend.child.die(3)
            await wait_all_tasks_blocked()
            await server.model("m").infer({"INPUT0": np.float32([1, 2])})
            await trio.sleep(LIMITS.window + 1)
        assert len(backend.children) == 1 + 3 * LIMITS.restarts


async def test_a_restart_that_cannot_load_the_model_is_a_loss(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, PLAIN, hosted) as (server, backend):
        model = server.model("m")

        async def refuse(name: str) -> None:
            raise InvalidArgument("no such file")

        hosted.on_open_model = refuse
        backend.child.die(3)
        await trio.sleep(10)
        assert not model.ready
        assert "could not load the model again (no such file)" in model.why_unavailable()
        hosted.on_open_model = None


async def test_law_12_a_restart_that_takes_for_ever_is_a_loss(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, PLAIN, hosted) as (server, backend):
        hosted.on_open_model = lambda name: trio.Event().wait()
        backend.child.die(3)
        await trio.sleep(LIMITS.reload + 1)
        hosted.on_open_model = None
        await trio.sleep(2)
        assert server.model("m").ready and len(backend.children) == 3


async def test_a_worker_that_talks_nonsense_is_killed(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted) as (server, backend), calling(server.model("m")) as callers:
        a = await callers.call("a")
        backend.child.connection._socket.send(b"Traceback (most recent call last)")
        await a.ended.wait()
        assert "said what makes no sense" in a.error.message
        await wait_all_tasks_blocked()
        assert len(backend.children) == 2


@pytest.mark.parametrize("swallow", [False, True])
async def test_law_8_what_a_worker_that_falls_had_sent_is_no_whole_answer(
    tmp_path: Path, autojump_clock: MockClock, swallow: bool
) -> None:
    hosted = ScriptedBackend()
    hosted.misbehaviour.swallow_cancelled = swallow  # and answer everybody, when the fall cancels the execution
    async with workers(tmp_path, DECOUPLED, hosted) as (server, backend):
        request = server.model("m").request({"INPUT0": np.float32([[1, 2]])})
        read = []
        with pytest.raises(Unavailable) as raised:
            async with server.model("m").open_responses(request) as responses:
                (await hosted.wait_execution()).emit()
                async for response in responses:
                    read.append(response.final)
                    backend.child.socket.send(b"GET / HTTP/1.1\r\nHost: which the worker's reader makes nothing of\r\n")
        assert raised.value.message == "the worker process of model 'm' ended with exit code 1; it is being restarted"
        assert (read, request.outcome) == ([False], Outcome.ERROR)
        await wait_all_tasks_blocked()
        assert len(backend.children) == 2


BAD = [
    (SystemExit(3), "SystemExit: 3"),
    (PanicException("index out of bounds"), "PanicException: index out of bounds"),
    (BaseExceptionGroup("its tasks", [SystemExit(3), KeyError(1)]), "BaseExceptionGroup: its tasks (2 sub-exceptions)"),
    (BaseExceptionGroup("its tasks", [PanicException("no")]), "PanicException: no"),
]


def raise_(exc: BaseException) -> None:
    raise exc


@pytest.mark.parametrize(("exc", "text"), BAD, ids=str)
async def test_whatever_a_model_raises_is_the_error_of_its_own_requests_only(
    tmp_path: Path, autojump_clock: MockClock, exc: BaseException, text: str
) -> None:
    hosted = ScriptedBackend()
    config = scripted_config(instances=2)
    async with workers(tmp_path, config, hosted) as (server, backend), calling(server.model("m")) as callers:
        a, b = [await callers.call(label) for label in "ab"]
        first, second = await hosted.wait_execution(0), await hosted.wait_execution(1)
        first.call(lambda: raise_(exc))
        await a.ended.wait()
        assert a.error.message == f"model 'm' failed: {text}"
        second.finish()
        await b.ended.wait()
        assert b.outcome is Outcome.OK
        assert len(backend.children) == 1


@pytest.mark.parametrize("exc", [SystemExit(3), PanicException("no")], ids=str)
async def test_what_a_model_raises_when_it_is_cancelled_is_no_loss_of_its_worker(
    tmp_path: Path, autojump_clock: MockClock, exc: BaseException
) -> None:
    async def compute() -> bool:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise exc

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()

    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted) as (server, backend), calling(server.model("m")) as callers:
        a, b = [await callers.call(label) for label in "ab"]
        (await hosted.wait_execution(0))._send.send_nowait(compute)
        await wait_all_tasks_blocked()
        a.leave()
        (await hosted.wait_execution(1)).finish()
        await b.ended.wait()
        assert b.outcome is Outcome.OK
        assert len(backend.children) == 1


@pytest.mark.parametrize("seed", range(12))
async def test_laws_4_5_16_whoever_leaves_whatever_dies_and_whenever(
    tmp_path: Path, autojump_clock: MockClock, seed: int
) -> None:
    rng = random.Random(seed)
    hosted = ScriptedBackend()
    config = scripted_config(max_batch_size=4, batching="max_queue_delay_microseconds: 1000", instances=2)
    limits = replace(LIMITS, restarts=1000)
    async with workers(tmp_path, config, hosted, limits=limits, release_limit=5) as (server, backend):
        model = server.model("m")
        async with calling(model) as callers:
            for number in range(120):
                what = rng.choice(
                    ["call"] * 4 + ["leave"] * 3 + ["step", "finish", "finish", "fail", "die", "hang", "time"]
                )
                live = [call for call in callers.calls if not call.ended.is_set()]
                execution = rng.choice(hosted.running) if hosted.running else None
                if what == "call":
                    callers.start(str(number), rows=rng.randint(1, 3))
                elif what == "leave" and live:
                    rng.choice(live).leave()
                elif what == "die":
                    backend.child.die(-11)
                elif what == "hang":
                    hosted.misbehaviour.ignore_release = not hosted.misbehaviour.ignore_release
                elif what == "time":
                    await trio.sleep(rng.choice([0.001, 1, 6]))
                elif execution is not None and what == "fail":
                    execution.fail(ValueError("as it happens"))
                elif execution is not None and what in ("step", "finish"):
                    getattr(execution, what)()
                if rng.random() < 0.7:
                    await wait_all_tasks_blocked()
            hosted.misbehaviour.ignore_release = False
            hosted.automatic = True
            for execution in hosted.running:
                execution.let_go()
                execution.finish()
        assert model.counters.in_flight == 0
        assert model.counters.started == len(callers.calls)
        await trio.sleep(limits.window)
        response = await model.infer({"INPUT0": np.float32([[1, 2]])})
        assert response.outputs["OUTPUT0"].tolist() == [[1, 2]]


MAD = [
    Finish(1, 99),
    Hello(),
    ModelOpened([]),
    InstanceOpened("m_0"),
    Refused(("Unavailable", ["no"])),
    Lingers(1, math.nan),
    Lingers(1, "soon"),
    Released(1, 0, "all"),
    Ended(1, None, 0.0, 0.0, "long", [Account(0.0, 0.0, 0.0, 0)]),
    Ended(1, None, None, 0.0, 0.0, [Account(0.0, 0.0, 0.0, 0)]),
    Ended(1, None, 0.0, 0.0, 0.0, [Account(math.inf, 0.0, 0.0, 0)]),
    Ended(1, None, 0.0, 0.0, 0.0, [Account(0.0, 0.0, 0.0, "none")]),
    Ended(1, None, 0.0, 0.0, 0.0, []),
]


@pytest.mark.parametrize("message", MAD, ids=str)
async def test_a_message_that_makes_no_sense_now_is_no_error_of_the_servers(
    tmp_path: Path, autojump_clock: MockClock, message: Message
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted) as (server, backend), calling(server.model("m")) as callers:
        a = await callers.call("a")
        backend.child.connection.post(message)
        with trio.fail_after(10):
            await a.ended.wait()
        assert "said what makes no sense" in a.error.message
        b = await callers.call("b")
        (await hosted.wait_execution(1)).finish()
        await b.ended.wait()
        assert b.outcome is Outcome.OK


@pytest.mark.parametrize(
    "message",
    [
        Hello(),
        InstanceOpened("m_0"),
        ModelOpened(["xy"]),
        ModelOpened([("KIND_CPU", 0, "two")]),
        ModelOpened([("KIND_CPU", 0, 0)]),
        ModelOpened([("KIND_CPU", 0, 1 << 17)]),
        ModelOpened(None),
        Refused(None),
    ],
    ids=str,
)
@pytest.mark.parametrize("again", [False, True])
async def test_a_worker_that_answers_what_nobody_has_asked_is_replaced(
    tmp_path: Path, autojump_clock: MockClock, message: Message, again: bool
) -> None:
    hosted = ScriptedBackend(automatic=True)
    async with workers(tmp_path, PLAIN, hosted, explicit=True) as (server, backend):

        async def answer(name: str) -> None:
            hosted.on_open_model = None
            backend.child.connection.post(message)

        if not again:
            hosted.on_open_model = answer
            with pytest.raises(TritonError, match=r"said what makes no sense|an error that nobody knows"):
                await server.load_model("m")
        await server.load_model("m")
        if again:
            hosted.on_open_model = answer
            backend.child.die(3)
            await trio.sleep(LIMITS.delay + 1)
        assert server.model("m").ready
        await server.model("m").infer({"INPUT0": np.float32([1, 2])})
        assert len(backend.children) == (3 if again else 2)


async def test_a_device_that_its_backend_gives_up_is_had_again_in_another_process(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend(one_device=True)
    config = scripted_config(instances=2)
    async with workers(tmp_path, config, hosted) as (server, backend), calling(server.model("m")) as callers:
        a, b, c = [await callers.call(label) for label in "abc"]
        lost, hosted.availability = hosted.availability, Availability()
        hosted.availability.restore()
        lost.end("its context is broken")
        await a.ended.wait()
        await b.ended.wait()
        assert a.error.message == b.error.message
        assert "model 'm' was killed: its context is broken; it is being restarted" in a.error.message
        (await hosted.wait_execution(2)).finish()
        await c.ended.wait()
        assert c.outcome is Outcome.OK and len(backend.children) == 2
