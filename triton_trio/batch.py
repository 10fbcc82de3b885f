"""A batch: the requests of one execution, and everything a backend may do to them.

A :class:`Batch` is formed synchronously, when an instance is in hand, from requests that are alive at that moment.  It
is the *place* of its requests: a cancelled request leaves through :meth:`Batch.leave` and nothing is raised in the
execution.  The backend sees who has left at its own checkpoints (:attr:`Member.live`), stops spending device time on
their rows, and says so with :meth:`Member.release`; survivors get bit for bit what they would have got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import trio

from .errors import InternalError, TritonError
from .lifecycle import Event
from .request import InferenceRequest, InferenceResponse, NullRequest, ParameterValue
from .scopes import BatchScope, Reason

if TYPE_CHECKING:
    from .request import Array

#: Hands an action on a request over to whoever decides when responses go out (``preserve_ordering``).
Hand = Callable[[InferenceRequest, Callable[[], None]], None]

Reshape = Callable[["Mapping[str, Array]"], "Mapping[str, Array]"]

#: Keeps the state tensors of an answer for the sequence's next request, and returns the others.
TakeStates = Callable[[InferenceRequest, "Mapping[str, Array]"], "Mapping[str, Array]"]


class Member:
    """One request's part in a batch: its inputs, its rows ``[start, stop)``, and whether anybody still wants them."""

    __slots__ = (
        "_on_released",
        "kept",
        "left_at",
        "queue_seconds",
        "released",
        "request",
        "saved_seconds",
        "scope",
        "seconds_after_cancel",
        "served",
        "start",
        "steps_after_cancel",
        "stop",
        "useful_seconds",
        "wasted_seconds",
    )

    def __init__(self, request: InferenceRequest, start: int, on_released: Callable[[Member], None]) -> None:
        # Not the batch, which has the members: a cycle would keep all their tensors until the garbage is collected.
        self._on_released = on_released
        self.request = request
        self.start = start
        self.stop = start + request.batch_size
        self.served = False
        #: How long it has waited for this execution.  Kept, for the request may be queued again before the execution ends.
        self.queue_seconds = 0.0
        self.left_at: float | None = None
        #: Cancelled, and its row goes on all the same: for its sequence's state, where the configuration says so.
        self.kept = False
        self.released = False
        #: From the cancel until the device had let go.
        self.seconds_after_cancel = 0.0
        #: A backend that runs each member in a scope of its own puts it here: cancelled when the member leaves.
        self.scope: trio.CancelScope | None = None
        #: Device steps dispatched or finished for this member after it was cancelled; the backend counts them.
        self.steps_after_cancel = 0
        # Device time; see Batch.charge().
        self.useful_seconds = 0.0
        self.wasted_seconds = 0.0  #: of programs that had not ended when the member left
        self.saved_seconds = 0.0  #: the backend's estimate of what it would have gone on to take

    def __repr__(self) -> str:
        state = "served" if self.served else "live" if self.live else "left"
        return f"<Member rows {self.start}:{self.stop} of {self.request!r} {state}>"

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays by tensor name; with a batching model the first dimension has ``stop - start`` rows."""
        return self.request.inputs

    @property
    def ready(self) -> bool:
        """False for a row that no request fills (Triton's READY control)."""
        return not isinstance(self.request, NullRequest)

    @property
    def live(self) -> bool:
        """True while the request waits for (more of) its result."""
        return not self.served and (self.left_at is None or self.kept)

    @property
    def can_send(self) -> bool:
        """False while the reader is behind: leave this row out of the next step instead of buffering for it."""
        return self.request.can_send

    def release(self) -> None:
        """The device holds nothing for this member any more.  Idempotent; the instance calls it at the latest."""
        if not self.released:
            self.released = True
            if self.left_at is not None:
                self.seconds_after_cancel = trio.current_time() - self.left_at
            self._on_released(self)


class Batch:
    """The members of one execution.

    Args:
      requests: alive, in queue order; all of one shape signature.
      name: the instance's name, for messages.
      decoupled: whether a member may have any number of responses.
      output_names: the model's outputs, to say what is missing.
      reshape: from the shapes of the model's outputs to those of the response; None if they are the same.
      take_states: see :data:`TakeStates`; None for a model without implicit state.
      keep_cancelled: a member that is cancelled gets no answer, but its row is computed to the end.
      on_rescheduled: told of a member that the model wants to see again.
      hand: gets every response and failure to pass on, in preserve_ordering's order; None passes them on at once.
      on_released: told when a member's device resources are free.
      on_abandoned: told when the last member has left and the execution has been cancelled.
    """

    __slots__ = (
        "_by_request",
        "_hand",
        "_keep_cancelled",
        "_on_abandoned",
        "_on_rescheduled",
        "_output_names",
        "_reshape",
        "_take_states",
        "compute_infer_at",
        "compute_output_at",
        "decoupled",
        "device_seconds",
        "formed_at",
        "members",
        "name",
        "rows",
        "scope",
    )

    def __init__(
        self,
        requests: Sequence[InferenceRequest],
        *,
        name: str = "",
        decoupled: bool = False,
        output_names: Sequence[str] = (),
        reshape: Reshape | None = None,
        take_states: TakeStates | None = None,
        keep_cancelled: bool = False,
        hand: Hand | None = None,
        on_released: Callable[[Member], None] = lambda member: None,
        on_rescheduled: Callable[[Member], None] | None = None,
        on_abandoned: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.name = name
        self.decoupled = decoupled
        self._on_abandoned = on_abandoned
        self._output_names = output_names
        self._on_rescheduled = on_rescheduled
        self._reshape = reshape
        self._take_states = take_states
        self._keep_cancelled = keep_cancelled
        self._hand = hand
        self.formed_at = trio.current_time()
        #: Set by the backend when inputs are on the device / results start to come back; for the statistics.
        self.compute_infer_at = 0.0
        self.compute_output_at = 0.0
        self.device_seconds = 0.0
        members = []
        rows = 0
        for request in requests:
            member = Member(request, rows, on_released)
            rows = member.stop
            members.append(member)
            if isinstance(request, NullRequest):
                member.served = True
                continue
            request.place = self
            request.bound_at = self.formed_at
            member.queue_seconds = self.formed_at - request.enqueued_at
            request.advance(Event.BIND)
        self.members = tuple(members)
        self.rows = rows
        self._by_request = dict(zip(requests, members, strict=True))
        self.scope: BatchScope[InferenceRequest] = BatchScope(member.request for member in members if not member.served)

    def __repr__(self) -> str:
        return f"<Batch {self.name} {len(self.scope)}/{len(self.members)} live, {self.rows} rows>"

    def live(self) -> Iterator[Member]:
        """Members who still want their result, in row order."""
        return (member for member in self.members if member.live)

    def stack(self, name: str) -> Array:
        """The input ``name`` of all members, concatenated along the batch dimension (shape ``[rows, ...]``)."""
        if len(self.members) == 1:
            return self.members[0].inputs[name]
        return np.concatenate([member.inputs[name] for member in self.members])

    # A member's cancel comes in here, from the abort function of its own task

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        member = self._by_request.get(request)
        if member is None or not member.live:
            return
        # Set first: a device thread that looks in between must not see a row that is kept as one that has left.
        member.kept = self._keep_cancelled
        member.left_at = trio.current_time()
        if member.kept:
            return
        if member.scope is not None:
            member.scope.cancel(reason=reason.value)
        if self.scope.leave(request, reason):
            self._on_abandoned(self)

    # The backend's side

    async def checkpoint(self) -> None:
        """The explicit place to let go: other tasks run, and cancels that have arrived are visible afterwards.

        **Cancellation:** raises ``Cancelled`` if every member has left (or the model is being unloaded); otherwise
        members that left meanwhile are no longer :attr:`Member.live`.
        """
        await trio.lowlevel.checkpoint()

    def charge(self, member: Member, seconds: float, *, wasted: bool | None = None) -> None:
        """``member`` has had ``seconds`` of device time; ``wasted`` if it had left by then, which by default is by now."""
        self.device_seconds += seconds
        if (member.left_at is not None and not member.kept) if wasted is None else wasted:
            member.wasted_seconds += seconds
        else:
            member.useful_seconds += seconds

    def respond(
        self,
        member: Member,
        outputs: Mapping[str, Array],
        *,
        final: bool = True,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> None:
        """Send ``outputs`` to ``member``; by default its last response.  Silent for a member who has left.

        Non-decoupled models call it once a member.  A decoupled model asks :attr:`Member.can_send` first, or uses
        :meth:`send`.
        """
        if not member.live:
            return
        request = member.request
        if not (final or self.decoupled):
            # Its only response would pass for the whole result.
            name = request.model_name
            self.fail(
                member, InternalError(f"{request.label}model '{name}' is not decoupled: its response must be final")
            )
            return
        if self._take_states is not None:
            try:
                outputs = self._take_states(request, outputs)
            except TritonError as exc:
                self.fail(member, exc)
                return
        if wanted := request.requested_outputs:
            try:
                outputs = {name: outputs[name] for name in wanted}
            except KeyError as exc:
                self.fail(
                    member,
                    InternalError(
                        f"{request.label}model '{request.model_name}' did not produce requested output {exc}"
                    ),
                )
                return
        elif not self.decoupled and len(outputs) < len(self._output_names):
            missing = ", ".join(f"'{name}'" for name in self._output_names if name not in outputs)
            self.fail(
                member,
                InternalError(f"{request.label}model '{request.model_name}' did not produce output {missing}"),
            )
            return
        self._deliver(member, outputs if self._reshape is None else self._reshape(outputs), final, parameters)

    async def send(self, member: Member, outputs: Mapping[str, Array], *, final: bool = False) -> None:
        """Send one response of a decoupled model, waiting while the reader is behind.

        **Cancellation:** a checkpoint of the execution; if the reader is cancelled while we wait, the response is
        dropped and nothing is raised here unless it was the last member.
        """
        if member.live and not member.request.can_send:
            await member.request.wait_can_send()
        else:
            await trio.lowlevel.checkpoint()
        self.respond(member, outputs, final=final)

    def finish(self, member: Member) -> None:
        """End a decoupled member's responses with an empty final one."""
        if member.live:
            self._deliver(member, {}, True, None)

    def reschedule(self, member: Member, states: Mapping[str, Array] | None = None) -> None:
        """Let ``member`` go unfinished: its sequence is to be executed again, without START (``iterative_sequence``).

        Other requests may come in between.  ``states`` are state outputs for that next time, all of them; without any,
        the states stay as they are.  Silent for a member who has left.
        """
        if not member.live:
            return
        if self._on_rescheduled is None:
            self.fail(
                member,
                InternalError(
                    "Request is released with TRITONSERVER_REQUEST_RELEASE_RESCHEDULE, while the model is not "
                    "configured to handle such a flag."
                ),
            )
            return
        if states and self._take_states is not None:
            try:
                self._take_states(member.request, states)
            except TritonError as exc:
                self.fail(member, exc)
                return
        self._serve(member)
        self._on_rescheduled(member)

    def fail(self, member: Member, error: TritonError) -> None:
        """End one member with an error; its neighbours do not notice."""
        if not member.live:
            return
        self._serve(member)
        request = member.request
        if self._hand is None:
            request.fail_nowait(error)
        else:
            kind, args = type(error), error.args
            self._hand(request, lambda: request.fail_nowait(kind(*args)))

    async def wait_can_send(self) -> None:
        """Wait until at least one live member's reader has caught up.

        **Cancellation:** a checkpoint of the execution; nothing is left behind.
        """
        live = tuple(self.live())
        if any(member.can_send for member in live) or not live:
            await trio.lowlevel.checkpoint()
            return
        async with trio.open_nursery() as nursery:

            async def wait(member: Member) -> None:
                await member.request.wait_can_send()
                nursery.cancel_scope.cancel(reason="a reader caught up")

            for member in live:
                # Owner: this nursery; the first reader to catch up cancels the others.
                nursery.start_soon(wait, member, name=f"reader of request #{member.request.generation}")

    # Inside

    def _deliver(
        self,
        member: Member,
        outputs: Mapping[str, Array],
        final: bool,
        parameters: Mapping[str, ParameterValue] | None,
    ) -> None:
        request = member.request
        response = InferenceResponse(
            outputs,
            model_name=request.model_name,
            model_version=request.model_version,
            request_id=request.request_id,
            parameters=parameters,
            final=final,
        )
        if final:
            self._serve(member)
        if self._hand is None:
            request.deliver_nowait(response)
        else:
            self._hand(request, lambda: request.deliver_nowait(response))

    def _serve(self, member: Member) -> None:
        # Served members leave without being counted as leavers: finishing is not a reason to cancel the rest.
        member.served = True
        self.scope.discard(member.request)
        member.request.place = None
