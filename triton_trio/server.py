"""The server: one nursery tree, opened and closed by one context manager.

::

    server nursery (watchdogs)
    └── models nursery          one task per loaded version, per load, per unload
        └── frontends nursery   one task per frontend; drain = start_drain() on each, and one time limit

The nesting is the order of shutdown, inside out: frontends end before models, so that everything a request needs is there
as long as requests can arrive; watchdogs end last, since they bound how long the rest may take.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

import trio

from ._version import __version__
from .backends import DEFAULT_BACKENDS, Backend
from .ensemble import EnsembleModel
from .errors import InvalidArgument
from .groups import WithoutGroups
from .model import Model, ModelStatistics
from .observe import name_nursery
from .repository import ModelRepository
from .response_cache import CacheStatistics, ResponseCache
from .scheduling import RateLimiter, RateLimiterStatistics, Resource
from .scopes import Reason

LOGGER = logging.getLogger("triton_trio.server")

#: Triton's extensions that this server has.
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "logging",
)


class Frontend(Protocol):
    """A protocol in front of the server, such as gRPC."""

    def start_drain(self) -> None:
        """Accept nothing new; what is in flight goes on.  Sync and idempotent."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    ready: bool
    draining: bool
    in_flight: int  #: requests of all models
    models: tuple[ModelStatistics, ...]
    response_cache: CacheStatistics | None  #: None: no responses are kept
    rate_limiter: RateLimiterStatistics | None  #: None: rates are not limited


