"""What the scenes stand on: the server, the cancel log as events, the tree as a picture, and claims that are checked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trio
import tritonclient.grpc as tritonclient

from ..backends.jax import PlacedStatistics
from ..model import Model
from ..observe import tree
from ..server import InferenceServer
from .clients import Call, Inputs
from .pictures import damage, damaged, landscape

_MOVING = ("model", "queue:", "instance", "batch", "frontends", "grpc", "connection", "rpc", "request", "wait for")


class ClaimFailed(Exception):
    """The demo said something that was not so."""


@dataclass(frozen=True)
class Released:
    """A line of the cancel log, and when it was written: the moment at which the request held nothing any more."""

    ns: int  #: CLOCK_MONOTONIC
    line: str
    reason: str
    stage: str
    steps_after_cancel: int


class CancelLog(logging.Handler):
    """The server's own log of cancelled requests, by request id."""

    def __init__(self) -> None:
        super().__init__()
        self._released: dict[str, Released] = {}
        self._waiters: dict[str, trio.Event] = {}

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = vars(record)
        request_id = fields["request_id"]
        self._released[request_id] = Released(
            ns=time.monotonic_ns(),
            line=record.getMessage(),
            reason=fields["reason"],
            stage=fields["stage"],
            steps_after_cancel=fields["device_steps_after_cancel"],
        )
        self._waiters.setdefault(request_id, trio.Event()).set()

    async def released(self, request_id: str) -> Released:
        """Wait until the request has let go of everything."""
        with trio.fail_after(20):
            await self._waiters.setdefault(request_id, trio.Event()).wait()
        return self._released[request_id]


class Stage:
    """Everything a scene needs."""

    def __init__(self, server: InferenceServer, address: str, log: CancelLog, folder: Path) -> None:
        self.server = server
        self.address = address
        self.log = log
        self.folder = folder
        self.client = tritonclient.InferenceServerClient(address)
        self.inpaint: Model = server.model("inpaint")
        self.picture = landscape()
        self.summary: list[tuple[str, str, str, str]] = []
        self._claims = 0

    # Saying and claiming

    def headline(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}")

    def say(self, text: str = "") -> None:
        print("\n".join(f"  {line}" for line in text.splitlines()) if text else "", flush=True)

    def claim(self, text: str, holds: bool) -> None:
        """Print ``text`` if it is so; end the demo if it is not."""
        if not holds:
            raise ClaimFailed(text)
        self._claims += 1
        self.say(f"✓ {text}")

    @property
    def claims(self) -> int:
        return self._claims

    async def show_tree(self, when: str, *, model: str = "inpaint") -> None:
        """The part of the live tree that moves: the model's queue and batch, the connections and their requests."""
        for _ in range(3):  # what has been woken by a cancel runs to its end first
            await trio.lowlevel.checkpoint()
        shown: list[str] = []
        elsewhere = False
        for line in tree().splitlines():
            name = line.lstrip(" │├└─")
            if name.startswith("model "):
                elsewhere = not name.startswith(f"model {model}:")
            elif name.startswith("frontends"):
                elsewhere = False
            if not elsewhere and name.startswith(_MOVING):
                shown.append(line)
        margin = min(len(line) - len(line.lstrip(" ")) for line in shown)
        self.say(f"{when}:")
        for line in shown:
            self.say(f"    {line[margin:]}")

    # Requests

    def inputs(self, sweeps: int, *, seed: int = 3) -> Inputs:
        """One damaged picture, as the inpainting models want it."""
        mask = damage(seed)
        return {
            "IMAGE": damaged(self.picture, mask)[None],
            "MASK": mask[None],
            "SWEEPS": np.array([[sweeps]], np.int32),
        }

    def call(self, request_id: str, sweeps: int, *, seed: int = 3, timeout: float | None = None) -> Call:
        """Ask for a picture over the socket, without waiting for it."""
        return Call(self.client, "inpaint", self.inputs(sweeps, seed=seed), request_id=request_id, timeout=timeout)

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait until the server is in a state; the demo looks from outside, so it looks again and again."""
        with trio.move_on_after(30) as patience:
            while not holds():  # noqa: ASYNC110 - from outside there is nothing to wait for
                await trio.sleep(0.002)
        if patience.cancelled_caught:
            raise ClaimFailed(f"within 30 s: {what}")

    async def executing(self, request_id: str, model: Model | None = None) -> None:
        """Wait until a request is in a batch and its first steps have been made."""
        instances = (model or self.inpaint).instances

        def holds() -> bool:
            return any(
                member.request.request_id == request_id
                for instance in instances
                if instance.batch
                for member in instance.batch.members
            )

        await self.until(f"request {request_id} executes", holds)
        await trio.sleep(0.1)

    async def queued(self, count: int) -> None:
        await self.until(f"{count} requests wait", lambda: len(self.inpaint.scheduler.queue) == count)

    async def quiet(self) -> None:
        """Wait until nothing is in flight: what the server held for anybody is free again."""
        await self.until("nothing is in flight", lambda: self.server.statistics().in_flight == 0)
        await self.until(
            "every instance is idle",
            lambda: all(i.batch is None for model in self.server.repository.loaded() for i in model.instances),
        )

    def report(self, scene: str, cancelled_ns: int, released: Released) -> None:
        """What a cancel cost, for the scene and for the summary."""
        took = (released.ns - cancelled_ns) / 1e6
        self.say(f"server log: {released.line}")
        self.say(
            f"from the client's cancel to release: {took:.1f} ms; device steps after it: {released.steps_after_cancel}"
        )
        self.summary.append((scene, released.reason, f"{took:.1f}", str(released.steps_after_cancel)))

    def two_chunks(self, model: Model | None = None) -> int:
        """Steps that may still run when a cancel arrives: the running chunk and the one queued behind it.

        The controller may be about to change the size of a chunk, so a size up is allowed for: twice the larger.
        """
        [instance] = (model or self.inpaint).statistics().instances
        placed = instance.backend
        assert isinstance(placed, PlacedStatistics)
        batch = (model or self.inpaint).instances[0].batch
        rows = batch.rows if batch else 1
        used = min((found for found in placed.buckets if found.bucket >= rows), key=lambda found: found.bucket)
        return 2 * 2 * used.k
