"""Several hosts in one process: a leader with its engine, followers with their own state, and a byte stream to each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import jax
import numpy as np
import trio
import trio.testing

from triton_trio.backends.jax.controller import ChunkController
from triton_trio.backends.jax.device import DeviceThread, Executor
from triton_trio.backends.jax.generation.engine import SlotEngine, SlotPrograms
from triton_trio.backends.jax.generation.follower import follow
from triton_trio.backends.jax.generation.leader import Leader, LeadingPrograms, open_leader
from triton_trio.backends.jax.generation.plan import PlanBroken, PlanFormat
from triton_trio.backends.jax.generation.schedule import Program, Settings, SlotSchedule
from triton_trio.backends.jax.generation.slots import Emitted
from triton_trio.errors import TritonError
from triton_trio.testing.device import DeviceGate

from .test_schedule import Somebody
from .tiny import CHUNK, SPEC, machine, prompt

LADDER = (1, 8)
PLAN = PlanFormat(SPEC, (CHUNK,), LADDER, dtype="float32", weights="ours")


class Recorded:
    """Notes what a host dispatches; mixed into its programs."""

    def run(self, program: Program) -> Emitted:
        emitted: Emitted = super().run(program)  # type: ignore[misc]
        vars(self).setdefault("dispatched", []).append(inputs(program))
        return emitted

    def unload(self) -> None:
        self.last_state = [np.asarray(leaf) for leaf in jax.tree.leaves(self.state)]  # type: ignore[attr-defined]
        super().unload()  # type: ignore[misc]


def inputs(program: Program) -> object:
    """All that goes into a program, to compare."""
    if program.chunk is not None:
        return program.length, [array.tolist() for array in program.chunk.pack(SPEC, program.length)]
    assert program.evict is not None
    assert program.hold is not None
    return program.steps, program.evict.tolist(), program.hold.tolist()


class Leads(Recorded, LeadingPrograms):
    pass


class Follows(Recorded, SlotPrograms):
    pass


class Host:
    """One host.  ``scope`` is its process: cancel it, and the host is gone."""

    def __init__(self, programs: type[SlotPrograms], executor: Executor | None) -> None:
        compiled = machine()
        self.programs: Any = programs(
            compiled.programs,
            compiled.params,
            {CHUNK: compiled.prefill(CHUNK)},
            {steps: compiled.decode(steps) for steps in LADDER},
        )
        self.programs.dispatched = self.dispatched = []
        self.executor = executor
        self.scope = trio.CancelScope()
        self.error = ""

    async def follow(self, stream: trio.abc.Stream) -> None:
        try:
            with self.scope:
                await follow(stream, PLAN, self.programs, executor=self.executor)
        except* (TritonError, PlanBroken) as group:
            self.error = str(group.exceptions[0])
        finally:
            await trio.aclose_forcefully(stream)
            self.programs.unload()


class Hosts:
    def __init__(
        self, leader: Host, followers: list[Host], device: DeviceThread, link: Leader, engine: SlotEngine
    ) -> None:
        self.leader = leader
        self.device = device  #: the leader's
        self.followers = followers
        self.link = link
        self.engine = engine

    async def write(self, number: int, text: Text, tokens: int = 12) -> None:
        """One text in the slot of its number; every second one is drawn."""
        settings = Settings(max_tokens=tokens, min_tokens=tokens, temperature=float(number % 2), seed=number)
        asked = np.array(prompt(number, 20 + 9 * number), np.int32)
        try:
            async with self.engine.open_generation(number % SPEC.slots, asked, settings, Somebody()) as generation:
                while len(text.ids) < tokens:
                    text.ids += [token.id for token in await self.engine.tokens(generation)]
        except TritonError as exc:
            text.error = f"{type(exc).__name__}: {exc}"


class Text:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.error = ""


def alone(number: int, *, tokens: int = 12) -> list[int]:
    """The same text with one host and nobody else there."""
    settings = {"max_tokens": tokens, "min_tokens": tokens, "temperature": float(number % 2), "seed": number}
    return machine().text(prompt(number, 20 + 9 * number), **settings)[0]


@asynccontextmanager
async def open_hosts(
    followers: int = 2,
    *,
    patience: float = 60.0,
    target: float = 20e-3,
    gates: Mapping[int, DeviceGate] = {},
    between: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
) -> AsyncIterator[Hosts]:
    """Host 0 leads.

    Args:
      target: seconds of a program; less than a step takes makes all of one.
      gates: by host.
      between: awaited each time before a follower reads.
    """
    leader, *others = [Host(Follows if number else Leads, gates.get(number)) for number in range(followers + 1)]
    ends: dict[str, trio.abc.Stream] = {}
    device = DeviceThread("cpu:0", executor=leader.executor)
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number, host in enumerate(others, 1):
                    ends[f"process {number}"], theirs = trio.testing.memory_stream_pair()
                    theirs.receive_stream.receive_some_hook = between
                    nursery.start_soon(host.follow, theirs)
                async with open_leader(PLAN, ends, device.abandon, patience=patience) as link:
                    leader.programs.leader = link
                    schedule, controller = SlotSchedule(SPEC, (CHUNK,)), ChunkController(target, LADDER)
                    engine = SlotEngine("generation", "llm", device, leader.programs, schedule, controller)
                    async with trio.open_nursery() as serving:
                        serving.start_soon(engine.run)
                        try:
                            yield Hosts(leader, others, device, link, engine)
                        finally:
                            for gate in gates.values():
                                gate.open()  # leaving waits for the device
                        serving.cancel_scope.cancel()
    finally:
        device.close()
