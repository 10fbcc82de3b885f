"""What ``parameters`` in config.pbtxt say to the JAX backend, and the buckets and chunk sizes that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ...errors import InvalidArgument
from .memory import MIB

if TYPE_CHECKING:
    from ...config import ModelConfig

T = TypeVar("T")

DEFAULT_LADDER: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
_X64 = frozenset({"FP64", "INT64", "UINT64"})


@dataclass(frozen=True, slots=True)
class JaxOptions:
    """One model's settings.

    The parameters of config.pbtxt, all optional:

    ``target_chunk_ms``
        device time of one chunk of a step model, 2 by default.  A cancel waits for at most two of them.
    ``late_enqueue``
        ``true``: a step model's next chunk is queued only just before the running one ends, so that a cancel waits for
        one of them; with it the target can be higher, 3 to 4 ms, for the same latency and less overhead.
    ``max_steps``
        a row that has made so many steps is done, whatever ``done`` says; with it ``done`` may be left out.
    ``ladder``
        chunk sizes to compile, ``1,2,4,8,16,32,64`` by default.
    ``buckets``
        batch sizes to compile, by default the powers of two below ``max_batch_size`` and itself.
    ``compact_to``
        the smallest bucket that a batch moves to when its rows have left or are done, 2 by default: in a bucket of 1 many
        programs round differently.  ``max_batch_size`` keeps every batch in the bucket where it began.
    ``join``
        ``false``: queued requests do not join a running batch.  By default they do, with ``dynamic_batching``: they take
        rows that nobody needs any more, of the bucket where the batch is.  Nobody joins in a process of its own
        (``worker_process``).
    ``shapes``
        for models with variable dims: for how many different shapes compiled programs are kept, 16 by default.  Each
        may have them in every bucket.
    ``warmup``
        ``false``: do not run the model on zeros when it is loaded: an explicit model once, to compile its programs, and
        a step model's first chunks, to measure them.
    ``device_memory_limit_mb``
        MiB on a device that the parameters and one batch for each instance there may take.  A bucket whose programs, by
        XLA's account, need more is refused when it is compiled: at load, or with variable dims at the request.  Not for a
        model with explicit checkpoints, whose programs are not known.  No limit by default.
    ``state_on_device``
        ``false``: the states of ``sequence_batching`` go through the host with each request.  By default they stay on the
        device: one array for each state, of as many rows as an instance has sequences at a time and one more, made at
        load.  Through the host they go anyway in an explicit model, one with ``emit``, one in a process of its own, and
        one with a variable dim in a state.
    ``worker_process``
        ``true``: the model is in a process of its own, so that neither the server's busy event loop nor another model's
        delays its device, and what takes the process down takes this model's executions and nothing else.  A device
        that hangs is then replaced, with the process.  An execution costs some tenths of a millisecond more, and so does
        every MiB of tensors; and queued requests do not join a running batch.  Also for a language model.
    ``x64``
        ``true`` or ``false``: JAX's 64-bit mode for this model; by default on if a tensor is FP64, INT64 or UINT64,
        which the correlation ID of a sequence may be, too.
    """

    target: float  #: seconds
    late_enqueue: bool
    max_steps: int | None
    ladder: tuple[int, ...]
    buckets: tuple[int, ...]
    compact_to: int
    join: bool
    shapes: int
    warmup: bool
    memory_limit: float | None  #: bytes
    state_on_device: bool
    x64: bool

    @classmethod
    def read(cls, config: ModelConfig) -> JaxOptions:
        """Raises :exc:`InvalidArgument` for a parameter that makes no sense."""

        def parameter(name: str, parse: Callable[[str], T], what: str, default: T) -> T:
            text = config.parameters.get(name)
            if text is None:
                return default
            try:
                return parse(text)
            except ValueError:
                raise InvalidArgument(
                    f"model '{config.name}': parameter {name} in config.pbtxt must be {what}, got '{text}'"
                ) from None

        max_steps: int | None = parameter("max_steps", parse_count, "a number of steps, 1 or more", None)
        ladder = parameter("ladder", parse_counts, "chunk sizes such as '1,2,4,8'", DEFAULT_LADDER)
        if max_steps is not None:
            # A chunk that is longer than any row lives is never picked.
            ladder = tuple(k for k in ladder if k <= max_steps) or (max_steps,)
        buckets = parameter(
            "buckets", parse_counts, "batch sizes such as '2,4,8'", default_buckets(config.max_batch_size)
        )
        largest = max(config.max_batch_size, 1)
        if buckets[-1] != largest:
            raise InvalidArgument(
                f"model '{config.name}': the largest of the parameter buckets must be {largest} "
                f"({'max_batch_size' if config.max_batch_size else 'the model does not batch'}), got {buckets[-1]}"
            )
        compact_to = parameter("compact_to", parse_count, "a batch size, 1 or more", min(2, largest))
        if compact_to > largest:
            raise InvalidArgument(
                f"model '{config.name}': parameter compact_to in config.pbtxt must be a batch size, {largest} at most, got "
                f"'{compact_to}'"
            )
        wide = any(spec.datatype in _X64 for spec in (*config.inputs, *config.outputs))
        return cls(
            target=parameter("target_chunk_ms", parse_milliseconds, "a positive number of milliseconds", 2e-3),
            late_enqueue=parameter("late_enqueue", parse_flag, "'true' or 'false'", False),
            max_steps=max_steps,
            ladder=ladder,
            buckets=buckets,
            compact_to=compact_to,
            join=parameter("join", parse_flag, "'true' or 'false'", True) and config.dynamic_batching is not None,
            shapes=parameter("shapes", parse_count, "a number of shapes, 1 or more", 16),
            warmup=parameter("warmup", parse_flag, "'true' or 'false'", True),
            memory_limit=parameter("device_memory_limit_mb", parse_mebibytes, "a positive number of MiB", None),
            state_on_device=parameter("state_on_device", parse_flag, "'true' or 'false'", True),
            x64=parameter("x64", parse_flag, "'true' or 'false'", wide),
        )

    def bucket(self, rows: int) -> int:
        """The batch size of the programs that serve ``rows`` rows."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def compacted(self, bucket: int, rows: int) -> int | None:
        """The bucket that a batch in ``bucket`` should move to when it needs only ``rows`` rows; None: it may stay."""
        wanted = max(rows, self.compact_to)
        if 2 * rows > bucket or wanted >= bucket:
            return None
        smaller = self.bucket(wanted)
        return smaller if smaller < bucket else None


def wants_worker(config: ModelConfig) -> bool:
    """The parameter ``worker_process``; raises :exc:`InvalidArgument` if it makes no sense."""
    text = config.parameters.get("worker_process", "false")
    try:
        return parse_flag(text)
    except ValueError:
        raise InvalidArgument(
            f"model '{config.name}': parameter worker_process in config.pbtxt must be 'true' or 'false', got '{text}'"
        ) from None


def default_buckets(max_batch_size: int) -> tuple[int, ...]:
    """``6`` → ``(1, 2, 4, 6)``; a model that does not batch (0) has one bucket of one row."""
    largest = max(max_batch_size, 1)
    powers = (1 << exponent for exponent in range(largest.bit_length()))
    return (*(power for power in powers if power < largest), largest)


def parse_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def parse_counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({parse_count(part) for part in text.split(",")}))


def parse_milliseconds(text: str) -> float:
    value = float(text) / 1e3
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def parse_mebibytes(text: str) -> float | None:
    value = float(text) * MIB
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def parse_flag(text: str) -> bool:
    value = text.lower()
    if value not in ("true", "false"):
        raise ValueError(text)
    return value == "true"
