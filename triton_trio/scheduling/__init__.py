"""Schedulers: who is served when, decided synchronously.  Knows neither gRPC nor JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .default import DefaultScheduler as DefaultScheduler
from .dynamic_batcher import DynamicBatcher as DynamicBatcher
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
