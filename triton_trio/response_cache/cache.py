"""Answers by what was asked, the least recently used of which goes first.  Pure state: no task, no clock, no await.

An answer comes here when its execution has succeeded, and never before: what was cancelled, failed or turned away leaves
no trace.  (Triton inserts whatever its backend responds with, an error as an answer without outputs.)
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tensor import datatype_of, to_raw

if TYPE_CHECKING:
    from ..request import Array, InferenceRequest, ParameterValue

#: The load of a model (a number that is never used again), and the digest of what was asked.
Key = tuple[int, bytes]

# Bytes beside what is counted exactly; measured, for an entry must not weigh more than it says.
_ENTRY = 600
_ARRAY = 200
_PARAMETER = 160
_ELEMENT = 41  #: of a BYTES tensor, beside its text


@dataclass(frozen=True, slots=True)
class Answer:
    """What a response says, without whom it says it to."""

    outputs: Mapping[str, Array]
    parameters: Mapping[str, ParameterValue]

    def outputs_for_one(self) -> dict[str, Array]:
        """The outputs, read-only: whoever gets them is not the only one."""
        return {name: _read_only(array.view()) for name, array in self.outputs.items()}

    def size(self) -> int:
        """Bytes that it takes in a cache."""
        tensors = sum(_ARRAY + size_of(array) for array in self.outputs.values())
        return _ENTRY + tensors + sum(_PARAMETER + sys.getsizeof(value) for value in self.parameters.values())


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    capacity: int  #: bytes
    used: int  #: bytes
    entries: int
    hits: int
    misses: int
    evictions: int  #: entries that made room for others


class ResponseCache:
    """The answers of all models of a server.

    Args:
      capacity: bytes that entries may take.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[Key, tuple[Answer, int]] = OrderedDict()
        self._used = 0
        self._hits = self._misses = self._evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            capacity=self.capacity,
            used=self._used,
            entries=len(self._entries),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def get(self, key: Key) -> Answer | None:
        """The answer kept for ``key``; its arrays are read-only."""
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Key, answer: Answer) -> Answer | None:
        """Keep a copy of ``answer``, and return it; None if it is larger than the cache."""
        size = answer.size()
        if size > self.capacity:
            return None
        self.drop(key)
        # A copy, for the model's array may be a view of a whole batch, and would keep all of it.
        outputs = {name: _read_only(array.copy()) for name, array in answer.outputs.items()}
        kept = Answer(outputs, dict(answer.parameters))
        self._entries[key] = kept, size
        self._used += size
        while self._used > self.capacity:
            self._evictions += 1
            self.drop(next(iter(self._entries)))
        return kept

    def drop(self, key: Key) -> None:
        """Forget the entry, if there is one."""
        _, size = self._entries.pop(key, (None, 0))
        self._used -= size

    def drop_all_of(self, owner: int) -> None:
        """Forget what a load of a model has put here."""
        for key in [key for key in self._entries if key[0] == owner]:
            self.drop(key)


def digest(request: InferenceRequest) -> bytes:
    """What was asked: tensors, requested outputs and parameters, in whatever order the client names them.

    Not who asked, how urgently, or under which label.  Reads every byte of the inputs: about 1 ms for a MiB.
    """
    found = hashlib.blake2b(digest_size=32)
    for name in sorted(request.inputs):
        array = request.inputs[name]
        raw = to_raw(array)
        # Lengths and shapes before contents, so that no two requests look alike by where one part ends.
        found.update(f"{name!r}{datatype_of(array)}{array.shape}{len(raw)};".encode())
        found.update(raw)
    found.update(f"{sorted(request.requested_outputs)}{sorted(request.parameters.items())}".encode())
    return found.digest()


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


def size_of(array: Array) -> int:
    """Bytes that the elements take."""
    if array.dtype.hasobject:
        return array.nbytes + sum(len(item) + _ELEMENT for item in array.ravel().tolist())
    return array.nbytes
