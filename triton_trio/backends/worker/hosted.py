"""An execution in the worker: the server's batch, as the backend there sees it.

Requests, members and scopes are the server's own classes, so that a backend cannot tell where it runs.  Only the way out
is another one: what a member gets is posted, and whether its reader is behind is what the server has said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from ...batch import Batch, Member
from ...errors import TritonError
from ...lifecycle import Event
from ...request import RESPONSE_BUFFER, InferenceRequest, NullRequest, ParameterValue, Place
from ...scopes import Reason
from .messages import Account, Ended, Execute, Fail, Finish, Lingers, Part, Released, Reschedule, Respond, write_error

if TYPE_CHECKING:
    from ...request import Array
    from .connection import Connection


class HostedRequest(InferenceRequest):
    """A request whose responses are read in the server."""

    __slots__ = ("_unread",)

    def __init__(self, inputs: Mapping[str, Array], part: Part, model_name: str, version: int) -> None:
        super().__init__(
            inputs,
            request_id=part.request_id,
            parameters=part.parameters,
            sequence_id=part.sequence_id,
            sequence_start=part.sequence_start,
            sequence_end=part.sequence_end,
        )
        self.batch_size = part.rows
        self.generation = part.generation
        self._unread = 0
        self.admit(model_name, version, _settled)
        self.advance(Event.ENQUEUE)

    @property
    def can_send(self) -> bool:
        """False while the server has had :data:`RESPONSE_BUFFER` responses that it has not called taken."""
        return self._unread < RESPONSE_BUFFER

    def sent(self) -> None:
        self._unread += 1

    def taken(self, count: int) -> None:
        self._unread -= count
        if self._senders is not None:
            self._senders.unpark_all()


def _settled(request: InferenceRequest, place: Place | None) -> None:
    """The server counts; here, nobody does."""


class HostedBatch(Batch):
    """Made of an :class:`Execute`; see :class:`~triton_trio.batch.Batch`.  Nobody joins it: who waits, waits in the server.

    Args:
      process: cancelled when the process is about to end.  What a backend says from then on (it may have caught its
        ``Cancelled``, and answer with what it has) is kept from the server, whose answer is the loss of the process.
    """

    __slots__ = ("_by_index", "_connection", "_index", "_number", "_process")

    def __init__(
        self,
        message: Execute,
        connection: Connection,
        *,
        model_name: str,
        version: int,
        decoupled: bool,
        process: trio.CancelScope,
    ) -> None:
        requests: list[InferenceRequest] = []
        for plain, inputs in zip(message.parts, message.tensors, strict=True):
            part = Part(*plain)
            if part.ready:
                requests.append(HostedRequest(inputs, part, model_name, version))
            else:
                requests.append(NullRequest(inputs))
        number = self._number = message.execution
        self._connection = connection
        self._process = process
        index = self._index = dict[int, int]()

        def post_released(member: Member) -> None:
            # Neither of the batch nor of its members: a cycle would keep all their tensors until the garbage is collected.
            connection.post(Released(number, index[id(member)], member.steps_after_cancel))

        super().__init__(requests, name=message.instance, decoupled=decoupled, on_released=post_released)
        self._by_index = self.members  # the backend may retire them before the end
        index |= {id(member): position for position, member in enumerate(self.members)}

    # From the server

    def leave_index(self, index: int, reason: Reason) -> None:
        """The member at ``index`` was cancelled there."""
        self._by_index[index].request.cancel(reason)

    def taken(self, index: int, count: int) -> None:
        request = self._by_index[index].request
        if isinstance(request, HostedRequest):
            request.taken(count)

    # To the server, which knows what a response must have

    def respond(
        self,
        member: Member,
        outputs: Mapping[str, Array],
        *,
        final: bool = True,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> None:
        if not self._may_be_told(member):
            return
        index = self._index[id(member)]
        try:
            self._connection.post(Respond(self._number, index, final, dict(parameters or {}), (outputs,)))
        except TritonError as exc:
            self.fail(member, exc)
            return
        if final:
            self._serve(member)
        elif isinstance(member.request, HostedRequest):
            member.request.sent()

    def watch_release(self, seconds: float = 0.0) -> None:
        self._connection.post(Lingers(self._number, seconds))

    def finish(self, member: Member) -> None:
        if self._may_be_told(member):
            self._connection.post(Finish(self._number, self._index[id(member)]))
            self._serve(member)

    def reschedule(self, member: Member, states: Mapping[str, Array] | None = None) -> None:
        if not self._may_be_told(member):
            return
        try:
            self._connection.post(Reschedule(self._number, self._index[id(member)], (states,) if states else ()))
        except TritonError as exc:
            self.fail(member, exc)
            return
        self._serve(member)

    def fail(self, member: Member, error: TritonError) -> None:
        if self._may_be_told(member):
            self._connection.post(Fail(self._number, self._index[id(member)], write_error(error)))
            self._serve(member)

    def post_ended(self, error: TritonError | None) -> None:
        """The device is idle for this execution; whoever is live gets ``error``."""
        if self._process.cancel_called:
            return
        for member in self._by_index:
            if member.live:
                self._serve(member)
        now = trio.current_time()
        self._connection.post(
            Ended(
                self._number,
                None if error is None else write_error(error),
                now - self.compute_infer_at if self.compute_infer_at else 0.0,
                now - self.compute_output_at if self.compute_output_at else 0.0,
                self.device_seconds,
                _accounts(self._by_index),
            )
        )

    def _may_be_told(self, member: Member) -> bool:
        return member.live and not self._process.cancel_called


def _accounts(members: Sequence[Member]) -> list[Account]:
    return [
        Account(member.useful_seconds, member.wasted_seconds, member.saved_seconds, member.steps_after_cancel)
        for member in members
    ]
