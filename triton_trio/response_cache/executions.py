"""Requests that ask one model the same at the same time share one execution.

It is shared as a batch is, by a :class:`~triton_trio.scopes.BatchScope`: a member that is cancelled leaves, at that
instant, and when the last one has left the execution is cancelled, in the queue or on the device.  It runs in a task of
its own with a request of its own, so it belongs to none of its members, not even to the first.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import trio

from ..batch import Batch
from ..errors import InternalError, TritonError
from ..lifecycle import Event, Outcome, Stage
from ..request import InferenceRequest, InferenceResponse
from ..scopes import BatchScope, Reason
from .cache import Answer, Key, ResponseCache, digest, size_of

if TYPE_CHECKING:
    from ..model import Model
    from ..request import Array

LOGGER = logging.getLogger("triton_trio.response_cache")

#: Bytes of input beyond which a request is executed without a look at the cache: to find its key takes the event loop
#: about a millisecond for each MiB, in which nobody else is served.
LARGEST_INPUT = 4 << 20

#: What requests must have in common to share an execution: what they ask, their priority and queue timeout.
SharedBy = tuple[Key, int, int]

_owners = count(1)
_EVENTS = {Outcome.REJECTED: Event.REJECT, Outcome.CANCELLED: Event.CANCEL, Outcome.DEADLINE: Event.EXPIRE}


class SharedExecutions:
    """One loaded model's part of the cache, and what it executes for it now."""

    def __init__(self, model: Model, cache: ResponseCache) -> None:
        self._model = model
        self._cache = cache
        self._owner = next(_owners)
        self._running: dict[SharedBy, SharedExecution] = {}
        self._nursery: trio.Nursery | None = None

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[SharedExecution]:
        return iter(self._running.values())

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """While the model is loaded; answers of a load are never those of the next.

        **Cancellation:** executions are cancelled, and so are their members, with ``model_unloading``.
        """
        try:
            async with trio.open_nursery() as self._nursery:
                yield
                self._nursery.cancel_scope.cancel(reason=Reason.MODEL_UNLOADING.value)
        finally:
            self._nursery = None
            self._cache.drop_all_of(self._owner)

    def renew(self) -> None:
        """The model would not say the same any more: forget what it said, and keep nothing of what is under way."""
        self._cache.drop_all_of(self._owner)
        self._owner = next(_owners)

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """The response to a request that was admitted and fits: kept, shared, or its own.

        **Cancellation:** the request has left its execution when the cancel returns; others of it do not notice.
        """
        if _is_of_a_sequence(request) or sum(map(size_of, request.inputs.values())) > LARGEST_INPUT:
            return await self._model._serve(request)
        began = trio.current_time()
        key = (self._owner, digest(request))
        answer = self._cache.get(key)
        took = trio.current_time() - began
        request.enqueued_at = began
        request.advance(Event.ENQUEUE)
        if answer is None:
            self._join(request, key)
        else:
            _bind(request)
            self.deliver(request, answer, cached=True)
        response = await request.receive()
        # Not before: from here to the request's outcome there is no checkpoint.
        self._model.counters.count_lookup(request, took)
        return response

    def _join(self, request: InferenceRequest, key: Key) -> None:
        # Whoever may wait for another time, or comes sooner, has an execution of its own.
        shared_by = (key, request.priority, request.timeout_us)
        execution = self._running.get(shared_by)
        if execution is None:  # or it was cancelled: then it is not found any more
            execution = self._running[shared_by] = SharedExecution(self, shared_by, request)
            assert self._nursery is not None
            # Owner: the model's executions; ended by its own scope, when the last member has left, or by unload.
            self._nursery.start_soon(execution.run, name=f"shared execution of {self._model.name}")
        execution.join(request)

    # Called by an execution

    async def execute(self, request: InferenceRequest) -> InferenceResponse:
        request.admit(self._model.name, self._model.version, self._model._left)
        with request:
            return await self._model._serve(request)

    def keep(self, execution: SharedExecution, answer: Answer) -> Answer:
        """Keep an answer, as far as it can be; returns what members are to get."""
        key = execution.key[0]
        if key[0] != self._owner:
            return answer
        began = trio.current_time()
        kept = self._cache.put(key, answer)
        self._model.counters.count_kept(trio.current_time() - began)
        return answer if kept is None else kept

    def forget(self, execution: SharedExecution) -> None:
        if self._running.get(execution.key) is execution:
            del self._running[execution.key]

    def deliver(self, member: InferenceRequest, answer: Answer, *, cached: bool) -> None:
        member.cached = cached
        member.deliver_nowait(
            InferenceResponse(
                answer.outputs_for_one(),
                model_name=member.model_name,
                model_version=member.model_version,
                request_id=member.request_id,
                parameters=dict(answer.parameters),
            )
        )


