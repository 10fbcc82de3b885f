"""The sequence batcher: requests with one correlation ID are one sequence, which keeps its slot until it ends.

Here is what both of Triton's strategies share: which sequence a request belongs to, who waits for a slot, and what becomes
of the sequences when something happens to a request.  :mod:`.direct` and :mod:`.oldest` decide who shares a batch.

A sequence gets its slot late, like everything else: when an instance is in hand and is to execute its first request.
Until then it waits in the backlog, and any instance may take it; afterwards it is bound to that instance.

Correlation IDs are labels.  A new sequence may have the ID of one that has not been released yet (it was cancelled, or its
END is still on the device); it gets no slot before that.  So two sequences of one ID are never on a device together, and
whatever ends the older one cannot touch the newer.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ..errors import InvalidArgument
from ..lifecycle import Event, Outcome, Stage
from ..scopes import Reason, SequenceEndCause
from ..states import StateSlot
from .queue import QueueStatistics
from .scheduler import INF, Scheduler, SchedulerStatistics
from .sequence import InferenceSequence
from .slots import SequenceSlots

if TYPE_CHECKING:
    from ..request import Array, InferenceRequest
    from .scheduler import Seat
    from .sequence_tensors import SequenceTensors

LOGGER = logging.getLogger("triton_trio.sequence")

#: The first correlation ID for requests that come without one; it fits every type that a control input may have.
_NAMELESS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SequenceStatistics(SchedulerStatistics):
    sequences: int  #: not released yet
    in_slots: int  #: of these, with a slot of an instance
    in_backlog: int  #: of these, waiting for one


@dataclass(frozen=True, slots=True)
class SequenceOptions:
    """What a model's configuration says about its sequences, whatever the strategy."""

    model_name: str
    slots: int  #: how many sequences an instance has at a time
    idle_limit: float  #: seconds without a request after which a sequence ends
    #: The model may let a request go unfinished, and one without a correlation ID is a sequence of its own.
    iterative: bool = False
    #: False is Triton's narrower rule: only the cancel of a request that is still queued ends its sequence, and whatever
    #: is executing then is answered; one that is cancelled itself is computed to the end, for the state that it leaves.
    executing_cancel_ends_sequence: bool = True


