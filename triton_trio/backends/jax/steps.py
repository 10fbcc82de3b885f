"""Step models: chunks of steps until every row is done, has left, or its reader is behind.

The plan lives on both sides of the device thread.  There, :meth:`StepPlan.next_program` decides at the last moment what
goes onto the device: who is live and not parked *now*, how many steps, whether somebody's result can be fetched.  On
the Trio side, :func:`execute_steps` hands out credits, one for each program, and passes results on.  So a cancel that the
server has seen is in the mask of the next program that is dispatched, and a server that is late holds the device back.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from .accounts import share
from .device import WINDOW, Turn
from .job import DeviceJob
from .programs import precision
from .states import gather_inputs
from .turns import Rows, Slot, place_inputs, row_numbers, start_copy, to_host, to_response

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...request import Array
    from .controller import ChunkController
    from .placed import PlacedModel
    from .programs import ProgramSet
    from .states import StateStore

#: Chunks that go out with half of their rows idle before the others move to a smaller bucket: moving costs about a
#: chunk, and who has half of its batch cancelled often has the rest cancelled too.
PATIENCE = 2
#: Programs of one job that may be out: two on the device, and one in line so that the thread need not wait for Trio.
CREDITS = WINDOW + 1


class StepPlan:
    """The device's side of one execution of a step model."""

    def __init__(
        self, placed: PlacedModel, programs: ProgramSet, batch: Batch, states: StateStore | None = None
    ) -> None:
        self.placed = placed
        self.states = states
        self.programs = programs  #: of the bucket where the rows are
        self.batch = batch
        #: Another tuple when somebody joins or is retired: the other thread reads it as it was, or as it is.
        self.slots = tuple(Slot(member) for member in batch.members)
        # Held by the device thread while it decides who needs rows of which bucket, and by Trio's while somebody joins:
        # so whoever joins has rows there when it is dispatched.
        self._lock = threading.Lock()
        self._carry: Any = None
        self._flags: Any = None
        self._started = False  #: from then on others may join
        self._smaller = placed.smaller_sets(batch, programs.bucket)
        self._half_idle = 0  #: chunks in a row that half of the rows had no part in

    def drop(self) -> None:
        """Forget the device's arrays; when the device is idle for this execution their memory is free."""
        self._carry = self._flags = None

    @property
    def over(self) -> bool:
        """Nobody needs another program."""
        return not any(self._wants_finish(slot) or self._wants_steps(slot) for slot in self.slots)

    def has_work(self) -> bool:
        """For the Trio side: whether a credit would be used."""
        return any(slot.member.live and not slot.parked and not slot.finishing for slot in self.slots) and not self.over

    def _wants_steps(self, slot: Slot) -> bool:
        return slot.member.live and not (slot.done or slot.exhausted or slot.finishing)

    def _wants_finish(self, slot: Slot) -> bool:
        return self.programs.finish is not None and slot.member.live and self._is_done(slot) and not slot.finishing

    @staticmethod
    def _is_done(slot: Slot) -> bool:
        return slot.done or slot.exhausted

    # In the Trio thread

    def let_join(self) -> None:
        """Offer the rows that nobody needs any more to requests that wait."""
        if self._started and self.programs.join is not None:
            with self._lock:
                free = self.programs.bucket - sum(slot.size for slot in self.slots if slot.member.live)
                largest = self.programs.bucket == self.placed.options.buckets[-1]
                joined = self.batch.join(free, all_or_none=not largest)
                self.slots += tuple(Slot(member, joins=True) for member in joined)
            self.placed.joined += len(joined)

    def retire(self) -> list[Slot]:
        """Forget those for whom there is nothing to do any more; returns them."""
        retired = [slot for slot in self.slots if slot.settled]
        if retired:
            self.slots = tuple(slot for slot in self.slots if slot not in retired)
        return retired

    # In the device thread

    def next_program(self, turn: StepTurn) -> bool:
        with precision(self.placed.options.x64):
            finishing = [slot for slot in self.slots if self._wants_finish(slot) and slot.take()]
            if finishing:
                return self._dispatch_finish(turn, finishing)
            limit, before = self.placed.options.max_steps, self.programs
            with self._lock:
                # Decided once for both: whoever leaves meanwhile may have a row and make no step, but not the other way.
                needed = [slot for slot in self.slots if self._wants_steps(slot)]
                stepping = [slot for slot in needed if not slot.parked and slot.take()]
                if not stepping:
                    return False
                left = None if limit is None else max(limit - slot.steps for slot in stepping)
                if self._started:
                    self.programs = self._smaller_set(sum(slot.size for slot in needed), left) or before
            began = [slot for slot in needed if slot.began]
            if self.programs is not before:
                self._compact(before, began)
            return self._dispatch_chunk(turn, stepping, began, left, other=self.programs is not before)

    def _dispatch_chunk(
        self, turn: StepTurn, slots: list[Slot], began: list[Slot], left: int | None, *, other: bool
    ) -> bool:
        limit = self.placed.options.max_steps
        params = self.placed.params
        joining = [slot for slot in slots if not slot.began]
        if not self._started:
            assert self.programs.init is not None
            inputs = gather_inputs(self.batch, self.placed, self.programs.bucket, self.states)
            self._carry, self._flags = self.programs.init(params, inputs)
            self._started = True
        elif not other:
            turn.controller = self.programs.controller  # other chunks' time has init or the move in it
        if joining:
            turn.joined = True
            self._join(joining, began)
        turn.include(slots, self.programs.bucket)
        keep = np.zeros(self.programs.bucket, bool)
        for slot in slots:
            keep[slot.rows] = True
        k = turn.steps = self.programs.controller.pick(left)
        carry, self._carry = self._carry, None
        self._carry, self._flags, turn.emitted = self.programs.chunks[k](params, carry, self._flags, keep)
        for slot in slots:
            slot.steps += k
            slot.exhausted = limit is not None and slot.steps >= limit
        turn.ended = self._flags[0]
        start_copy((turn.ended, turn.emitted))
        return True

    def _smaller_set(self, rows: int, left: int | None) -> ProgramSet | None:
        """The programs of a smaller bucket for the ``rows`` that are needed, if it pays to move there."""
        smaller = self.placed.options.compacted(self.programs.bucket, rows)
        if smaller not in self._smaller:
            self._half_idle = 0
            return None
        self._half_idle += 1
        if self._half_idle <= PATIENCE or (left is not None and left <= self.programs.controller.k):
            return None
        self._half_idle = 0
        return self._smaller[smaller]

    def _compact(self, before: ProgramSet, slots: list[Slot]) -> None:
        """Move the rows of ``slots`` from there to the bucket where they are to be.

        Rows that are done go too: their ``finish`` is on the device already, with the carry of that time.
        """
        bucket = self.programs.bucket
        rows = [row for slot in slots for row in row_numbers(slot.rows)]
        # Padding repeats a real row, as in stack_inputs(); there is none that is needed if all others have yet to join.
        source = np.array(rows + (rows[:1] or [0]) * (bucket - len(rows)), np.int32)
        carry, self._carry = self._carry, None
        self._carry, self._flags = before.compact[bucket](carry, self._flags, source)
        start = 0
        for slot in slots:
            slot.rows = slice(start, start + slot.size)
            start += slot.size

    def _join(self, slots: list[Slot], began: list[Slot]) -> None:
        """Give ``slots`` rows that ``began`` do not need.

        By the whole bucket's ``init``: so a row is bit for bit what it would be, had it begun with the others.
        """
        taken = {row for slot in began for row in row_numbers(slot.rows)}
        free = [row for row in range(self.programs.bucket) if row not in taken]
        begin = np.zeros(self.programs.bucket, bool)
        for slot in slots:
            slot.rows, free = free[: slot.size], free[slot.size :]
            slot.began = True
            begin[slot.rows] = True
        assert self.programs.init is not None
        assert self.programs.join is not None
        inputs = place_inputs(slots, self.placed.config, self.programs.bucket)
        new_carry, new_flags = self.programs.init(self.placed.params, inputs)
        carry, self._carry = self._carry, None
        self._carry, self._flags = self.programs.join(carry, self._flags, new_carry, new_flags, begin)

    def _dispatch_finish(self, turn: StepTurn, slots: list[Slot]) -> bool:
        turn.include(slots, self.programs.bucket)
        assert self.programs.finish is not None
        turn.finished = self.programs.finish(self.placed.params, self._carry)
        for slot in slots:
            slot.finishing = True
        start_copy(self.placed.shown(turn.finished))
        return True


