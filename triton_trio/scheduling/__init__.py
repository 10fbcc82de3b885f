"""Schedulers: who is served when, decided synchronously.  Knows neither gRPC nor JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..config.scheduling import OldestStrategy
from ..errors import InvalidArgument
from .default import DefaultScheduler as DefaultScheduler
from .direct import DirectBatcher as DirectBatcher
from .dynamic_batcher import DynamicBatcher as DynamicBatcher
from .joining import Joining as Joining
from .oldest import OldestBatcher as OldestBatcher
from .queue import QueuePolicy as QueuePolicy
from .queue import QueueStatistics as QueueStatistics
from .queue import RequestQueue as RequestQueue
from .queue import TimeoutAction as TimeoutAction
from .queue_scheduler import QueueScheduler as QueueScheduler
from .rate_limiter import Permit as Permit
from .rate_limiter import PoolStatistics as PoolStatistics
from .rate_limiter import RateLimiter as RateLimiter
from .rate_limiter import RateLimiterStatistics as RateLimiterStatistics
from .rate_limiter import Resource as Resource
from .scheduler import Scheduler as Scheduler
from .scheduler import SchedulerStatistics as SchedulerStatistics
from .scheduler import Seat as Seat
from .sequence import InferenceSequence as InferenceSequence
from .sequence_batcher import SequenceBatcher as SequenceBatcher
from .sequence_batcher import SequenceOptions as SequenceOptions
from .sequence_batcher import SequenceStatistics as SequenceStatistics
from .sequence_tensors import SequenceTensors as SequenceTensors

if TYPE_CHECKING:
    from .. import config
    from ..request import Array


def _policy(policy: config.QueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        timeout_action=TimeoutAction[policy.timeout_action],
        default_timeout=policy.default_timeout_microseconds / 1e6,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )


def make_scheduler(model: config.ModelConfig, initial_states: Mapping[str, Array] | None = None) -> Scheduler:
    """The scheduler that a model's configuration asks for; ``initial_states``: see :class:`SequenceTensors`."""
    if model.sequence_batching is not None:
        return _sequence_batcher(model, model.sequence_batching, SequenceTensors(model, initial_states))
    batching = model.dynamic_batching
    if batching is None:
        return DefaultScheduler()
    levels = max(1, batching.priority_levels)
    queue = RequestQueue(
        levels=levels,
        default_level=batching.default_priority_level or 1,
        policy=_policy(batching.default_queue_policy),
        policies={level: _policy(policy) for level, policy in batching.priority_queue_policy.items()},
    )
    return DynamicBatcher(
        queue,
        max_batch_size=max(1, model.max_batch_size),
        preferred_sizes=batching.preferred_batch_size,
        max_queue_delay=batching.max_queue_delay_microseconds / 1e6,
        preserve_ordering=batching.preserve_ordering,
    )


def _sequence_batcher(
    model: config.ModelConfig, batching: config.SequenceBatching, tensors: SequenceTensors
) -> SequenceBatcher:
    rows = max(1, model.max_batch_size)
    strategy = batching.strategy
    options = SequenceOptions(
        model_name=model.name,
        # Without a number of candidates there is one for each row, as for `direct`.
        slots=(strategy.max_candidate_sequences if isinstance(strategy, OldestStrategy) else 0) or rows,
        idle_limit=batching.max_sequence_idle_microseconds / 1e6,
        iterative=batching.iterative_sequence,
        executing_cancel_ends_sequence=_executing_cancel_ends_sequence(model),
    )
    max_queue_delay = strategy.max_queue_delay_microseconds / 1e6
    if isinstance(strategy, OldestStrategy):
        return OldestBatcher(
            options,
            tensors,
            max_batch_size=rows,
            preferred_sizes=strategy.preferred_batch_size,
            max_queue_delay=max_queue_delay,
            preserve_ordering=strategy.preserve_ordering,
        )
    return DirectBatcher(
        options,
        tensors,
        max_queue_delay=max_queue_delay,
        minimum_slot_utilization=strategy.minimum_slot_utilization,
    )


def _executing_cancel_ends_sequence(model: config.ModelConfig) -> bool:
    text = model.parameters.get("executing_cancel_ends_sequence", "true")
    if text not in ("true", "false"):
        raise InvalidArgument(
            f"model '{model.name}': parameter executing_cancel_ends_sequence in config.pbtxt must be 'true' or 'false', "
            f"got '{text}'"
        )
    return text == "true"