class _Executed(InferenceRequest):
    """The execution's own request: its members are where it is."""

    __slots__ = ("_members", "last")

    def __init__(self, like: InferenceRequest, members: BatchScope[InferenceRequest]) -> None:
        super().__init__(
            # The caller of `like` may leave and use its arrays for something else.
            {name: array if _is_fixed(array) else array.copy() for name, array in like.inputs.items()},
            requested_outputs=like.requested_outputs,
            request_id=like.request_id,
            priority=like.priority,
            timeout_us=like.timeout_us,
            parameters=like.parameters,
        )
        self.batch_size, self.signature = like.batch_size, like.signature
        self.parent = like.parent
        self._members = members
        #: The member with which it was cancelled on the device.
        self.last: InferenceRequest | None = None

    @property
    def cancelled_for(self) -> InferenceRequest | None:
        return self.last

    def advance(self, event: Event) -> None:
        super().advance(event)
        if event is Event.BIND:
            for member in self._members:
                _bind(member)


def _is_of_a_sequence(request: InferenceRequest) -> bool:
    # Of an ensemble, a step of which is one: then the answer depends on what was asked before.
    return bool(request.sequence_id or request.sequence_start or request.sequence_end)


def _is_fixed(array: Array) -> bool:
    """Whether nobody can write to it, not even to what it is a view of; so are the tensors of a message."""
    found: object = array
    while isinstance(found, np.ndarray):
        if found.flags.writeable:
            return False
        found = found.base
    return True


def _bind(member: InferenceRequest) -> None:
    member.advance(Event.BIND)
    member.bound_at = trio.current_time()


class SharedExecution:
    """The *place* of its members.

    Args:
      first: the request that it is begun for; it joins like all others.
    """

    def __init__(self, executions: SharedExecutions, key: SharedBy, first: InferenceRequest) -> None:
        self.key = key
        self.scope: BatchScope[InferenceRequest] = BatchScope()
        self.task: trio.lowlevel.Task | None = None
        self._executions = executions
        self._request = _Executed(first, self.scope)

    def __repr__(self) -> str:
        return f"<SharedExecution of {len(self.scope)} requests, {self._request.stage.value}>"

    def logs(self, request: InferenceRequest) -> bool:
        """Whether the cancel of a member is logged when the device has let go, and not before."""
        return self._request.last is request

    def join(self, request: InferenceRequest) -> None:
        """Share what comes of it with ``request``."""
        joined = self.scope.join(request)
        assert joined, "a cancelled execution was found"
        request.place = self
        if self._request.stage not in (Stage.RECEIVED, Stage.QUEUED):
            _bind(request)

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        """A member was settled, at that instant; with the last, the execution is cancelled, wherever it is."""
        if len(self.scope) == 1 and isinstance(self._request.place, Batch):
            self._request.last = request
        if self.scope.leave(request, reason):
            self._executions.forget(self)

    async def run(self) -> None:
        """Execute, and tell whoever is still there.

        **Cancellation:** by the last member that leaves, or by unload, which cancels every member first.
        """
        self.task = trio.lowlevel.current_task()
        request = self._request
        try:
            with self.scope.cancel_scope:
                response = await self._executions.execute(request)
                # In the same step as the end of the execution: whoever comes now finds it in the cache.
                self._answer(Answer(response.outputs, response.parameters))
        except TritonError as exc:
            self._fail(exc)
        except Exception as exc:
            # A bug of ours.  Without this execution it would have cost one RPC, and here it would cost the server.
            LOGGER.exception("%s failed", self)
            self._fail(InternalError(f"{request.label}{type(exc).__name__}: {exc}"))
        finally:
            self._executions.forget(self)

    def _answer(self, answer: Answer) -> None:
        kept = self._executions.keep(self, answer)
        for number, member in enumerate(self._take_members()):
            # One of them is whom it was executed for, in the books: of those who are still there, the first.
            self._executions.deliver(member, kept, cached=number > 0)

    def _fail(self, error: TritonError) -> None:
        request = self._request
        event = Event.FAIL if request.outcome is None else _EVENTS.get(request.outcome, Event.FAIL)
        for member in self._take_members():
            member.failed_at = request.failed_at
            # The text may have the label of the request that was executed, at the front or after an ensemble's name.
            message = error.message.replace(request.label, member.label)
            member.fail_nowait(type(error)(message, *error.args[1:]), event, request.reason)

    def _take_members(self) -> Iterator[InferenceRequest]:
        for member in self.scope:
            self.scope.discard(member)
            member.place = None
            yield member
