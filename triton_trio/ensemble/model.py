"""An ensemble: a model without a backend, whose requests run through other models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

import trio

from ..config.validate import cannot_be_cached
from ..errors import InvalidArgument, TritonError
from ..groups import WithoutGroups
from ..instance import reshape_outputs
from ..lifecycle import Event, Outcome
from ..model import Model, ModelState, Responses
from ..response_cache import ResponseCache
from ..scopes import Reason
from .flow import Flow
from .graph import Graph

if TYPE_CHECKING:
    from ..backends import ModelContext
    from ..config import EnsembleStep, ModelConfig
    from ..request import Array, InferenceRequest, InferenceResponse, Place

#: Finds a ready model by name and version (None: the latest), or raises :exc:`TritonError`.
Find = Callable[[str, int | None], Model]


class EnsembleModel(Model):
    """See :class:`~triton_trio.model.Model`.

    Its steps' models are looked up when they are needed, so they may be loaded anew while the ensemble serves; models
    that have not been seen before are checked first.  It is ready while they all are, and fit.

    Args:
      find: finds the steps' models.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        find: Find,
        *,
        files: AbstractContextManager[object] | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        super().__init__(config, context, files=files, cache=cache)
        assert config.ensemble_scheduling is not None
        self._find = find
        self._steps = config.ensemble_scheduling.steps
        most = config.ensemble_scheduling.max_inflight_requests
        self._limits = [trio.CapacityLimiter(most) for _ in self._steps] if most else None
        self._models: tuple[Model, ...] = ()
        self._refused: tuple[Model, ...] = ()
        self._missing = "its steps were not looked up yet"
        self._graph: Graph | None = None
        reshape = any(output.reshape is not None for output in config.outputs)
        self._reshape = reshape_outputs(config) if reshape else None

    # Its steps

    def _able(self) -> bool:
        """Whether all steps' models are ready, and fit."""
        if self._models and all(model.ready for model in self._models):
            return True
        try:
            self._look_up()
        except TritonError as exc:
            self._missing = exc.message
            return False
        return True

    def _look_up(self) -> None:
        models = tuple(_find_step(self._find, step) for step in self._steps)
        if models == self._refused:
            raise InvalidArgument(self._missing)
        try:
            graph = Graph(self.config, [model.config for model in models])
            if graph.decoupled is not self.config.decoupled:
                raise InvalidArgument(
                    f"ensemble '{self.name}' was loaded with steps of another transaction policy: load it again"
                )
        except InvalidArgument:
            self._refused = models
            raise
        self._graph = graph
        self._use(models)

    def _use(self, models: Sequence[Model]) -> None:
        for model in self._models:
            model.users.pop(self, None)
        self._models = tuple(models)
        self._refused = ()
        for model in models:
            model.users[self] = None
        self.forget_answers()

    def step_model(self, index: int) -> Model:
        """The model of the step ``index``: its latest, or the one that is being unloaded if there is no other."""
        model = self._models[index]
        if not model.ready:
            self._able()
        return self._models[index]

    def _able_to_finish(self) -> bool:
        return self._able() or all(model.takes_steps() for model in self._models)

    def limit(self, index: int) -> AbstractAsyncContextManager[object]:
        """Held while a request of the step ``index`` is in flight (``max_inflight_requests``).

        **Cancellation:** the wait for it ends at once, and holds nothing.
        """
        return _UNLIMITED if self._limits is None else self._limits[index]

    @property
    def step_names(self) -> list[str]:
        """The models it is made of."""
        return [step.model_name for step in self._steps]

    @property
    def inflight(self) -> tuple[int, ...]:
        """By step, the requests that count against ``max_inflight_requests``; empty if there is no limit."""
        return tuple(limit.borrowed_tokens for limit in self._limits or ())

    def reshape(self, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """From the shapes of the steps' tensors to those of the ensemble's outputs."""
        return outputs if self._reshape is None else self._reshape(outputs)

    # Inference

    async def _serve(self, request: InferenceRequest) -> InferenceResponse:
        flow = self._begin(request)
        response: InferenceResponse | None = None
        with WithoutGroups(nurseries=1):
            async with trio.open_nursery() as nursery:
                flow.start(nursery)
                response = await request.receive()
        await trio.lowlevel.checkpoint_if_cancelled()  # it may have come while the nursery was being closed
        if response is None:
            return await request.receive()  # a step has failed, and cancelled the nursery: here is its error
        return response

    @asynccontextmanager
    async def _open_responses(self, request: InferenceRequest) -> AsyncIterator[Responses]:
        with self._admitted(request):
            self._check(request)
            flow = self._begin(request)
            with WithoutGroups(nurseries=1):
                async with trio.open_nursery() as nursery:
                    # Steps have a nursery of their own: their failure ends them, and not what our caller is doing.
                    # Owner: this block; ends with the last step, or when the block is left.
                    nursery.start_soon(flow.run, name=f"steps of {self.name}:{self.version}")
                    yield Responses(request)
                    nursery.cancel_scope.cancel(reason=Reason.CALLER.value)

    def _begin(self, request: InferenceRequest) -> Flow:
        assert self._graph is not None
        flow = Flow(self, request, self._graph.plan(request.requested_outputs))
        request.enqueued_at = request.bound_at = trio.current_time()
        request.place = flow
        # Nothing waits here: requests queue where their steps do.
        request.advance(Event.ENQUEUE)
        request.advance(Event.BIND)
        return flow

    def why_unavailable(self) -> str:
        if self.state is ModelState.READY:
            return f"ensemble '{self.name}' is not ready: {self._missing}"
        return super().why_unavailable()

    def _left(self, request: InferenceRequest, place: Place | None) -> None:
        if isinstance(place, Flow) and request.outcome is Outcome.OK:
            self.counters.count_flow(request, place.compute_seconds, time.time())

    # Life

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        self._look_up()
        try:
            yield
        finally:
            self._use(())


_UNLIMITED = nullcontext()


def complete_ensemble(config: ModelConfig, find: Find) -> ModelConfig:
    """An ensemble's configuration with what its steps' models add: whether it is decoupled.

    Raises:
      InvalidArgument: a step's version is not loaded, or they do not fit together.
    """
    assert config.ensemble_scheduling is not None
    models = []
    for step in config.ensemble_scheduling.steps:
        try:
            models.append(_find_step(find, step).config)
        except TritonError:
            wanted = (
                f"whose required version {step.model_version} is not loaded."
                if step.model_version > 0
                else "which has no loaded version."
            )
            raise InvalidArgument(f"ensemble '{config.name}' depends on '{step.model_name}' {wanted}") from None
    decoupled = Graph(config, models).decoupled
    if decoupled and config.response_cache:
        raise cannot_be_cached(config.name, "'decoupled' transaction policy")
    return config if decoupled is config.decoupled else config.replace(decoupled=decoupled)


def _find_step(find: Find, step: EnsembleStep) -> Model:
    return find(step.model_name, step.model_version if step.model_version > 0 else None)
