"""Who is in which slot, and what the device does next: plain data and synchronous decisions.

A generation comes with its prompt, is fed to the device piece by piece, makes tokens, and leaves: at its end, or earlier,
when nobody wants its text any more.  Whether somebody does is asked anew for each decision, so a cancel is seen by the next
one, whichever thread makes it.  That its owner has to go is told to the device with the next program that could still
move it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import trio

from ....errors import InternalError, TritonError
from .accounts import TextAccounts
from .config import SlotSpec
from .slots import NO_TOKEN, Emitted, PromptChunk

#: Tokens that may wait for a reader before its row stands still.
UNREAD = 32
#: Pieces of other prompts that may go before a prompt's next one.
PATIENCE = 4
_OWNERS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one text is made; the fields of :class:`PromptChunk` that have the same names."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    log_probability: float
    last: bool  #: the text ends with it


class Reader(Protocol):
    """Whom a text is for."""

    @property
    def live(self) -> bool:
        """Whether they want more of it; not any more from the instant of a cancel.  Read in the device thread, too."""

    @property
    def cancelled(self) -> bool:
        """Whether it was a cancel that ended that."""

    def charge(self, seconds: float, steps: int) -> None:
        """A program of ``steps`` has worked for them, and this is their share."""

    def spare(self, seconds: float) -> None:
        """So much the text would have gone on to take, had they not cancelled it; an estimate."""


class Generation:
    """One request's text, from its prompt to its last token."""

    def __init__(self, slot: int, owner: int, prompt: np.ndarray, settings: Settings, reader: Reader) -> None:
        self.slot = slot
        self.owner = owner
        self.prompt = prompt
        self.settings = settings
        self.reader = reader
        self.fed = 0  #: tokens of the prompt that were given to the device
        self.passed = 0  #: pieces of other prompts that went before its next one
        self.made = 0  #: tokens that the device was asked for, at most
        self.busy = 0  #: programs on the device, or in line, that work for it
        self.arrived = 0  #: tokens that came back
        self.unread: deque[Token] = deque()
        self.ended = False  #: on the device; tokens may still be unread
        self.out = False  #: of its slot
        self.settled = False  #: its account is closed
        self.error: TritonError | None = None
        #: Parks its owner: tokens, an error, or no program any more.
        self.news = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Generation {self.owner} in slot {self.slot}, {self.fed}/{len(self.prompt)} fed, {self.made} made>"

    @property
    def left(self) -> bool:
        """Nobody wants more of it."""
        return self.out or not self.reader.live

    @property
    def armed(self) -> bool:
        """As far as anybody knows, the device has it and could make another token."""
        return (
            self.fed == len(self.prompt)
            and self.made < self.settings.max_tokens
            and not self.ended
            and self.error is None
        )

    @property
    def prefilling(self) -> bool:
        """The device could be given another piece of its prompt."""
        return self.fed < len(self.prompt) and self.error is None and not self.left

    @property
    def decoding(self) -> bool:
        """And somebody wants it."""
        return self.armed and not self.left

    @property
    def held(self) -> bool:
        """It stands still, for its reader is behind: with what is under way, :data:`UNREAD` tokens or more."""
        return bool(self.unread) and len(self.unread) + self.made - self.arrived >= UNREAD


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What goes to the device next.  ``chunk`` of a prompt, or ``steps`` of ``decode``."""

    rows: tuple[Generation, ...]  #: whom it works for
    steps: int = 0
    length: int = 0  #: of the prefill program
    chunk: PromptChunk | None = None
    evict: np.ndarray | None = None
    hold: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class ScheduleStatistics:
    slots_in_use: int
    prefilling: int
    held: int  #: rows that stand still, because their readers are behind
    generations: int  #: that have begun
    prompt_tokens: int  #: given to the device
    tokens: int  #: made, and passed on
    stale_tokens: int  #: made, and dropped, for their owner had left
    evictions: int  #: owners that the device was told to put out
    #: Device time, by what became of the texts that it was for; all three together are the device's own.
    useful_seconds: float
    wasted_seconds: float  #: of programs that were under way when their text was cancelled
    unpaid_seconds: float  #: of programs that outlasted all of their texts; the next text is charged with them
    saved_seconds: float  #: what cancelled texts would have gone on to take; an estimate


class SlotSchedule:
    """Decides.  Every method is synchronous, and none waits.  Its user sees to it that one thread at a time is in here.

    Args:
      chunks: lengths of the compiled prefill programs, ascending.
    """

    def __init__(self, spec: SlotSpec, chunks: Sequence[int]) -> None:
        self.spec = spec
        self._chunks = tuple(chunks)
        self._rows: dict[int, Generation] = {}  # by slot, in order of admission
        self._evict: dict[int, int] = {}  # slot → owner who is on the device and has to go
        self._next_owner = 1
        self._prefilled = False  # by the latest program
        self._generations = self._prompt_tokens = self._tokens = self._stale = self._evictions = 0
        self._accounts = TextAccounts()

    def __len__(self) -> int:
        return len(self._rows)

    def statistics(self) -> ScheduleStatistics:
        rows = self._rows.values()
        return ScheduleStatistics(
            slots_in_use=len(rows),
            prefilling=sum(row.prefilling for row in rows),
            held=sum(row.decoding and row.held for row in rows),
            generations=self._generations,
            prompt_tokens=self._prompt_tokens,
            tokens=self._tokens,
            stale_tokens=self._stale,
            evictions=self._evictions,
            useful_seconds=self._accounts.useful,
            wasted_seconds=self._accounts.wasted,
            unpaid_seconds=self._accounts.unpaid,
            saved_seconds=self._accounts.saved,
        )

    # Coming and going

    def admit(self, slot: int, prompt: np.ndarray, settings: Settings, reader: Reader) -> Generation:
        """Put a text into a free slot.  What it asks for has been checked."""
        assert slot not in self._rows, f"slot {slot} is taken"
        taken = {row.owner for row in self._rows.values()} | set(self._evict.values())
        while self._next_owner in taken:
            self._next_owner = self._next_owner % _OWNERS + 1
        generation = self._rows[slot] = Generation(slot, self._next_owner, prompt, settings, reader)
        self._next_owner = self._next_owner % _OWNERS + 1
        self._generations += 1
        return generation

    def leave(self, generation: Generation) -> None:
        """No program from now on works for it, and the slot is free.  Idempotent."""
        if generation.out:
            return
        generation.out = True
        del self._rows[generation.slot]
        self._stale += len(generation.unread)
        self._tokens -= len(generation.unread)
        generation.unread.clear()
        if generation.armed:
            self._evict[generation.slot] = generation.owner

    def settle(self, generation: Generation, *, completed: bool) -> None:
        """Close the account of one that has left."""
        self._accounts.settle(generation, completed=completed)

    def lose(self, error: TritonError, *, everybody: bool) -> None:
        """The state on the device is gone, and with it every text that was there."""
        self._evict.clear()
        for row in self._rows.values():
            if everybody or row.fed:
                self._fail(row, error)

    def _fail(self, row: Generation, error: TritonError) -> None:
        row.error = type(error)(*error.args)
        row.news.unpark_all()

    # What next

    def next_program(self, *, waiting: bool, steps: int) -> Program | None:
        """None if nobody needs the device.  What is returned counts as dispatched.

        Pieces of prompts alternate with tokens for everybody else.

        Args:
          waiting: requests wait for a slot: then a row that ends must not idle in its slot for the rest of a chunk.
          steps: how many a chunk may have, otherwise.
        """
        for row in tuple(self._rows.values()):
            if not row.reader.live:
                self.leave(row)
        prompts = [row for row in self._rows.values() if row.prefilling]
        rows = tuple(row for row in self._rows.values() if row.decoding and not row.held)
        if prompts and not (rows and self._prefilled):
            self._prefilled = True
            return self._prefill(_next_prompt(prompts))
        self._prefilled = False
        return self._decode(rows, 1 if waiting or prompts else steps) if rows else None

    def has_work(self) -> bool:
        """Whether :meth:`next_program` would find something.  The answer may be late, and does no harm then."""
        return any(row.prefilling or (row.decoding and not row.held) for row in self._rows.values())

    def most_steps(self) -> int:
        """Tokens that somebody can still use."""
        return max((row.settings.max_tokens - row.made for row in self._rows.values() if row.decoding), default=1)

    def _prefill(self, row: Generation) -> Program:
        # How it is cut depends on the prompt alone: another cut would round differently.
        left = len(row.prompt) - row.fed
        length = next((length for length in self._chunks if length >= left), self._chunks[-1])
        count = min(left, length)
        settings = row.settings
        chunk = PromptChunk(
            slot=row.slot,
            tokens=row.prompt[row.fed : row.fed + count],
            start=row.fed,
            owner=row.owner if count == left else 0,
            max_tokens=settings.max_tokens,
            min_tokens=settings.min_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        if not row.fed:
            # The first piece puts the slot's old owner out.
            self._evictions += self._evict.pop(row.slot, None) is not None
        row.fed += count
        row.busy += 1
        if count == left:
            row.made = 1
        self._prompt_tokens += count
        return Program((row,), length=length, chunk=chunk)

    def _decode(self, rows: tuple[Generation, ...], steps: int) -> Program:
        evict = np.zeros(self.spec.slots, np.int32)
        for slot, owner in self._evict.items():
            evict[slot] = owner
        self._evictions += len(self._evict)
        self._evict.clear()
        hold = np.ones(self.spec.slots, np.bool_)
        for row in rows:
            hold[row.slot] = False
            row.made = min(row.made + steps, row.settings.max_tokens)
            row.busy += 1
        return Program(rows, steps=steps, evict=evict, hold=hold)

    # What came of it

    def receive(self, program: Program, emitted: Emitted, seconds: float) -> None:
        """A program has ended.  ``emitted`` is on the host."""
        # Whoever had come to their end on the device before it began had no part in it.
        present = [row for row in program.rows if program.chunk is not None or emitted.owner[row.slot] == row.owner]
        self._accounts.charge(program, present, seconds)
        for row in program.rows:
            row.busy -= 1
            tokens = list(_tokens(emitted, row))
            if row.left or row.error is not None:
                self._stale += len(tokens)
            else:
                self._take(row, tokens)
            row.news.unpark_all()

    def dropped(self, program: Program, seconds: float) -> None:
        """It never ran to an end that anybody could read, and the device is idle."""
        self._accounts.charge(program, program.rows, seconds)
        for row in program.rows:
            row.busy -= 1
            row.news.unpark_all()

    def _take(self, row: Generation, tokens: list[Token]) -> None:
        row.arrived += len(tokens)
        for token in tokens:
            if token.log_probability != token.log_probability:
                self._evict[row.slot] = row.owner
                self._fail(
                    row, InternalError("the model computed NaN for this text; its weights or dtype do not suit it")
                )
                return
            row.unread.append(token)
            self._tokens += 1
            row.ended |= token.last


def _next_prompt(rows: Sequence[Generation]) -> Generation:
    """The one with the least left to feed, unless another has let :data:`PATIENCE` pieces go before."""
    chosen = max(rows, key=lambda row: row.passed)
    if chosen.passed < PATIENCE:
        chosen = min(rows, key=lambda row: len(row.prompt) - row.fed)
    for row in rows:
        row.passed += 1
    chosen.passed = 0
    return chosen


def _tokens(emitted: Emitted, row: Generation) -> Iterator[Token]:
    slot = row.slot
    if emitted.owner[slot] != row.owner:
        return
    for step in range(len(emitted.tokens)):
        token = int(emitted.tokens[step, slot])
        if token != NO_TOKEN:
            yield Token(token, float(emitted.log_probabilities[step, slot]), bool(emitted.ended[step, slot]))
