"""A batch: the requests of one execution, and everything a backend may do to them.

A :class:`Batch` is formed synchronously, when an instance is in hand, from requests that are alive at that moment.  It
is the *place* of its requests: a cancelled request leaves through :meth:`Batch.leave` and nothing is raised in the
execution.  The backend sees who has left at its own checkpoints (:attr:`Member.live`), stops spending device time on
their rows, and says so with :meth:`Member.release`; survivors get bit for bit what they would have got.

Where the backend has room, queued requests join it later (:meth:`Batch.join`), and are members like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import trio

from .errors import InternalError, TritonError
from .lifecycle import Event
from .member import Cohort as Cohort
from .member import Member as Member
from .request import InferenceRequest, InferenceResponse, NullRequest, ParameterValue
from .scopes import BatchScope, Reason

if TYPE_CHECKING:
    from .request import Array
    from .scheduling import Joining

#: Hands an action on a request over to whoever decides when responses go out (``preserve_ordering``).
Hand = Callable[[InferenceRequest, Callable[[], None]], None]

Reshape = Callable[["Mapping[str, Array]"], "Mapping[str, Array]"]

#: Keeps the state tensors of an answer for the sequence's next request, and returns the others.
TakeStates = Callable[[InferenceRequest, "Mapping[str, Array]"], "Mapping[str, Array]"]


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
      on_abandoned: told when nobody waits for the execution any more: the last member has left, and it has been cancelled, or
        goes on for its sequence's state; or they were all served, and a program is still out.
      on_ended: told when nothing is left to do or to count for a cohort, of its members.
      joining: whom :meth:`join` asks; None: nobody joins.
    """

    __slots__ = (
        "_by_request",
        "_first",
        "_hand",
        "_joining",
        "_keep_cancelled",
        "_on_abandoned",
        "_on_ended",
        "_on_released",
        "_on_rescheduled",
        "_output_names",
        "_reshape",
        "_signature",
        "_take_states",
        "decoupled",
        "device_seconds",
        "members",
        "name",
        "owed_seconds",
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
        on_ended: Callable[[Cohort, Sequence[Member]], None] = lambda cohort, members: None,
        joining: Joining | None = None,
    ) -> None:
        self.name = name
        self.decoupled = decoupled
        self._on_abandoned = on_abandoned
        self._on_ended = on_ended
        self._on_released = on_released
        self._joining = joining
        self._signature = requests[0].signature
        self._output_names = output_names
        self._on_rescheduled = on_rescheduled
        self._reshape = reshape
        self._take_states = take_states
        self._keep_cancelled = keep_cancelled
        self._hand = hand
        self.device_seconds = 0.0
        self.owed_seconds = 0.0  #: see :meth:`watch_release`
        #: In the order in which they came; another tuple when somebody joins, or has been retired.
        self.members: tuple[Member, ...] = ()
        self._by_request: dict[InferenceRequest, Member] = {}
        self.scope: BatchScope[InferenceRequest] = BatchScope()
        self._first = self._add(requests)

    def __repr__(self) -> str:
        return f"<Batch {self.name} {len(self.scope)}/{len(self.members)} live, {self.rows} rows>"

    @property
    def rows(self) -> int:
        """Of all members, whether they are still there or not."""
        return sum(member.stop - member.start for member in self.members)

    @property
    def compute_infer_at(self) -> float:
        """When the inputs of those that the batch was formed of were on the device; set by the backend."""
        return self._first.compute_infer_at

    @compute_infer_at.setter
    def compute_infer_at(self, at: float) -> None:
        self._first.compute_infer_at = at

    @property
    def compute_output_at(self) -> float:
        """When their results started to come back; set by the backend."""
        return self._first.compute_output_at

    @compute_output_at.setter
    def compute_output_at(self, at: float) -> None:
        self._first.compute_output_at = at

    def live(self) -> Iterator[Member]:
        """Members who still want their result, in row order."""
        return (member for member in self.members if member.live)

    def stack(self, name: str) -> Array:
        """The input ``name`` of those that the batch was formed of, concatenated along the batch dimension."""
        return self.stack_of(self._first, name)

    def stack_of(self, cohort: Cohort, name: str) -> Array:
        """The same of another cohort; shape ``[cohort.rows, ...]``."""
        arrays = [member.inputs[name] for member in self.members if member.cohort is cohort]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    # Who comes and goes

    def join(self, rows: int, *, all_or_none: bool = False) -> tuple[Member, ...]:
        """Let queued requests have ``rows`` rows that nobody needs any more; sync.

        From this moment they are members like the others.  Nobody joins an execution that was cancelled, or that nobody
        waits for any more; else the scheduler decides (see :class:`~triton_trio.scheduling.Joining`).

        Args:
          all_or_none: a new batch could have more rows than this one, so only if everybody who waits fits.

        Returns:
          The new members; mostly none.
        """
        if self._joining is None or not len(self.scope):
            return ()
        requests = self._joining.take_nowait(self._signature, rows, all_or_none=all_or_none)
        if not requests:
            return ()
        cohort = self._add(requests)
        cohort.compute_infer_at = cohort.began_at
        return self.members[-len(requests) :]

    def retire(self, member: Member) -> Sequence[Member]:
        """All of ``member`` has been counted and released.  Idempotent; the instance calls it at the latest.

        Returns:
          The members of its cohort, if it was the last of them: the batch has forgotten them.
        """
        if member.retired:
            return ()
        member.retired = True
        cohort = member.cohort
        cohort.unretired -= 1
        if cohort.unretired:
            return ()
        ended = [member for member in self.members if member.cohort is cohort]
        if len(ended) == len(self.members):
            self.members = ()
            self._by_request.clear()
        else:
            self.members = tuple([member for member in self.members if member.cohort is not cohort])
            for member in ended:
                self._by_request.pop(member.request, None)
        self._on_ended(cohort, ended)
        return ended

    def _add(self, requests: Sequence[InferenceRequest]) -> Cohort:
        now = trio.current_time()
        cohort = Cohort(now)
        members = []
        for request in requests:
            member = Member(request, cohort, cohort.rows, self._on_released)
            members.append(member)
            cohort.rows = member.stop
            cohort.unretired += 1
            if isinstance(request, NullRequest):
                member.served = True
                continue
            self._by_request[request] = member
            request.place = self
            request.bound_at = now
            member.queue_seconds = now - request.enqueued_at
            request.advance(Event.BIND)
            self.scope.join(request)
        self.members += tuple(members)
        return cohort

    # A member's cancel comes in here, from the abort function of its own task

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        member = self._by_request.get(request)
        if member is None or not member.live:
            return
        # Set first: a device thread that looks in between must not see a row that is kept as one that has left.
        member.kept = self._keep_cancelled
        member.left_at = trio.current_time()
        if member.kept:
            if all(other.served or other.left_at is not None for other in self.members):
                self._on_abandoned(self)
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

    def watch_release(self, seconds: float = 0.0) -> None:
        """Nobody waits any more, and the device has yet to let go: its time is limited from now on, as after a cancel.

        Args:
          seconds: what is out will take, as far as the backend knows; the limit begins behind that.
        """
        self.owed_seconds = seconds
        self._on_abandoned(self)

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
        member.failed = True
        self._serve(member)
        request = member.request
        if self._hand is None:
            request.fail_nowait(error)
        else:
            kind, args = type(error), error.args
            self._hand(request, lambda: request.fail_nowait(kind(*args)))

    async def wait_can_send(self, *, or_arrival: bool = False) -> None:
        """Wait until at least one live member's reader has caught up.

        Args:
          or_arrival: or until :meth:`join` is worth another try.

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

            async def wait_arrival(joining: Joining) -> None:
                await joining.wait_arrival()
                nursery.cancel_scope.cancel(reason="the queue has changed")

            for member in live:
                # Owner: this nursery; the first reader to catch up cancels the others.
                nursery.start_soon(wait, member, name=f"reader of request #{member.request.generation}")
            if or_arrival and self._joining is not None:
                # Owner: this nursery; a reader that catches up cancels it.
                nursery.start_soon(wait_arrival, self._joining, name="arrival of somebody who may join")

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
