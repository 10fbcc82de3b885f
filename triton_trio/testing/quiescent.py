"""Nothing is left: what must hold of a server whenever it has nothing to do (law 16)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..ensemble import EnsembleModel
from ..instance import InstanceState
from ..lifecycle import Outcome
from ..model import Model, ModelState
from ..observe import tree
from ..scheduled_model import ScheduledModel
from ..scheduling import QueueScheduler, SequenceBatcher

if TYPE_CHECKING:
    from ..server import InferenceServer


def assert_quiescent(server: InferenceServer, *, idle_sequences: bool = False) -> None:
    """Fail with all that is left, and the live tree, unless the server holds nothing and its counters balance.

    No live request, queue entry, batch, answer kept for its turn, load, watchdog or task beyond the resident ones; every
    instance waits for work.  Sync: call it when all tasks are blocked (``await trio.testing.wait_all_tasks_blocked()``).

    A sequence that nobody has ended is left, too, with its slot and its state, unless ``idle_sequences`` are expected.
    """
    found = list(_left(server, idle_sequences))
    if found:
        raise AssertionError("the server is not quiescent:\n  " + "\n  ".join(found) + "\n\n" + tree())


def _left(server: InferenceServer, idle_sequences: bool) -> Iterator[str]:
    repository = server.repository
    for name, entry in repository._entries.items():
        if entry.load is not None:
            yield f"model {name} is being loaded, with {len(entry.load.waiters)} waiters"
    resident = {f"model {model.name}:{model.version}" for model in repository.loaded()}
    for task in repository._nursery.child_tasks:
        if task.name not in resident:
            yield f"task '{task.name}' in the models nursery"
    for task in repository._watchdogs.child_tasks:
        yield f"task '{task.name}' in the watchdogs nursery"
    if repository.limiter is not None:
        limited = repository.limiter.statistics()
        if limited.waiters or any(pool.in_use for pool in limited.resources):
            yield f"the rate limiter: {limited}"
    for model in repository.loaded():
        for what in _left_in(model, idle_sequences):
            yield f"model {model.name}:{model.version}: {what}"


def _left_in(model: Model, idle_sequences: bool) -> Iterator[str]:
    for request in model._live:
        yield f"live request {request!r}"
    counters = model.counters
    if counters.in_flight:
        yield f"started {counters.started} requests, but the outcomes are {dict(counters.outcomes)}"
    if sum(counters.reasons.values()) != counters.outcomes[Outcome.CANCELLED] + counters.outcomes[Outcome.DEADLINE]:
        yield f"the reasons {dict(counters.reasons)} do not add up to the outcomes {dict(counters.outcomes)}"
    for execution in model.shared or ():
        yield f"{execution!r}"
    if isinstance(model, EnsembleModel) and any(model.inflight):
        yield f"requests that count against max_inflight_requests, by step: {model.inflight}"
    if isinstance(model, ScheduledModel):
        yield from _left_in_scheduler(model)
        if isinstance(model.scheduler, SequenceBatcher):
            yield from _left_sequences(model.scheduler, idle_sequences)


def _left_in_scheduler(model: ScheduledModel) -> Iterator[str]:
    scheduler = model.scheduler
    for request in scheduler.queued():
        yield f"queued request {request!r}"
    statistics = scheduler.statistics().queue
    if statistics.queued or any(statistics.by_level.values()):
        yield f"the queue counts {statistics}"
    if isinstance(scheduler, QueueScheduler) and scheduler.queue._timed:
        yield f"{len(scheduler.queue._timed)} queue timeouts"
    if scheduler.order is not None and len(scheduler.order):
        yield f"{len(scheduler.order)} requests whose answers must go out in order"
    waiting = 0
    for instance in model.instances:
        if instance.batch is not None:
            yield f"instance {instance.name} executes {instance.batch!r}"
        waiting += instance.state is InstanceState.IDLE
    if model.state is ModelState.READY and scheduler.statistics().idle_instances != waiting:
        yield f"{scheduler.statistics().idle_instances} instances wait for work, of {waiting} that are idle"


def _left_sequences(batcher: SequenceBatcher, idle_sequences: bool) -> Iterator[str]:
    live = set(batcher._live.values())
    for sequence in batcher._sequences:
        idle = sequence in live and sequence.slots is not None and not sequence.waiting and sequence.executing is None
        if not (idle and idle_sequences):
            yield f"{sequence!r}"
    for request in (*batcher._sequence_of, *batcher._on_device):
        yield f"a sequence's request {request!r}"
    slots = {sequence for each in batcher._slots.values() for sequence in each.taken.values()}
    for what, known in (("slot", slots), ("ID", live), ("latest of an ID", set(batcher._latest.values()))):
        for sequence in known - set(batcher._sequences):
            yield f"{sequence!r} is released, and has a {what}"
    if batcher._backlog or any(each.ready for each in batcher._slots.values()):
        yield f"sequences wait to be executed: {batcher.statistics()}"
