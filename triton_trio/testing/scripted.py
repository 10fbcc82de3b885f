"""A backend whose executions do what the test says, when the test says it.

::

    backend = ScriptedBackend()
    ...
    execution = await backend.wait_execution()   # it has its batch, and waits for its first command
    execution.step(2)                            # two device steps
    await trio.testing.wait_all_tasks_blocked()
    request.cancel()
    execution.finish()                           # answers whoever is still there

The answer to a member is computed on the *stacked* inputs and cut out by the member's rows, so that a row that moved would
be seen.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ..backends import Availability, Backend, BackendInstance, BackendModel, ModelContext, Placement
from ..errors import Unavailable

if TYPE_CHECKING:
    from ..batch import Batch, Member
    from ..request import Array, InferenceRequest
    from ..scopes import SequenceEnd

Command = Callable[[], Awaitable[bool] | bool]
Compute = Callable[["Array"], "Array"]


@dataclass
class Misbehaviour:
    """What a backend may do wrong when its execution is cancelled; change it while the test runs."""

    #: Catch ``Cancelled``, answer everybody and return as if nothing had happened (law 9).
    swallow_cancelled: bool = False
    #: The device does not let go: wait, shielded, until the test or :meth:`BackendInstance.abandon` releases it.
    ignore_release: bool = False


class Execution:
    """One execution: what it has seen, and the commands that drive it.

    It names requests by their labels and holds its batch only while it runs, so a record keeps no tensor alive.
    """

    def __init__(self, backend: ScriptedBackend, instance: str, batch: Batch) -> None:
        self.instance = instance
        self.batch: Batch | None = batch
        self.members = tuple(member.request.request_id for member in batch.members)
        self.rows = batch.rows
        self.steps = 0
        #: The labels of the members that were live at each step.
        self.live: list[tuple[str, ...]] = []
        #: Steps done when the cancel arrived; None if it never did.
        self.cancelled_after: int | None = None
        self.abandoned = False
        self.ended = trio.Event()
        self._backend = backend
        self._let_go = trio.Event()
        self._send, self._commands = trio.open_memory_channel[Command](math.inf)

    def __repr__(self) -> str:
        state = "ended" if self.ended.is_set() else "running"
        return f"<Execution on {self.instance} of {', '.join(self.members)}: {self.steps} steps, {state}>"

    # Commands: each is done when the execution's task runs next

    def step(self, count: int = 1) -> None:
        """Do ``count`` device steps, with a checkpoint before each."""
        for _ in range(count):
            self._send.send_nowait(self._step)

    def finish(self) -> None:
        """Answer every live member, and return."""
        self._send.send_nowait(self._finish)

    def reschedule(self) -> None:
        """Ask for another execution of every live member (``iterative_sequence``), and return."""

        def command() -> bool:
            batch = self._running
            for member in batch.live():
                batch.reschedule(member)
            return True

        self._send.send_nowait(command)

    def join(self, rows: int, *, all_or_none: bool = False) -> None:
        """Let waiting requests have ``rows`` rows."""

        def command() -> bool:
            for member in self._running.join(rows, all_or_none=all_or_none):
                self.members += (member.request.request_id,)
            return False

        self._send.send_nowait(command)

    def end(self) -> None:
        """Return without answering."""
        self._send.send_nowait(lambda: True)

    def emit(self, index: int = 0, *, final: bool = False) -> None:
        """Send one response of a decoupled model to the member at ``index``, waiting while its reader is behind."""

        async def command() -> bool:
            member = self._running.members[index]
            await self._running.send(member, self.answer(member), final=final)
            return False

        self._send.send_nowait(command)

    def fail(self, error: Exception) -> None:
        """Raise ``error`` out of execute."""

        def command() -> bool:
            raise error

        self._send.send_nowait(command)

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function`` when it is its turn, to see how far the execution has come."""

        def command() -> bool:
            function()
            return False

        self._send.send_nowait(command)

    def let_go(self) -> None:
        """End the wait of :attr:`Misbehaviour.ignore_release`."""
        self._let_go.set()

    def answer(self, member: Member) -> dict[str, Array]:
        """The outputs of ``member``."""
        return self._backend.answer(self._running, member)

    # Inside

    @property
    def _running(self) -> Batch:
        if self.batch is None:
            raise RuntimeError(f"{self!r} has ended")
        return self.batch

    async def _step(self) -> bool:
        await self._running.checkpoint()
        self.steps += 1
        self.live.append(tuple(member.request.request_id for member in self._running.live()))
        return False

    def _finish(self) -> bool:
        batch = self._running
        for member in batch.live():
            batch.respond(member, self.answer(member))
        return True

    async def run(self) -> None:
        try:
            done = False
            while not done:
                # Where a cancel arrives.
                result = (await self._commands.receive())()
                done = result if isinstance(result, bool) else await result
        except trio.Cancelled:  # noqa: ASYNC103 - what a model must not do, it does on demand
            self.cancelled_after = self.steps
            if self._backend.misbehaviour.ignore_release:
                with trio.CancelScope(shield=True):  # without a deadline: that is what the watchdog is for
                    await self._let_go.wait()
            if not self._backend.misbehaviour.swallow_cancelled:
                raise
            for member in self._running.members:
                self._running.respond(member, self.answer(member))
        finally:
            self.batch = None
            self.ended.set()

    def abandon(self) -> None:
        self.abandoned = True
        self._let_go.set()


