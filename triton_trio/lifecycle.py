"""The life of a request: one table, in one file.

Rule: every transition a request can make is in :data:`TRANSITIONS`, and :func:`advance` is the only way to make one.
The diagram in ``docs/concepts/life-cycle.md``, the labels of metrics and log lines, and the tests all read this table,
so a stage cannot be added without all of them changing.

A request is in exactly one :class:`Stage` until it is settled; a settled request has exactly one :class:`Outcome`
and never moves again.  ``cancel`` and ``expire`` are possible everywhere, because there is no place where a request can wait
that is not inside its own scope.
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """Where a request is."""

    RECEIVED = "received"  #: decoded and being checked; in no queue yet
    QUEUED = "queued"  #: waiting for an instance
    EXECUTING = "executing"  #: a member of a batch; an ensemble's, as soon as its steps have begun
    RESPONDING = "responding"  #: its first response has left the instance


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"  #: its final response was handed over
    ERROR = "error"  #: bad input, or the model failed
    REJECTED = "rejected"  #: a queue policy turned it away (full, or its queue timeout passed)
    CANCELLED = "cancelled"  #: its scope was cancelled; the reason says by whom
    DEADLINE = "deadline"  #: its scope's deadline passed


class Event(StrEnum):
    """What can happen to a request."""

    ENQUEUE = "enqueue"
    BIND = "bind"  #: a batch was formed and an instance is in hand
    RESCHEDULE = "reschedule"  #: the model wants to see it again (iterative sequences)
    RESPOND = "respond"  #: a response was sent
    COMPLETE = "complete"  #: the final response was handed over
    FAIL = "fail"
    REJECT = "reject"
    CANCEL = "cancel"
    EXPIRE = "expire"


_ALWAYS: dict[Event, Stage | Outcome] = {
    Event.REJECT: Outcome.REJECTED,  # of an ensemble's request: where it is when the queue of a step turns it away
    Event.FAIL: Outcome.ERROR,
    Event.CANCEL: Outcome.CANCELLED,
    Event.EXPIRE: Outcome.DEADLINE,
}

TRANSITIONS: dict[Stage, dict[Event, Stage | Outcome]] = {
    Stage.RECEIVED: {Event.ENQUEUE: Stage.QUEUED, **_ALWAYS},
    Stage.QUEUED: {Event.BIND: Stage.EXECUTING, **_ALWAYS},
    Stage.EXECUTING: {Event.RESPOND: Stage.RESPONDING, Event.RESCHEDULE: Stage.QUEUED, **_ALWAYS},
    Stage.RESPONDING: {
        Event.RESPOND: Stage.RESPONDING,
        Event.RESCHEDULE: Stage.QUEUED,
        Event.COMPLETE: Outcome.OK,
        **_ALWAYS,
    },
}


class LifecycleError(Exception):
    """The server tried a transition that is not in the table: a bug in the server, never in a client."""


def advance(stage: Stage, event: Event) -> Stage | Outcome:
    """The stage or outcome that follows ``event`` in ``stage``; :exc:`LifecycleError` if there is none."""
    try:
        return TRANSITIONS[stage][event]
    except KeyError:
        raise LifecycleError(f"no transition for {event.value!r} in stage {stage.value!r}") from None
