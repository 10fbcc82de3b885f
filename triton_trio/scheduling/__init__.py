"""Schedulers: who is served when, decided synchronously.  Knows neither gRPC nor JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .default import DefaultScheduler as DefaultScheduler
from .dynamic_batcher import DynamicBatcher as DynamicBatcher
from .queue import QueuePolicy as QueuePolicy
from .queue import QueueStatistics as QueueStatistics
from .queue import RequestQueue as RequestQueue
from .queue import TimeoutAction as TimeoutAction
from .scheduler import Scheduler as Scheduler
from .scheduler import SchedulerStatistics as SchedulerStatistics

if TYPE_CHECKING:
    from ..config import ModelConfig
