"""Load and unload of a model in a worker.  Workers are tasks; see world.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InternalError, InvalidArgument, Reason, Unavailable
from triton_trio.backends import BackendModel, ModelContext
from triton_trio.backends.worker.messages import Hello, InstanceOpened, Message, ModelOpened
from triton_trio.testing import ScriptedBackend, scripted_config

from .world import LIMITS, PanicException, workers

PLAIN = scripted_config()


async def test_what_the_load_raises_in_the_worker_is_what_the_client_reads(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hosted = ScriptedBackend()

    async def refuse(name: str) -> None:
        raise InvalidArgument(f"{name}: parameter steps must be a number")

    for where in ("on_open_model", "on_open_instance"):
        setattr(hosted, where, refuse)
        async with workers(tmp_path, PLAIN, hosted, explicit=True) as (server, backend):
            with pytest.raises(InvalidArgument, match="parameter steps must be a number"):
                await server.load_model("m")
            await wait_all_tasks_blocked()
            assert await backend.child.wait() is not None
        setattr(hosted, where, None)


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (ValueError("no"), "ValueError: no"),
        (SystemExit(3), "SystemExit: 3"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
        (BaseExceptionGroup("its tasks", [SystemExit(3)]), "BaseExceptionGroup: its tasks (1 sub-exception)"),
    ],
    ids=str,
)
async def test_whatever_the_load_raises_is_told_as_if_it_were_in_the_server(
    tmp_path: Path, autojump_clock: MockClock, exc: BaseException, text: str
) -> None:
    hosted = ScriptedBackend()

    async def fail(name: str) -> None:
        raise exc

    for where in ("on_open_model", "on_open_instance"):
        setattr(hosted, where, fail)
        async with workers(tmp_path, PLAIN, hosted, explicit=True) as (server, _):
            with pytest.raises(InternalError) as caught:
                await server.load_model("m")
            assert caught.value.message == f"load failed for model 'm': {text}"
        setattr(hosted, where, None)


@pytest.mark.parametrize(
    ("where", "answer"),
    [
        ("on_open_model", InstanceOpened("m_0")),
        ("on_open_model", Hello()),
        ("on_open_instance", ModelOpened([("KIND_CPU", 0, 1)])),
        ("on_open_instance", Hello()),
    ],
    ids=str,
)
async def test_an_answer_to_another_question_is_none(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, where: str, answer: Message
) -> None:
    hosted = ScriptedBackend()
    async with workers(tmp_path, PLAIN, hosted, explicit=True) as (server, backend):

        async def mistake(name: str) -> None:
            backend.child.connection.post(answer)
            raise InvalidArgument("and this would end the wait, had the answer been taken for one")

        setattr(hosted, where, mistake)
        with pytest.raises(Unavailable, match="said what makes no sense"):
            await server.load_model("m")
        assert f"nobody has asked for {type(answer).__name__}(" in caplog.text


async def test_a_worker_that_dies_in_the_load_fails_the_load(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend()
    for where in ("on_open_model", "on_open_instance"):
        async with workers(tmp_path, PLAIN, hosted, explicit=True) as (server, backend):

            async def die(name: str, backend: object = backend) -> None:
                backend.child.die(-11)
                await trio.sleep_forever()

            setattr(hosted, where, die)
            with pytest.raises(Unavailable, match="was killed by SIGSEGV"):
                await server.load_model("m")
        setattr(hosted, where, None)


async def test_a_cancelled_load_kills_its_worker(tmp_path: Path, autojump_clock: MockClock) -> None:
    hosted = ScriptedBackend()
    for where in ("on_open_model", "on_open_instance"):
        loading = trio.Event()

        async def load(name: str, loading: trio.Event = loading) -> None:
            loading.set()
            with trio.CancelScope(shield=True):
                await trio.sleep(1000)

        setattr(hosted, where, load)
        async with workers(tmp_path, PLAIN, hosted, explicit=True) as (server, backend):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.load_model, "m")
                await loading.wait()
                began = trio.current_time()
                nursery.cancel_scope.cancel()
            await backend.child.wait()
            assert backend.child.killed and trio.current_time() == began
        setattr(hosted, where, None)


@pytest.mark.parametrize("unload", [True, False])
async def test_an_unload_cancels_what_executes_and_closes_the_worker(
    tmp_path: Path, autojump_clock: MockClock, unload: bool
) -> None:
    hosted = ScriptedBackend()
    options = {"explicit": True, "load_models": ["m"], "unload_grace": 5}
    async with trio.open_nursery() as nursery:
        async with workers(tmp_path, PLAIN, hosted, **options) as (server, backend):
            async with calling(server.model("m")) as callers:
                a = await callers.call("a")
                execution = await hosted.wait_execution()
                if unload:
                    await server.unload_model("m")
                else:
                    server.repository.stop()
                await a.ended.wait()
                assert a.request.reason is Reason.MODEL_UNLOADING
                await backend.child.wait()
                assert execution.cancelled_after == 0
                assert not backend.child.killed
                assert (hosted.open_models, hosted.open_instances) == (0, 0)
        nursery.cancel_scope.cancel()


async def test_an_unload_cancels_a_row_that_was_to_be_computed_to_its_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    more = 'parameters { key: "executing_cancel_ends_sequence" value { string_value: "false" } }'
    config = scripted_config(max_batch_size=4, sequences="oldest { max_candidate_sequences: 4 }", more=more)
    hosted = ScriptedBackend()
    async with workers(tmp_path, config, hosted, explicit=True, load_models=["m"]) as (server, backend):
        async with calling(server.model("m")) as callers:
            a = await callers.call("a", rows=1, sequence_id=5, sequence_start=True, sequence_end=True)
            execution = await hosted.wait_execution()
            a.leave()
            await wait_all_tasks_blocked()
            assert execution.cancelled_after is None
            server.repository.stop()
            await execution.ended.wait()
            assert execution.cancelled_after == 0
        await backend.child.wait()
        assert not backend.child.killed


async def test_law_12_a_worker_that_does_not_close_is_killed(tmp_path: Path, autojump_clock: MockClock) -> None:
    class Slow(ScriptedBackend):
        @asynccontextmanager
        async def open_model(self, context: ModelContext) -> AsyncIterator[BackendModel]:
            async with super().open_model(context) as model:
                try:
                    yield model
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(100)

    hosted = Slow(automatic=True)
    async with workers(tmp_path, PLAIN, hosted, explicit=True, load_models=["m"]) as (server, backend):
        began = trio.current_time()
        await server.unload_model("m")
        assert backend.child.killed
        assert trio.current_time() - began == pytest.approx(LIMITS.close)
