"""Counters of one model version, with Triton's fields and the balance that Triton lacks.

``started == sum(outcomes) + in_flight`` at every moment: :class:`ModelCounters` is changed in three places only (a
request is admitted, a request is settled, an execution has ended), each of them one synchronous method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..lifecycle import Outcome, Stage
from ..member import Cohort, Member
from ..request import InferenceRequest


class FailureReason(StrEnum):
    """Triton's labels of ``nv_inference_request_failure``, spelled as on the wire."""

    REJECTED = "REJECTED"  #: a queue policy turned the request away
    CANCELED = "CANCELED"  #: cancelled, or its deadline passed; :attr:`ModelCounters.reasons` says by whom
    BACKEND = "BACKEND"  #: the model failed
    OTHER = "OTHER"  #: bad input, no such sequence, not ready


@dataclass(slots=True)
class Duration:
    """How often something took time, and how much in all (seconds)."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds

    @property
    def ns(self) -> int:
        return int(self.seconds * 1e9)


@dataclass(slots=True)
class BatchDurations:
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ModelCounters:
    """What one model version has done since it was loaded."""

    started: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  #: cancelled, by (reason, stage)
    failures: Counter[FailureReason] = field(default_factory=Counter)
    inference_count: int = 0  #: rows of successful requests that were executed
    execution_count: int = 0  #: batches that were executed, and groups of requests that joined one
    last_inference: float = 0.0  #: seconds since the epoch
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)  #: answered from the cache, or by somebody else's execution
    cache_miss: Duration = field(default_factory=Duration)  #: executed; the time to look, and to keep the answer
    by_batch_size: dict[int, BatchDurations] = field(default_factory=dict)
    device_seconds_after_cancel: float = 0.0  #: from each cancel of an executing request until its device let go
    #: Device time of programs, by whether the request was still there at their end: the two add up to the device's.
    device_seconds_useful: float = 0.0
    device_seconds_wasted: float = 0.0
    device_seconds_saved: float = 0.0  #: an estimate of what requests cancelled while executing would have taken

    @property
    def in_flight(self) -> int:
        return self.started - sum(self.outcomes.values())

    def count_settled(self, request: InferenceRequest) -> None:
        outcome = request.outcome
        assert outcome is not None
        self.outcomes[outcome] += 1
        took = request.ended_at - request.received_at
        if outcome is Outcome.OK:
            self.success.add(took)
            if not request.cached:
                self.inference_count += request.batch_size
        else:
            self.fail.add(took)
            self.failures[_failure_reason(request)] += 1
            if request.reason is not None:
                self.reasons[request.reason.value, request.stage.value] += 1

    def count_execution(self, cohort: Cohort, members: Sequence[Member], now: float, wall: float) -> None:
        """An execution has ended at ``now`` (Trio's clock) for those who began it together; ``wall`` is the time of day."""
        self.execution_count += 1
        self.last_inference = wall
        infer_at = cohort.compute_infer_at or cohort.began_at
        output_at = cohort.compute_output_at or now
        durations = (infer_at - cohort.began_at, output_at - infer_at, now - output_at)
        per_size = self.by_batch_size.get(cohort.rows)
        if per_size is None:
            per_size = self.by_batch_size[cohort.rows] = BatchDurations()
        per_size.compute_input.add(durations[0])
        per_size.compute_infer.add(durations[1])
        per_size.compute_output.add(durations[2])
        for member in members:
            self.device_seconds_after_cancel += member.seconds_after_cancel
            self.device_seconds_useful += member.useful_seconds
            self.device_seconds_wasted += member.wasted_seconds
            self.device_seconds_saved += member.saved_seconds
            if member.served and member.ready and not member.failed:  # as Triton counts: what succeeded
                self.queue.add(member.queue_seconds)
                self.compute_input.add(durations[0])
                self.compute_infer.add(durations[1])
                self.compute_output.add(durations[2])

    def count_lookup(self, request: InferenceRequest, seconds: float) -> None:
        """A request that was looked up in the response cache is answered: ``hits + misses`` are those requests."""
        if request.cached:
            self.cache_hit.add(seconds)
            self.queue.add(0.0)  # as Triton counts it
        else:
            self.cache_miss.add(seconds)

    def count_kept(self, seconds: float) -> None:
        self.cache_miss.add(seconds, count=0)

    def count_flow(self, request: InferenceRequest, compute_seconds: float, wall: float) -> None:
        """An ensemble's request is complete, and its steps took ``compute_seconds`` together; as Triton counts it."""
        self.execution_count += 1
        self.last_inference = wall
        self.queue.add(0.0)
        per_size = self.by_batch_size.setdefault(request.batch_size, BatchDurations())
        for times in (self, per_size):
            times.compute_input.add(0.0)
            times.compute_infer.add(compute_seconds)
            times.compute_output.add(0.0)


def _failure_reason(request: InferenceRequest) -> FailureReason:
    if request.outcome is Outcome.REJECTED:
        return FailureReason.REJECTED
    if request.outcome in (Outcome.CANCELLED, Outcome.DEADLINE):
        return FailureReason.CANCELED
    at = request.failed_at or request.stage
    return FailureReason.BACKEND if at in (Stage.EXECUTING, Stage.RESPONDING) else FailureReason.OTHER
