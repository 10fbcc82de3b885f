"""One request's text: a slot of the engine, as an instance."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import trio

from ...base import BackendInstance
from .engine import EngineStatistics, SlotEngine
from .request import TextRequest, answer
from .text import StopFilter

if TYPE_CHECKING:
    from ....batch import Batch, Member
    from .schedule import Generation
    from .tokenizer import Tokenizer


#: Bytes of a text that are cut into tokens on the spot, within a millisecond or so.
LONG = 4096
#: Longer ones that are cut at a time, for one model on one device.
CUTTERS = 2


class MemberReader:
    """A member of a batch, as the one for whom a text is made."""

    def __init__(self, batch: Batch, member: Member) -> None:
        self._batch = batch
        self._member = member

    @property
    def live(self) -> bool:
        return self._member.live

    @property
    def cancelled(self) -> bool:
        return self._member.left_at is not None

    def charge(self, seconds: float, steps: int) -> None:
        self._batch.charge(self._member, seconds)
        if self.cancelled:
            self._member.steps_after_cancel += steps

    def spare(self, seconds: float) -> None:
        self._member.saved_seconds = seconds


class TextInstance(BackendInstance):
    """One slot."""

    def __init__(
        self,
        engine: SlotEngine,
        slot: int,
        tokenizer: Tokenizer,
        cutters: trio.CapacityLimiter,
        outputs: Collection[str],
    ) -> None:
        self.availability = engine.availability
        self._engine = engine
        self._slot = slot
        self._tokenizer = tokenizer
        self._cutters = cutters
        self._outputs = outputs
        self._generation: Generation | None = None  #: of the execution

    def statistics(self) -> EngineStatistics:
        """Of the model on this device, which all its slots share."""
        return self._engine.statistics()

    def time_left(self, limit: float, unseen: float) -> float | None:
        return self._engine.seconds_left(limit, unseen) if self._on_device else None

    def abandon(self) -> bool:
        if self._on_device:
            self._engine.abandon()
        return False

    @property
    def _on_device(self) -> bool:
        return self._generation is not None and self._generation.busy > 0

    async def execute(self, batch: Batch) -> None:
        """Make one text.

        **Cancellation:** at any time; while a long text is cut into tokens, the thread that does it is left to end by itself, and
        holds one of :data:`CUTTERS` places until then.  For what follows see :meth:`SlotEngine.open_generation`.
        """
        (member,) = batch.members
        spec = self._engine.programs.spec
        read = partial(TextRequest.read, member.inputs, spec, self._tokenizer, member.request.label)
        # The event loop can spare what a short text takes, and a long one is left to a thread: pure computation, of which a
        # cancel need not see the end.
        long = any(len(item) > LONG for name in ("text_input", "messages") for item in member.inputs.get(name, ()))
        asked = await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self._cutters) if long else read()
        batch.compute_infer_at = trio.current_time()
        reader = MemberReader(batch, member)
        try:
            async with self._engine.open_generation(self._slot, asked.prompt, asked.settings, reader) as generation:
                self._generation = generation
                await self._write(batch, member, asked, generation)
        finally:
            self._generation = None

    async def _write(self, batch: Batch, member: Member, asked: TextRequest, generation: Generation) -> None:
        stream = self._tokenizer.stream(asked.prompt.tolist() if asked.continues else ())
        stops = StopFilter(asked.stops)
        ends = self._engine.programs.spec.end_tokens
        parts: list[str] = []
        ids: list[int] = []
        logs: list[float] = []
        reason = ""
        while not reason:
            for token in await self._engine.tokens(generation):
                ids.append(token.id)
                logs.append(token.log_probability)
                parts.append(stops.add(stream.add(token.id)))
                if token.last:
                    parts.append(stops.add(stream.finish()))
                if stops.stopped or token.last:
                    reason = "stop" if stops.stopped or token.id in ends else "length"
                    break
            batch.compute_output_at = batch.compute_output_at or trio.current_time()
            if reason:
                parts.append(stops.finish())
            if reason or (batch.decoupled and asked.stream):
                made = answer("".join(parts), ids, logs, reason)
                outputs = {name: array for name, array in made.items() if name in self._outputs}
                parts, ids, logs = [], [], []
                if batch.decoupled:
                    await batch.send(member, outputs, final=bool(reason))
                else:
                    batch.respond(member, outputs)