class InferenceServer:
    """Models, and the frontends that bring requests to them.  Made by :func:`open_server`."""

    def __init__(
        self,
        repository: ModelRepository,
        *,
        server_id: str,
        strict_readiness: bool,
        frontends: trio.Nursery,
    ) -> None:
        self.repository = repository
        self.server_id = server_id
        self.version = __version__
        self.extensions = EXTENSIONS
        self.draining = False
        self.started = False
        self._strict_readiness = strict_readiness
        self._frontends = frontends
        self._serving: list[Frontend] = []
        self._drained: trio.Event | None = None

    @property
    def live(self) -> bool:
        return not self.draining

    @property
    def ready(self) -> bool:
        """Started, not draining, and (with strict readiness) every model that was loaded is ready.

        Ensembles do not count: what they are made of does.
        """
        if self.draining or not self.started:
            return False
        return not self._strict_readiness or all(
            model.ready for model in self.repository.loaded() if not isinstance(model, EnsembleModel)
        )

    def statistics(self) -> ServerStatistics:
        models = tuple(model.statistics() for model in self.repository.loaded())
        return ServerStatistics(
            ready=self.ready,
            draining=self.draining,
            in_flight=sum(model.in_flight for model in models),
            models=models,
            response_cache=None if self.repository.cache is None else self.repository.cache.statistics(),
            rate_limiter=None if self.repository.limiter is None else self.repository.limiter.statistics(),
        )

    def model(self, name: str, version: int | None = None) -> Model:
        """A ready model; see :meth:`ModelRepository.model` for what it raises."""
        return self.repository.model(name, version)

    async def load_model(self, name: str, *, config_json: str | None = None) -> None:
        """See :meth:`ModelRepository.load`."""
        await self.repository.load(name, config_json=config_json)

    async def unload_model(self, name: str, *, dependents: bool = False) -> None:
        """See :meth:`ModelRepository.unload`."""
        await self.repository.unload(name, dependents=dependents)

    async def start_frontend(
        self, frontend: Frontend, serve: Callable[..., Awaitable[Any]], *args: Any, name: str
    ) -> Any:
        """Run ``serve(*args, task_status=...)`` in the frontends nursery; returns what it reports as started.

        **Cancellation:** until it has started, the frontend belongs to the caller's scope; then to the server.
        """
        return await self._frontends.start(self._run_frontend, frontend, serve, args, name=name)

    async def _run_frontend(  # noqa: ASYNC128 - serve() gets the task_status and says started
        self,
        frontend: Frontend,
        serve: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self._serving.append(frontend)
        try:
            await serve(*args, task_status=task_status)
        finally:
            self._serving.remove(frontend)
            if not self._serving and self._drained is not None:
                self._drained.set()

    async def drain(self, timeout: float) -> None:
        """Shut down gracefully: not ready, nothing new, work in flight has ``timeout`` seconds, then it is cancelled.

        Every client still waiting at the end gets UNAVAILABLE (reason ``server_drain``).  Calling it again with a
        shorter time, for example 0, only brings the end forward.  At the end the block of :func:`open_server` is cancelled
        as well, so that nothing runs on in a server that has ended.

        **Cancellation:** the wait ends; the server stays in the state "draining", with nobody watching the time.
        """
        self.draining = True
        for frontend in self._serving:
            frontend.start_drain()
        if self._serving:
            if self._drained is None:
                self._drained = trio.Event()
            # A deadline on the frontends' scope would say "deadline" to every client; the reason is ours to give.
            with trio.move_on_after(timeout):
                await self._drained.wait()
        self._frontends.cancel_scope.cancel(reason=Reason.SERVER_DRAIN.value)


@asynccontextmanager
async def open_server(
    model_repository: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    *,
    explicit: bool = False,
    load_models: Sequence[str] = (),
    backends: Mapping[str, Callable[[], Backend]] | None = None,
    backend_config: Mapping[str, Mapping[str, str]] | None = None,
    server_id: str = "triton",
    strict_config: bool = False,
    strict_readiness: bool = True,
    exit_on_error: bool = True,
    release_limit: float = 10.0,
    unload_grace: float = 30.0,
    rate_limit: Literal["off", "execution_count"] = "off",
    resources: Sequence[Resource] = (),
    cache_size: int = 0,
) -> AsyncIterator[InferenceServer]:
    """Open a server in the caller's Trio program; leaving the block shuts it down.

    ::

        async with triton_trio.open_server("models") as server:
            response = await server.model("identity").infer({"INPUT0": array})

    Args:
      model_repository: one directory or several.
      explicit: load only ``load_models`` at first, then what clients ask for; otherwise everything in the repository.
      load_models: names to load at the start in explicit mode; ``*`` means all.
      backends: makers of further backends by the name that ``backend:`` has in config.pbtxt.
      backend_config: settings of backends, by their names (``--backend-config``); see :meth:`Backend.configure`.
      server_id: the name that ServerMetadata gives.
      strict_config: config.pbtxt must be complete (``--disable-auto-complete-config``).
      strict_readiness: ready only while every loaded model is ready.
      exit_on_error: raise if a model fails to load at the start; otherwise serve the others.
      release_limit: seconds a device may take to let go of cancelled work before its instance is quarantined.
      unload_grace: seconds that requests in flight have when their model is unloaded.
      rate_limit: ``execution_count``: an instance executes while it holds what its ``rate_limiter`` lists in config.pbtxt.
      resources: how much there is, instead of the greatest need of any instance; see
        :class:`~triton_trio.scheduling.RateLimiter`.
      cache_size: bytes of the response cache, for models with ``response_cache { enable: true }``; 0: none.

    Raises:
      TritonError: a model failed to load at the start (with ``exit_on_error``); names file and field.

    **Cancellation:** cancelling the scope around the block cancels frontends, then models, and waits for the devices
    (at most ``release_limit``).  Nothing is left running.
    """
    if rate_limit not in ("off", "execution_count"):
        raise ValueError(f"rate_limit is 'off' or 'execution_count', not {rate_limit!r}")
    if resources and rate_limit == "off":
        raise ValueError("resources have no effect without rate_limit='execution_count'")
    makers = {**DEFAULT_BACKENDS, **(backends or {})}
    for name, settings in (backend_config or {}).items():
        if name not in makers:
            raise InvalidArgument(
                f"backend config for '{name}': no such backend; this server has {', '.join(sorted(makers))}"
            )
        makers[name] = partial(_configured, makers[name], name, settings)
    paths = [model_repository] if isinstance(model_repository, str | PathLike) else model_repository
    # Watchdogs are outermost: they bound how long leaving everything inside may take.
    with WithoutGroups(nurseries=3):
        async with trio.open_nursery() as watchdogs:
            name_nursery(watchdogs, "server")
            async with trio.open_nursery() as models:
                repository = ModelRepository(
                    [Path(path) for path in paths],
                    makers,
                    models=models,
                    watchdogs=watchdogs,
                    explicit=explicit,
                    strict_config=strict_config,
                    release_limit=release_limit,
                    unload_grace=unload_grace,
                    limiter=RateLimiter(resources) if rate_limit == "execution_count" else None,
                    cache=ResponseCache(cache_size) if cache_size > 0 else None,
                )
                name_nursery(models, "models", repository.notes)
                async with trio.open_nursery() as frontends:
                    name_nursery(frontends, "frontends")
                    server = InferenceServer(
                        repository, server_id=server_id, strict_readiness=strict_readiness, frontends=frontends
                    )
                    names = list(load_models) if explicit and "*" not in load_models else None
                    await repository.load_all(names, exit_on_error=exit_on_error)
                    server.started = True
                    yield server
                    server.draining = True
                    frontends.cancel_scope.cancel(reason=Reason.SERVER_DRAIN.value)
                repository.stop()
                models.cancel_scope.cancel(reason=Reason.MODEL_UNLOADING.value)


def _configured(make: Callable[[], Backend], name: str, settings: Mapping[str, str]) -> Backend:
    backend = make()
    try:
        backend.configure(settings)
    except InvalidArgument as exc:
        raise InvalidArgument(f"backend config for '{name}': {exc.message}") from None
    return backend
