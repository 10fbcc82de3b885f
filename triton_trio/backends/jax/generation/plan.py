"""The plan: what a model over several hosts does next, as one host decides it and all of them do it.

A program over several hosts runs when every host has dispatched it, and all have to dispatch the same programs in the same
order.  So one host decides, the leader, and writes down what: a record for each program, numbered from 1.  The others
are followers: they read the records and dispatch what they say, and decide nothing.  A cancel is decided by the leader
alone, between two records; the next one says who is out.

Plain data and synchronous: who sends and who waits is in :mod:`.hosts`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import jax
import numpy as np

from ...._version import __version__
from ....errors import Unavailable
from .config import SlotSpec
from .schedule import Program
from .slots import PromptChunk

_HEAD = struct.Struct("<QBI")  # number, kind, size
_HELLO = struct.Struct("<8sI32s32s32s")  # what this is, who says it, of which plan
_MAGIC = b"ttplan 2"
#: What a plan's digests are of.
_OTHER = (
    "another version of JAX or of triton_trio",
    "another model (its numbers, or what is in its files)",
    "other options (slots, context, prefill_chunk, ladder or dtype)",
)


class PlanBroken(Unavailable):
    """What came is not the next record of this plan; nothing after it can be trusted."""


class Kind(IntEnum):
    PREFILL = 1
    DECODE = 2
    END = 3  #: no record follows, and that is how it should be


@dataclass(frozen=True, slots=True, eq=False)
class PlanRecord:
    """One program: which, and all that goes into it beside parameters and state, which every host has.

    Args:
      size: tokens that the prefill program takes, or steps of the decode program.
      arrays: what :meth:`PromptChunk.pack` makes, or ``evict`` and ``hold``.
    """

    number: int
    kind: Kind
    size: int = 0
    arrays: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, number: int, program: Program, spec: SlotSpec) -> PlanRecord:
        if program.chunk is not None:
            return cls(number, Kind.PREFILL, program.length, program.chunk.pack(spec, program.length))
        assert program.evict is not None
        assert program.hold is not None
        return cls(number, Kind.DECODE, program.steps, (program.evict, program.hold))

    def encode(self) -> bytes:
        return b"".join((_HEAD.pack(self.number, self.kind, self.size), *(array.tobytes() for array in self.arrays)))

    def program(self) -> Program:
        """What the leader dispatched; whom it works for is the leader's business."""
        if self.kind is Kind.DECODE:
            evict, hold = self.arrays
            return Program((), steps=self.size, evict=evict, hold=hold)
        tokens, numbers, fractions = self.arrays
        slot, start, count, owner, max_tokens, min_tokens, top_k, seed = map(int, numbers)
        temperature, top_p = map(float, fractions)
        chunk = PromptChunk(
            slot=slot,
            tokens=tokens[:count],
            start=start,
            owner=owner,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed & 0xFFFFFFFF,
        )
        return Program((), length=self.size, chunk=chunk)


class PlanFormat:
    """What records look like for one set of programs; all hosts of a plan have the same.

    Args:
      prefill: lengths of the compiled programs.
      decode: steps of them.
      dtype: of matrices.
      weights: what is in the model's files: :func:`.fingerprint.fingerprint`.
    """

    def __init__(
        self, spec: SlotSpec, prefill: Iterable[int], decode: Iterable[int], *, dtype: str, weights: str
    ) -> None:
        self.spec = spec
        self._sizes = {Kind.PREFILL: frozenset(prefill), Kind.DECODE: frozenset(decode), Kind.END: frozenset((0,))}
        programs = [sorted(sizes) for sizes in self._sizes.values()]
        versions, model = (jax.__version__, __version__), (spec.config, spec.end_tokens, weights)
        same = versions, model, (spec, programs, dtype, jax.process_count())
        self._digests = tuple(hashlib.sha256(repr(one).encode()).digest() for one in same)

    def layout(self, kind: Kind, size: int) -> tuple[tuple[type, int], ...]:
        """Dtype and length of each of a record's arrays."""
        if kind is Kind.PREFILL:
            return (np.int32, size), (np.int32, 8), (np.float32, 2)
        if kind is Kind.DECODE:
            return (np.int32, self.spec.slots), (np.bool_, self.spec.slots)
        return ()

    def check(self, kind: int, size: int) -> Kind:
        """Raises :exc:`PlanBroken`: this host has no such program."""
        if kind not in self._sizes or size not in self._sizes[Kind(kind)]:
            raise PlanBroken(f"it asks for a program of kind {kind} and size {size}, which this host does not have")
        return Kind(kind)

    # The first word, of a follower and of the leader to it

    HELLO_BYTES = _HELLO.size

    def hello(self, process: int) -> bytes:
        """What a process says first: which it is, and what it has."""
        return _HELLO.pack(_MAGIC, process, *self._digests)

    def speaker(self, hello: bytes) -> int | None:
        """Which process says so; None: none of this version."""
        if len(hello) != _HELLO.size or not hello.startswith(_MAGIC):
            return None
        return int(_HELLO.unpack(hello)[1])

    def difference(self, hello: bytes) -> str:
        """Why the speaker would not do what this process does; empty if it would."""
        _, process, *digests = _HELLO.unpack(hello)
        for other, ours, theirs in zip(_OTHER, self._digests, digests, strict=True):
            if ours != theirs:
                return f"process {process} has {other} than this one; start all processes with the same"
        return ""


class PlanReader:
    """A follower's side of the stream: bytes in, whole records out, each exactly the next one."""

    def __init__(self, plan: PlanFormat) -> None:
        self._plan = plan
        self._buffer = bytearray()
        self.number = 0  #: of the latest record but the end
        self.ended = False  #: the leader has said that nothing follows

    def feed(self, data: bytes | bytearray) -> Iterator[PlanRecord]:
        """The records that are complete with ``data``.

        Raises:
          PlanBroken: there is a gap, or something that is no record.
        """
        self._buffer += data
        while (record := self._next()) is not None:
            yield record

    def _next(self) -> PlanRecord | None:
        if len(self._buffer) < _HEAD.size:
            return None
        number, code, size = _HEAD.unpack_from(self._buffer)
        if self.ended:
            raise PlanBroken(f"record {number} came after the end")
        if number != self.number + 1:
            raise PlanBroken(f"record {number} came after record {self.number}")
        kind = self._plan.check(code, size)
        layout = [(dtype, length, length * np.dtype(dtype).itemsize) for dtype, length in self._plan.layout(kind, size)]
        whole = _HEAD.size + sum(wide for _, _, wide in layout)
        if len(self._buffer) < whole:
            return None
        data, at = bytes(self._buffer[:whole]), _HEAD.size
        arrays: list[np.ndarray] = []
        for dtype, length, wide in layout:
            arrays.append(np.frombuffer(data, dtype, length, at))
            at += wide
        del self._buffer[:whole]
        self.ended = kind is Kind.END
        self.number = number - self.ended
        return PlanRecord(number, kind, size, tuple(arrays))
