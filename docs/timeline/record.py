"""Watches a run: after every step of every task it looks at requests and scopes, and notes what has changed.

It is a Trio instrument, so nothing in the server knows of it; and on the simulated clock, so that each run is the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
import trio.testing

import triton_trio
from triton_trio.lifecycle import Outcome, Stage


@dataclass(frozen=True)
class RequestState:
    """What can be seen of a request from outside."""

    stage: Stage
    outcome: Outcome | None = None
    reason: str = ""


@dataclass(frozen=True)
class ScopeState:
    """What can be seen of a scope that has members; they are named like their lanes."""

    generation: int
    members: frozenset[str]
    cancelled: bool


State = RequestState | ScopeState


@dataclass
class Lane:
    """One line of the picture: the states of one thing, each with the time from which it holds; None: it is not there."""

    name: str
    look: Callable[[], State | None]
    spreads: bool = False  # a scope: a member's cancel goes to all others
    nests: bool = False  # a scope: its members are inside of it
    states: list[tuple[float, State | None]] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)

    def sample(self, now: float) -> None:
        # One state for each moment: which of several tasks goes on first is chance.
        if self.states and self.states[-1][0] == now:
            self.states.pop()
        state = self.look()
        if state != (self.states[-1][1] if self.states else None):
            self.states.append((now, state))


class Recording(trio.abc.Instrument):
    """The lanes of a run, in the order in which they are to be drawn."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.ended = 0.0
        self._began = trio.current_time()

    def request(self, request: triton_trio.InferenceRequest) -> triton_trio.InferenceRequest:
        """A lane for ``request``, with its id for a name."""

        self.lanes.append(Lane(request.request_id, lambda: _state(request)))
        return request

    def step(self, name: str, find: Callable[[], triton_trio.InferenceRequest | None]) -> None:
        """A lane for a request that somebody else makes; ``find`` is asked until it returns it."""
        found: list[triton_trio.InferenceRequest] = []

        def look() -> RequestState | None:
            if not found and (request := find()) is not None:
                found.append(request)
            return _state(found[0]) if found else None

        self.lanes.append(Lane(name, look))

    def scope(
        self, name: str, look: Callable[[], ScopeState | None], *, spreads: bool = False, nests: bool = False
    ) -> Lane:
        """A lane for scopes that follow each other; ``look`` returns None while there is none."""
        self.lanes.append(Lane(name, look, spreads, nests))
        return self.lanes[-1]

    @property
    def now(self) -> float:
        return trio.current_time() - self._began

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        for lane in self.lanes:
            lane.sample(self.now)


def _state(request: triton_trio.InferenceRequest) -> RequestState | None:
    if not request.model_name:  # no model has it yet
        return None
    return RequestState(request.stage, request.outcome, request.reason.value if request.reason else "")


def record(run: Callable[[Recording], Awaitable[None]]) -> Recording:
    """Run ``await run(recording)`` on the simulated clock."""

    async def main() -> Recording:
        recording = Recording()
        trio.lowlevel.add_instrument(recording)
        await run(recording)
        trio.lowlevel.remove_instrument(recording)
        recording.ended = recording.now
        return recording

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
