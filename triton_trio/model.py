"""One loaded version of a model: its scheduler, its instances, and the calls that run a request through them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import trio

from .backends import Placement
from .batch import Batch
from .errors import Unavailable, Unsupported
from .instance import InstanceState, InstanceStatistics, ModelInstance
from .lifecycle import Event, Outcome
from .observe.cancel_log import log_cancelled
from .observe.statistics import ModelCounters
from .request import InferenceRequest, InferenceResponse, ParameterValue, Place
from .scheduling import SchedulerStatistics, Seat, make_scheduler
from .scopes import Reason
from .validation import RequestValidator

if TYPE_CHECKING:
    from .backends import Backend, ModelContext
    from .config import ModelConfig
    from .request import Array

LOGGER = logging.getLogger("triton_trio.model")


class ModelState(StrEnum):
    """Triton's states of a model version."""

    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    name: str
    version: int
    state: ModelState
    scheduler: SchedulerStatistics
    instances: tuple[InstanceStatistics, ...]
    in_flight: int


class Responses:
    """The responses of one request, in order: ``async for response in responses``.

    **Cancellation:** each step is a checkpoint; cancelled there, the request leaves its queue or batch at once.
    """

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request

    def __aiter__(self) -> Responses:
        return self

    async def __anext__(self) -> InferenceResponse:
        try:
            return await self.request.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class Model:
    """One version of a model while it is loaded.

    Get it from :meth:`InferenceServer.model`.  ``config`` is what clients see; ``context.config``, what the backend
    sees, also has the tensors that the scheduler adds.  ``release_limit``: see :class:`ModelInstance`;
    ``initial_states``: see :class:`~triton_trio.scheduling.SequenceTensors`.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        *,
        release_limit: float,
        watchdogs: trio.Nursery,
        files: AbstractContextManager[object] | None = None,
        initial_states: Mapping[str, Array] | None = None,
    ) -> None:
        self.context = context
        self._files = files or nullcontext()
        self.config = config
        self.version = context.version
        self.state = ModelState.LOADING
        self.scheduler = make_scheduler(config, initial_states)
        self.instances: list[ModelInstance] = []
        self.counters = ModelCounters()
        self._validator = RequestValidator(config)
        self._release_limit = release_limit
        self._watchdogs = watchdogs
        self._scope = trio.CancelScope()
        self._live: dict[InferenceRequest, None] = {}
        self._drained: trio.Event | None = None
        self._stopped = trio.Event()
        self._task: trio.lowlevel.Task | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def ready(self) -> bool:
        """Loaded, and with at least one instance that is not quarantined."""
        return self.state is ModelState.READY and any(
            instance.state is not InstanceState.QUARANTINED for instance in self.instances
        )

    def statistics(self) -> ModelStatistics:
        return ModelStatistics(
            name=self.name,
            version=self.version,
            state=self.state,
            scheduler=self.scheduler.statistics(),
            instances=tuple(instance.statistics() for instance in self.instances),
            in_flight=len(self._live),
        )

    def notes(self) -> Iterator[tuple[trio.lowlevel.Task, str]]:
        """For the live tree: where requests wait, and what executes."""
        if self._task is None:
            return
        if queued := len(self.scheduler):
            yield self._task, f"queue: {queued} waiting"
        for request in self._live:
            who = f"request #{request.generation}" + (f" '{request.request_id}'" if request.request_id else "")
            yield request.waiting_task or self._task, f"{who} of {self.name}:{self.version}, {request.stage.value}"
        for instance in self.instances:
            if instance.task is not None and (batch := instance.batch) is not None:
                live, all_of_it = len(batch.scope), len(batch.members)
                yield instance.task, f"batch of {batch.rows} rows: {live} of {all_of_it} requests live"

    # Inference

    def request(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: tuple[str, ...] = (),
        request_id: str = "",
        priority: int = 0,
        timeout_us: int = 0,
        parameters: Mapping[str, ParameterValue] | None = None,
        sequence_id: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
    ) -> InferenceRequest:
        """Make a request of numpy arrays, for :meth:`infer` or :meth:`open_responses`; see :class:`InferenceRequest`."""
        return InferenceRequest(
            {name: np.asarray(array) for name, array in inputs.items()},
            requested_outputs=tuple(outputs),
            request_id=request_id,
            priority=priority,
            timeout_us=timeout_us,
            parameters=parameters,
            sequence_id=sequence_id,
            sequence_start=sequence_start,
            sequence_end=sequence_end,
        )

    async def infer(self, request: InferenceRequest | Mapping[str, Array]) -> InferenceResponse:
        """Run one request and return its response.

        Args:
          request: from :meth:`request`, or just the inputs: arrays by tensor name, with a batch dimension first if
            ``max_batch_size`` is not 0.

        Raises:
          InvalidArgument: the inputs do not fit the model.
          Unavailable: the model is being unloaded, or its queue policy turned the request away.
          Unsupported: the model is decoupled; use :meth:`open_responses`.
          RequestCancelled: somebody else cancelled the request (``request.cancel(reason)``).

        **Cancellation:** leaving the Trio scope around the call is the cancel.  A queued request has left its queue when
        the cancel returns; an executing one has left its batch, and the device stops at its next checkpoint if nobody
        else is in it.  Nothing else is left behind.
        """
        if not isinstance(request, InferenceRequest):
            request = self.request(request)
        if self.config.decoupled:
            raise Unsupported(f"model '{self.name}' is decoupled: infer() returns one response; use open_responses()")
        with self._admitted(request):
            self._check(request)
            return await self._serve(request)

    @asynccontextmanager
    async def open_responses(self, request: InferenceRequest | Mapping[str, Array]) -> AsyncIterator[Responses]:
        """Run one request of any model and iterate over its responses; leaving the block early cancels the rest.

        ::

            async with model.open_responses(inputs) as responses:
                async for response in responses:
                    ...

        At most :data:`~triton_trio.request.RESPONSE_BUFFER` responses wait for the reader; then the model is held back.

        **Cancellation:** as :meth:`infer`; also when the block is left before the final response.
        """
        if not isinstance(request, InferenceRequest):
            request = self.request(request)
        with self._admitted(request):
            self._check(request)
            self._enqueue(request)
            yield Responses(request)

    def _admitted(self, request: InferenceRequest) -> InferenceRequest:
        request.admit(self.name, self.version, self._on_settled)
        self.counters.started += 1
        self._live[request] = None
        return request

    def _check(self, request: InferenceRequest) -> None:
        request.batch_size, request.signature = self._validator.check(request)
        if not self.ready:
            request.settle(Event.REJECT)
            raise Unavailable(f"{request.label}{self._why_unavailable()}")

    async def _serve(self, request: InferenceRequest) -> InferenceResponse:
        self._enqueue(request)
        return await request.receive()

    def _enqueue(self, request: InferenceRequest) -> None:
        try:
            self.scheduler.enqueue(request)
        except Unavailable:
            request.settle(Event.REJECT)
            raise

    def _why_unavailable(self) -> str:
        if self.state is ModelState.READY:
            return f"model '{self.name}' has no instance left: all are quarantined; reload it"
        return "Server is stopping, scheduler for model has stopped accepting new inference requests"

    def _on_settled(self, request: InferenceRequest, place: Place | None) -> None:
        del self._live[request]
        self.counters.count_settled(request)
        self.scheduler.settled(request)
        if request.outcome in (Outcome.CANCELLED, Outcome.DEADLINE) and not isinstance(place, Batch):
            log_cancelled(request)  # otherwise the batch logs it, when the device has let go
        if self._drained is not None and not self._live:
            self._drained.set()

    # Life

    async def run(self, backend: Backend, *, task_status: trio.TaskStatus[Model] = trio.TASK_STATUS_IGNORED) -> None:
        """Load, serve until :meth:`stop`, release everything.  Started in the server's models nursery.

        **Cancellation:** until ``started()`` it belongs to whoever loads, and leaves nothing behind; afterwards it ends
        by :meth:`stop` or with the server, and every request still here is cancelled with ``model_unloading``.
        """
        self._task = trio.lowlevel.current_task()
        try:
            with self._scope:
                async with AsyncExitStack() as stack:
                    stack.enter_context(self._files)
                    opened = await stack.enter_async_context(backend.open_model(self.context))
                    for placement in self._placements():
                        instance = await stack.enter_async_context(opened.open_instance(placement))
                        self.instances.append(
                            ModelInstance(
                                self,
                                placement,
                                instance,
                                seat=Seat(len(self.instances)),
                                release_limit=self._release_limit,
                                watchdogs=self._watchdogs,
                            )
                        )
                    async with trio.open_nursery() as nursery:
                        for model_instance in self.instances:
                            # Owner: this nursery.  Ended by the model's scope (unload) or a quarantine.
                            nursery.start_soon(model_instance.run, name=f"instance {model_instance.name}")
                        self.scheduler.start(nursery, f"{self.name}:{self.version}")
                        self.state = ModelState.READY
                        task_status.started(self)
                        try:
                            await trio.sleep_forever()
                        finally:
                            # However it ends: nothing new, everybody is told at once, and from now on each device's
                            # time to let go is limited.
                            self.begin_unload()
                            self._cancel_live()
                            for model_instance in self.instances:
                                if model_instance.batch is not None:
                                    model_instance.watch_release(model_instance.batch)
        finally:
            self.state = ModelState.UNAVAILABLE
            self._stopped.set()

    def _placements(self) -> list[Placement]:
        return [
            Placement(
                name=f"{group.name or self.name}_{index}",
                kind=group.kind,
                device=device,
            )
            for group in self.config.instance_groups
            # `count` is for each listed GPU; without a list, for the one device that the backend chooses.
            for index, device in enumerate(device for device in group.gpus or (0,) for _ in range(group.count))
        ]

    def begin_unload(self) -> None:
        """Accept nothing more; what is in flight goes on.  Sync: the state changes when this returns."""
        if self.state is ModelState.READY:
            self.state = ModelState.UNLOADING

    async def wait_unloaded(self, grace: float) -> None:
        """Wait for what is in flight, at most ``grace`` seconds; then cancel it and wait until all is released.

        **Cancellation:** the wait is given up; the model goes on unloading only if somebody calls this again.
        """
        if self._live:
            self._drained = trio.Event()
            with trio.move_on_after(grace):
                await self._drained.wait()
        self.stop()
        await self.wait_stopped()

    async def wait_stopped(self) -> None:
        """Wait until everything is released.  **Cancellation:** only the wait ends."""
        await self._stopped.wait()

    def stop(self) -> None:
        """Cancel everything now.  Sync; :meth:`run` ends when the devices have let go."""
        self._cancel_live()
        self._scope.cancel(reason=Reason.MODEL_UNLOADING.value)

    def instance_quarantined(self, instance: ModelInstance) -> None:
        """If it was the last one, nobody will ever serve what is queued: say so now."""
        LOGGER.error("model %s: instance %s is quarantined", self.name, instance.name)
        if not self.ready:
            for request in tuple(self.scheduler.queued()):
                request.fail_nowait(Unavailable(f"{request.label}{self._why_unavailable()}"), Event.REJECT)

    def _cancel_live(self) -> None:
        for request in tuple(self._live):
            request.cancel(Reason.MODEL_UNLOADING)
