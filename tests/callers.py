"""Clients inside the process: tasks that call a model, each in a scope of its own, and how their calls ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import trio
from trio.testing import wait_all_tasks_blocked

from triton_trio import InferenceRequest, Model, Outcome, Reason, TritonError


class Call:
    """One call of ``model.infer``; ``value`` fills the input, ``rows`` is the batch size (None: the model has none)."""

    def __init__(self, model: Model, label: str, *, value: float = 0, rows: int | None = None, **options: Any) -> None:
        shape = (2,) if rows is None else (rows, 2)
        self.model = model
        self.request: InferenceRequest = model.request(
            {"INPUT0": np.full(shape, value, np.float32)}, request_id=label, **options
        )
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.output: np.ndarray | None = None
        self.error: TritonError | None = None

    async def run(self) -> None:
        try:
            with self.scope:
                response = await self.model.infer(self.request)
                self.output = response.outputs["OUTPUT0"]
        except TritonError as exc:
            # Without the frames it has seen, which hold the request's tensors.
            exc.__context__ = None
            self.error = exc.with_traceback(None)
        finally:
            self.ended.set()

    def leave(self, reason: Reason | None = Reason.CLIENT_RESET) -> None:
        """Cancel the scope around the call, as a frontend does when its client goes away."""
        self.scope.cancel(reason=None if reason is None else reason.value)

    @property
    def outcome(self) -> Outcome | None:
        return self.request.outcome

    def check(self) -> None:
        """What the caller saw is what the books say (law 8)."""
        assert self.ended.is_set()
        assert (self.output is not None) == (self.outcome is Outcome.OK)
        if self.error is not None:
            assert self.error.message
        if self.outcome in (Outcome.ERROR, Outcome.REJECTED):
            assert self.request.reason is None
            assert self.error is not None or self.scope.cancelled_caught  # told, or gone in the same tick
        elif self.outcome is not Outcome.OK:
            assert self.request.reason is not None
            assert self.scope.cancelled_caught or self.error is not None


class Callers:
    def __init__(self, model: Model, nursery: trio.Nursery) -> None:
        self.model = model
        self.calls: list[Call] = []
        self._nursery = nursery

    async def call(self, label: str, **options: Any) -> Call:
        """Start a call, and wait until it waits: in its queue, or in a batch."""
        call = self.start(label, **options)
        await wait_all_tasks_blocked()
        return call

    async def call_all(self, labels: Iterable[str], **options: Any) -> list[Call]:
        """One call for each label, in this order."""
        return [await self.call(label, **options) for label in labels]

    def start(self, label: str, **options: Any) -> Call:
        """Start a call, which runs when it is its turn."""
        call = Call(self.model, label, **options)
        self.calls.append(call)
        self._nursery.start_soon(call.run, name=f"client {label}")
        return call


@asynccontextmanager
async def calling(model: Model) -> AsyncIterator[Callers]:
    """Callers of ``model``.  The block is left when all calls have ended; each must have ended in one way only."""
    async with trio.open_nursery() as nursery:
        callers = Callers(model, nursery)
        yield callers
    for call in callers.calls:
        call.check()
