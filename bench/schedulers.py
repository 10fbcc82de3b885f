"""(e) What scheduling costs, without a network: CPU µs for each request and each cancel, against the number queued.

Everything runs in one process with a backend that answers at once, so what is measured is ours: the caller's scope, the queue,
the batch, the task switches, the answer.

* **served**: N callers in a closed loop; CPU µs for each request, from ``infer`` to its response.
* **cancelled**: N requests wait behind a busy instance; CPU µs for each ``request.cancel()`` of one of them.
* **live**: N sequences are live and idle, and one of them gets a request; memory for each.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import trio
import trio.testing

from triton_trio import InferenceRequest, InferenceServer, Model, TritonError, open_server
from triton_trio._process import calm_garbage_collector
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch

from .harness import RESULTS, machine, rss_bytes, save, table

NUMBERS = (1, 100, 1_000, 10_000)
ROW = np.zeros((1, 4), np.float32)
TENSORS = """max_batch_size: {max_batch_size}
input {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] }} output {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] }}
"""
INSTANT = 'backend: "instant" instance_group {{ kind: KIND_CPU }}\n' + TENSORS


class InstantBackend(Backend):
    """``OUTPUT0`` is ``INPUT0``, at once; or never, while :attr:`gate` is closed."""

    def __init__(self) -> None:
        self.gate: trio.Event | None = None

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[InstantModel]:
        yield InstantModel(self)


@dataclass
class InstantModel(BackendModel):
    backend: InstantBackend

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[InstantInstance]:
        yield InstantInstance(self.backend)


@dataclass
class InstantInstance(BackendInstance):
    backend: InstantBackend

    async def execute(self, batch: Batch) -> None:
        if self.backend.gate is not None:
            await self.backend.gate.wait()
        for member in batch.live():
            batch.respond(member, {"OUTPUT0": member.inputs["INPUT0"]})


Options = Callable[[int, int], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One way to schedule: models by name (``m`` is asked), and what the ``turn``-th request of a caller says."""

    name: str
    models: dict[str, str]
    options: Options = lambda caller, turn: {}
    server: dict[str, Any] = field(default_factory=dict)
    distinct: bool = False  #: every request has tensors of its own


def instant(max_batch_size: int, more: str = "") -> str:
    return INSTANT.format(max_batch_size=max_batch_size) + more


def sequence(caller: int, turn: int) -> dict[str, Any]:
    return {"sequence_id": caller + 1, "sequence_start": turn == 0}


def short_sequence(caller: int, turn: int) -> dict[str, Any]:
    return {"sequence_id": caller + 1, "sequence_start": True, "sequence_end": True}


def ensemble(steps: int) -> str:
    tensors = ["INPUT0", *(f"t{n}" for n in range(1, steps)), "OUTPUT0"]
    flow = ", ".join(
        f'{{ model_name: "step" model_version: -1 input_map {{ key: "INPUT0" value: "{before}" }} '
        f'output_map {{ key: "OUTPUT0" value: "{after}" }} }}'
        for before, after in pairwise(tensors)
    )
    return f'platform: "ensemble" ensemble_scheduling {{ step [ {flow} ] }}\n' + TENSORS.format(max_batch_size=64)


BATCHED = instant(64, "dynamic_batching { }")
POLICIES = """dynamic_batching { priority_levels: 2 default_priority_level: 2
default_queue_policy { default_timeout_microseconds: 3600000000 max_queue_size: 100000 } }"""
DIRECT = "sequence_batching { direct { } max_sequence_idle_microseconds: 3600000000 }"
OLDEST = "sequence_batching { oldest { max_candidate_sequences: 10000 } max_sequence_idle_microseconds: 3600000000 }"
LIMITED = """instance_group { kind: KIND_CPU rate_limiter { resources [ { name: "R" count: 1 } ] } }
""" + TENSORS.format(max_batch_size=64)

SUBJECTS = (
    Subject("default", {"m": instant(1)}),
    Subject("dynamic batcher", {"m": BATCHED}),
    Subject("dynamic, priorities and timeouts", {"m": instant(64, POLICIES)}, lambda c, t: {"priority": 1 + c % 2}),
    Subject("sequences, direct, 64 slots", {"m": instant(64, DIRECT)}, short_sequence),
    Subject("sequences, oldest, 10,000 candidates", {"m": instant(64, OLDEST)}, sequence),
    Subject("ensemble of three steps", {"m": ensemble(3), "step": BATCHED}),
    Subject(
        "dynamic, rate limited",
        {"m": f'backend: "instant" dynamic_batching {{ }} {LIMITED}'},
        server={"rate_limit": "execution_count"},
    ),
    Subject(
        "cached, every request a hit",
        {"m": BATCHED + "response_cache { enable: true }"},
        server={"cache_size": 64 << 20},
    ),
    Subject(
        "cached, every request a miss",
        {"m": BATCHED + "response_cache { enable: true }"},
        server={"cache_size": 64 << 20},
        distinct=True,
    ),
)


@asynccontextmanager
async def opened(subject: Subject) -> AsyncIterator[tuple[InferenceServer, Model, InstantBackend]]:
    backend = InstantBackend()
    with tempfile.TemporaryDirectory() as folder:
        for name, config in subject.models.items():
            (Path(folder) / name / "1").mkdir(parents=True)
            (Path(folder) / name / "config.pbtxt").write_text(config)
        async with open_server(folder, backends={"instant": lambda: backend}, **subject.server) as server:
            yield server, server.model("m"), backend


