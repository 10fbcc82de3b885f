"""``python -m triton_trio.demo``: every way to leave, and what is left behind: nothing.

The server runs in this process, so that its live tree can be printed; everything else is what a user has: a real socket, the
stock ``tritonclient``, and a client process to kill.  Each line with a tick is checked; the exit status is 0 only if all hold.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import trio

# Before gRPC's C core starts: the demo kills a client, and gRPC would report that on our terminal.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from ..grpc.frontend import serve_grpc
from ..server import open_server
from .scenes import SCENES
from .stage import CancelLog, ClaimFailed, Stage

MODELS = Path(__file__).parent / "models"


async def demo(folder: Path) -> None:
    log = CancelLog()
    cancel_logger = logging.getLogger("triton_trio.cancel")
    cancel_logger.setLevel(logging.INFO)
    cancel_logger.addHandler(log)
    cancel_logger.propagate = False
    began = time.perf_counter()
    print(f"Loading {MODELS}: every program is compiled before the first request …", flush=True)
    try:
        async with open_server(MODELS) as server:
            [address] = await serve_grpc(server, host="127.0.0.1", port=0)
            loaded = ", ".join(model.name for model in server.repository.loaded())
            print(f"Ready after {time.perf_counter() - began:.1f} s at {address}: {loaded}")
            stage = Stage(server, address, log, folder)
            for scene in SCENES:
                with trio.fail_after(60):
                    await scene(stage)
            stage.client.close()
            stage.headline("In short")
            stage.say(f"{'a request left':20} {'reason':16} {'release, ms':>12} {'device steps after':>19}")
            for scene_name, reason, took, steps in stage.summary:
                stage.say(f"{scene_name:20} {reason:16} {took:>12} {steps:>19}")
            counters = [model.counters for model in server.repository.loaded()]
            started, ended = sum(c.started for c in counters), sum(sum(c.outcomes.values()) for c in counters)
            stage.say()
            stage.claim(f"the books balance: {started} requests started, {ended} ended, 0 in flight", started == ended)
            print(
                f"\n{stage.claims} claims, all checked, in {time.perf_counter() - began:.0f} s. Pictures are in {folder}/"
            )
    finally:
        cancel_logger.removeHandler(log)


def main() -> int:
    folder = Path("demo-output")
    folder.mkdir(exist_ok=True)
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        trio.run(demo, folder)
    except* ClaimFailed as group:
        for error in group.exceptions:
            print(f"\n✗ not so: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
