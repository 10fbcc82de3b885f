"""Who keeps the states of sequences between requests: what a sequence batcher and an instance agree on.

By default the batcher does, on the host (:mod:`triton_trio.scheduling.sequence_tensors`).  An instance that says
``keeps_states`` is not sent them and does not return them: each request says instead in which slot of the instance its
sequence is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request import Array


@dataclass(frozen=True, slots=True)
class StateSlots:
    """What an instance needs to know to keep the states of its sequences."""

    count: int  #: sequences an instance has at a time
    initial: Mapping[str, Array]  #: what every state starts from, by input name, shaped as the input of one request
    hidden: frozenset[str]  #: the state outputs that no client sees


@dataclass(frozen=True, slots=True)
class StateSlot:
    """Where an instance finds the states of a request's sequence.

    A slot has one sequence at a time, and a later one in its place.  Which of them left what is there is known by the
    generation: who finds another one's starts from the initial states.
    """

    index: int  #: below :attr:`StateSlots.count`
    generation: int  #: of the sequence
