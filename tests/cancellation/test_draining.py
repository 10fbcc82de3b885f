"""Blocking place: a server that shuts down.  Nothing new, a grace for what is in flight, and an answer for everybody (E1)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call, Callers
from triton_trio import InferenceServer, Outcome, Reason
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve


class Clients:
    """A frontend whose clients are tasks: it ends when it is told to drain and the last of them has gone."""

    def __init__(self, server: InferenceServer) -> None:
        self.server = server
        self.callers: Callers
        self.draining = False
        self._changed = trio.Event()

    def start_drain(self) -> None:
        self.draining = True
        self._changed.set()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self.callers = Callers(self.server.model("m"), nursery)
            task_status.started()
            await self._changed.wait()


@asynccontextmanager
async def frontend(serve: Serve, backend: ScriptedBackend, **options: Any) -> AsyncIterator[Clients]:
    """A server with clients in front of it.  Its own block is left by the drain."""
    async with serve({"m": scripted_config()}, backend, **options) as server:
        clients = Clients(server)
        await server.start_frontend(clients, clients.serve, name="clients")
        yield clients


async def test_E1_what_is_in_flight_ends_within_the_grace(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    calls: list[Call] = []
    async with frontend(serve, backend) as clients:
        server = clients.server
        calls = await clients.callers.call_all("eq")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.drain, 5)
            await wait_all_tasks_blocked()
            assert server.draining and not server.ready and clients.draining
            assert server.model("m").ready  # models stay: what is in flight may need them
            await trio.sleep(2)
            backend.automatic = True
            backend.executions[0].finish()
            began = trio.current_time()
            await trio.sleep_forever()  # the drain ends this block
    assert trio.current_time() == began
    assert [call.outcome for call in calls] == [Outcome.OK, Outcome.OK]


async def test_E1_and_whoever_is_still_there_is_told_why(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    async with frontend(serve, backend) as clients:
        calls = await clients.callers.call_all("eq")
        before = trio.current_time()
        await clients.server.drain(5)
        await trio.sleep_forever()
    assert trio.current_time() - before == 5
    assert [call.request.reason for call in calls] == [Reason.SERVER_DRAIN] * 2
    assert [call.request.stage.value for call in calls] == ["executing", "queued"]
    assert all(call.ended.is_set() for call in calls)


async def test_E1_a_second_drain_brings_the_end_forward(serve: Serve, autojump_clock: MockClock) -> None:
    backend = ScriptedBackend()
    async with frontend(serve, backend) as clients:
        (call,) = await clients.callers.call_all("e")
        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients.server.drain, 3600)
            await trio.sleep(2)
            await clients.server.drain(0)
            await trio.sleep_forever()
    assert trio.current_time() - before == 2
    assert call.request.reason is Reason.SERVER_DRAIN


async def test_an_idle_server_drains_at_once(serve: Serve, autojump_clock: MockClock) -> None:
    async with frontend(serve, ScriptedBackend()) as clients:
        before = trio.current_time()
        await clients.server.drain(5)
        await trio.sleep_forever()
    assert trio.current_time() == before


async def test_E1_the_end_of_a_drain_waits_for_the_device_and_not_longer_than_the_limit(
    serve: Serve, autojump_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    backend.misbehaviour.ignore_release = True
    async with frontend(serve, backend, release_limit=7) as clients:
        (call,) = await clients.callers.call_all("e")
        before = trio.current_time()
        await clients.server.drain(5)
        await trio.sleep_forever()
    assert call.request.ended_at - before == 5
    assert trio.current_time() - before == 5 + 7
    assert backend.executions[0].abandoned


async def test_leaving_the_block_of_the_server_is_a_drain_without_grace(serve: Serve) -> None:
    backend = ScriptedBackend()
    with pytest.raises(AssertionError, match="not quiescent"):
        # The test server says so: to leave while something is in flight is what tests must not do by accident.
        async with frontend(serve, backend) as clients:
            (call,) = await clients.callers.call_all("e")
    assert call.ended.is_set()
    assert call.outcome is Outcome.CANCELLED
