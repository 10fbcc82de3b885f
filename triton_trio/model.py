"""One loaded version of a model, whatever runs it: the requests it has, their counters, and the end of its life.

Two kinds: :class:`~triton_trio.scheduled_model.ScheduledModel` has a backend, a scheduler and instances;
:class:`~triton_trio.ensemble.EnsembleModel` has other models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import trio

from .batch import Batch
from .errors import Unavailable, Unsupported
from .lifecycle import Event, Outcome
from .observe.cancel_log import log_cancelled
from .observe.statistics import ModelCounters
from .request import InferenceRequest, InferenceResponse, ParameterValue, Place
from .response_cache import ResponseCache, SharedExecution, SharedExecutions
from .scopes import Reason
from .validation import RequestValidator

if TYPE_CHECKING:
    from .backends import ModelContext
    from .config import ModelConfig
    from .instance import InstanceStatistics
    from .request import Array
    from .scheduling import SchedulerStatistics


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
    scheduler: SchedulerStatistics | None  #: None for an ensemble: its steps have one each
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


class Model(ABC):
    """One version of a model while it is loaded.

    Get it from :meth:`InferenceServer.model`.  ``config`` is what clients see; ``context.config``, what the backend
    sees, also has the tensors that the scheduler adds.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        *,
        files: AbstractContextManager[object] | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self.context = context
        self.config = config
        self.version = context.version
        self.state = ModelState.LOADING
        self.counters = ModelCounters()
        #: Ensembles that have this model as a step.
        self.users: dict[Model, None] = {}
        self._files = files or nullcontext()
        #: Where equal requests share an execution and its answer; None if the model, or the server, caches nothing.
        self.shared = SharedExecutions(self, cache) if cache is not None and config.response_cache else None
        self._validator = RequestValidator(config)
        self._scope = trio.CancelScope()
        self._live: dict[InferenceRequest, None] = {}
        self._idle: trio.Event | None = None
        self._stopping = False
        self._stopped = trio.Event()
        self._task: trio.lowlevel.Task | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.state is ModelState.READY and self._able()

    @abstractmethod
    def _able(self) -> bool:
        """Whether there is something to run a request, apart from the model's state."""

    def takes_steps(self) -> bool:
        """Whether it takes requests that are steps of an ensemble's request in flight: also while it is being unloaded.

        Otherwise the end of a step's model would be the end of requests that have a grace of their own.
        """
        return self.state in (ModelState.READY, ModelState.UNLOADING) and not self._stopping and self._able_to_finish()

    def _able_to_finish(self) -> bool:
        return self._able()

    def statistics(self) -> ModelStatistics:
        return ModelStatistics(
            name=self.name,
            version=self.version,
            state=self.state,
            scheduler=None,
            instances=(),
            in_flight=len(self._live),
        )

    def notes(self) -> Iterator[tuple[trio.lowlevel.Task, str]]:
        """For the live tree: where requests wait, and what executes."""
        if self._task is None:
            return
        for request in self._live:
            who = f"request #{request.generation}" + (f" '{request.request_id}'" if request.request_id else "")
            yield request.waiting_task or self._task, f"{who} of {self.name}:{self.version}, {request.stage.value}"
        for execution in self.shared or ():
            if execution.task is not None:
                yield execution.task, f"requests that share it: {len(execution.scope)}"

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
        """Run one request and return its response; its arrays are read-only if the model's responses are cached.

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
            if self.shared is not None:
                return await self.shared.infer(request)
            return await self._serve(request)

    def open_responses(self, request: InferenceRequest | Mapping[str, Array]) -> AbstractAsyncContextManager[Responses]:
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
        return self._open_responses(request)

    @abstractmethod
    async def _serve(self, request: InferenceRequest) -> InferenceResponse:
        """Run a request that was admitted and fits; its one response."""

    @abstractmethod
    def _open_responses(self, request: InferenceRequest) -> AbstractAsyncContextManager[Responses]: ...

    def _admitted(self, request: InferenceRequest) -> InferenceRequest:
        request.admit(self.name, self.version, self._on_settled)
        self.counters.started += 1
        self._live[request] = None
        return request

    def _check(self, request: InferenceRequest) -> None:
        request.batch_size, request.signature = self._validator.check(request)
        if not self.ready and not self._finishes(request):
            request.settle(Event.REJECT)
            raise Unavailable(f"{request.label}{self.why_unavailable()}")

    def _finishes(self, request: InferenceRequest) -> bool:
        """Whether it takes this one, for the sake of what is in flight, though it is not :attr:`ready`."""
        return request.parent is not None and self.takes_steps()

    def why_unavailable(self) -> str:
        """Why it takes no requests, for clients."""
        return "Server is stopping, scheduler for model has stopped accepting new inference requests"

    def _left(self, request: InferenceRequest, place: Place | None) -> None:
        """A request that was served here is settled: a client's, or that of an execution which some share."""
        return

    def _on_settled(self, request: InferenceRequest, place: Place | None) -> None:
        self._left(request, place)
        del self._live[request]
        self.counters.count_settled(request)
        if request.outcome in (Outcome.CANCELLED, Outcome.DEADLINE) and not (
            isinstance(place, Batch) or (isinstance(place, SharedExecution) and place.logs(request))
        ):
            log_cancelled(request)  # otherwise the batch logs it, when the device has let go
        if self._idle is not None and not self._live:
            self._idle.set()

    def forget_answers(self) -> None:
        """What the response cache has of this model, and of the ensembles made of it, is out of date."""
        if self.shared is not None:
            self.shared.renew()
        for user in self.users:
            user.forget_answers()

    # Life

    async def run(self, *, task_status: trio.TaskStatus[Model] = trio.TASK_STATUS_IGNORED) -> None:
        """Load, serve until :meth:`stop`, release everything.  Started in the server's models nursery.

        **Cancellation:** until ``started()`` it belongs to whoever loads, and leaves nothing behind; afterwards it ends
        by :meth:`stop` or with the server, and every request still here is cancelled with ``model_unloading``.
        """
        self._task = trio.lowlevel.current_task()
        try:
            with self._scope, self._files:
                async with self._open(), nullcontext() if self.shared is None else self.shared.open():
                    self.state = ModelState.READY
                    task_status.started(self)
                    try:
                        await trio.sleep_forever()
                    finally:
                        # However it ends: nothing new, and everybody is told at once.
                        self.begin_unload()
                        self._cancel_live()
        finally:
            self.state = ModelState.UNAVAILABLE
            self._stopped.set()

    @abstractmethod
    def _open(self) -> AbstractAsyncContextManager[None]:
        """Everything that the model holds while it is loaded.

        **Cancellation:** until it is entered, the load is cancelled; leaving it waits until all is released.
        """

    def begin_unload(self) -> None:
        """Accept nothing more; what is in flight goes on.  Sync: the state changes when this returns."""
        if self.state is ModelState.READY:
            self.state = ModelState.UNLOADING

    async def wait_unloaded(self, grace: float) -> None:
        """Wait for what is in flight, at most ``grace`` seconds; then cancel it and wait until all is released.

        **Cancellation:** the wait is given up; the model goes on unloading only if somebody calls this again.
        """
        with trio.move_on_after(grace):
            await self._wait_unneeded()
        self.stop()
        await self.wait_stopped()

    async def _wait_unneeded(self) -> None:
        """Wait until nothing is in flight here, nor in an ensemble that takes nothing new and may come here yet.

        An ensemble that does take requests has found another version of this model for its steps.

        **Cancellation:** only the wait ends.
        """
        for user in tuple(self.users):
            if not user.ready:
                await user._wait_unneeded()
        if self._live:
            if self._idle is None or self._idle.is_set():
                self._idle = trio.Event()
            await self._idle.wait()

    async def wait_stopped(self) -> None:
        """Wait until everything is released.  **Cancellation:** only the wait ends."""
        await self._stopped.wait()

    def stop(self) -> None:
        """Cancel everything now.  Sync; :meth:`run` ends when the devices have let go."""
        self._cancel_live()
        self._scope.cancel(reason=Reason.MODEL_UNLOADING.value)

    def _cancel_live(self) -> None:
        self._stopping = True
        for request in tuple(self._live):
            request.cancel(Reason.MODEL_UNLOADING)
