"""What the server and a worker process say to each other: plain data, and tensors beside it.

An execution is the unit.  What happens between two of its chunks (who is in the next program, joined cancellation) is
decided in the worker and never waits for the server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from ...errors import InternalError, TritonError

if TYPE_CHECKING:
    from ...request import Array, ParameterValue

    Tensors = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Message:
    """Fields are JSON's own types; only ``tensors``, where a message has them, are not."""


# From the server


@dataclass(frozen=True, slots=True)
class OpenModel(Message):
    """Answered with :class:`ModelOpened` or :class:`Refused`."""

    config: str  #: the ModelConfig message, its bytes as Latin-1
    version: int
    model_directory: str
    version_directory: str


@dataclass(frozen=True, slots=True)
class OpenInstance(Message):
    """Answered with :class:`InstanceOpened` or :class:`Refused`.  It is open until the worker is closed."""

    name: str
    kind: str
    device: int


class Part(NamedTuple):
    """One member of an execution."""

    rows: int
    ready: bool  #: false for a row that no request fills
    request_id: str
    generation: int
    sequence_id: int | str
    sequence_start: bool
    sequence_end: bool
    parameters: Mapping[str, ParameterValue]


@dataclass(frozen=True, slots=True)
class Execute(Message):
    """Answered with any number of messages for each member, and one :class:`Ended`."""

    execution: int
    instance: str
    parts: Sequence[Part]  #: as lists, when it has arrived
    tensors: Tensors  #: inputs, of each member


@dataclass(frozen=True, slots=True)
class Leave(Message):
    """A member was cancelled.  Those who stay do not notice; when the last has left, the execution is cancelled."""

    execution: int
    member: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """The execution is cancelled from above: its model is being unloaded."""

    execution: int


@dataclass(frozen=True, slots=True)
class Taken(Message):
    """The reader of a member has room for ``count`` more responses."""

    execution: int
    member: int
    count: int


@dataclass(frozen=True, slots=True)
class EndSequence(Message):
    """For ``on_sequence_end``."""

    instance: str
    sequence_id: int | str
    generation: int
    cause: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Waiting(Message):
    """How many requests wait for an instance; sent with other messages, when some have become none or none some."""

    count: int


@dataclass(frozen=True, slots=True)
class Look(Message):
    """Somebody looks at the statistics; answered with a :class:`Report`."""

    instance: str


@dataclass(frozen=True, slots=True)
class Close(Message):
    """Close everything and end."""


# From the worker


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The process is there and has its backend."""


@dataclass(frozen=True, slots=True)
class ModelOpened(Message):
    lanes: Sequence[tuple[str, int, int]]  #: kind, device, and how many lanes an instance there has


@dataclass(frozen=True, slots=True)
class InstanceOpened(Message):
    name: str


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """What could not be opened, and why."""

    error: tuple[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Respond(Message):
    execution: int
    member: int
    final: bool
    parameters: Mapping[str, ParameterValue]
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class Finish(Message):
    execution: int
    member: int


@dataclass(frozen=True, slots=True)
class Reschedule(Message):
    execution: int
    member: int
    tensors: Tensors  #: its states; of nobody, if they stay as they are


@dataclass(frozen=True, slots=True)
class Fail(Message):
    execution: int
    member: int
    error: tuple[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Released(Message):
    """The device holds nothing for the member any more."""

    execution: int
    member: int
    steps_after_cancel: int


@dataclass(frozen=True, slots=True)
class Lingers(Message):
    """Everybody is served, and the device has yet to let go: see :meth:`~triton_trio.batch.Batch.watch_release`."""

    execution: int
    seconds: float


class Account(NamedTuple):
    """What a member has had of the device, in seconds."""

    useful: float
    wasted: float
    saved: float
    steps_after_cancel: int


@dataclass(frozen=True, slots=True)
class Ended(Message):
    """The device is idle for the execution.  The last message of it."""

    execution: int
    error: tuple[str, Sequence[str]] | None  #: of all members that are still live
    infer_age: float  #: seconds since inputs were on the device; 0 if nobody said
    output_age: float  #: seconds since results began to come back; 0 if nobody said
    device_seconds: float
    accounts: Sequence[Account]  #: of each member; as lists, when they have arrived


@dataclass(frozen=True, slots=True)
class GivenUp(Message):
    """The backend has given its device up for good, which another process may have again."""

    why: str


@dataclass(frozen=True, slots=True)
class Report(Message):
    """What ``statistics()`` has returned there; see :func:`~triton_trio.backends.worker.plain.write_statistics`."""

    instance: str
    statistics: object


@dataclass(frozen=True, slots=True)
class Log(Message):
    """A line for the server's log."""

    logger: str
    level: int
    text: str
    created: float
    path: str
    line: int
    thread: str


# Texts

#: Characters of an error or a log line; more is of no use to who reads it, and a server that is busy has to read it, too.
LONGEST = 1 << 16


def cut(text: str) -> str:
    """``text``, or its beginning and how long it was."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... (cut: it had {len(text)} characters)"


# Errors

_ERRORS = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}


def write_error(error: TritonError) -> tuple[str, Sequence[str]]:
    """For a message; of a class that the other end does not know, the nearest one that it knows."""
    kind = next(each for each in type(error).__mro__ if _ERRORS.get(each.__name__) is each)
    return kind.__name__, [cut(str(each)) for each in error.args]


def read_error(written: object) -> TritonError:
    """The error of a message."""
    match written:
        case [str(name), [*args]] if issubclass(kind := _ERRORS.get(name, object), TritonError):
            try:
                return kind(*map(str, args))
            except TypeError:
                pass  # not what this class is made of
    return InternalError(f"a worker process reported an error that nobody knows: {written}")


# Numbers, of which the server makes sums, limits and instances

_MOST_LANES = 1 << 16


def read_seconds(written: object) -> float:
    """Raises ValueError, or OverflowError: it is no number."""
    if not isinstance(written, int | float) or not math.isfinite(written):
        raise ValueError(f"{written!r} is no number of seconds")
    return float(written)


def read_lanes(written: Sequence[object]) -> dict[tuple[str, int], int]:
    """By kind and device.  Raises ValueError, or TypeError: there is none, or more than a model has."""
    lanes = {}
    for entry in written:
        match entry:
            case [str(kind), int(device), int(count)] if 0 < count <= _MOST_LANES:
                lanes[kind, device] = count
            case _:
                raise ValueError(f"{entry!r} are no lanes of an instance")
    return lanes
