"""What turns of every form share: inputs onto the device, outputs to the host, and the slot of a member."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...config import ModelConfig, TensorSpec
    from ...request import Array


#: Of one member, in a bucket: side by side, or where there was room.
Rows = slice | list[int]


class Slot:
    """One member's rows in a bucket.

    ``rows`` is where they are for the next program that is dispatched: the device thread moves them when it compacts the
    batch, and finds room for those that join.  What a program on the device has made is found where its turn says.

    ``busy`` counts programs on the device that include the rows.  The device thread raises it *before* it looks whether
    the member is live, and the Trio thread looks at it *after* the member has left: so either the program leaves the rows
    out, or the release waits for the program.
    """

    __slots__ = (
        "began",
        "busy",
        "charged",
        "done",
        "ended",
        "exhausted",
        "final",
        "finishing",
        "member",
        "parked",
        "pending",
        "programs",
        "rows",
        "size",
        "steps",
    )

    def __init__(self, member: Member, *, joins: bool = False) -> None:
        self.member = member
        self.size = member.stop - member.start
        # Of the device thread:
        self.rows: Rows = [] if joins else slice(member.start, member.stop)
        self.began = not joins  #: it has its rows; false for one that has yet to join
        self.programs = 0  #: that were made for it
        self.busy = 0
        self.steps = 0  #: dispatched for these rows
        self.done = False  #: all rows are known to be done
        self.exhausted = False  #: max_steps steps were dispatched: they will be done
        self.finishing = False  #: finish was dispatched
        # Of the Trio thread:
        self.charged = 0  #: of ``programs``, those whose time has been charged
        self.parked = False  #: the reader is behind
        self.pending: deque[dict[str, Array]] = deque()  #: responses that wait for the reader
        self.final: dict[str, Array] | None = None
        self.ended = False  #: no response comes after ``pending`` and ``final``

    def take(self) -> bool:
        """Include the rows in the next program, if anybody wants them; in the device thread."""
        self.busy += 1
        if self.member.live:
            return True
        self.busy -= 1
        return False

    def release_if_left(self) -> None:
        """In the Trio thread."""
        if not self.member.live and not self.busy:
            self.member.release()

    @property
    def settled(self) -> bool:
        """There is nothing to do for it any more, and nothing to charge; in the Trio thread."""
        return self.member.released and self.charged == self.programs


def row_shapes(
    batch: Batch, specs: tuple[TensorSpec, ...], on_device: Mapping[str, tuple[int, ...]], *, batched: bool
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The shape of a row of this batch, as the model's functions see it; all members have the same.

    Args:
      on_device: the shapes of inputs that no member brings.
    """
    inputs = batch.members[0].inputs
    return tuple(
        (spec.name, on_device[spec.name] if spec.name in on_device else inputs[spec.name].shape[batched:])
        for spec in specs
    )


def stack_inputs(
    batch: Batch, config: ModelConfig, bucket: int, *, on_device: Collection[str] = ()
) -> dict[str, Array]:
    """All members' rows, padded to the bucket; runs in the device thread, so that big batches do not stop the server.

    Not those of inputs that are ``on_device`` already.

    Padding repeats a real row, and so do rows that no request fills, except for the control inputs: made-up zeros could
    keep a ``while_loop`` in the model from ever ending.
    """
    batching = config.sequence_batching
    controls = {control.name for control in batching.controls} if batching is not None else ()
    real = next(member for member in batch.members if member.ready)
    stacked = {}
    for name in (spec.name for spec in config.inputs if spec.name not in on_device):
        if config.max_batch_size > 0:
            parts = [(member if member.ready or name in controls else real).inputs[name] for member in batch.members]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        else:
            array = real.inputs[name][None]
        rows = array.shape[0]
        if rows < bucket:
            padded = np.empty((bucket, *array.shape[1:]), array.dtype)
            padded[:rows] = array
            padded[rows:] = array[0]
            array = padded
        stacked[name] = array
    return stacked


def row_numbers(rows: Rows) -> Sequence[int]:
    return range(rows.start, rows.stop) if isinstance(rows, slice) else rows


def place_inputs(slots: Sequence[Slot], config: ModelConfig, bucket: int) -> dict[str, Array]:
    """The rows of ``slots``, each where its slot says; all others repeat one of them."""
    source = np.zeros(bucket, np.intp)
    start = 0
    for slot in slots:
        source[slot.rows] = range(start, start + slot.size)
        start += slot.size
    return {
        spec.name: np.concatenate([slot.member.inputs[spec.name] for slot in slots])[source] for spec in config.inputs
    }


def start_copy(tree: Any) -> None:
    """Begin the copy to the host behind the program, so that the wait for it is over when the program is."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()


def to_host(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Block until the outputs are there; raises what the program raised."""
    return {name: np.asarray(value) for name, value in outputs.items()}


def to_response(outputs: Mapping[str, Array], rows: Rows, *, batched: bool) -> dict[str, Array]:
    """One member's part of the outputs."""
    return {name: values[rows] if batched else values[0] for name, values in outputs.items()}
