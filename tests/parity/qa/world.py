"""The QA's models, with the test in the place of ``execute_delay_ms``, and what its client's callbacks are given."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio
import tritonclient.grpc as triton
from trio.testing import wait_all_tasks_blocked
from tritonclient.utils import InferenceServerException

from tests.parity.world import eventually, in_thread
from triton_trio import InferenceServer, Model
from triton_trio.grpc.frontend import serve_grpc
from triton_trio.grpc.server import GrpcServer
from triton_trio.observe.statistics import ModelCounters
from triton_trio.scheduling import SequenceStatistics
from triton_trio.testing import Execution, ScriptedBackend, open_test_server

LOCALLY = "Locally cancelled by application!"
#: Triton's rule: what executes when a request of its sequence is cancelled, or is cancelled itself, is left to its end.
NARROW = 'parameters { key: "executing_cancel_ends_sequence" value { string_value: "false" } }'


def tensor(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


class Callback:
    """A callback of the client, and all that it was given: at most once for a request, many times for a stream."""

    def __init__(self) -> None:
        self.results: list[triton.InferResult] = []
        self.errors: list[InferenceServerException] = []
        self._trio = trio.lowlevel.current_trio_token()
        self._called = trio.lowlevel.ParkingLot()

    def __call__(self, result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        """In one of gRPC's threads."""
        self._trio.run_sync_soon(self._put, result, error)

    def _put(self, result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        assert (result is None) != (error is None)
        if error is None:
            self.results.append(result)
        else:
            self.errors.append(error)
        self._called.unpark_all()

    @property
    def responded(self) -> bool:
        return bool(self.results or self.errors)

    async def wait(self, count: int = 1) -> None:
        """Until it was called ``count`` times."""
        while len(self.results) + len(self.errors) < count:
            await self._called.park()

    async def result(self) -> triton.InferResult:
        """What a request that was not cancelled has got."""
        await self.wait()
        assert self.errors == [], self.errors
        return self.results[0]

    async def cancelled(self) -> str:
        """The QA's ``_assert_response_is_cancelled``; the message, which says who cancelled it: the client here, or the
        server.  Triton's server sends an empty one."""
        await self.wait()
        (error,) = self.errors
        assert self.results == []
        assert isinstance(error, InferenceServerException)
        assert error.status() == "StatusCode.CANCELLED"
        assert error.message()
        return str(error.message())


class Call(Callback):
    """One ``async_infer``."""

    def __init__(self, client: triton.InferenceServerClient, model: str, inputs: Any, **options: Any) -> None:
        super().__init__()
        self._context = client.async_infer(model, inputs, self, **options)

    def cancel(self) -> None:
        self._context.cancel()


class World:
    """A server on a loopback socket, its backend, and one client."""

    def __init__(self, server: InferenceServer, backend: ScriptedBackend, address: str) -> None:
        self.server = server
        self.backend = backend
        self.address = address
        self.client = triton.InferenceServerClient(address)
        self.calls: list[Call] = []

    def model(self, name: str) -> Model:
        return self.server.model(name)

    def counters(self, name: str) -> ModelCounters:
        return self.server.model(name).counters

    def failures(self, name: str, reason: str = "CANCELED") -> int:
        """``nv_inference_request_failure{model="<name>",reason="<reason>",version="1"}``."""
        return sum(count for each, count in self.counters(name).failures.items() if each == reason)

    def pending(self, name: str) -> int:
        """``nv_inference_pending_request_count``: received, and not executing."""
        scheduler = self.server.model(name).statistics().scheduler
        assert scheduler is not None
        return scheduler.queue.queued

    def sequences(self, name: str) -> tuple[int, int]:
        """How many sequences have a slot, and how many wait for one."""
        scheduler = self.server.model(name).statistics().scheduler
        assert isinstance(scheduler, SequenceStatistics)
        return scheduler.in_slots, scheduler.in_backlog

    @property
    def running(self) -> list[str]:
        """The instances that execute something."""
        return [execution.instance for execution in self.backend.running]

    def call(self, model: str, inputs: Any, **options: Any) -> Call:
        call = Call(self.client, model, inputs, **options)
        self.calls.append(call)
        return call

    async def executing(self, model: str, inputs: Any, **options: Any) -> tuple[Call, Execution]:
        """A call that an instance executes now: it holds it until its execution is told to finish."""
        number = len(self.backend.executions)
        call = self.call(model, inputs, **options)
        return call, await self.backend.wait_execution(number)

    async def queued(self, model: str, inputs: Any, **options: Any) -> Call:
        """A call that waits in the model's queue now."""
        before = self.pending(model)
        call = self.call(model, inputs, **options)
        await eventually(lambda: self.pending(model) > before)
        return call

    async def wait_failures(self, model: str, count: int) -> None:
        """Until that many requests of the model were cancelled, and whatever follows from it has happened."""
        await eventually(lambda: self.failures(model) >= count)
        await wait_all_tasks_blocked()

    async def execution_count(self, model: str) -> int:
        return int((await self.statistics(model)).execution_count)

    async def statistics(self, model: str) -> Any:
        """The model's statistics, as the client asks for them."""
        reply = await in_thread(lambda: self.client.get_inference_statistics(model))
        (statistics,) = reply.model_stats
        return statistics


@asynccontextmanager
async def playing(
    root: Path,
    models: Mapping[str, str],
    backend: ScriptedBackend | None = None,
    *,
    limit: float = 10.0,
    **options: Any,
) -> AsyncIterator[World]:
    """Serve ``models``; at the end every call has its answer, no request or connection is left, and the books balance."""
    backend = backend or ScriptedBackend()
    # The QA's sequences have no END, but an idle time of six seconds.
    async with open_test_server(root, models, backend, limit=limit, idle_sequences=True, **options) as server:
        [address] = await serve_grpc(server, host="127.0.0.1", port=0)
        [frontend] = server._serving
        assert isinstance(frontend, GrpcServer)
        world = World(server, backend, address)
        try:
            yield world
            for call in world.calls:
                await call.wait()
        finally:
            with trio.move_on_after(5, shield=True):
                await in_thread(world.client.close)
        await eventually(lambda: frontend.statistics().connections == 0)
        statistics = frontend.statistics()
        assert (statistics.running, statistics.queued, statistics.incomplete) == (0, 0, 0)
        assert statistics.started == statistics.finished
