"""One live sequence: its task, its scope, its requests in their order, and the one way in which it ends.

However a sequence ends (its END was executed, one of its requests was cancelled, it was idle, a START came for its ID, its
instance was quarantined, the model is unloaded), :meth:`InferenceSequence.end` decides it once, synchronously: from then
on no request finds it and none of it is executed.  What it held, its slot and its state, is given back in the ``finally``
of its task, when the device has let go of it.  Nobody else gives it back, so nothing is given back twice.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import trio

from ..errors import Unavailable
from ..lifecycle import Event
from ..scopes import Reason, SequenceEnd, SequenceEndCause, SequenceScope

if TYPE_CHECKING:
    from ..request import Array, InferenceRequest
    from .slots import SequenceSlots

INF = float("inf")

_generations = itertools.count(1)


class SequenceOwner(Protocol):
    """Who finds sequences by their IDs and gives them slots."""

    def forget(self, sequence: InferenceSequence) -> None:
        """It has ended: no request is to find it, and none of it is to be executed.  Sync, at the instant of the end."""

    def release(self, sequence: InferenceSequence) -> None:
        """The device has let go: take back what it holds.  Sync; called once, by the sequence's own task."""


class InferenceSequence:
    """A sequence from its START until its slot is given back.

    Args:
      sequence_id: the correlation ID.  Only a label: ``generation`` is what the sequence is known by.
      state: its implicit state, which it owns.
      idle_limit: seconds without a request after which it ends.
      nameless: it is one request that the model executes again and again, made a sequence by the scheduler.
    """

    def __init__(
        self,
        owner: SequenceOwner,
        sequence_id: int | str,
        *,
        model_name: str,
        state: dict[str, Array],
        idle_limit: float,
        nameless: bool = False,
    ) -> None:
        self.sequence_id = sequence_id
        self.generation = next(_generations)
        self.scope: SequenceScope[InferenceRequest] = SequenceScope()
        self.state = state
        self.nameless = nameless
        self.waiting: OrderedDict[InferenceRequest, None] = OrderedDict()
        #: What the device holds.  At most one request, so that each finds the state that the one before it has left.
        self.executing: InferenceRequest | None = None
        self.executed = False  #: whether anything ever was
        self.slots: SequenceSlots | None = None  #: those of its instance; None until it has one of them
        self.slot = -1
        self.turn = 0  #: its place among those that wait for an instance
        self.ended: SequenceEnd | None = None
        self.released = False
        #: Whether all older ones with its ID are released; until then it gets no slot.
        self.first_of_its_id = True
        #: The one that started next with the same ID.
        self.successor: InferenceSequence | None = None
        self.task: trio.lowlevel.Task | None = None
        self._owner = owner
        self._model_name = model_name
        self._idle_limit = idle_limit
        self._idle_since = INF
        self._backlog_deadline = INF
        self._timer: trio.CancelScope | None = None
        self._let_go: trio.Event | None = None

    def __repr__(self) -> str:
        where = "waits for a slot" if self.slots is None else f"slot {self.slot} of {self.slots.seat.name}"
        state = "live" if self.ended is None else self.ended.cause.value
        return f"<InferenceSequence #{self.generation} {self.sequence_id!r} {state}, {where}>"

    @property
    def ready(self) -> bool:
        """Whether its next request may be executed now."""
        return self.ended is None and self.executing is None and bool(self.waiting)

    # Its requests

    def append(self, request: InferenceRequest) -> None:
        """Its next request, which was queued just now."""
        self.scope.join(request)
        self.waiting[request] = None
        if self.slots is None and request.timeout_us > 0:
            self._backlog_deadline = min(self._backlog_deadline, request.enqueued_at + request.timeout_us / 1e6)
            self._reset_timer()

    def leave(self, request: InferenceRequest) -> None:
        """A request that waits here was settled."""
        self.waiting.pop(request, None)

    def next_request(self) -> InferenceRequest:
        """What is to be executed next."""
        return next(iter(self.waiting))

    def execute_next(self) -> tuple[InferenceRequest, bool]:
        """Its next request goes to the device; returns it, and whether it is the sequence's first."""
        request, _ = self.waiting.popitem(last=False)
        first = not self.executed
        self.executing, self.executed = request, True
        return request, first

    def reschedule(self, request: InferenceRequest) -> None:
        """The request on the device is to be executed once more, when the device has let go of it: before all others."""
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)

    def let_go(self) -> None:
        """The device holds nothing of the sequence any more."""
        request, self.executing = self.executing, None
        if self._let_go is not None:
            self._let_go.set()
        if request is not None and request not in self.waiting and (request.sequence_end or self.nameless):
            self.end(SequenceEndCause.END)
        elif not self.waiting:
            self._idle_since = trio.current_time()
            self._reset_timer()

    # Its end

    def end(self, cause: SequenceEndCause, reason: Reason | None = None) -> bool:
        """It ends now, if it has not ended before; its members are left alone.  Sync."""
        if self.ended is not None:
            return False
        self.ended = SequenceEnd(self.sequence_id, self.generation, cause, reason)
        self._owner.forget(self)
        if self._timer is not None:
            self._timer.cancel(reason=cause.value)
        return True

    def cancel(self, cause: SequenceEndCause, reason: Reason, why: str) -> None:
        """It ends now, and so do all of its requests, wherever they are.  Sync; a no-op if it has ended before."""
        if self.end(cause):
            self.scope.cancel(reason, why)

    def member_cancelled(self, request: InferenceRequest) -> None:
        """One of its requests was: the others are, too.  Sync.

        Not after its end: then the others have been executed, and what was answered on the same tick is an answer.
        """
        reason = request.reason or Reason.CALLER
        unloading = reason in (Reason.MODEL_UNLOADING, Reason.SERVER_DRAIN)
        cause = SequenceEndCause.UNLOADING if unloading else SequenceEndCause.CANCELLED
        if self.end(cause, None if unloading else reason):
            who = f"request '{request.request_id}'" if request.request_id else "another request of it"
            self.scope.leave(request, reason, f"{who} was cancelled while {request.stage.value} ({reason.value})")
        else:
            self.scope.discard(request)

    def quarantine(self, instance: str) -> None:
        """Its instance gets no more work, and its device may never let go.  Sync."""
        self.end(SequenceEndCause.QUARANTINED)
        if self.executing is not None:
            self.let_go()
        why = f"its instance {instance} is quarantined"
        self._reject(f"sequence {self.sequence_id} of model '{self._model_name}' has ended: {why}; start it again")
        self.scope.cancel(Reason.SEQUENCE_CANCELLED, why)

    def _reject(self, message: str) -> None:
        for request in tuple(self.waiting):
            request.fail_nowait(Unavailable(message), Event.REJECT)

    # Its task

    async def run(self) -> None:
        """Live until the end, wait until the device has let go, give everything back.

        **Cancellation:** by its scope, when the sequence is cancelled; by the model's nursery, when the model is unloaded:
        then its requests are cancelled with ``model_unloading``.  Either way slot and state are given back here.
        """
        self.task = trio.lowlevel.current_task()
        try:
            with self.scope.cancel_scope:
                await self._run_timers()
            # Its neighbours in the batch may keep the device for longer: nobody can use its slot until then, either.
            await self._wait_let_go()
        finally:
            # Only if nothing else has ended it.
            self.cancel(SequenceEndCause.UNLOADING, Reason.MODEL_UNLOADING, "")
            limit = INF if self.slots is None else self.slots.seat.release_limit
            with trio.move_on_after(limit, shield=True):
                await self._wait_let_go()
            self._owner.release(self)

    async def _wait_let_go(self) -> None:
        if self.executing is not None:
            self._let_go = trio.Event()
            await self._let_go.wait()

    async def _run_timers(self) -> None:
        while self.ended is None:
            with trio.CancelScope(deadline=self._due()) as self._timer:
                await trio.sleep_forever()
            self._timer = None
            # It may have been busy since the timer was set: to set it anew for every request would cost more.
            if self.ended is None and self._due() <= trio.current_time():
                self._expire()

    def _due(self) -> float:
        if self.slots is None:
            return self._backlog_deadline
        return INF if self.executing is not None or self.waiting else self._idle_since + self._idle_limit

    def _reset_timer(self) -> None:
        if self._timer is not None and (due := self._due()) < self._timer.deadline:
            self._timer.deadline = due

    def _expire(self) -> None:
        if self.slots is None:
            self.end(SequenceEndCause.TIMEOUT)
            self._reject("timeout of the corresponding sequence has been expired")
        else:
            self.end(SequenceEndCause.IDLE)
