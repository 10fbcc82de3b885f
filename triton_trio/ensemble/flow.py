"""One request of an ensemble: a nursery of steps inside the request's own scope.

A step is a request of its own, a child, to the step's model; its scope nests in its parent's.  So whoever cancels the
parent cancels every step in flight, in whatever queue, batch or sequence of another model it is, and in steps of steps.

Tensors are pushed: one that is made goes into the inputs of every step that wants it, and the step whose last input that
was goes on, in the task that made it, or in a new one where the flow forks.

A decoupled step makes a *branch* of each of its responses.  Branches run side by side, at most :data:`BRANCHES` of one
step, and what they come to leaves in the order of those responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from ..errors import TritonError
from ..lifecycle import Event, Outcome
from ..request import InferenceRequest, InferenceResponse
from ..scopes import Reason

if TYPE_CHECKING:
    from ..request import Array
    from .graph import Plan, Step
    from .model import EnsembleModel

    #: A tensor that was left out (an optional input) is None.
    Tensors = dict[str, Array | None]

#: Responses of one decoupled step that are on their way through the steps behind it; then the step is held back.
BRANCHES = 8

_EVENTS = {Outcome.REJECTED: Event.REJECT, Outcome.CANCELLED: Event.CANCEL, Outcome.DEADLINE: Event.EXPIRE}


class Branch:
    """What follows from the request, or from one response of a decoupled step: the inputs and outputs known so far.

    Args:
      last: no other response of the ensemble comes after what this one leads to.
      turn: set when all branches that come first are done; None: there are none.
      slots: of the step that made it, one of which is ours.
    """

    __slots__ = ("_slots", "done", "inputs", "last", "outputs", "turn")

    def __init__(
        self, *, last: bool = True, turn: trio.Event | None = None, slots: trio.Semaphore | None = None
    ) -> None:
        self.inputs: dict[Step, Tensors] = {}
        self.outputs: Tensors = {}
        self.last = last
        self.turn = turn
        self.done = trio.Event()
        self._slots = slots

    async def wait_turn(self) -> None:
        if self.turn is not None and not self.turn.is_set():
            await self.turn.wait()

    def end(self) -> None:
        self.done.set()
        if self._slots is not None:
            self._slots.release()


class Flow:
    """The *place* of an ensemble's request while its steps are under way."""

    __slots__ = ("_ensemble", "_nursery", "_plan", "compute_seconds", "request")

    def __init__(self, ensemble: EnsembleModel, request: InferenceRequest, plan: Plan) -> None:
        self.request = request
        self.compute_seconds = 0.0  #: of steps that have succeeded
        self._ensemble = ensemble
        self._plan = plan
        self._nursery: trio.Nursery | None = None

    def leave(self, request: InferenceRequest, reason: Reason) -> None:
        """The request is settled.  Unless it is complete, its steps have nobody to work for."""
        if self._nursery is not None and request.outcome is not Outcome.OK:
            self._nursery.cancel_scope.cancel(reason=(request.reason or Reason.SIBLING_FAILED).value)

    async def run(self) -> None:
        """All steps, in a nursery of their own.

        **Cancellation:** every step in flight is cancelled.
        """
        async with trio.open_nursery() as nursery:
            self.start(nursery)

    def start(self, nursery: trio.Nursery) -> None:
        """Start the first steps.  Sync; ``nursery`` is cancelled if the request comes to a bad end."""
        self._nursery = nursery
        given = self.request.inputs
        made: Tensors = {**given, **{name: None for name in self._plan.optional if name not in given}}
        branch = Branch()
        for step, inputs in self._put(branch, made):
            self._spawn(branch, step, inputs)
        if self._complete(branch):
            self._deliver(branch.outputs, final=True)

    # Tensors

    def _put(self, branch: Branch, tensors: Mapping[str, Array | None]) -> list[tuple[Step, Tensors]]:
        """The steps that can start now that there are ``tensors``, and their inputs."""
        ready = []
        plan = self._plan
        for name, array in tensors.items():
            for edge in plan.edges.get(name, ()):
                step = edge.step
                inputs = branch.inputs.setdefault(step, {})
                inputs[edge.input] = array if edge.fit is None or array is None else edge.fit(array)
                if len(inputs) == step.inputs:
                    ready.append((step, branch.inputs.pop(step)))
            if name in plan.outputs:
                fit = plan.outputs[name]
                branch.outputs[name] = array if fit is None or array is None else fit(array)
        return ready

    def _complete(self, branch: Branch) -> bool:
        return len(branch.outputs) == len(self._plan.outputs)

    # Steps

    def _spawn(self, branch: Branch, step: Step, inputs: Tensors) -> None:
        assert self._nursery is not None
        # Owner: the request's nursery.  Ends with the last step of its strand, or is cancelled with the request.
        self._nursery.start_soon(self._strand, branch, step, inputs, name=step.task_name)

    async def _strand(self, branch: Branch, step: Step, inputs: Tensors) -> None:
        """Steps, one after the other; where the flow forks, the others get strands of their own."""
        while not step.decoupled:
            made = await self._infer(step, inputs)
            if made is None:
                return
            ready = self._put(branch, made)
            if self._complete(branch):
                await self._respond(branch)
                return
            if not ready:
                return
            for fork in ready[1:]:
                self._spawn(branch, *fork)
            step, inputs = ready[0]
            del made, ready  # the next steps have what they need
            trio.lowlevel.current_task().name = step.task_name
        await self._stream(branch, step, inputs)

    async def _infer(self, step: Step, inputs: Tensors) -> Tensors | None:
        """The tensors that ``step`` makes; None if it failed, and everything has been said."""
        child = self._child(step, inputs)
        try:
            async with self._ensemble.limit(step.index):
                await trio.lowlevel.checkpoint_if_cancelled()
                response = await self._ensemble.step_model(step.index).infer(child)
        except TritonError as exc:
            self._fail(child, exc)
            return None
        self.compute_seconds += child.ended_at - child.bound_at
        return _tensors(step, response)

    async def _stream(self, branch: Branch, step: Step, inputs: Tensors) -> None:
        """A decoupled step: each of its responses becomes a branch."""
        # Of two such steps in a row, one at a time: the one whose turn it is must never wait for the other.
        await branch.wait_turn()
        child = self._child(step, inputs)
        slots = trio.Semaphore(BRANCHES)
        previous: trio.Event | None = None
        response: InferenceResponse | None = None
        try:
            async with self._ensemble.limit(step.index):
                await trio.lowlevel.checkpoint_if_cancelled()
                async with self._ensemble.step_model(step.index).open_responses(child) as responses:
                    async for response in responses:
                        if response.final:
                            break
                        await slots.acquire()
                        previous = await self._fork(Branch(last=False, turn=previous, slots=slots), step, response)
        except TritonError as exc:
            self._fail(child, exc)
            return
        self.compute_seconds += child.ended_at - child.bound_at
        # The step's last response counts when its request is complete: no cancel of it can come after this.
        assert response is not None
        if response.outputs:
            previous = await self._fork(Branch(last=branch.last, turn=previous), step, response)
        if previous is not None:
            await previous.wait()
        if branch.last and not response.outputs:
            self._deliver({}, final=True)
        branch.end()

    async def _fork(self, branch: Branch, step: Step, response: InferenceResponse) -> trio.Event:
        ready = self._put(branch, _tensors(step, response))
        for fork in ready:
            self._spawn(branch, *fork)
        if self._complete(branch):
            await self._respond(branch)
        return branch.done

    def _child(self, step: Step, inputs: Tensors) -> InferenceRequest:
        parent = self.request
        child = InferenceRequest(
            {name: array for name, array in inputs.items() if array is not None},
            requested_outputs=step.wanted,
            request_id=parent.request_id,
            priority=parent.priority,
            timeout_us=parent.timeout_us,
            parameters=parent.parameters,
            sequence_id=parent.sequence_id,
            sequence_start=parent.sequence_start,
            sequence_end=parent.sequence_end,
        )
        child.parent = parent
        return child

    # The ensemble's answer

    async def _respond(self, branch: Branch) -> None:
        await branch.wait_turn()
        if not self.request.can_send:
            await self.request.wait_can_send()
        self._deliver(branch.outputs, final=branch.last)
        branch.end()

    def _deliver(self, outputs: Tensors, *, final: bool) -> None:
        request = self.request
        found = {name: array for name in self._plan.outputs if (array := outputs.get(name)) is not None}
        request.deliver_nowait(
            InferenceResponse(
                self._ensemble.reshape(found),
                model_name=request.model_name,
                model_version=request.model_version,
                request_id=request.request_id,
                final=final,
            )
        )

    def _fail(self, child: InferenceRequest, error: TritonError) -> None:
        """The first step that ends badly decides how the ensemble's request ends; :meth:`leave` cancels the others."""
        request = self.request
        if request.outcome is not None:
            return
        # A step without an outcome was never admitted: its model is gone.
        event = Event.REJECT if child.outcome is None else _EVENTS.get(child.outcome, Event.FAIL)
        request.failed_at = child.failed_at or child.stage
        message = f"in ensemble '{self._ensemble.name}', {error.message}"
        request.fail_nowait(type(error)(message, *error.args[1:]), event, child.reason)


def _tensors(step: Step, response: InferenceResponse) -> Tensors:
    outputs = response.outputs
    return {tensor: outputs.get(output) for output, tensor in step.makes}
