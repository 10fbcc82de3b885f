"""What the scenes stand on: the server, clients, the tree as a picture, and claims that are checked."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import trio
import tritonclient.grpc as tritonclient

from ..backends.jax.device import WINDOW
from ..observe import tree
from ..scheduled_model import ScheduledModel
from ..server import InferenceServer
from .clients import Call, Inputs
from .excerpt import excerpt
from .pictures import damage, damaged, landscape
from .watch import CancelLog, ClaimFailed, DeviceLog, within

COLUMNS = 108

#: Steps: more than a scene ever waits for, minutes of work.
ENDLESS = 1_000_000


def say(text: str, *, indent: int = 2) -> None:
    """Print lines, wrapped where they are long."""
    for line in text.splitlines():
        wrapped = textwrap.wrap(line, COLUMNS - indent, subsequent_indent="    ")
        print(textwrap.indent("\n".join(wrapped), " " * indent), flush=True)


class Stage:
    """Everything a scene needs."""

    def __init__(
        self, server: InferenceServer, address: str, cancels: CancelLog, device: DeviceLog, folder: Path
    ) -> None:
        self.server = server
        self.address = address
        self.cancels = cancels
        self.device = device
        self.folder = folder
        self.client = tritonclient.InferenceServerClient(address)
        self.inpaint = self.model("inpaint")
        self.picture = landscape()
        self.claims = 0
        self._summary: list[tuple[str, ...]] = []

    # Saying and claiming

    def headline(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}", flush=True)

    def claim(self, text: str, holds: object) -> None:
        """Print ``text`` if it is so; end the demo if it is not."""
        if not holds:
            raise ClaimFailed(text)
        self.claims += 1
        say(f"✓ {text}")

    async def show_tree(self, when: str, *models: str) -> None:
        """The part of the live tree that moves: queue and batch of ``models`` (default: inpaint), connections and requests."""
        for _ in range(3):  # what has been woken by a cancel runs to its end first
            await trio.lowlevel.checkpoint()
        say(f"{when}:")
        say(excerpt(tree(), *(models or ("inpaint",))), indent=6)

    def claim_cancelled(
        self, what: str, *cancels: tuple[str, int], reasons: Collection[str], model: str = "inpaint"
    ) -> None:
        """What it cost to cancel requests (id, and when the client did it), and that nobody worked on for them.

        All of them are released.
        """
        took = most_chunks = most_steps = late = 0
        for request_id, cancelled_ns in cancels:
            released = self.cancels[model, request_id]
            say(f"server log: {released.line}")
            programs = self.device.after_cancel(request_id)
            took = max(took, released.ns - cancelled_ns)
            late += sum(program.dispatched > program.left[request_id] for program in programs)
            most_chunks = max(most_chunks, len(programs))
            most_steps = max(most_steps, sum(program.steps for program in programs))
        self.claim(
            f"from {what} to release: {took / 1e6:.1f} ms; the server's reason: {released.reason}",
            released.reason in reasons and took < 5e9,
        )
        if released.stage == "queued":
            self.claim("the device has never heard of it", not any(self.device.heard_of(name) for name, _ in cancels))
        else:
            ran_on = f"of at most {WINDOW} on the device, {most_chunks} ran on ({most_steps} steps)"
            self.claim(f"no chunk was dispatched once the server knew; {ran_on}", late == 0 and most_chunks <= WINDOW)
        row = (
            what.rstrip(","),
            released.reason,
            released.stage,
            f"{took / 1e6:.1f}",
            str(most_chunks),
            str(most_steps),
        )
        self._summary.append(row)

    def print_summary(self) -> None:
        """One line for each way to leave."""
        header = ("after", "reason", "stage", "released, ms", "chunks", "steps")
        say("from the client's end to release, and what was on the device when the server knew of it:")
        rows = [header, *self._summary]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            cells = [
                cell.rjust(width) if column >= 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            say("   ".join(cells))

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

    def model(self, name: str) -> ScheduledModel:
        model = self.server.model(name)
        assert isinstance(model, ScheduledModel)
        return model

    # Looking at the server from outside, where there is nothing to wait for: the demo asks, again and again

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        with within(30, what):
            while not holds():  # noqa: ASYNC110 - see above
                await trio.sleep(0.002)

    async def queued(self, count: int, *, model: str = "inpaint") -> None:
        scheduler = self.model(model).scheduler
        await self.until(f"{count} requests wait for {model}", lambda: len(scheduler) == count)

    async def gone(self, request_id: str) -> None:
        """Wait until no task and no place in the tree has the request."""
        await self.until(f"the tree has no '{request_id}'", lambda: f"'{request_id}'" not in tree())

    def connections(self) -> int:
        return sum(" connection " in line for line in tree().splitlines())

    async def quiet(self) -> None:
        """Wait until nothing is in flight: what the server held for anybody is free again."""
        await self.until("nothing is in flight", lambda: self.server.statistics().in_flight == 0)
        await self.until(
            "every instance is idle",
            lambda: all(i.members == 0 for model in self.server.statistics().models for i in model.instances),
        )
