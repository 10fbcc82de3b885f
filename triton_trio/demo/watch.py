"""What the demo sees of the server, as events: its cancel log, and every chunk that goes over the device."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from ..backends.jax.device import Executor, Turn
from ..backends.jax.steps import StepTurn


class ClaimFailed(Exception):
    """The demo said something that was not so."""


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """The demo must end, so whatever it waits for is a claim, too."""
    with trio.move_on_after(seconds) as patience:
        yield
    if patience.cancelled_caught:
        raise ClaimFailed(f"within {seconds:g} s, {what}")


@dataclass(frozen=True)
class Released:
    """A line of the cancel log, written when the request holds nothing any more."""

    ns: int  #: CLOCK_MONOTONIC, as for the clients
    line: str
    reason: str
    stage: str


@dataclass(frozen=True)
class Program:
    """A chunk of steps that went over the device.

    ``left`` has, for each request in it that had been cancelled before it ended, when the server saw the cancel.
    """

    steps: int
    dispatched: float  #: seconds, by the clock of ``left``
    left: Mapping[str, float]


class _Events:
    """Events by key, made by whoever comes first: the one who waits or the one who tells."""

    def __init__(self) -> None:
        self._events: defaultdict[Hashable, trio.Event] = defaultdict(trio.Event)

    def set(self, key: Hashable) -> None:
        self._events[key].set()

    async def wait(self, key: Hashable) -> None:
        await self._events[key].wait()


class CancelLog(logging.Handler):
    """The server's own log of cancelled requests, by model and request id: a step of an ensemble has its parent's id."""

    def __init__(self) -> None:
        super().__init__()
        self._released: dict[tuple[str, str], Released] = {}
        self._events = _Events()

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic_ns()
        fields: dict[str, Any] = vars(record)
        key = fields["model"], fields["request_id"]
        self._released[key] = Released(
            ns=now,
            line=record.getMessage(),
            reason=fields["reason"],
            stage=fields["stage"],
        )
        self._events.set(key)

    def __getitem__(self, key: tuple[str, str]) -> Released:
        return self._released[key]

    async def released(self, request_id: str, *, model: str = "inpaint") -> None:
        """Wait until the request has let go of everything."""
        with within(30, f"{model} has let go of request '{request_id}'"):
            await self._events.wait((model, request_id))


class DeviceLog(Executor):
    """Stands between the device thread and the device, and notes each chunk of a step model that goes through."""

    def __init__(self) -> None:
        self._programs: list[Program] = []
        self._dispatched: dict[Turn, float] = {}
        self._announced: set[str] = set()
        self._events = _Events()
        self._token = trio.lowlevel.current_trio_token()
        # To read Trio's clock in another thread: it is this one, and begins somewhere else.
        self._offset = trio.current_time() - time.perf_counter()

    # In the device thread

    def dispatch(self, turn: Turn) -> bool:
        began = time.perf_counter() + self._offset
        if not super().dispatch(turn):
            return False
        self._dispatched[turn] = began
        return True

    def wait(self, turn: Turn) -> None:
        began = self._dispatched.pop(turn)
        super().wait(turn)
        if isinstance(turn, StepTurn) and turn.steps:
            members = [slot.member for slot in turn.slots]
            left = {member.request.request_id: member.left_at for member in members if member.left_at is not None}
            self._programs.append(Program(turn.steps, began, left))
            for name in {member.request.request_id for member in members} - self._announced:
                self._announced.add(name)
                with suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._events.set, name)

    # In Trio's

    async def worked_for(self, request_id: str) -> None:
        """Wait until the device has made the request's first steps."""
        with within(30, f"the device works for request '{request_id}'"):
            await self._events.wait(request_id)

    def heard_of(self, request_id: str) -> bool:
        """Whether a step was ever made for the request."""
        return request_id in self._announced

    def after_cancel(self, request_id: str) -> list[Program]:
        """The programs with the request's rows that ended after its cancel."""
        return [program for program in self._programs if request_id in program.left]
