"""``apply(params, inputs) -> outputs``: one program, and one checkpoint after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from .accounts import share
from .device import Turn
from .job import DeviceJob
from .programs import precision
from .states import gather_inputs
from .turns import Slot, start_copy, to_host, to_response

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...request import Array
    from .placed import PlacedModel
    from .programs import ProgramSet
    from .states import StateStore


class ApplyTurn(Turn):
    steps = 1
    last = True

    def __init__(
        self, placed: PlacedModel, programs: ProgramSet, batch: Batch, slots: list[Slot], states: StateStore | None
    ) -> None:
        self._placed = placed
        self._states = states
        self._programs = programs
        self._batch = batch
        self._slots = slots
        self._taken: list[Slot] = []
        self._outputs: dict[str, Any] = {}
        self.outputs: dict[str, Array] = {}

    @property
    def members(self) -> list[Member]:
        """Those it was made for."""
        return [slot.member for slot in self._taken]

    def dispatch(self) -> bool:
        self._taken = [slot for slot in self._slots if slot.take()]
        if not self._taken:
            return False
        placed = self._placed
        assert self._programs.apply is not None
        with precision(placed.options.x64):
            inputs = gather_inputs(self._batch, placed, self._programs.bucket, self._states)
            self._outputs = self._programs.apply(placed.params, inputs)
        start_copy(placed.shown(self._outputs))
        return True

    def wait(self) -> None:
        outputs, self._outputs = self._outputs, {}
        try:
            self.outputs = to_host(self._placed.shown(outputs))
            if self._states is not None:
                self._states.put(outputs, [(slot.member, slot.rows) for slot in self._taken], self._programs.bucket)
        finally:
            for slot in self._taken:
                # Counted here, as in a step model: the member had left before the program ended.
                slot.member.steps_after_cancel += slot.member.left_at is not None
                slot.busy -= 1

    def failed(self) -> None:
        if self._states is not None:
            self._states.check()

    def ready(self) -> bool:
        return all(leaf.is_ready() for leaf in self._outputs.values())

    def expect(self) -> float | None:
        return self._programs.controller.expect(1)

    def done(self, seconds: float) -> None:
        if seconds:
            self._programs.controller.observe(1, seconds)


async def execute_apply(placed: PlacedModel, batch: Batch, states: StateStore | None = None) -> None:
    """Serve ``batch`` with one program.

    **Cancellation:** a program that runs is waited for, one that is still in line is not dispatched.
    """
    programs = await placed.program_set(batch)
    slots = [Slot(member) for member in batch.members]
    turn = ApplyTurn(placed, programs, batch, slots, states)
    batch.compute_infer_at = trio.current_time()
    try:
        async with DeviceJob(placed.device, placed.name, owner=batch) as job:
            await job.call(turn)
    finally:
        if turn.seconds:
            share(batch, turn.members, turn.seconds)
        for slot in slots:
            had = slot.member in turn.members
            placed.typical.settle(slot.member, int(had), completed=had and not turn.failure)
    await batch.checkpoint()
    batch.compute_output_at = trio.current_time()
    for slot in slots:
        if slot.member.live:
            outputs = to_response(turn.outputs, slot.rows, batched=placed.batched)
            batch.respond(slot.member, outputs)
        slot.release_if_left()