class StepTurn(Turn):
    """One credit: whatever the plan needs next, a chunk or a finish."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan: StepPlan | None = plan
        self._states = plan.states
        self.slots: list[Slot] = []
        self.rows: list[Rows] = []  #: of each slot, in this program; the slot may have moved when the turn is complete
        self.controller: ChunkController | None = None
        self.joined = False  #: its time has an init in it
        #: On the device, until wait() has brought them to the host:
        self.ended: Any = None
        self.emitted: Any = None
        self.finished: dict[str, Any] | None = None
        #: For the Trio side:
        self.active: Array | None = None  #: bool [K, bucket], which rows made which step
        self.emissions: dict[str, Array] = {}  #: [K, bucket, ...]
        self.outputs: dict[str, Array] | None = None
        self.now_done: list[Slot] = []

    @property
    def members(self) -> list[Member]:
        """Those it was made for."""
        return [slot.member for slot in self.slots]

    def include(self, slots: list[Slot], bucket: int) -> None:
        """This program is for ``slots``, where they are now."""
        self.slots = slots
        self.rows = [slot.rows for slot in slots]
        self.width = bucket
        for slot in slots:
            slot.programs += 1

    def dispatch(self) -> bool:
        assert self._plan is not None
        return self._plan.next_program(self)

    def wait(self) -> None:
        plan, self._plan = self._plan, None
        assert plan is not None
        ended, emitted, finished = self.ended, self.emitted, self.finished
        self.ended = self.emitted = self.finished = None
        try:
            if finished is not None:
                self.outputs = to_host(plan.placed.shown(finished))
                if plan.states is not None:
                    members = [slot.member for slot in self.slots]
                    plan.states.put(finished, list(zip(members, self.rows, strict=True)), self.width)
            else:
                flags = np.asarray(ended)
                if emitted is not None:
                    self.emissions, self.active = to_host(emitted[0]), np.asarray(emitted[1])
                for slot, rows in zip(self.slots, self.rows, strict=True):
                    if not slot.done and flags[rows].all():
                        slot.done = True
                        self.now_done.append(slot)
        finally:
            for slot in self.slots:
                # Counted here, where it is known that the member had left before the program ended, and before the rows
                # are free, for then the member's line is logged.
                if slot.member.left_at is not None:
                    slot.member.steps_after_cancel += self.steps
                slot.busy -= 1
        self.last = plan.over

    def ready(self) -> bool:
        if self.finished is not None:
            return all(leaf.is_ready() for leaf in self.finished.values())
        return self.ended is None or bool(self.ended.is_ready())

    def failed(self) -> None:
        if self._states is not None:
            self._states.check()

    def expect(self) -> float | None:
        return None if self.controller is None or self.joined else self.controller.expect(self.steps)

    def done(self, seconds: float) -> None:
        if self.controller is not None and self.steps:
            self.controller.observe(self.steps, seconds, at_most=self.joined)


async def execute_steps(placed: PlacedModel, batch: Batch, states: StateStore | None = None) -> None:
    """Serve ``batch`` chunk by chunk; each member is answered when its rows are done.

    **Cancellation:** a member that leaves is left out of the next chunk that is dispatched; when all have left, no chunk
    is dispatched any more, and the exception passes on when the running and the queued one have ended.
    """
    programs = await placed.program_set(batch)
    plan = StepPlan(placed, programs, batch, states)
    job = DeviceJob(placed.device, placed.name, owner=batch, late=placed.options.late_enqueue)
    batch.compute_infer_at = trio.current_time()
    longest = 0.0  # seconds of a program
    try:
        async with job:
            while any(member.live for member in batch.members):
                for slot in plan.retire():
                    _settle(placed, slot)
                    placed.account(batch.retire(slot.member))
                plan.let_join()
                if job.outstanding < CREDITS and plan.has_work():
                    job.submit(*(StepTurn(plan) for _ in range(CREDITS - job.outstanding)))
                if job.outstanding:
                    turn = await job.next()
                    assert isinstance(turn, StepTurn)
                    longest = max(longest, turn.seconds)
                    share(batch, turn.members, turn.seconds)
                    _take(plan, turn)
                    placed.warn_if_slow(programs)
                else:
                    await batch.wait_can_send(or_arrival=programs.join is not None)  # every row is parked
                for slot in plan.slots:
                    _flush(batch, slot)
                await batch.checkpoint()
                for slot in plan.slots:
                    slot.release_if_left()
            if job.outstanding:
                # Everybody is served, so nobody's cancel would bound that wait.
                batch.watch_release(job.outstanding * longest)
    finally:
        plan.drop()
        for late in job.leftover():
            assert isinstance(late, StepTurn)
            share(batch, late.members, late.seconds)
        rest = job.device_seconds - batch.device_seconds
        if rest > 0:  # of programs that raised
            share(batch, (), rest)
        for slot in plan.slots:
            _settle(placed, slot)


def _settle(placed: PlacedModel, slot: Slot) -> None:
    if slot.member.ready:
        placed.typical.settle(slot.member, slot.steps, completed=slot.done or slot.exhausted)


def _take(plan: StepPlan, turn: StepTurn) -> None:
    """Sort the results of one program by member."""
    batched = plan.placed.batched
    for slot in turn.slots:
        slot.charged += 1
    live = [(slot, rows) for slot, rows in zip(turn.slots, turn.rows, strict=True) if slot.member.live]
    if turn.outputs is not None:
        for slot, rows in live:
            cohort = slot.member.cohort
            cohort.compute_output_at = cohort.compute_output_at or trio.current_time()
            slot.final = to_response(turn.outputs, rows, batched=batched)
            slot.ended = True
    if turn.active is not None:
        for slot, rows in live:
            # A member's rows step together: one response for each step that any of them made.
            for index in np.flatnonzero(turn.active[:, rows].any(axis=1)):
                step = {name: values[index] for name, values in turn.emissions.items()}
                slot.pending.append(to_response(step, rows, batched=batched))
    if plan.programs.finish is None:
        for slot in turn.now_done:
            slot.ended = True


def _flush(batch: Batch, slot: Slot) -> None:
    """Pass on what the member's reader has room for; beyond that, park its rows."""
    member = slot.member
    while slot.pending and member.live and member.can_send:
        batch.respond(member, slot.pending.popleft(), final=False)
    if not member.live:
        slot.pending.clear()
        slot.final = None
    elif slot.ended and not slot.pending:
        final, slot.final = slot.final, None
        if final is None:
            batch.finish(member)
        else:
            batch.respond(member, final)
    slot.parked = bool(slot.pending) or not member.can_send
