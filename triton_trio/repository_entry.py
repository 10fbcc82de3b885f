"""What the repository knows of one model name, and a load in progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from .backends import Backend
from .config import ModelConfig, load_model_config
from .errors import TritonError
from .model import Model, ModelState
from .scopes import BatchScope


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of RepositoryIndex; ``version`` and ``state`` are empty for a model that was never loaded."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(slots=True)
class Entry:
    """What the repository knows of one model name."""

    models: dict[int, Model] = field(default_factory=dict)
    #: States without a Model: versions that are loading, failed or were unloaded, with the reason.
    states: dict[int, tuple[ModelState, str]] = field(default_factory=dict)
    fingerprint: object = None
    load: Load | None = None
    #: Somebody asked for it by name; otherwise it was loaded along with an ensemble.
    explicit: bool = False
    #: What is loaded came from disk, and not with the request to load it.
    of_disk: bool = True


class Load:
    """A load in progress: its waiters share one scope."""

    def __init__(self, config_json: str | None, files: Mapping[str, bytes]) -> None:
        self.config_json = config_json
        self.files = files
        self.directory: Path | None = None  #: once it is known
        self.waiters: BatchScope[object] = BatchScope()
        self.done = trio.Event()
        self.steps: tuple[str, ...] = ()  #: the models that this load waits for: it is of an ensemble
        self.error: tuple[type[TritonError], str] | None = None

    @property
    def of_disk(self) -> bool:
        """Whether it loads what is on disk and nothing else, as everybody else's does."""
        return self.config_json is None and not self.files


def state_of(model: Model) -> tuple[ModelState, str]:
    """For the index: what is loaded and cannot serve is not READY."""
    if model.state is ModelState.READY and not model.ready:
        return ModelState.UNAVAILABLE, model.why_unavailable()
    return model.state, ""


def complete_config(backend: Backend, config: ModelConfig, directory: Path, strict: bool) -> ModelConfig:
    """With what the backend knows better: of the model's files (unless ``strict``), and where its instances can be.

    Blocking.
    """
    if not strict:
        config = backend.auto_complete(config, directory)
    groups = tuple(backend.place(group, config) for group in config.instance_groups)
    if groups != config.instance_groups:
        config = config.replace(instance_groups=groups)
    return config.check_complete()


def read_model(directory: Path, config_json: str | None, strict: bool) -> tuple[ModelConfig, list[int], object]:
    """The model's config, its version directories, and a fingerprint that changes when a file of it changes.

    Blocking.
    """
    config = load_model_config(directory, strict=strict, override_json=config_json)
    available = sorted(int(child.name) for child in directory.iterdir() if child.is_dir() and child.name.isdecimal())
    files = sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    stamps = tuple((str(path), status.st_mtime_ns, status.st_size) for path in files if (status := path.stat()))
    return config, [version for version in available if version > 0], (config_json, stamps)
