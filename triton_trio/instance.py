"""A model instance: the task that takes a batch when its device is ready, and executes it in the batch's own scope.

The execution is not a child of any request: a request that is cancelled leaves its batch, and only when the last has
left is the execution cancelled.  The device lets go at its own checkpoint; until then this task waits, and a watchdog
that needs no new traffic bounds the wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import trio

from .batch import Batch, Cohort, Hand, Member, Reshape
from .errors import InternalError, TritonError, no_panic
from .observe.cancel_log import log_cancelled
from .scheduling import Seat
from .scopes import Reason, wait_in_parts

if TYPE_CHECKING:
    from .backends import BackendInstance, Placement
    from .config import ModelConfig
    from .request import Array, InferenceRequest
    from .scheduled_model import ScheduledModel

LOGGER = logging.getLogger("triton_trio.instance")


#: Executions after which an instance lets other tasks run, whether or not its backend ever waits.
TURN = 8
#: Seconds after which an execution that returns, though it was cancelled, is worth a word in the log.
SWALLOWED = 0.1


class InstanceState(StrEnum):
    IDLE = "idle"
    EXECUTING = "executing"
    RECOVERING = "recovering"  #: its device was lost and is being made anew; until then it takes no work
    QUARANTINED = "quarantined"  #: its device did not let go in time; it gets no more work


@dataclass(frozen=True, slots=True)
class InstanceStatistics:
    name: str
    state: InstanceState
    executions: int  #: that have ended
    members: int  #: requests in the execution that runs now
    live_members: int  #: of these, still wanted
    backend: object | None  #: what the backend counts


class ModelInstance:
    """Takes batches from the model's scheduler, one at a time.

    Args:
      seat: of the model's scheduler.
      release_limit: seconds the device may take to let go of an execution that nobody wants any more.
      watchdogs: starts a watchdog where neither the model's nor a request's end can cancel it.
    """

    def __init__(
        self,
        model: ScheduledModel,
        placement: Placement,
        backend: BackendInstance,
        *,
        seat: Seat,
        release_limit: float,
        watchdogs: trio.Nursery,
    ) -> None:
        self.model = model
        self.placement = placement
        self.seat = seat
        self.state = InstanceState.IDLE
        self.batch: Batch | None = None
        self.executions = 0
        self.why_lost = ""  #: why its device was given up, where it is one that can be made anew
        self.task: trio.lowlevel.Task | None = None
        self._backend = backend
        self._release_limit = release_limit
        self._watchdogs = watchdogs
        self._released: trio.Event | None = None
        self._ending = False
        order = model.scheduler.order
        self._hand: Hand | None = None if order is None else order.hand_over
        self._output_names = tuple(output.name for output in model.config.outputs)
        self._reshape = (
            reshape_outputs(model.config) if any(o.reshape is not None for o in model.config.outputs) else None
        )

    @property
    def name(self) -> str:
        return self.placement.name

    def statistics(self) -> InstanceStatistics:
        batch = self.batch
        return InstanceStatistics(
            name=self.name,
            state=self.state,
            executions=self.executions,
            members=sum(member.ready for member in batch.members) if batch else 0,
            live_members=len(batch.scope) if batch else 0,
            backend=self._backend.statistics(),
        )

    async def run(self) -> None:
        """Serve until the model is unloaded or the instance is quarantined.

        **Cancellation:** a running execution is cancelled and its device awaited (bounded); its requests are
        cancelled with the reason ``model_unloading``.
        """
        self.task = trio.lowlevel.current_task()
        while await self._available():
            try:
                # In one expression: a local variable would keep the last batch's tensors alive until the next batch.
                await self._execute(await self._next_batch())
            finally:
                self.seat.give_back()
            if self.executions % TURN == 0:
                # A backend that never waits could serve a whole queue before anybody else runs, readers included.
                await trio.lowlevel.checkpoint()

    async def _available(self) -> bool:
        """Wait until requests can be executed here; False if they never can any more."""
        availability = self._backend.availability
        if availability is not None and not availability.ready and self.state is InstanceState.IDLE:
            self.state = InstanceState.RECOVERING
            await availability.wait()
            self.state = InstanceState.IDLE
            if availability.why:
                self._quarantine(availability.why)
        return self.state is not InstanceState.QUARANTINED

    async def _next_batch(self) -> Sequence[InferenceRequest]:
        """What to execute next; nothing, if the device is lost meanwhile."""
        availability, scheduler = self._backend.availability, self.model.scheduler
        if availability is None:
            return await scheduler.next_batch(self.seat)
        with availability.while_ready():
            return await scheduler.next_batch(self.seat)
        return ()

    async def _execute(self, requests: Sequence[InferenceRequest]) -> None:
        if not requests:
            return
        scheduler = self.model.scheduler
        batch = self.batch = Batch(
            requests,
            name=self.name,
            decoupled=self.model.config.decoupled,
            output_names=self._output_names,
            reshape=self._reshape,
            take_states=None if scheduler.states is None or self.seat.keeps_states else scheduler.take_states,
            keep_cancelled=scheduler.keeps_cancelled,
            hand=self._hand,
            on_released=self._on_released,
            on_rescheduled=self._on_rescheduled if scheduler.reschedules else None,
            on_abandoned=self.watch_release,
            on_ended=self._on_ended,
            joining=scheduler.joining(self.seat),
        )
        self.state = InstanceState.EXECUTING
        try:
            # The scope inside: a panic comes alone only without the cancels of the model's own tasks.
            with no_panic(f"model '{self.model.name}' failed"), batch.scope.cancel_scope:
                await self._backend.execute(batch)
        except TritonError as exc:
            self._fail_live(batch, exc)
        except (Exception, SystemExit) as exc:
            LOGGER.exception("model %s version %d failed in execute", self.model.name, self.model.version)
            self._fail_live(batch, InternalError(f"model '{self.model.name}' failed: {type(exc).__name__}: {exc}"))
        else:
            self._finish_live(batch)
            self._say_if_swallowed(batch)
        finally:
            for member in batch.members:
                if member.live:
                    # Only a cancel from above (unload, shutdown) gets here with somebody still waiting.
                    member.request.cancel(Reason.MODEL_UNLOADING)
                member.release()
                batch.retire(member)
            self.batch = None
            self.executions += 1
            if self.state is InstanceState.EXECUTING:
                self.state = InstanceState.IDLE
            if self._released is not None:
                self._released.set()
                self._released = None

    def _fail_live(self, batch: Batch, error: TritonError) -> None:
        for member in batch.members:
            batch.fail(member, type(error)(*error.args))

    def _finish_live(self, batch: Batch) -> None:
        for member in batch.members:
            if batch.decoupled:
                batch.finish(member)
            elif member.live:
                label = member.request.label
                batch.fail(member, InternalError(f"{label}model '{self.model.name}' returned without a response"))

    def _say_if_swallowed(self, batch: Batch) -> None:
        scope = batch.scope.cancel_scope
        if not scope.cancel_called or scope.cancelled_caught:
            return
        # It may have been about to end when the last member left; only going on for long afterwards is a mistake.
        last = max((member.left_at for member in batch.members if member.left_at is not None), default=None)
        if last is not None and trio.current_time() - last > SWALLOWED:
            LOGGER.warning(
                "model %s went on for %.1f s after its execution was cancelled, and then returned: does it catch "
                "Cancelled, or work without a checkpoint? Its requests are cancelled whatever it returns",
                self.model.name,
                trio.current_time() - last,
            )

    def _on_released(self, member: Member) -> None:
        if member.left_at is not None:
            log_cancelled(member.request, member)
        if member.ready:
            self.model.scheduler.released(member.request)

    def _on_ended(self, cohort: Cohort, members: Sequence[Member]) -> None:
        self.model.counters.count_execution(cohort, members, trio.current_time(), time.time())

    def _on_rescheduled(self, member: Member) -> None:
        self.model.scheduler.rescheduled(member.request)

    # The watchdog

    def end(self) -> None:
        """Its model ends: from now on its device's time to let go is limited."""
        self._ending = True
        if self.batch is not None:
            self.watch_release(self.batch)

    def watch_release(self, batch: Batch) -> None:
        """From now on the device has ``release_limit`` seconds to let go of ``batch``, and those that it is known to need."""
        if batch is self.batch and self._released is None:
            self._released = trio.Event()
            # Owner: the server's outermost nursery; ends when the execution has ended, or at the limit.
            self._watchdogs.start_soon(self._watchdog, batch, self._released, name=f"watchdog of {self.name}")

    async def _watchdog(self, batch: Batch, released: trio.Event) -> None:
        began = trio.current_time()
        left = self._release_limit + batch.owed_seconds
        # Shielded, for a shutdown must not cancel what bounds it; bounded by the limit itself.
        with trio.CancelScope(shield=True):
            while left > 0:
                unseen = await wait_in_parts(released, left)
                if unseen is None:
                    return
                left = self._time_left(batch, unseen)
        took = trio.current_time() - began
        if self._backend.abandon():
            LOGGER.error("instance %s: %s; the device is made anew", self.name, _late(took))
        else:
            self._quarantine(_late(took))

    def _time_left(self, batch: Batch, unseen: float) -> float:
        left = self._backend.time_left(self._release_limit, unseen)
        if left is not None:
            return left
        # Cancelled, and computed to the end all the same: it takes what it takes.
        goes_on = not self._ending and any(member.kept and member.live for member in batch.members)
        return self._release_limit if goes_on else 0.0

    def _quarantine(self, what: str) -> None:
        self.state = InstanceState.QUARANTINED
        if self._backend.availability is not None:
            self.why_lost = self._backend.availability.why
        LOGGER.error("instance %s quarantined: %s; it gets no more work", self.name, what)
        self.model.instance_quarantined(self)


def _late(seconds: float) -> str:
    return f"its device did not let go within {seconds:.1f} s, and nobody waits for it"


def reshape_outputs(config: ModelConfig) -> Reshape:
    """From the shapes of a model's outputs to those that its responses have."""
    specs = {output.name: output for output in config.outputs}
    batch_dims = 1 if config.max_batch_size > 0 else 0

    def reshape(outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {
            name: array.reshape(array.shape[:batch_dims] + specs[name].to_request_shape(array.shape[batch_dims:]))
            if name in specs
            else array
            for name, array in outputs.items()
        }

    return reshape
