"""What every scheduler is: a place where requests wait until an instance is in hand.

*Late binding*: requests stay queued, each in its own scope, until the instance *and* its rate-limiter resources are in
hand; then one synchronous function (:meth:`Scheduler.form_batch`) makes the batch from what is alive at that moment.
Nothing is prefetched, so there is no gap between scheduler and device in which a cancel could go unseen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import outcome
import trio

from .ordering import ResponseOrder

if TYPE_CHECKING:
    from ..request import Array, InferenceRequest
    from ..scopes import Reason, SequenceEnd
    from ..states import StateSlots
    from .joining import Joining
    from .queue import QueueStatistics
    from .rate_limiter import Permit

INF = float("inf")


@dataclass(eq=False, slots=True)
class Seat:
    """A model instance as its scheduler sees it."""

    index: int = 0  #: among the model's instances
    permit: Permit | None = None  #: None: no rate limiter
    name: str = ""
    release_limit: float = 10.0  #: seconds within which its device lets go of what nobody wants, or it is quarantined
    on_sequence_end: Callable[[SequenceEnd], None] = lambda end: None
    keeps_states: bool = False  #: the instance keeps the states of its sequences

    def give_back(self) -> None:
        """The instance executes no more, for now."""
        if self.permit is not None and self.permit.held:
            self.permit.release()


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    queue: QueueStatistics
    idle_instances: int  #: instances waiting for work


class Scheduler(ABC):
    """Requests in, batches out.

    :meth:`enqueue`, :meth:`leave`, :meth:`form_batch`, :meth:`settled` and :meth:`released` are synchronous: in Trio each
    is atomic, and each can be tested without an event loop.  Only :meth:`next_batch` waits.
    """

    def __init__(self) -> None:
        #: Set where answers must leave in the order of arrival.
        self.order: ResponseOrder | None = None
        self._idle: dict[int, trio.lowlevel.Task] = {}  # by seat, in the order in which they became idle
        self._in_line: dict[int, Seat] = {}  # those with work, whose resources are not free

    @property
    def idle_instances(self) -> int:
        return len(self._idle)

    @abstractmethod
    def statistics(self) -> SchedulerStatistics: ...

    @abstractmethod
    def queued(self) -> Iterator[InferenceRequest]:
        """Every request that waits here."""

    @abstractmethod
    def __len__(self) -> int:
        """How many wait.  O(1)."""

    def start(self, nursery: trio.Nursery, name: str) -> None:
        """The model is ready: start the tasks that the scheduler needs, in the model's own nursery.  Sync."""
        return

    def notes(self) -> Iterator[tuple[trio.lowlevel.Task, str]]:
        """For the live tree: what there is to say of those tasks."""
        return iter(())

    def continues(self, request: InferenceRequest) -> bool:
        """Whether ``request`` is part of something that has begun, and may go on while the model is being unloaded."""
        return False

    async def wait_drained(self) -> None:
        """Wait until everything that has begun has ended, and no more requests of it are to be expected.

        **Cancellation:** only the wait ends.
        """
        return

    # Decide

    @abstractmethod
    def form_batch(self, now: float, seat: Seat) -> tuple[Sequence[InferenceRequest], float]:
        """The requests that ``seat`` is to execute now (they wait no more), or none and the time at which to ask again.

        ``inf`` as that time means: not before something changes here.
        """

    @abstractmethod
    def enqueue(self, request: InferenceRequest) -> None:
        """Take a request that fits the model; raises :exc:`TritonError` if it may not wait here."""

    @abstractmethod
    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        """A waiting request was settled: its place is free when this returns, whether or not an instance is."""

    def ready_at(self, now: float, seat: Seat) -> float:
        """When there is something to execute on ``seat``: ``now``, later, or never (``inf``).

        Asked only where there is a rate limiter, before an instance stands in its line for nothing, and when what waits
        here has changed.  To say ``now`` too often does no harm: :meth:`form_batch` decides.
        """
        return now if len(self) else INF

    def settled(self, request: InferenceRequest) -> None:
        """A request of this scheduler has its outcome, wherever it was; called once, after :meth:`leave`."""
        if self.order is not None:
            self.order.forget(request)
        if self._in_line:
            self._leave_line()

    def released(self, request: InferenceRequest) -> None:
        """The device holds nothing more for a request that was executed."""
        return

    def quarantined(self, seat: Seat) -> None:
        """That instance will never ask for work again, and its device may hold what it has for ever.  Sync."""
        return

    def rescheduled(self, request: InferenceRequest) -> None:
        """The model wants to execute the request again; only where :attr:`reschedules`."""
        raise NotImplementedError

    #: Whether the model may let a request go unfinished.
    reschedules = False
    #: Whether the row of a cancelled request is computed to the end.
    keeps_cancelled = False
    #: What sequences keep from request to request: by :meth:`take_states`, unless their instance keeps it; None: nothing.
    states: StateSlots | None = None

    def take_states(self, request: InferenceRequest, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        raise NotImplementedError

    def joining(self, seat: Seat) -> Joining | None:
        """How queued requests join what ``seat`` executes; None: they wait until it is over."""
        return None

    # Wait

    async def next_batch(self, seat: Seat) -> Sequence[InferenceRequest]:
        """Wait for requests to execute; called by an instance that is ready to take them.  Its permit is held then.

        **Cancellation:** the instance stops waiting and holds nothing; the queue is untouched.
        """
        permit = seat.permit
        try:
            while True:
                try:
                    await trio.lowlevel.checkpoint_if_cancelled()
                except trio.Cancelled:
                    self._wake()  # what this one was woken for is another's to do
                    raise
                now = again_at = trio.current_time()
                if permit is not None:
                    again_at = self.ready_at(now, seat)
                if again_at <= now:
                    if permit is not None and not permit.acquire_nowait():
                        for index in tuple(self._idle):
                            self._wake(index)  # what another instance needs may be free
                        await self._stand_in_line(seat, permit)
                        continue
                    # From the resources to the batch without a checkpoint: a request is never cancelled in between.
                    requests, again_at = self.form_batch(now, seat)
                    if requests:
                        if self._in_line:
                            self._leave_line()
                        return requests
                    if permit is not None:
                        permit.release(executed=False)
                elif permit is not None:
                    permit.leave_line()
                if again_at == INF:
                    await self._park(seat)
                else:
                    with trio.move_on_at(again_at):
                        await self._park(seat)
        finally:
            if permit is not None:
                permit.leave_line()

    async def _stand_in_line(self, seat: Seat, permit: Permit) -> None:
        self._in_line[seat.index] = seat
        try:
            await permit.wait_turn()
        finally:
            del self._in_line[seat.index]

    def _leave_line(self) -> None:
        """What waited here is less: instances that have nothing to execute any more let others of the line go ahead."""
        now = trio.current_time()
        for seat in tuple(self._in_line.values()):
            if seat.permit is not None and self.ready_at(now, seat) > now:
                seat.permit.leave_line()

    async def _park(self, seat: Seat) -> None:
        self._idle[seat.index] = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._idle[seat.index]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self, index: int | None = None) -> None:
        """Let an idle instance look again: that of the seat ``index``, or the one that has waited longest.

        It looks for itself, so a wake-up too many does no harm.
        """
        if index is None:
            index = next(iter(self._idle), None)
        task = self._idle.pop(index, None) if index is not None else None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None))