class ScriptedBackend(Backend):
    """See :mod:`triton_trio.testing.scripted`.

    Args:
      compute: from a stacked input to a stacked output; a function of each row by itself.  Default: the input.
      automatic: every execution answers at once, after one checkpoint, instead of waiting for commands.
      one_device: all instances are on it; it is lost for all of them when one is abandoned.
    """

    def __init__(
        self, compute: Compute = lambda stacked: stacked, *, automatic: bool = False, one_device: bool = False
    ) -> None:
        self.compute = compute
        self.automatic = automatic
        self.availability = Availability() if one_device else None
        if self.availability is not None:
            self.availability.restore()
        self.misbehaviour = Misbehaviour()
        self.executions: list[Execution] = []
        #: Sequences that have ended, as their instances were told: the instance's name, and how.
        self.sequence_ends: list[tuple[str, SequenceEnd]] = []
        #: Awaited while a model or an instance is being opened, with its name: raise or wait here.
        self.on_open_model: Callable[[str], Awaitable[None]] | None = None
        self.on_open_instance: Callable[[str], Awaitable[None]] | None = None
        #: Models and instances open now: what a load has acquired and not yet given back.
        self.open_models = 0
        self.open_instances = 0
        self._batching: dict[str, bool] = {}
        self._changed = trio.lowlevel.ParkingLot()

    def answer(self, batch: Batch, member: Member) -> dict[str, Array]:
        """The outputs of ``member``: ``compute`` of input *n* becomes output *n*.  Override it for a model of your own."""
        outputs = {}
        for name in member.inputs:
            stacked = self.compute(batch.stack_of(member.cohort, name))
            rows = stacked[member.start : member.stop] if self.batches(member.request) else stacked
            outputs[name.replace("IN", "OUT", 1)] = rows
        return outputs

    def batches(self, request: InferenceRequest) -> bool:
        """Whether the first dimension of the request's tensors is the batch."""
        return self._batching[request.model_name]

    @property
    def running(self) -> list[Execution]:
        """Executions that have not ended, in the order in which they began."""
        return [execution for execution in self.executions if not execution.ended.is_set()]

    async def wait_execution(self, number: int | None = None) -> Execution:
        """The execution with that number (from 0), once it has begun; by default the next one that begins, or the
        latest if it still runs.

        **Cancellation:** only the wait ends.
        """
        while True:
            await trio.lowlevel.checkpoint()
            if number is None and self.running:
                return self.running[-1]
            if number is not None and len(self.executions) > number:
                return self.executions[number]
            await self._changed.park()

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[ScriptedModel]:
        name = context.config.name
        self._batching[name] = context.config.max_batch_size > 0
        self.open_models += 1
        try:
            if self.on_open_model is not None:
                await self.on_open_model(name)
            yield ScriptedModel(self)
        finally:
            self.open_models -= 1

    def begin(self, execution: Execution) -> None:
        self.executions.append(execution)
        if self.automatic:
            execution.finish()
        self._changed.unpark_all()


class ScriptedModel(BackendModel):
    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[ScriptedInstance]:
        self._backend.open_instances += 1
        try:
            if self._backend.on_open_instance is not None:
                await self._backend.on_open_instance(placement.name)
            yield ScriptedInstance(self._backend, placement.name)
        finally:
            self._backend.open_instances -= 1


class ScriptedInstance(BackendInstance):
    def __init__(self, backend: ScriptedBackend, name: str) -> None:
        self.availability = backend.availability
        self._backend = backend
        self._name = name
        self._execution: Execution | None = None

    async def execute(self, batch: Batch) -> None:
        self._execution = execution = Execution(self._backend, self._name, batch)
        self._backend.begin(execution)
        await execution.run()

    def on_sequence_end(self, end: SequenceEnd) -> None:
        self._backend.sequence_ends.append((self._name, end))

    def abandon(self) -> bool:
        if self._execution is not None:
            self._execution.abandon()
        if self.availability is not None:
            self.availability.end("the device that all instances are on was given up; reload the model")
            for execution in self._backend.running:
                execution.fail(Unavailable("the device was given up"))
        return False