def requests_of(subject: Subject, model: Model) -> Callable[[int, int], InferenceRequest]:
    made = 0

    def request(caller: int, turn: int) -> InferenceRequest:
        nonlocal made
        row = ROW
        if subject.distinct:
            made += 1
            row = np.full((1, 4), made, np.float32)
        return model.request({"INPUT0": row}, **subject.options(caller, turn))

    return request


async def served(subject: Subject, callers: int, total: int) -> float:
    """CPU µs for each request, with ``callers`` in a closed loop."""
    async with opened(subject) as (_, model, _):
        request = requests_of(subject, model)
        left = total

        async def caller(number: int) -> None:
            nonlocal left
            turn = 0
            while left > 0:
                left -= 1
                await model.infer(request(number, turn))
                turn += 1

        async with trio.open_nursery() as nursery:
            for number in range(callers):
                nursery.start_soon(caller, number, name=f"caller {number}")
            calm_garbage_collector()  # as the server does
            began = time.process_time()
        return (time.process_time() - began) / total * 1e6


async def cancelled(subject: Subject, waiting: int, cancels: int) -> float:
    """CPU µs for each ``cancel()`` of one of ``waiting``; its task's own end included."""
    async with opened(subject) as (_, model, backend):
        backend.gate = trio.Event()
        request = requests_of(subject, model)
        live: list[InferenceRequest] = []
        spent = 0.0

        async def caller(number: int) -> None:
            one = request(number, 0)
            live.append(one)
            with suppress(TritonError):
                await model.infer(one)

        async with trio.open_nursery() as nursery:
            for number in range(waiting):
                nursery.start_soon(caller, number, name=f"caller {number}")
            await trio.testing.wait_all_tasks_blocked()
            rng = random.Random(0)
            for extra in range(cancels):
                # One comes for each that goes, so that as many wait at the last cancel as at the first.
                position = rng.randrange(len(live))
                live[position], live[-1] = live[-1], live[position]
                victim = live.pop()
                began = time.process_time()
                victim.cancel()
                spent += time.process_time() - began
                nursery.start_soon(caller, waiting + extra, name="caller")
                if not live or extra % 16 == 0:
                    await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return spent / cancels * 1e6


async def live_sequences(number: int, total: int) -> dict[str, float]:
    """``number`` live sequences, one request each at a time, in random order."""
    subject = next(subject for subject in SUBJECTS if subject.name.startswith("sequences, oldest"))
    async with opened(subject) as (_, model, _):
        request = requests_of(subject, model)
        calm_garbage_collector()
        before = rss_bytes(os.getpid())
        began = time.process_time()
        for sequence_id in range(number):
            await model.infer(request(sequence_id, 0))
        started = time.process_time() - began
        memory = rss_bytes(os.getpid()) - before
        calm_garbage_collector()
        rng = random.Random(0)
        began = time.process_time()
        for _ in range(total):
            await model.infer(request(rng.randrange(number), 1))
        spent = time.process_time() - began
        began = time.process_time()
        for sequence_id in range(number):
            one = model.request({"INPUT0": ROW}, sequence_id=sequence_id + 1, sequence_end=True)
            await model.infer(one)
        ended = time.process_time() - began
        return {
            "live": number,
            "us_first_request": round(started / number * 1e6, 1),
            "us_per_request": round(spent / total * 1e6, 1),
            "us_last_request": round(ended / number * 1e6, 1),
            "kib_each": round(memory / number / 1024, 2),
        }


def plot(figures: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, what in zip(axes, ("served", "cancelled"), strict=True):
        for name, values in figures[what].items():
            axis.plot(NUMBERS, values, "o-", label=name)
        axis.set(xscale="log", ylim=(0, None), title=f"{what}: CPU µs each", xlabel="in the queue")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000, help="for each figure of 'served'")
    parser.add_argument("--cancels", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="part of a scheduler's name")
    args = parser.parse_args()
    before = machine()
    subjects = [subject for subject in SUBJECTS if not args.only or args.only in subject.name]
    # First of all, while the allocator has nothing in store.
    live = [trio.run(live_sequences, number, args.cancels) for number in (100, 1_000, 10_000)]
    figures: dict[str, dict[str, list[float]]] = {"served": {}, "cancelled": {}}
    for subject in subjects:
        # The best of alternating rounds: what is above it is other work on this machine.
        served_rounds = [
            [trio.run(served, subject, number, args.requests) for number in NUMBERS] for _ in range(args.rounds)
        ]
        cancel_rounds = [
            [trio.run(cancelled, subject, number, args.cancels) for number in NUMBERS] for _ in range(args.rounds)
        ]
        figures["served"][subject.name] = [round(min(each), 1) for each in zip(*served_rounds, strict=True)]
        figures["cancelled"][subject.name] = [round(min(each), 1) for each in zip(*cancel_rounds, strict=True)]
        print(subject.name, figures["served"][subject.name], figures["cancelled"][subject.name], flush=True)
    header = ["scheduler", *(f"{number:,} queued" for number in NUMBERS)]
    text = "CPU µs for each request served, N callers in a closed loop:\n\n"
    text += table(header, [[name, *values] for name, values in figures["served"].items()])
    text += "\n\nCPU µs for each `request.cancel()` of one of N that wait:\n\n"
    text += table(header, [[name, *values] for name, values in figures["cancelled"].items()])
    text += "\n\nLive sequences (`oldest`), CPU µs for the first, a middle and the last request of one, and memory:\n\n"
    text += table(list(live[0]), [list(row.values()) for row in live])
    text += "\n\n![curves](schedulers.png)"
    if not args.only:
        RESULTS.mkdir(exist_ok=True)
        plot(figures, RESULTS / "schedulers.png")
        save("schedulers", "python -m bench schedulers", {**figures, "live": live}, text, before)
    else:
        print(text)


if __name__ == "__main__":
    main()
