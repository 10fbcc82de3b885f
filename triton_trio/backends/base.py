"""What a backend is: three abstract classes, one for each thing with a life of its own.

``Backend`` (one per server) opens models, ``BackendModel`` (one per loaded version) opens instances,
``BackendInstance`` executes one batch at a time.  Models and instances are async context managers: what they acquire is
released by leaving the block, whether the load finished, failed or was cancelled.

A backend knows nothing of gRPC, queues or other requests.  It gets a :class:`~triton_trio.batch.Batch`, answers members
with ``respond`` / ``send`` / ``finish`` / ``fail``, and puts ``await batch.checkpoint()`` where it can let go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidArgument
from .availability import Availability

if TYPE_CHECKING:
    from ..batch import Batch
    from ..config import InstanceGroup, ModelConfig
    from ..scopes import SequenceEnd
    from ..states import StateSlots


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a backend needs to open one version of a model."""

    config: ModelConfig  #: its ``inputs`` and ``outputs`` are the model's own, with what a sequence batcher adds
    version: int
    model_directory: Path  #: holds config.pbtxt and the version directories
    version_directory: Path  #: ``model_directory / str(version)``
    waiting: Callable[[], int] = lambda: 0  #: requests that no instance has taken yet
    release_limit: float = 10.0  #: seconds that a device has to let go of a load that was cancelled
    states: StateSlots | None = None  #: for instances that can keep the states of their sequences; None: they cannot


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an instance runs."""

    name: str  #: ``<group>_<index>``, as Triton names instances; with several lanes ``<group>_<index>_<lane>``
    kind: str  #: as :meth:`Backend.place` left it
    device: int  #: as listed in ``gpus``; where none are, which of the group's instances it is


class BackendInstance(ABC):
    """Executes batches, one at a time, in the instance's own task."""

    #: Where its device can be lost and made anew: whether it takes batches now.  None: as long as it is there.
    availability: Availability | None = None
    #: Whether it keeps the states of its sequences: then no request brings them, each has a ``state_slot``, and answers are
    #: without those that are :attr:`~triton_trio.states.StateSlots.hidden`.
    keeps_states: bool = False

    @abstractmethod
    async def execute(self, batch: Batch) -> None:
        """Serve every live member of ``batch``; a member left without a final response is failed by the caller.

        An exception fails all members that are still live, with INTERNAL and its text.

        **Cancellation:** raised when the last member has left or the model is unloaded.  When the exception has
        passed through, the device must be idle for this batch and its memory free: a backend whose device runs on
        waits for it here, and the server's watchdog bounds that wait with :meth:`abandon`.
        """

    def on_sequence_end(self, end: SequenceEnd) -> None:
        """A sequence that was executed here has ended: forget what the model keeps for it.  Default: nothing.

        Called at most once for each, when the device has let go of its last request and before its slot is taken
        again; no request of the same correlation ID is executed in between.  Sync, and between two scheduling
        decisions: it must not block.  An exception is logged and changes nothing.

        A quarantined instance is told, too; its device may still be at work.
        """
        return

    def statistics(self) -> object | None:
        """What the backend counts for this instance: a frozen object with named fields, or None."""
        return None

    def time_left(self, limit: float, unseen: float) -> float | None:
        """The release limit has passed, and :meth:`execute` has not: for how many seconds may its device go on?  Sync.

        More than 0 where the device does get on, or waits for what somebody else wants: it is asked again after that.  None,
        the default: if it waits for a device at all, nobody knows of it.

        Args:
          limit: the release limit, seconds.
          unseen: seconds just past in which nobody could run: see :func:`~triton_trio.scopes.wait_in_parts`.
        """
        return None

    def abandon(self) -> bool:
        """The device did not let go within the release limit: make :meth:`execute` return now, whatever is lost.

        Called at most once for an execution.  A backend whose device has nothing of this execution leaves the device alone,
        for others may be on it.

        Returns:
          True if the device is made anew: the instance gets more work when it is :attr:`availability`'s time.  With False, the
          default, it is quarantined.
        """
        return False


class BackendModel(ABC):
    """One loaded version of a model."""

    def lanes(self, placement: Placement) -> int:
        """How many instances to open there: more than one if a device serves several executions side by side.

        Each takes requests when it is free, and is watched, as any instance.
        """
        return 1

    @abstractmethod
    def open_instance(self, placement: Placement) -> AbstractAsyncContextManager[BackendInstance]:
        """Make an instance; leaving the block releases its device."""


class Backend(ABC):
    """A kind of model, by the name that ``backend:`` has in config.pbtxt."""

    def auto_complete(self, config: ModelConfig, model_directory: Path) -> ModelConfig:
        """Fill in what the model's files tell (inputs, outputs, batch size); sync and cheap.  Default: nothing."""
        return config

    def configure(self, settings: Mapping[str, str]) -> None:
        """Take the settings that ``--backend-config=NAME,SETTING=VALUE`` has for it; before anything else, if there are any.

        Default: raises :exc:`~triton_trio.errors.InvalidArgument`, for there is none.
        """
        raise InvalidArgument(f"it has no setting '{next(iter(settings))}'")

    def place(self, group: InstanceGroup, config: ModelConfig) -> InstanceGroup:
        """``group`` with the kind and the devices that ``config`` leaves open (``KIND_AUTO``; a GPU, but none listed).

        Clients see the result in the ModelConfig RPC.  Blocking; called in a worker thread.  Default: the CPU.
        """
        return replace(group, kind="KIND_CPU") if group.kind == "KIND_AUTO" else group

    @abstractmethod
    def open_model(self, context: ModelContext) -> AbstractAsyncContextManager[BackendModel]:
        """Load; leaving the block frees everything.

        **Cancellation:** a load is cancellable between its stages; a cancelled load leaves nothing behind.
        """
