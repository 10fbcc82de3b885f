"""(g) A JAX model in a worker process against the same model in the server: what it costs, and what it saves.

In process (no network), in alternating rounds.  "Busy" is a task of the event loop that computes in Python and never rests but
for a checkpoint every few milliseconds: the worst that handlers can do to a device thread which shares the GIL with them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import trio

from triton_trio import open_server
from triton_trio.model import Model

from .harness import BENCH, machine, percentile, save, table

PLACES = ("server", "worker")
MIB = 1 << 20
SIZES = (1, 16)  #: MiB there, and as many back

ECHO = """
def apply(params, inputs):
    return {"OUTPUT0": inputs["INPUT0"]}
"""
ECHO_CONFIG = """backend: "jax" max_batch_size: 0
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }
"""


def write_models(root: Path) -> None:
    source = BENCH / "models" / "slow"
    models = {
        "slow": ((source / "1" / "model.py").read_text(), (source / "config.pbtxt").read_text()),
        "echo": (ECHO, ECHO_CONFIG),
    }
    for place in PLACES:
        for name, (code, config) in models.items():
            model = root / f"{name}_{place}"
            (model / "1").mkdir(parents=True)
            (model / "1" / "model.py").write_text(code)
            wanted = "true" if place == "worker" else "false"
            parameter = f'parameters {{ key: "worker_process" value {{ string_value: "{wanted}" }} }}\n'
            (model / "config.pbtxt").write_text(config + parameter)


async def run(model: Model, steps: int) -> float:
    """Seconds of one request."""
    began = time.perf_counter()
    await model.infer({"INPUT0": np.full((1, 1), steps, np.float32)})
    return time.perf_counter() - began


async def small(model: Model, requests: int) -> float:
    """µs from one answer to the next, for requests that do nothing."""
    array = np.zeros(1, np.float32)
    began = time.perf_counter()
    for _ in range(requests):
        await model.infer({"INPUT0": array})
    return (time.perf_counter() - began) / requests * 1e6


async def cancelled(model: Model) -> float:
    """Milliseconds from a cancel until the device has let go and the instance is free."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model.infer, {"INPUT0": np.full((1, 1), 1e6, np.float32)})
        await trio.sleep(0.05 + 0.02 * np.random.random())
        before = model.counters.device_seconds_after_cancel
        nursery.cancel_scope.cancel()
    while model.instances[0].batch is not None:  # noqa: ASYNC110 - measured from outside, without a hook in the server
        await trio.lowlevel.checkpoint()
    return (model.counters.device_seconds_after_cancel - before) * 1e3


async def moved(model: Model, mebibytes: int, times: int) -> float:
    """Milliseconds of one request with a tensor of that size, there and back."""
    array = np.zeros(mebibytes * MIB // 4, np.float32)
    await model.infer({"INPUT0": array})
    began = time.perf_counter()
    for _ in range(times):
        await model.infer({"INPUT0": array})
    return (time.perf_counter() - began) / times * 1e3


@asynccontextmanager
async def busy(milliseconds: float) -> AsyncIterator[None]:
    """The event loop computes all the time."""

    async def spin() -> None:
        while True:
            until = time.perf_counter() + milliseconds / 1e3
            while time.perf_counter() < until:
                sum(range(100))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(spin, name="a busy event loop")
        yield
        nursery.cancel_scope.cancel()


async def measure(steps: int, rounds: int, cancels: int, spin: float) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {place: {} for place in PLACES}

    async def note(what: str, measure_one: Callable[[str], Awaitable[float]]) -> None:
        for place in PLACES:
            found[place].setdefault(what, []).append(await measure_one(place))

    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        async with open_server(folder) as server:
            for place in PLACES:
                await run(server.model(f"slow_{place}"), steps)
                await small(server.model(f"echo_{place}"), 1)  # compiles
            for _ in range(rounds):
                await note("request_us", lambda place: small(server.model(f"echo_{place}"), 300))
                await note("steps_per_s_idle", lambda place: rate(server.model(f"slow_{place}"), steps))
                async with busy(spin):
                    await note("steps_per_s_busy", lambda place: rate(server.model(f"slow_{place}"), steps))
                for size in SIZES:
                    await note(
                        f"echo_{size}_mib_ms", lambda place, size=size: moved(server.model(f"echo_{place}"), size, 10)
                    )
            for _ in range(cancels):
                await note("cancel_ms_idle", lambda place: cancelled(server.model(f"slow_{place}")))
    figures: dict[str, dict[str, float]] = {}
    for place, measures in found.items():
        figures[place] = {what: round(percentile(values, 50), 2) for what, values in measures.items()}
        figures[place]["cancel_ms_idle_max"] = round(max(measures["cancel_ms_idle"]), 2)
    return figures


async def rate(model: Model, steps: int) -> float:
    return steps / await run(model, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cancels", type=int, default=50)
    parser.add_argument("--spin", type=float, default=5.0, help="milliseconds between two checkpoints of the busy loop")
    args = parser.parse_args()
    # One core for the device, one for the event loop.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    before = machine()
    figures = trio.run(measure, args.steps, args.rounds, args.cancels, args.spin)
    rows = []
    for what in figures["server"]:
        server, worker = (figures[place][what] for place in PLACES)
        rows.append([what.replace("_", " "), server, worker, f"{worker / server:.2f}"])
    text = (
        f"Medians of {args.rounds} alternating rounds; {args.cancels} cancels. Busy: the event loop computes {args.spin:g} ms "
        "between any two checkpoints. request: one that does nothing, one after the other. steps: of bench/models/slow, in one "
        "request. cancel: until the device has let go. echo: a tensor of that size there and back.\n\n"
        + table(["", "in the server", "in a worker", "ratio"], rows)
    )
    save("worker", "python -m bench worker", figures, text, before)


if __name__ == "__main__":
    main()
