"""A model whose answer is the sum of all that its sequence has sent, and callers of its sequences."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio
from trio.testing import wait_all_tasks_blocked

from tests.callers import Call, Callers, calling
from tests.scheduling.requests import make
from triton_trio import InferenceServer
from triton_trio.batch import Batch, Member
from triton_trio.config import parse_model_config
from triton_trio.request import InferenceRequest
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.scheduling import SequenceBatcher, SequenceOptions, SequenceStatistics, SequenceTensors
from triton_trio.testing import Execution, ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

DIRECT = "direct { }"
OLDEST = "oldest { max_candidate_sequences: 4 }"
TENSORS = """
state { input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_FP32 dims: [ 2 ] }
control_input [
  { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } },
  { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } },
  { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } }
]
"""


class SumBackend(ScriptedBackend):
    """The state is the sum of a sequence's inputs, and so is the answer; computed on the stacked rows."""

    def __init__(self, *, automatic: bool = False) -> None:
        super().__init__(automatic=automatic)
        #: For each execution: the correlation ID of each row, 0 for one that is not ready; negative with START.
        self.rows: list[tuple[int, ...]] = []

    def begin(self, execution: Execution) -> None:
        batch = execution.batch
        assert batch is not None
        columns = (batch.stack(name).ravel().tolist() for name in ("READY", "START", "ID"))
        self.rows.append(tuple(ready * (-who if start else who) for ready, start, who in zip(*columns, strict=True)))
        super().begin(execution)

    def answer(self, batch: Batch, member: Member) -> dict[str, np.ndarray]:
        total = batch.stack("SUM_IN") + batch.stack("INPUT0")
        rows = total[member.start : member.stop] if self.batches(member.request) else total
        return {"OUTPUT0": rows, "SUM_OUT": rows}


def sum_config(
    strategy: str = DIRECT, *, idle: float = 5.0, max_batch_size: int = 4, instances: int = 1, more: str = "", **kw: Any
) -> str:
    sequences = f"{strategy} max_sequence_idle_microseconds: {round(idle * 1e6)} {TENSORS} {more}"
    return scripted_config(max_batch_size=max_batch_size, instances=instances, sequences=sequences, **kw)


@dataclass
class World:
    server: InferenceServer
    model: ScheduledModel
    backend: SumBackend
    callers: Callers

    @property
    def batcher(self) -> SequenceBatcher:
        assert isinstance(self.model.scheduler, SequenceBatcher)
        return self.model.scheduler

    @property
    def statistics(self) -> SequenceStatistics:
        return self.batcher.statistics()

    @property
    def slots(self) -> dict[int | str, str]:
        """``{42: "m_0_0:3"}``: who has which slot."""
        return {
            sequence.sequence_id: f"{slots.seat.name}:{slot}"
            for slots in self.batcher._slots.values()
            for slot, sequence in sorted(slots.taken.items())
        }

    @property
    def ends(self) -> list[tuple[int | str, str]]:
        """Sequences whose end the instances were told, in order, with the cause."""
        return [(end.sequence_id, end.cause.value) for _, end in self.backend.sequence_ends]

    def start(self, label: str, sequence_id: int | str, flags: str = "", value: float = 1, **options: Any) -> Call:
        """A request of a sequence, on its way; ``flags``: "start", "end", "start end"."""
        options.setdefault("rows", 1 if self.model.config.max_batch_size else None)
        return self.callers.start(
            label,
            value=value,
            sequence_id=sequence_id,
            sequence_start="start" in flags,
            sequence_end="end" in flags,
            **options,
        )

    async def call(self, label: str, sequence_id: int | str, flags: str = "", value: float = 1, **options: Any) -> Call:
        """The same, waiting where it waits."""
        call = self.start(label, sequence_id, flags, value, **options)
        await wait_all_tasks_blocked()
        return call

    async def begin(self, *ids: int | str) -> None:
        """Start these sequences, one after the other, and have their first request answered: a sum of 1."""
        automatic, self.backend.automatic = self.backend.automatic, True
        for sequence_id in ids:
            call = await self.call(f"start {sequence_id}", sequence_id, "start")
            await call.ended.wait()
        self.backend.automatic = automatic

    async def finish(self) -> None:
        """The running executions answer, and what follows from that happens."""
        for execution in self.backend.running:
            execution.finish()
        await wait_all_tasks_blocked()


@asynccontextmanager
async def playing(serve: Serve, config: str, *, automatic: bool = False, **options: Any) -> AsyncIterator[World]:
    """A server with one model of sequences; at the end no sequence may be left."""
    backend = SumBackend(automatic=automatic)
    async with serve({"m": config}, backend, **options) as server:
        model = server.model("m")
        assert isinstance(model, ScheduledModel)
        async with calling(model) as callers:
            yield World(server, model, backend, callers)


def total(call: Call) -> float:
    """The sum that was answered."""
    assert call.output is not None, call.error
    assert (call.output == call.output.flat[0]).all()
    return float(call.output.flat[0])


# Without a server: decisions alone


@asynccontextmanager
async def batcher(
    kind: Callable[..., SequenceBatcher], *, slots: int, iterative: bool = False, **options: Any
) -> AsyncIterator[SequenceBatcher]:
    """A batcher of a model without controls and states; its sequences end with the block."""
    tensors = SequenceTensors(parse_model_config(f'name: "m" {scripted_config(max_batch_size=4, sequences="")}'))
    made = kind(SequenceOptions("m", slots, idle_limit=5.0, iterative=iterative), tensors, **options)
    async with trio.open_nursery() as nursery:
        made.start(nursery, "m:1")
        yield made
        nursery.cancel_scope.cancel()


def enqueue(made: SequenceBatcher, label: str, *, shape: object = None, start: bool = True) -> InferenceRequest:
    """A request of the sequence whose ID is its label's first letter."""
    request = make(label, shape=shape)
    request.sequence_id, request.sequence_start = ord(label[0]), start
    request.admit("m", 1, lambda request, place: made.settled(request))
    made.enqueue(request)
    return request


def rows(formed: tuple[Iterable[InferenceRequest], float]) -> str:
    """``"a-b"``: the labels of a batch, with ``-`` for a row that is not ready."""
    return "".join(request.request_id or "-" for request in formed[0])
