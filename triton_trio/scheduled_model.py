"""A model that a backend executes: its scheduler, its instances, and how a request comes to them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from .backends import Placement
from .errors import InvalidArgument, Unavailable
from .instance import InstanceState, ModelInstance
from .lifecycle import Event
from .model import Model, ModelState, ModelStatistics, Responses
from .response_cache import ResponseCache
from .scheduling import Permit, RateLimiter, Seat, make_scheduler

if TYPE_CHECKING:
    from .backends import Backend, BackendModel, ModelContext
    from .config import InstanceGroup, ModelConfig
    from .request import Array, InferenceRequest, InferenceResponse, Place

LOGGER = logging.getLogger("triton_trio.model")


class ScheduledModel(Model):
    """See :class:`Model`.

    Args:
      release_limit, watchdogs: see :class:`~triton_trio.instance.ModelInstance`.
      initial_states: see :class:`~triton_trio.scheduling.SequenceTensors`.
      limiter: None if the server does not limit rates: then instances hold nothing, and it costs nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        backend: Backend,
        *,
        release_limit: float,
        watchdogs: trio.Nursery,
        files: AbstractContextManager[object] | None = None,
        initial_states: Mapping[str, Array] | None = None,
        limiter: RateLimiter | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self.scheduler = make_scheduler(config, initial_states)
        context = replace(context, waiting=lambda: len(self.scheduler), states=self.scheduler.states)
        super().__init__(config, context, files=files, cache=cache)
        self.instances: list[ModelInstance] = []
        self._backend = backend
        self._release_limit = release_limit
        self._watchdogs = watchdogs
        self._limiter = limiter

    def _able(self) -> bool:
        """Whether at least one instance is not quarantined."""
        return any(instance.state is not InstanceState.QUARANTINED for instance in self.instances)

    def statistics(self) -> ModelStatistics:
        return replace(
            super().statistics(),
            scheduler=self.scheduler.statistics(),
            instances=tuple(instance.statistics() for instance in self.instances),
        )

    def notes(self) -> Iterator[tuple[trio.lowlevel.Task, str]]:
        if self._task is not None and (queued := len(self.scheduler)):
            yield self._task, f"queue: {queued} waiting"
        yield from super().notes()
        yield from self.scheduler.notes()
        for instance in self.instances:
            if instance.task is not None and (batch := instance.batch) is not None:
                live, all_of_it = len(batch.scope), len(batch.members)
                yield instance.task, f"batch of {batch.rows} rows: {live} of {all_of_it} requests live"
            elif instance.task is not None and (permit := instance.seat.permit) is not None and permit.waiting:
                yield instance.task, f"waits for {permit}"

    # Inference

    async def _serve(self, request: InferenceRequest) -> InferenceResponse:
        self._enqueue(request)
        return await request.receive()

    @asynccontextmanager
    async def _open_responses(self, request: InferenceRequest) -> AsyncIterator[Responses]:
        with self._admitted(request):
            self._check(request)
            self._enqueue(request)
            yield Responses(request)

    def _enqueue(self, request: InferenceRequest) -> None:
        try:
            self.scheduler.enqueue(request)
        except Unavailable:
            request.settle(Event.REJECT)
            raise

    def _finishes(self, request: InferenceRequest) -> bool:
        return super()._finishes(request) or (self.takes_steps() and self.scheduler.continues(request))

    def why_unavailable(self) -> str:
        if self.state is ModelState.READY:
            lost = next((instance.why_lost for instance in self.instances if instance.why_lost), None)
            return f"model '{self.name}' has no instance left: {lost or 'all are quarantined; reload it'}"
        return super().why_unavailable()

    def _left(self, request: InferenceRequest, place: Place | None) -> None:
        self.scheduler.settled(request)

    # Life

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            # First of all: a model that could never execute is not worth loading.
            places = [
                (placement, group, self._register(stack, placement, group)) for placement, group in self._placements()
            ]
            opened = await stack.enter_async_context(self._backend.open_model(self.context))
            for placement, group, permit in self._lanes(stack, opened, places):
                instance = await stack.enter_async_context(opened.open_instance(placement))
                if group.passive:
                    continue
                self.instances.append(
                    ModelInstance(
                        self,
                        placement,
                        instance,
                        seat=Seat(
                            len(self.instances),
                            permit,
                            name=placement.name,
                            release_limit=self._release_limit,
                            on_sequence_end=instance.on_sequence_end,
                            keeps_states=instance.keeps_states,
                        ),
                        release_limit=self._release_limit,
                        watchdogs=self._watchdogs,
                    )
                )
            async with trio.open_nursery() as nursery:
                for model_instance in self.instances:
                    # Owner: this nursery.  Ended by the model's scope (unload) or a quarantine.
                    nursery.start_soon(model_instance.run, name=f"instance {model_instance.name}")
                self.scheduler.start(nursery, f"{self.name}:{self.version}")
                try:
                    yield
                finally:
                    for model_instance in self.instances:
                        model_instance.end()

    def _lanes(
        self, stack: AsyncExitStack, opened: BackendModel, places: list[tuple[Placement, InstanceGroup, Permit | None]]
    ) -> Iterator[tuple[Placement, InstanceGroup, Permit | None]]:
        for placement, group, permit in places:
            lanes = opened.lanes(placement)
            for lane in range(lanes):
                place = placement if lanes == 1 else replace(placement, name=f"{placement.name}_{lane}")
                yield place, group, permit if lane == 0 else self._register(stack, place, group)

    def _register(self, stack: AsyncExitStack, placement: Placement, group: InstanceGroup) -> Permit | None:
        if self._limiter is None or group.passive:
            return None
        device = placement.device if group.gpus else 0
        return stack.enter_context(self._limiter.register(placement.name, device, group.rate_limiter))

    def _placements(self) -> list[tuple[Placement, InstanceGroup]]:
        if all(group.passive for group in self.config.instance_groups):
            raise InvalidArgument(
                f"model '{self.name}': every instance group is passive, so nobody would serve its requests"
            )
        return [
            (Placement(name=f"{group.name or self.name}_{index}", kind=group.kind, device=device), group)
            for group in self.config.instance_groups
            for index, device in enumerate(group.devices)
        ]

    async def _wait_unneeded(self) -> None:
        await super()._wait_unneeded()
        await self.scheduler.wait_drained()
        await super()._wait_unneeded()

    def instance_quarantined(self, instance: ModelInstance) -> None:
        """If it was the last one, nobody will ever serve what is queued: say so now."""
        LOGGER.error("model %s: instance %s is quarantined", self.name, instance.name)
        self.scheduler.quarantined(instance.seat)
        if not self.ready:
            for request in tuple(self.scheduler.queued()):
                request.fail_nowait(Unavailable(f"{request.label}{self.why_unavailable()}"), Event.REJECT)