class SequenceBatcher(Scheduler):
    """What the strategies share: everything but the choice of sequences for a batch."""

    def __init__(self, options: SequenceOptions, tensors: SequenceTensors) -> None:
        super().__init__()
        self.reschedules = options.iterative
        self.keeps_cancelled = not options.executing_cancel_ends_sequence
        self.states = tensors.slots(options.slots)
        self._options = options
        self._model_name = options.model_name
        self._tensors = tensors
        self._turns = itertools.count()
        self._nameless_ids = itertools.cycle(range(_NAMELESS, _NAMELESS // 2, -1))
        self._nursery: trio.Nursery | None = None
        self._label = ""
        #: Everything that is not released.
        self._sequences: dict[InferenceSequence, None] = {}
        #: Those that the next request of an ID belongs to.
        self._live: dict[int | str, InferenceSequence] = {}
        #: The latest of each ID that is not released; an older one leads to it by ``successor``.
        self._latest: dict[int | str, InferenceSequence] = {}
        #: Those that wait for a slot, in order, with the time.
        self._backlog: dict[InferenceSequence, float] = {}
        #: By the instance's index, once it has asked for work.
        self._slots: dict[int, SequenceSlots] = {}
        #: Requests without an outcome.
        self._sequence_of: dict[InferenceRequest, InferenceSequence] = {}
        #: Of these, those that wait for an instance.
        self._waiting: dict[InferenceRequest, None] = {}
        #: Requests that a device holds, whatever their outcome.
        self._on_device: dict[InferenceRequest, InferenceSequence] = {}
        self._drained: trio.Event | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def queued(self) -> Iterator[InferenceRequest]:
        return iter(self._waiting)

    def sequences(self) -> Iterator[InferenceSequence]:
        """Every sequence that has not given everything back, the oldest first."""
        return iter(self._sequences)

    def statistics(self) -> SequenceStatistics:
        queued = len(self._waiting)
        return SequenceStatistics(
            queue=QueueStatistics(queued=queued, delayed=0, by_level={1: queued}),
            idle_instances=self.idle_instances,
            sequences=len(self._sequences),
            in_slots=sum(len(slots.taken) for slots in self._slots.values()),
            in_backlog=len(self._backlog),
        )

    def notes(self) -> Iterator[tuple[trio.lowlevel.Task, str]]:
        for sequence in self._sequences:
            if sequence.task is not None:
                where = "no slot" if sequence.slots is None else f"slot {sequence.slot} of {sequence.slots.seat.name}"
                yield sequence.task, f"{where}, {len(sequence.waiting)} waiting"

    def start(self, nursery: trio.Nursery, name: str) -> None:
        self._nursery, self._label = nursery, name

    def continues(self, request: InferenceRequest) -> bool:
        return not request.sequence_start and bool(request.sequence_id)

    async def wait_drained(self) -> None:
        while self._sequences:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()

    # What happens to requests

    def enqueue(self, request: InferenceRequest) -> None:
        """Queue a request of a live sequence, or one that starts one.

        Raises:
          InvalidArgument: it has no correlation ID that the model can be told, more than one row, or no START where no
            sequence of its ID is live.
        """
        sequence = self._find(request)
        request.enqueued_at = trio.current_time()
        request.place = self
        request.advance(Event.ENQUEUE)
        self._sequence_of[request] = sequence
        self._waiting[request] = None
        sequence.append(request)
        if request.sequence_end:
            self._drop_id(sequence)
        self._look(sequence)

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        self._waiting.pop(request, None)
        sequence = self._sequence_of[request]
        sequence.leave(request)
        if not sequence.waiting:
            self._not_ready(sequence)

    def settled(self, request: InferenceRequest) -> None:
        super().settled(request)
        sequence = self._sequence_of.pop(request, None)
        if sequence is None:
            return  # it was refused
        if request.outcome in (Outcome.CANCELLED, Outcome.DEADLINE) and not (
            self.keeps_cancelled and request.stage is not Stage.QUEUED
        ):
            if self.keeps_cancelled and sequence.executing is not None:
                sequence.scope.discard(sequence.executing)  # it ends by itself, and then gives the slot back
            sequence.member_cancelled(request)
            return
        sequence.scope.discard(request)
        if sequence.slots is None and not sequence.waiting:
            # The last instance was quarantined, and what was queued has been turned away.
            sequence.end(SequenceEndCause.QUARANTINED)

    def rescheduled(self, request: InferenceRequest) -> None:
        if request.outcome is not None:
            return  # cancelled, and computed to the end: this was the end
        sequence = self._sequence_of[request]
        if sequence.ended is not None:
            request.cancel(Reason.SEQUENCE_CANCELLED, "another request of it was cancelled meanwhile")
            return
        now = trio.current_time()
        took = now - request.bound_at
        if took > self._options.idle_limit:
            # Triton counts the time on the device as idle here: by now the sequence is gone, and this is nobody's request.
            request.fail_nowait(
                InvalidArgument(
                    f"{self._must_start(request)}; the model asked for another execution of it after {took:g} s, when "
                    "its sequence had ended: raise max_sequence_idle_microseconds"
                )
            )
            return
        request.advance(Event.RESCHEDULE)
        request.place = self
        request.enqueued_at, request.bound_at = now, 0.0
        self._waiting[request] = None
        sequence.reschedule(request)

    def released(self, request: InferenceRequest) -> None:
        sequence = self._on_device.pop(request)
        if sequence.executing is request:  # and it is not one that was given up with its instance
            sequence.let_go()
            self._look(sequence)

    def quarantined(self, seat: Seat) -> None:
        slots = self._slots.pop(seat.index, None)
        if slots is not None:
            for sequence in tuple(slots.taken.values()):
                sequence.quarantine(seat.name)

    def take_states(self, request: InferenceRequest, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._tensors.take_states(self._on_device[request].state, request, outputs)

    # Which sequence

    def _find(self, request: InferenceRequest) -> InferenceSequence:
        if request.batch_size > 1:
            raise InvalidArgument(
                f"inference request to model '{self._model_name}' must specify batch-size 1 due to requirements of "
                "sequence batcher"
            )
        sequence_id = request.sequence_id
        if not sequence_id:
            if not self.reschedules:
                raise InvalidArgument(
                    f"inference request to model '{self._model_name}' must specify a non-zero or non-empty "
                    "correlation ID"
                )
            request.sequence_id = next(self._nameless_ids)
            return self._begin(request.sequence_id, nameless=True)
        self._tensors.check(request)
        live = self._live.get(sequence_id)
        if request.sequence_start:
            if live is not None:
                LOGGER.warning(
                    "sequence %s for model '%s' has a conflict. The previous sequence did not end before this sequence "
                    "start. Previous sequence will be terminated early.",
                    sequence_id,
                    self._model_name,
                )
                live.cancel(
                    SequenceEndCause.RESTARTED, Reason.SEQUENCE_CANCELLED, "a START came for its correlation ID"
                )
            return self._begin(sequence_id)
        if live is None:
            raise InvalidArgument(self._must_start(request))
        return live

    def _must_start(self, request: InferenceRequest) -> str:
        return (
            f"inference request for sequence {request.sequence_id} to model '{self._model_name}' must specify the START "
            "flag on the first request of the sequence"
        )

    def _begin(self, sequence_id: int | str, *, nameless: bool = False) -> InferenceSequence:
        sequence = InferenceSequence(
            self,
            sequence_id,
            model_name=self._model_name,
            state=self._tensors.initial_state(),
            idle_limit=self._options.idle_limit,
            nameless=nameless,
        )
        self._sequences[sequence] = None
        if not nameless:
            self._live[sequence_id] = sequence
            before, self._latest[sequence_id] = self._latest.get(sequence_id), sequence
            if before is not None:
                before.successor = sequence
                sequence.first_of_its_id = False
        assert self._nursery is not None
        # Owner: the model's nursery.  Ends with the sequence: by its scope, its timers, or unload.
        self._nursery.start_soon(sequence.run, name=f"sequence {sequence_id} of {self._label}")
        return sequence

    def _drop_id(self, sequence: InferenceSequence) -> None:
        if self._live.get(sequence.sequence_id) is sequence:
            del self._live[sequence.sequence_id]

    # Who is next

    def _look(self, sequence: InferenceSequence) -> None:
        """It has got a request, or the device has let go of one: if one can be executed now, say so to an instance."""
        slots = sequence.slots
        if not sequence.ready or not sequence.first_of_its_id:
            return
        line = self._backlog if slots is None else slots.ready
        if sequence in line:
            return
        line[sequence] = trio.current_time()
        sequence.turn = next(self._turns)
        if slots is None:
            self._wake_for_backlog()
        else:
            self._wake(slots.seat.index)

    def _not_ready(self, sequence: InferenceSequence) -> None:
        self._backlog.pop(sequence, None)
        if sequence.slots is not None:
            sequence.slots.ready.pop(sequence, None)

    def _wake_for_backlog(self) -> None:
        for index in self._idle:
            slots = self._slots.get(index)
            if slots is None or slots.free:
                self._wake(index)
                return

    # The end of a sequence, called by itself

    def forget(self, sequence: InferenceSequence) -> None:
        self._drop_id(sequence)
        self._not_ready(sequence)

    def release(self, sequence: InferenceSequence) -> None:
        slots, end = sequence.slots, sequence.ended
        sequence.released = True
        del self._sequences[sequence]
        if slots is not None and end is not None:
            slots.give_back(sequence)
            try:
                slots.seat.on_sequence_end(end)
            except Exception:
                LOGGER.exception(
                    "model %s failed in on_sequence_end of sequence %s", self._model_name, sequence.sequence_id
                )
        if not sequence.nameless and sequence.first_of_its_id:
            self._promote_successor(sequence)
        if self._backlog:
            self._wake_for_backlog()
        if self._drained is not None and not self._sequences:
            self._drained.set()
            self._drained = None

    def _promote_successor(self, sequence: InferenceSequence) -> None:
        successor = sequence.successor
        while successor is not None and successor.released:
            successor = successor.successor  # it never got so far
        if successor is None:
            del self._latest[sequence.sequence_id]
        else:
            successor.first_of_its_id = True
            self._look(successor)

    # Batches

    @abstractmethod
    def choose(self, now: float, slots: SequenceSlots) -> tuple[Sequence[InferenceSequence], float]:
        """Whose next requests are to be executed together now, or nobody's and when to ask again.  Changes nothing."""

    @abstractmethod
    def fill_rows(self, chosen: Sequence[InferenceSequence]) -> Sequence[InferenceRequest]:
        """The rows of a batch: the next request of each, by :meth:`execute_next`."""

    def ready_at(self, now: float, seat: Seat) -> float:
        chosen, again_at = self.choose(now, self._slots_of(seat))
        return now if chosen else again_at

    def form_batch(self, now: float, seat: Seat) -> tuple[Sequence[InferenceRequest], float]:
        slots = self._slots_of(seat)
        chosen, again_at = self.choose(now, slots)
        if not chosen:
            return (), again_at
        for sequence in chosen:
            if sequence.slots is None:
                del self._backlog[sequence]
                slots.take(sequence)
            else:
                del slots.ready[sequence]
        return self.fill_rows(chosen), INF

    def execute_next(self, sequence: InferenceSequence) -> InferenceRequest:
        """Take the next request of ``sequence``, with the tensors that the model is to see."""
        request, first = sequence.execute_next()
        del self._waiting[request]
        self._on_device[request] = sequence
        state = sequence.state
        if sequence.slots is not None and sequence.slots.seat.keeps_states:
            request.state_slot, state = StateSlot(sequence.slot, sequence.generation), {}
        self._tensors.fill(request, state, start=first, end=request.sequence_end)
        return request

    def candidates(self, slots: SequenceSlots) -> Iterator[tuple[InferenceSequence, float]]:
        """Sequences that this instance may serve, with the time since when they wait for it, the oldest first."""
        if not self._backlog or not slots.free:
            return iter(slots.ready.items())
        backlog = itertools.islice(self._backlog.items(), slots.free)
        return heapq.merge(slots.ready.items(), backlog, key=_turn)

    def signature(self, sequence: InferenceSequence) -> Hashable:
        """Only sequences with equal ones may share a batch."""
        return self._tensors.signature(sequence.next_request(), sequence.state)

    def null_row(self, like: InferenceRequest) -> InferenceRequest:
        return self._tensors.null_row(like)

    def _slots_of(self, seat: Seat) -> SequenceSlots:
        slots = self._slots.get(seat.index)
        if slots is None:
            slots = self._slots[seat.index] = SequenceSlots(seat, self._options.slots)
        return slots


def _turn(entry: tuple[InferenceSequence, float]) -> int:
    return entry[0].turn
