"""The model repository: directories on disk, the versions loaded from them, and the two verbs load and unload.

A load is one task in the models nursery, shared by everybody who waits for it (:class:`~triton_trio.scopes.BatchScope`):
a waiter who is cancelled leaves, and when the last has left the load is cancelled between its stages.  So a load never
outlives the interest in it, one client never takes another's load away, and no state is ever stuck in LOADING.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import trio

from .backends import Backend, ModelContext
from .config import (
    EnsembleScheduling,
    ignored_fields,
    read_initial_states,
    refuse_unsupported,
)
from .ensemble import EnsembleModel, check_no_cycle, complete_ensemble, find_dependents
from .errors import InternalError, InvalidArgument, NotFound, TritonError, Unavailable, no_panic
from .model import Model, ModelState
from .repository_entry import Entry, IndexEntry, Load, complete_config, read_model, state_of
from .response_cache import ResponseCache
from .scheduled_model import ScheduledModel
from .scheduling import RateLimiter
from .scopes import Reason
from .sent_files import SentFiles

LOGGER = logging.getLogger("triton_trio.repository")


class ModelRepository:
    """Loads and finds models.

    Args:
      paths: repository directories; a model is a directory below one of them.
      backends: makers of backends by the name that ``backend:`` has in config.pbtxt; made when first needed.
      models: the nursery of loaded versions, loads and unloads.
      watchdogs: the nursery of watchdogs, which outlives ``models``.
      explicit: whether clients may load and unload (``--model-control-mode=explicit``).
      strict_config: no auto-complete (``--disable-auto-complete-config``).
      release_limit: see :class:`~triton_trio.instance.ModelInstance`.
      unload_grace: seconds that requests in flight have when their model is unloaded.
      limiter: None if the server does not limit rates.
      cache: None if the server keeps no responses.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        backends: Mapping[str, Callable[[], Backend]],
        *,
        models: trio.Nursery,
        watchdogs: trio.Nursery,
        explicit: bool = False,
        strict_config: bool = False,
        release_limit: float = 10.0,
        unload_grace: float = 30.0,
        limiter: RateLimiter | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.explicit = explicit
        self.limiter = limiter
        self.cache = cache
        self._makers = backends
        self._backends: dict[str, Backend] = {}
        self._nursery = models
        self._watchdogs = watchdogs
        self._strict_config = strict_config
        self._release_limit = release_limit
        self._unload_grace = unload_grace
        self._entries: dict[str, Entry] = {}

    # Find

    def model(self, name: str, version: int | None = None) -> Model:
        """The ready version ``version`` of a model, by default its latest.

        Raises:
          NotFound: the model, or this version, was never loaded.
          Unavailable: it is known but not ready.
        """
        entry = self._entries.get(name)
        if entry is None or not (entry.models or entry.states):
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version is None:
            ready = [number for number, model in entry.models.items() if model.ready]
            if not ready:
                raise Unavailable(f"Request for unknown model: '{name}' has no available versions")
            return entry.models[max(ready)]
        model = entry.models.get(version)
        if model is None:
            if version in entry.states:
                raise Unavailable(f"Request for unknown model: '{name}' version {version} is not at ready state")
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        if not model.ready:
            raise Unavailable(f"Request for unknown model: '{name}' version {version} is not at ready state")
        return model

    def loaded(self) -> Iterator[Model]:
        """Every version that is loaded, by name and version."""
        for name in sorted(self._entries):
            models = self._entries[name].models
            for version in sorted(models):
                yield models[version]

    def notes(self) -> Iterator[tuple[trio.lowlevel.Task, str]]:
        """For the live tree: see :meth:`Model.notes`."""
        for model in self.loaded():
            yield from model.notes()

    def directories(self) -> dict[str, Path]:
        """Model directories on disk by name.  Reads the file system."""
        found: dict[str, Path] = {}
        for path in self.paths:
            if not path.is_dir():
                raise InvalidArgument(f"model repository '{path}' is not a directory; check --model-repository")
            for child in sorted(path.iterdir()):
                if child.is_dir() and not child.name.startswith("."):
                    if child.name in found:
                        raise InvalidArgument(
                            f"model '{child.name}' is in two repositories, {found[child.name].parent} and {path}: "
                            "rename or remove one"
                        )
                    found[child.name] = child
        return found

    async def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """RepositoryIndex: a line for each known version, and one for each model on disk that was never loaded.

        **Cancellation:** while the file system is read; nothing is left behind.
        """
        on_disk = await trio.to_thread.run_sync(self.directories)
        lines = []
        for name in sorted({*on_disk, *self._entries}):
            entry = self._entries.get(name)
            states = dict(entry.states) if entry else {}
            if entry:
                states |= {version: state_of(model) for version, model in entry.models.items()}
            if not states:
                lines.append(IndexEntry(name, "", "", ""))
            for version, (state, reason) in sorted(states.items()):
                lines.append(IndexEntry(name, str(version) if version > 0 else "", state.value, reason))
        return [line for line in lines if not ready_only or line.state == ModelState.READY.value]

    # Load

    def check_explicit(self) -> None:
        """Raise if clients may not load and unload."""
        if not self.explicit:
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")

    async def load(
        self, name: str, *, config_json: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Load a model, or reload it if its files have changed; returns when it is ready.

        The models that an ensemble is made of are loaded along with it.  Two callers who load one model share the load.
        The versions served before go on until the new ones are ready.

        Args:
          config_json: overrides config.pbtxt.
          files: the model's files by path below its directory (``1/model.py``), instead of those on disk; needs
            ``config_json``.

        Raises:
          TritonError: what was wrong, with file and field; the versions served before are untouched.

        **Cancellation:** the caller leaves; if nobody else waits, the load is cancelled between its stages and the
        model is UNAVAILABLE with the reason ``load cancelled``, or as it was before.
        """
        if files and config_json is None:
            raise InvalidArgument(
                f"failed to load '{name}': override files ('file:<path>') need the model's configuration, too: "
                "send it as the parameter 'config'"
            )
        await self._load_shared(name, Load(config_json, files or {}))
        self._entries[name].explicit = True

    async def _load_shared(self, name: str, ours: Load) -> None:
        waiter = object()
        while True:
            entry = self._entries.setdefault(name, Entry())
            load = entry.load
            if load is None:
                load = entry.load = ours
                load.waiters.join(waiter)
                # Owner: the models nursery; ended by itself, or by its waiters' scope.
                self._nursery.start_soon(self._run_load, name, entry, load, name=f"load {name}")
                break
            if ours.of_disk and load.of_disk and load.waiters.join(waiter):
                break
            await load.done.wait()  # it is ending, or of other files: ours comes after it
        try:
            await load.done.wait()
        finally:
            if load.done.is_set():
                load.waiters.discard(waiter)
            else:
                load.waiters.leave(waiter, Reason.CALLER)
        if load.error is not None:
            kind, text = load.error
            raise kind(text)

    async def _run_load(self, name: str, entry: Entry, load: Load) -> None:
        error: tuple[type[TritonError], str] | None = (Unavailable, f"load failed for model '{name}': load cancelled")
        LOGGER.info("loading '%s'", name)
        try:
            with load.waiters.cancel_scope, no_panic(f"load failed for model '{name}'"):
                await self._load(name, entry, load)
                error = None
        except TritonError as exc:
            error = (type(exc), exc.message)
            begun = exc.message.startswith("failed to load")  # as in Triton's own texts
            LOGGER.error("%s%s", "" if begun else f"failed to load '{name}': ", exc.message)
        except OSError as exc:
            error = (InternalError, f"load failed for model '{name}': {exc}")
            LOGGER.error("failed to load '%s': %s", name, exc)
        except Exception as exc:
            error = (InternalError, f"load failed for model '{name}': {type(exc).__name__}: {exc}")
            LOGGER.exception("failed to load '%s'", name)
        finally:
            load.error = error
            for version, (state, _) in tuple(entry.states.items()):
                if state is ModelState.LOADING:
                    entry.states[version] = (ModelState.UNAVAILABLE, error[1] if error else "")
            if error is not None and not entry.models and not entry.states:
                if load.directory is None:
                    del self._entries[name]  # names that do not exist must not pile up here
                else:
                    entry.states[-1] = (ModelState.UNAVAILABLE, error[1])
            entry.load = None
            load.done.set()

    async def _load(self, name: str, entry: Entry, load: Load) -> None:
        if load.files:
            with await trio.to_thread.run_sync(SentFiles.write, name, load.files) as sent:
                load.directory = sent.directory
                await self._load_from(sent.directory, name, entry, load, sent)
            return
        directories = await trio.to_thread.run_sync(self.directories)
        directory = load.directory = directories.get(name)
        if directory is None:
            raise InvalidArgument(
                f"failed to load '{name}', failed to poll from model repository: no directory '{name}' in "
                + ", ".join(str(path) for path in self.paths)
            )
        await self._load_from(directory, name, entry, load, None)

    async def _load_from(self, directory: Path, name: str, entry: Entry, load: Load, sent: SentFiles | None) -> None:
        config, available, fingerprint = await trio.to_thread.run_sync(
            read_model, directory, load.config_json, self._strict_config
        )
        if config.ensemble_scheduling is not None:
            await self._load_steps(name, load, config.ensemble_scheduling)
        if entry.models and fingerprint == entry.fingerprint and all(model.ready for model in entry.models.values()):
            return
        refuse_unsupported(config)
        for ignored in ignored_fields(config):
            LOGGER.warning("model '%s': %s has no effect: %s", name, *ignored.split(": ", 1))
        if config.response_cache and self.cache is None:
            LOGGER.warning("model '%s': response_cache has no effect: the server has none (see --cache-config)", name)
        backend: Backend | None = None
        if config.ensemble_scheduling is not None:
            config = complete_ensemble(config.check_complete(), self.model)
        else:
            backend = self._backend(name, config.backend)
            config = await trio.to_thread.run_sync(complete_config, backend, config, directory, self._strict_config)
        initial_states = await trio.to_thread.run_sync(read_initial_states, config, directory)
        versions = config.version_policy.select(available)
        if not versions:
            raise InvalidArgument(
                f"failed to load '{name}', no version is available: {directory} has "
                + (
                    f"versions {available}, none of which its version_policy selects"
                    if available
                    else "no version directory, such as 1/"
                )
            )
        entry.states.clear()
        for version in versions:
            if version not in entry.models:
                entry.states[version] = (ModelState.LOADING, "")
        loaded: list[Model] = []
        model: Model
        try:
            for version in versions:
                context = ModelContext(
                    config.backend_view(),
                    version,
                    directory,
                    directory / str(version),
                    release_limit=self._release_limit,
                )
                model = (
                    EnsembleModel(config, context, self.model, files=sent, cache=self.cache)
                    if backend is None
                    else ScheduledModel(
                        config,
                        context,
                        backend,
                        files=sent,
                        initial_states=initial_states,
                        release_limit=self._release_limit,
                        watchdogs=self._watchdogs,
                        limiter=self.limiter,
                        cache=self.cache,
                    )
                )
                # Until it is started, the model's task belongs to this load and is cancelled with it.
                await self._nursery.start(model.run, name=f"model {name}:{version}")
                loaded.append(model)
        except BaseException:
            for model in loaded:
                model.stop()
            raise
        # Synchronous from here: the new versions are served from this moment, the old ones drain.
        old = tuple(entry.models.values())
        entry.models = {model.version: model for model in loaded}
        entry.states.clear()
        entry.fingerprint = fingerprint
        entry.of_disk = load.of_disk
        for model in old:
            self._start_unload(model)
        LOGGER.info("successfully loaded '%s' version %s", name, ", ".join(map(str, versions)))

    async def _load_steps(self, name: str, load: Load, scheduling: EnsembleScheduling) -> None:
        """Load what an ensemble is made of; raises :exc:`InvalidArgument` if it cannot be."""
        steps = load.steps = tuple(dict.fromkeys(step.model_name for step in scheduling.steps))
        # Loads that wait for each other would wait for ever: each says what it waits for, and looks before it does.
        check_no_cycle(name, self._steps_being_loaded)
        on_disk = await trio.to_thread.run_sync(self.directories)
        if missing := [step for step in steps if step not in on_disk and not self._loaded(step)]:
            raise InvalidArgument(
                f"ensemble {name} contains models that are not available or ambiguous: {', '.join(missing)}"
            )
        errors: dict[str, str] = {}

        async def load_step(step: str) -> None:
            if step in self._entries and not self._entries[step].of_disk and self._loaded(step):
                return  # what was sent for it stays
            try:
                await self._load_shared(step, Load(None, {}))
            except TritonError as exc:
                errors[step] = exc.message

        async with trio.open_nursery() as nursery:
            for step in steps:
                # Owner: this nursery, and so the load; ends with the step's load.
                nursery.start_soon(load_step, step, name=f"wait for load {step}")
        for step, message in errors.items():
            raise InvalidArgument(
                f"ensemble '{name}' depends on '{step}' which has no loaded version. Model '{step}' loading failed with "
                f"error: {message}"
            )
        check_no_cycle(name, lambda each: steps if each == name else self._loaded_steps(each))

    def _loaded(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and any(model.ready for model in entry.models.values())

    def _steps_being_loaded(self, name: str) -> Sequence[str]:
        entry = self._entries.get(name)
        return entry.load.steps if entry is not None and entry.load is not None else ()

    def _loaded_steps(self, name: str) -> Sequence[str]:
        entry = self._entries.get(name)
        models = entry.models.values() if entry is not None else ()
        return [step for model in models if isinstance(model, EnsembleModel) for step in model.step_names]

    def _backend(self, model_name: str, backend_name: str) -> Backend:
        if backend_name not in self._backends:
            maker = self._makers.get(backend_name)
            if maker is None:
                raise InvalidArgument(
                    f"failed to load '{model_name}': no backend '{backend_name}'; this server has "
                    + ", ".join(sorted(self._makers))
                )
            self._backends[backend_name] = maker()
        return self._backends[backend_name]

    async def load_all(self, names: Sequence[str] | None, *, exit_on_error: bool) -> None:
        """Load ``names`` side by side, by default everything on disk.

        **Cancellation:** all loads are cancelled.
        """
        if names is None:
            names = list(await trio.to_thread.run_sync(self.directories))

        async def load(name: str) -> None:
            try:
                await self.load(name)
            except TritonError as exc:
                errors.append(exc)

        errors: list[TritonError] = []
        async with trio.open_nursery() as nursery:
            for name in names:
                # Owner: this nursery; ends with the load.
                nursery.start_soon(load, name, name=f"wait for load {name}")
        if errors and exit_on_error:
            raise errors[0]

    def stop(self) -> None:
        """Cancel every load and every model now; sync."""
        for entry in self._entries.values():
            if entry.load is not None:
                entry.load.waiters.cancel_scope.cancel(reason=Reason.MODEL_UNLOADING.value)
            for model in entry.models.values():
                model.stop()

    # Unload

    async def unload(self, name: str, *, dependents: bool = False, wait: bool = True) -> None:
        """Unload all versions of a model: nothing new is accepted at once, requests in flight have the unload grace.

        An ensemble is not ready without its steps; what it has in flight is in flight in them, too.

        Args:
          name: the model.
          dependents: also the ensembles that it is a step of, and what was only loaded along with the unloaded ones.
          wait: until all is released.

        Raises:
          NotFound: no such model is loaded.

        **Cancellation:** the caller stops waiting; the unload goes on.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(f"failed to unload '{name}': no such model is loaded")
        names = [name]
        if dependents:
            steps = {each: self._loaded_steps(each) for each in self._entries}
            explicit = {each for each, its in self._entries.items() if its.explicit}
            names += find_dependents(name, steps, explicit)
        unloading = [pair for each in names for pair in await self._begin_unload(self._entries[each])]
        if wait:
            for model, its_entry in unloading:
                await model.wait_stopped()
                self._unloaded(model, its_entry)

    async def _begin_unload(self, entry: Entry) -> list[tuple[Model, Entry]]:
        if entry.load is not None:
            # An unload wins over a load in progress: cancel it for everybody.
            entry.load.waiters.cancel_scope.cancel(reason=Reason.MODEL_UNLOADING.value)
            await entry.load.done.wait()
        models, entry.models = tuple(entry.models.values()), {}
        entry.explicit = False
        for model in models:
            entry.states[model.version] = (ModelState.UNLOADING, "")
            self._start_unload(model, entry)
        return [(model, entry) for model in models]

    def _start_unload(self, model: Model, entry: Entry | None = None) -> None:
        model.begin_unload()
        # Owner: the models nursery; ends when the model has ended.  Bounded by the unload grace and the release limit.
        self._nursery.start_soon(self._unload, model, entry, name=f"unload {model.name}:{model.version}")

    async def _unload(self, model: Model, entry: Entry | None) -> None:
        await model.wait_unloaded(self._unload_grace)
        self._unloaded(model, entry)
        LOGGER.info("successfully unloaded '%s' version %d", model.name, model.version)

    def _unloaded(self, model: Model, entry: Entry | None) -> None:
        # Whoever comes first, the unload or the one who waited for it: afterwards the index says so.
        if entry is not None and entry.states.get(model.version, (None, ""))[0] is ModelState.UNLOADING:
            entry.states[model.version] = (ModelState.UNAVAILABLE, "unloaded")
