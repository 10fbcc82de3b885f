"""A server whose models are in workers, and workers that are tasks of the test: what runs there, the test says."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

from triton_trio import InferenceServer
from triton_trio.backends import Backend, BackendModel, ModelContext
from triton_trio.backends.worker import Host, WorkerLimits, open_worker_model
from triton_trio.backends.worker.connection import Connection
from triton_trio.backends.worker.wire import NonsenseError
from triton_trio.testing import ScriptedBackend, open_test_server

LIMITS = WorkerLimits(start=10, reload=20, reload_factor=0, close=3, reap=2, restarts=3, window=60, delay=1)


class PanicException(BaseException):
    """As PyO3 raises it for a panic in Rust."""


PanicException.__module__ = "pyo3_runtime"


class TaskChild:
    """A worker that is a task: killed, it has no time for anything, just as a process."""

    def __init__(self, hosted: Backend, pid: int) -> None:
        self.socket, self._theirs = socket.socketpair()
        self.pid = pid
        self.killed = False
        self.lingers = 0.0  #: seconds from the end of the connection to that of the process
        self.connection = Connection(self._theirs)
        self._hosted = hosted
        self._code: int | None = None
        self._ended = trio.Event()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        code = 0
        with self._scope:
            try:
                await Host(self._hosted, self.connection).run()
            except* NonsenseError:
                code = 1  # as a process that ends with a traceback
        self._end(code)
        self.connection.close()

    def die(self, code: int) -> None:
        """From one moment to the next."""
        self._end(code)
        self._scope.cancel()
        if isinstance(self._hosted, ScriptedBackend):
            for execution in self._hosted.running:
                execution.let_go()

    def kill(self) -> None:
        self.killed = self.killed or self._code is None
        self.die(-signal.SIGKILL)

    def _end(self, code: int) -> None:
        if self._code is None:
            self._code = code
            self.connection.end()
            self.connection._broken = True  # what the task says from now on, a process would not
            self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        await trio.sleep(self.lingers)
        assert self._code is not None
        return self._code


class Workers(Backend):
    """Has every model in a worker that hosts ``hosted``."""

    def __init__(self, hosted: Backend, nursery: trio.Nursery, limits: WorkerLimits = LIMITS) -> None:
        self.hosted = hosted
        self.limits = limits
        self.children: list[TaskChild] = []
        self._nursery = nursery

    @property
    def child(self) -> TaskChild:
        return self.children[-1]

    async def launch(self) -> TaskChild:
        await trio.lowlevel.checkpoint()
        child = TaskChild(self.hosted, pid=1000 + len(self.children))
        self.children.append(child)
        self._nursery.start_soon(child.run, name=f"worker {child.pid}")
        return child

    def open_model(self, context: ModelContext) -> AbstractAsyncContextManager[BackendModel]:
        return open_worker_model(context, self.launch, limits=self.limits)


@asynccontextmanager
async def workers(
    root: Path, config: str, hosted: ScriptedBackend, *, limits: WorkerLimits = LIMITS, **options: Any
) -> AsyncIterator[tuple[InferenceServer, Workers]]:
    """A server with the model ``m``; at the end every worker has ended, and nothing is open in any."""
    async with trio.open_nursery() as nursery:
        backend = Workers(hosted, nursery, limits)
        async with open_test_server(root, {"m": config}, backend, limit=float("inf"), **options) as server:
            yield server, backend
    for child in backend.children:
        assert await child.wait() is not None
    assert (hosted.open_models, hosted.open_instances) == (0, 0)
