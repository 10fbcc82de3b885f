"""What the server sees: a model and its instances, which forward."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ...groups import WithoutGroups
from ..base import BackendInstance, BackendModel, ModelContext, Placement
from .execution import LONGEST
from .messages import EndSequence
from .worker import Worker, WorkerLimits, WorkerStatistics

if TYPE_CHECKING:
    from ...batch import Batch
    from ...scopes import SequenceEnd
    from .process import Child


class WorkerInstance(BackendInstance):
    """An instance in the worker."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.availability = worker.availability
        self._worker = worker
        self._name = name

    async def execute(self, batch: Batch) -> None:
        await self._worker.execute(self._name, batch)

    def on_sequence_end(self, end: SequenceEnd) -> None:
        if isinstance(end.sequence_id, str) and len(end.sequence_id) > LONGEST:
            return  # every request of it was refused: the worker has heard of none, and would stand still for the header
        reason = None if end.reason is None else end.reason.value
        self._worker.post(EndSequence(self._name, end.sequence_id, end.generation, end.cause.value, reason))

    def statistics(self) -> WorkerStatistics:
        return self._worker.statistics(self._name)

    def abandon(self) -> bool:
        self._worker.abandon()
        return True


class WorkerModel(BackendModel):
    """One version, loaded in a process of its own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def lanes(self, placement: Placement) -> int:
        return self._worker.lanes.get((placement.kind, placement.device), 1)

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[WorkerInstance]:
        """In the worker; it is closed there with the model.

        **Cancellation:** who cancels a load leaves the model, too, and that ends the process.
        """
        await self._worker.open_instance(placement)
        yield WorkerInstance(self._worker, placement.name)


@asynccontextmanager
async def open_worker_model(
    context: ModelContext, launch: Callable[[], Awaitable[Child]], *, limits: WorkerLimits | None = None
) -> AsyncIterator[WorkerModel]:
    """Load a model in a process of its own, and keep one until the block is left.

    Args:
      launch: starts a process that hosts the model's backend; see :func:`~triton_trio.backends.worker.process.launch`.

    Raises:
      TritonError: what the load has raised there; or how the process has ended.

    **Cancellation:** a process that loads is killed.  Leaving the block closes the process, which has
    ``limits.close`` seconds for it.
    """
    worker = Worker(context, launch, limits or WorkerLimits())
    with WithoutGroups(nurseries=1):
        async with trio.open_nursery() as nursery:
            # Owner: this nursery; ended by close().
            await nursery.start(worker.run, name=worker.name)
            try:
                yield WorkerModel(worker)
            finally:
                worker.close()
