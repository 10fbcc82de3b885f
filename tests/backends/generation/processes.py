"""One of two processes that share a language model: ``python -m tests.backends.generation.processes NUMBER COORDINATOR PLAN``.

No process has the whole model.  Process 0 leads, and prints what it made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import jax
import numpy as np
import trio

from triton_trio.backends.jax.controller import ChunkController
from triton_trio.backends.jax.device import DeviceThread
from triton_trio.backends.jax.generation import LlamaPrograms, Placement
from triton_trio.backends.jax.generation.engine import SlotEngine, SlotPrograms
from triton_trio.backends.jax.generation.follower import connect, follow
from triton_trio.backends.jax.generation.leader import LeadingPrograms, greet_followers, open_leader
from triton_trio.backends.jax.generation.plan import PlanFormat
from triton_trio.backends.jax.generation.schedule import Settings, SlotSchedule
from triton_trio.errors import TritonError

from .test_schedule import Somebody
from .tiny import CHUNK, CONFIG, SPEC, params_of, prompt, random_tensors


def settings(number: int) -> dict[str, float]:
    return {"max_tokens": 25, "min_tokens": 25, "temperature": float(number % 2), "seed": number}


def asked(number: int) -> list[int]:
    return prompt(number, 30 + 9 * number)


async def lead(programs: LeadingPrograms, plan: PlanFormat, port: int) -> dict[str, object]:
    """Three texts in two slots: the second is cancelled in the middle, and the third takes its slot over."""
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with listener:
        followers = await greet_followers(listener, plan, [1], within=30)
    device = DeviceThread("mesh")
    made: dict[int, list[int]] = {0: [], 1: [], 2: []}
    errors: list[str] = []
    enough = trio.Event()
    async with (
        open_leader(plan, followers, device.abandon, patience=20) as programs.leader,
        trio.open_nursery() as tasks,
    ):
        schedule, controller = SlotSchedule(programs.spec, (CHUNK,)), ChunkController(20e-3, (1,))
        engine = SlotEngine("generation", "llm", device, programs, schedule, controller)
        tasks.start_soon(engine.run)

        async def write(number: int, slot: int) -> None:
            ids = np.array(asked(number), np.int32)
            try:
                async with engine.open_generation(slot, ids, Settings(**settings(number)), Somebody()) as generation:
                    while len(made[number]) < 25:
                        made[number] += [token.id for token in await engine.tokens(generation)]
                        if number == 1 and len(made[1]) >= 5:
                            enough.set()
            except TritonError as exc:
                errors.append(str(exc))

        async with trio.open_nursery() as readers:
            readers.start_soon(write, 0, 0)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as second:
                    second.start_soon(write, 1, 1)
                    await enough.wait()
                    scope.cancel()
            await write(2, 1)
        tasks.cancel_scope.cancel()
    device.close()
    return {"texts": list(made.values()), "errors": errors, "evictions": schedule.statistics().evictions}


async def replay(programs: SlotPrograms, plan: PlanFormat, port: int) -> dict[str, object]:
    async with await connect("127.0.0.1", port, plan, 1, within=30) as stream:
        await follow(stream, plan, programs)
    return {}


def main(number: int, coordinator: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{coordinator}", 2, number, heartbeat_timeout_seconds=10)
    placement = Placement.on(jax.devices())
    params = placement.put_params(params_of(CONFIG, random_tensors(CONFIG)))
    half = params["layers"][0]["q"].addressable_shards
    assert len(half) * 2 == placement.devices == CONFIG.kv_heads
    compiled = LlamaPrograms(SPEC, placement, params)
    programs = (SlotPrograms if number else LeadingPrograms)(
        compiled, params, {CHUNK: compiled.prefill(CHUNK)}, {1: compiled.decode(1)}
    )
    plan = PlanFormat(SPEC, (CHUNK,), (1,))
    task: Callable[..., object] = replay if number else lead
    print(json.dumps(trio.run(task, programs, plan, port)), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
