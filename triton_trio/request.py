"""Requests and responses: what travels through the server, and the one function that settles it.

A request owns one ``CancelScope``.  It waits in exactly one *place* at a time (a scheduler's queue or a batch); the
place has one synchronous method, ``leave``, and that is all a cancel needs.  Triton marks a flag and looks at it later;
here the abort function of the waiting task removes the request at the instant of the cancel, before anything else can
look.

Responses go to the request through :meth:`InferenceRequest.deliver_nowait` and come out of
:meth:`InferenceRequest.receive`.  The buffer between them is bounded by the sender, who asks :attr:`can_send` or waits.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import outcome
import trio

from .errors import DeadlineExceeded, RequestCancelled, TritonError, Unavailable
from .lifecycle import Event, LifecycleError, Outcome, Stage, advance
from .scopes import Reason

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from .states import StateSlot

    Array = npt.NDArray[np.generic]

ParameterValue = bool | int | float | str

#: Responses of one decoupled request that may wait for their reader before the model is held back.
RESPONSE_BUFFER = 8
#: Characters of a request's ID that stand before its messages.
LONGEST_NAME = 256

_generations = itertools.count(1)


class Place(Protocol):
    """Where a request waits: a scheduler or a batch."""

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        """Forget ``request`` now: synchronous, O(1), and silent if it is not here any more."""


class InferenceResponse:
    """One response: ``outputs`` by tensor name, as arrays with their batch dimension.

    ``final`` is true for the last response of the request; a decoupled model may end with a response without outputs.
    """

    __slots__ = ("final", "model_name", "model_version", "outputs", "parameters", "request_id")

    def __init__(
        self,
        outputs: Mapping[str, Array],
        *,
        model_name: str = "",
        model_version: int = 1,
        request_id: str = "",
        parameters: Mapping[str, ParameterValue] | None = None,
        final: bool = True,
    ) -> None:
        self.outputs = outputs
        self.model_name = model_name
        self.model_version = model_version
        self.request_id = request_id
        self.parameters = parameters or {}
        self.final = final

    def __repr__(self) -> str:
        names = ", ".join(self.outputs)
        return f"<InferenceResponse {self.model_name} id={self.request_id!r} [{names}] final={self.final}>"


class InferenceRequest:
    """One inference request and its life (see :mod:`triton_trio.lifecycle`).

    Args:
      inputs: arrays by tensor name; with a batching model the first dimension is the batch.
      requested_outputs: names of the outputs wanted; empty means all.
      request_id: the client's label.  Two live requests may share one; the server's own identity is ``generation``.
      priority: 1 is the highest; 0 means the model's default level.
      timeout_us: the queue timeout asked for, in microseconds; 0 means the model's default.  It bounds the wait in
        the queue only; a deadline for the whole request is a deadline on the scope around the call.
      parameters: passed to the model as they are.
      sequence_id: the correlation ID, for a model with a sequence batcher; 0 and "" mean none.
      sequence_start, sequence_end: whether this is the sequence's first request, its last.
      scope: the caller's scope, if it surrounds this one request and nothing else (that of a unary RPC does); by default
        the request opens one of its own.  Whoever owns the scope sees its cancel through.

    **Cancellation:** cancelling the request is leaving the Trio scope around the call that serves it, or
    :meth:`cancel`.  Either way it is out of its queue or batch at that instant, and settled.
    """

    __slots__ = (
        "_buffer",
        "_consumer",
        "_error",
        "_final_delivered",
        "_on_settled",
        "_owns_scope",
        "_senders",
        "batch_size",
        "bound_at",
        "cached",
        "ended_at",
        "enqueued_at",
        "failed_at",
        "generation",
        "inputs",
        "model_name",
        "model_version",
        "outcome",
        "parameters",
        "parent",
        "place",
        "priority",
        "queue_deadline",
        "reason",
        "received_at",
        "request_id",
        "requested_outputs",
        "scope",
        "sequence_end",
        "sequence_id",
        "sequence_start",
        "signature",
        "stage",
        "state_slot",
        "timeout_us",
        "why",
    )

    def __init__(
        self,
        inputs: Mapping[str, Array],
        *,
        requested_outputs: tuple[str, ...] = (),
        request_id: str = "",
        priority: int = 0,
        timeout_us: int = 0,
        parameters: Mapping[str, ParameterValue] | None = None,
        sequence_id: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
        scope: trio.CancelScope | None = None,
    ) -> None:
        self.inputs = inputs
        self.requested_outputs = requested_outputs
        self.request_id = request_id
        self.priority = priority
        self.timeout_us = timeout_us
        self.parameters = parameters if parameters is not None else {}
        self.sequence_id = sequence_id
        self.sequence_start = sequence_start
        self.sequence_end = sequence_end
        self.generation = next(_generations)
        self.model_name = ""
        self.model_version = 0
        self.batch_size = 1
        self.signature: object = None
        self.queue_deadline = float("inf")
        #: Where its instance keeps the states of its sequence, if it does.
        self.state_slot: StateSlot | None = None

        self.scope = trio.CancelScope() if scope is None else scope
        self._owns_scope = scope is None
        self.stage = Stage.RECEIVED
        self.outcome: Outcome | None = None
        self.reason: Reason | None = None
        #: What there is to say of the reason, for the message.
        self.why = ""
        self.place: Place | None = None
        #: The ensemble's request of which this is a step.
        self.parent: InferenceRequest | None = None
        #: The stage at which it failed, where that is not its own: that of the step which failed.
        self.failed_at: Stage | None = None
        #: Answered without an execution of its own, by the response cache.
        self.cached = False
        self.received_at = 0.0
        self.enqueued_at = 0.0
        self.bound_at = 0.0
        self.ended_at = 0.0

        self._buffer: deque[InferenceResponse] | None = None
        self._consumer: trio.lowlevel.Task | None = None
        self._senders: trio.lowlevel.ParkingLot | None = None
        self._error: tuple[type[TritonError], tuple[Any, ...]] | None = None
        self._final_delivered = False
        self._on_settled: Callable[[InferenceRequest, Place | None], None] | None = None

    def __repr__(self) -> str:
        life = self.stage.value if self.outcome is None else self.outcome.value
        return f"<InferenceRequest #{self.generation} {self.model_name} id={self.request_id!r} {life}>"

    @property
    def label(self) -> str:
        """The prefix Triton puts before its messages: ``[request id: 7] ``.  An ID that is too long to read is cut."""
        name = self.request_id or "<id_unknown>"
        return f"[request id: {name if len(name) <= LONGEST_NAME else f'{name[:LONGEST_NAME]}...'}] "

    def admit(
        self, model_name: str, version: int, on_settled: Callable[[InferenceRequest, Place | None], None]
    ) -> None:
        """A model has taken the request: from here on it is counted, and ``on_settled`` is called exactly once."""
        if self._on_settled is not None or self.outcome is not None:
            raise ValueError(f"{self!r} was used before: make a new request for every inference")
        self.model_name = model_name
        self.model_version = version
        self.received_at = trio.current_time()
        self._on_settled = on_settled

    @property
    def waiting_task(self) -> trio.lowlevel.Task | None:
        """The task that waits for the next response; None while it is busy elsewhere."""
        return self._consumer

    # Cancelling

    def cancel(self, reason: Reason = Reason.ADMIN, why: str = "") -> None:
        """Cancel this request, from any task; whoever awaits it gets :exc:`RequestCancelled` with the reason.

        ``why`` is added to a message that has room for it.
        """
        if self.outcome is None:
            self.why = why
        if self._on_settled is not None:
            # Now, and not when the caller's task comes to its next checkpoint: it may be busy writing to a slow client.
            self._settle_cancelled(reason)
        self.scope.cancel(reason=reason.value)

    @property
    def is_cancelled(self) -> bool:
        """The view that Triton's APIs have.  Derived from the scope; nothing in the server polls it."""
        return self.outcome in (Outcome.CANCELLED, Outcome.DEADLINE) or self.scope.cancel_called

    @property
    def cancelled_for(self) -> InferenceRequest | None:
        """Whose cancel it is when this one is cancelled; None: of several, and nobody's in particular."""
        return self

    # Life: every change of stage or outcome goes through these two

    def advance(self, event: Event) -> None:
        """Move to the next stage.  The caller knows the request is not settled."""
        after = advance(self.stage, event)
        if not isinstance(after, Stage):
            raise LifecycleError(f"{event.value!r} ends a request: use settle()")
        self.stage = after

    def settle(self, event: Event, reason: Reason | None = None) -> bool:
        """The one place where an outcome is decided; False if somebody was first, which is not an error.

        A settled request has left its place, and whoever waits to send it more is released.  A cancel drops the responses
        that wait for their reader; before an error they can still be read, in the order in which they were sent.
        """
        if self.outcome is not None:
            return False
        after = advance(self.stage, event)
        if not isinstance(after, Outcome):
            raise LifecycleError(f"{event.value!r} does not end a request: use advance()")
        self.outcome = after
        self.reason = reason
        self.ended_at = trio.current_time()
        place, self.place = self.place, None
        if place is not None:
            place.leave(self, reason or Reason.CALLER)
        if after in (Outcome.CANCELLED, Outcome.DEADLINE):
            self._buffer = None
        if self._senders is not None:
            self._senders.unpark_all()
        if self._on_settled is not None:
            self._on_settled(self, place)
        return True

    # The model's side

    @property
    def can_send(self) -> bool:
        """False while the reader is :data:`RESPONSE_BUFFER` responses behind: park the row, do not grow."""
        return self._buffer is None or len(self._buffer) < RESPONSE_BUFFER

    async def wait_can_send(self) -> None:
        """Wait until the reader has caught up, or is gone.

        **Cancellation:** an ordinary checkpoint of the *sender's* task; nothing is left behind.
        """
        while self.outcome is None and not self.can_send:
            if self._senders is None:
                self._senders = trio.lowlevel.ParkingLot()
            await self._senders.park()

    def deliver_nowait(self, response: InferenceResponse) -> None:
        """Hand a response to the request; dropped and silent if the request is settled or already had its final."""
        if self.outcome is not None or self._final_delivered:
            return
        if self.stage is Stage.EXECUTING:
            self.advance(Event.RESPOND)
        self._final_delivered = response.final
        if self._consumer is not None:
            task, self._consumer = self._consumer, None
            trio.lowlevel.reschedule(task, outcome.Value(response))
        else:
            if self._buffer is None:
                self._buffer = deque()
            self._buffer.append(response)

    def fail_nowait(self, error: TritonError, event: Event = Event.FAIL, reason: Reason | None = None) -> None:
        """End the request with an error, for the reader to raise; a no-op if it is settled.  ``reason`` of a cancel.

        Only the error's type and arguments are kept: a stored exception would pin the arrays of every frame it saw.
        """
        if self.outcome is not None:
            return
        self._error = (type(error), error.args)
        task, self._consumer = self._consumer, None
        if task is not None:
            # Before it is settled, for that may cancel a scope that the task is in.
            trio.lowlevel.reschedule(task, outcome.Value(None))
        self.settle(event, reason)

    # The caller's side

    def __enter__(self) -> InferenceRequest:
        if self._owns_scope:
            self.scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        # One release path: however the caller's block ended, the request is settled before its scope closes.
        if self.outcome is None:
            if isinstance(exc, trio.Cancelled):
                self._settle_cancelled(Reason.of(exc))
            elif isinstance(exc, BaseExceptionGroup) and (found := _find_cancelled(exc)) is not None:
                self._settle_cancelled(Reason.of(found))
            elif exc is None and self._final_delivered and not self._buffer and not self.scope.cancel_called:
                self.settle(Event.COMPLETE)
            elif exc is None or isinstance(exc, GeneratorExit):
                # A deadline may have passed without a checkpoint since, to say so.
                passed = self.scope.deadline <= trio.current_time()
                self._settle_cancelled(Reason.DEADLINE if passed else Reason.CALLER)
            else:
                self.settle(Event.FAIL)
        if not self._owns_scope:
            return False
        absorbed = self.scope.__exit__(exc_type, exc, tb)
        if (absorbed if exc is not None else self.scope.cancel_called) and self.outcome is not Outcome.OK:
            # Somebody else cancelled this request, and the caller is still here to be told how it ended.
            raise self._stored_error()
        return absorbed

    async def receive(self) -> InferenceResponse:
        """The next response.

        Raises:
          TritonError: the request failed or was rejected.
          trio.EndOfChannel: the final response has been received already.

        **Cancellation:** at the instant of the cancel the request leaves its queue or batch and is settled; a response
        that was handed over in the same tick is dropped, so that a cancelled request is never also ``ok`` (law 8).
        """
        response: InferenceResponse | None
        if self._buffer:
            response = self._buffer.popleft()
            if self._senders is not None:
                self._senders.unpark_all()
        elif self._error is not None:
            raise self._stored_error()
        elif self._final_delivered or self.outcome is not None:
            await trio.lowlevel.checkpoint_if_cancelled()  # a cancelled request does not look like one that is complete
            raise trio.EndOfChannel
        else:
            self._consumer = trio.lowlevel.current_task()
            response = await trio.lowlevel.wait_task_rescheduled(self._abort)
        await trio.lowlevel.checkpoint_if_cancelled()
        if response is None:
            raise self._stored_error()
        return response

    def _abort(self, raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
        # Runs synchronously inside whoever cancels: after this line nobody can find the request in a queue or batch.
        self._consumer = None
        self._settle_cancelled(_reason(raise_cancel))
        return trio.lowlevel.Abort.SUCCEEDED

    def _settle_cancelled(self, reason: Reason) -> None:
        self.settle(Event.EXPIRE if reason is Reason.DEADLINE else Event.CANCEL, reason)

    def _stored_error(self) -> TritonError:
        if self._error is None:
            return self.ended_error()
        kind, args = self._error
        return kind(*args)

    def ended_error(self) -> TritonError:
        """The error for a caller who is still there after the request was cancelled; its message is never empty."""
        reason = self.reason or Reason.CALLER
        if reason is Reason.DEADLINE:
            return DeadlineExceeded(f"{self.label}Deadline Exceeded while {self.stage.value}")
        if reason in (Reason.MODEL_UNLOADING, Reason.SERVER_DRAIN):
            what = "the model is being unloaded" if reason is Reason.MODEL_UNLOADING else "the server is shutting down"
            return Unavailable(f"{self.label}request cancelled while {self.stage.value}: {what}")
        if reason is Reason.SEQUENCE_CANCELLED:
            what = f"sequence {self.sequence_id} of model '{self.model_name}' was cancelled"
            if self.why:
                what += f": {self.why}"
            return RequestCancelled(f"{self.label}request cancelled while {self.stage.value}: {what}", reason.value)
        return RequestCancelled(f"{self.label}request cancelled while {self.stage.value}: {reason.value}", reason.value)


class NullRequest(InferenceRequest):
    """A row of a batch that no request fills (Triton's direct strategy): a sequence's slot with nothing to execute.

    It is settled from the start, so nothing can be sent to it and nothing can cancel it.
    """

    __slots__ = ()

    def __init__(self, inputs: Mapping[str, Array], signature: object = None) -> None:
        super().__init__(inputs)
        self.signature = signature
        self.stage = Stage.EXECUTING
        self.outcome = Outcome.OK


def _reason(raise_cancel: Callable[[], NoReturn]) -> Reason:
    # A name for the exception that outlives its handler would be a cycle through the traceback's frames, and keep the
    # request's tensors alive until the garbage is collected.
    try:
        raise_cancel()
    except trio.Cancelled as exc:  # noqa: ASYNC103 - Trio raises it again where it belongs, in the waiting task
        return Reason.of(exc)  # noqa: ASYNC104
    except KeyboardInterrupt:
        return Reason.CALLER


def _find_cancelled(group: BaseExceptionGroup[BaseException]) -> trio.Cancelled | None:
    for exc in group.exceptions:
        if isinstance(exc, trio.Cancelled):
            return exc
        if isinstance(exc, BaseExceptionGroup) and (found := _find_cancelled(exc)) is not None:
            return found
    return None
