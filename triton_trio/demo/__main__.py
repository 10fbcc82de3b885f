"""``python -m triton_trio.demo``: every way to leave, and what is left behind: nothing.

The server runs in this process, so that its live tree can be printed; everything else is what a user has: a real socket, the
stock ``tritonclient``, and a client process to kill.  Each line with a tick is checked; the exit status is 0 only if all hold.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

# Before gRPC's C core starts: the demo kills a client, and gRPC would report that on our terminal.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from ..backends.jax import JaxBackend
from ..grpc.frontend import serve_grpc
from ..server import open_server
from .scenes import SCENES
from .stage import Stage, say
from .watch import CancelLog, ClaimFailed, DeviceLog, within

MODELS = Path(__file__).parent / "models"


class ServerWarnings(logging.Handler):
    """What the server warns of, between the scenes' lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"server {record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def logs() -> Iterator[CancelLog]:
    """The server's log lines, to us; those of other libraries to nobody."""
    cancels = CancelLog()
    warnings = ServerWarnings(logging.WARNING)
    routes = [("triton_trio", warnings), ("triton_trio.cancel", cancels), ("jax", logging.NullHandler())]
    loggers = [(logging.getLogger(name), handler) for name, handler in routes]
    for logger, handler in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("triton_trio.cancel").setLevel(logging.INFO)
    try:
        yield cancels
    finally:
        for logger, handler in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


async def demo(folder: Path) -> None:
    """Run all scenes; pictures go to ``folder``.

    Raises:
      ClaimFailed: something that the demo says is not so.

    **Cancellation:** clients and server end; nothing is left.
    """
    began = time.perf_counter()
    print(f"Loading {MODELS}; every program is compiled before the first request …", flush=True)
    device = DeviceLog()
    backends = {"jax": lambda: JaxBackend(lambda name: device)}
    with logs() as cancels:
        async with open_server(MODELS, backends=backends, rate_limit="execution_count") as server:
            [address] = await serve_grpc(server, host="127.0.0.1", port=0)
            loaded = ", ".join(model.name for model in server.repository.loaded())
            print(f"Ready after {time.perf_counter() - began:.1f} s at {address}: {loaded}")
            stage = Stage(server, address, cancels, device, folder)
            for scene in SCENES:
                with within(60, f"the scene '{scene.__name__}' has ended"):
                    await scene(stage)
            stage.client.close()
            stage.headline("In short")
            stage.print_summary()
            counters = [model.counters for model in server.repository.loaded()]
            started, ended = sum(c.started for c in counters), sum(sum(c.outcomes.values()) for c in counters)
            print()
            stage.claim(f"the books balance: {started} requests started, {ended} ended, 0 in flight", started == ended)
            print(
                f"\n{stage.claims} claims, all checked, in {time.perf_counter() - began:.0f} s. Pictures are in {folder}/"
            )


def main() -> int:
    """The exit status: 0 if everything that was said is so."""
    folder = Path("demo-output")
    folder.mkdir(exist_ok=True)
    failed: list[str] = []
    try:
        trio.run(demo, folder)
    except* ClaimFailed as group:
        failed = list(_texts(group))
    for text in failed:
        print(f"\n✗ not so: {text}", file=sys.stderr)
    return 1 if failed else 0


def _texts(exc: BaseException) -> Iterator[str]:
    if isinstance(exc, BaseExceptionGroup):
        for child in exc.exceptions:
            yield from _texts(child)
    else:
        yield str(exc)


if __name__ == "__main__":
    raise SystemExit(main())
