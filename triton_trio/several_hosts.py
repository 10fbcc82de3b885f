"""``python -m triton_trio.several_hosts``: the server, with a language model that is too large for one host.

One process on each host, started at about the same time, with the same first four flags::

    --coordinator=10.0.0.1:8476 --processes=2 --model=/models/llm/1 --process=0 --model-repository=/models
    --coordinator=10.0.0.1:8476 --processes=2 --model=/models/llm/1 --process=1

Process 0 is the server, and takes the server's flags as well; the model is in its repository.  The others have nothing to say:
they do what process 0 does, and end when it unloads the model, or when a host is lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
import trio

from . import cli
from .backends.jax.generation.engine import SlotPrograms
from .backends.jax.generation.follower import connect, follow
from .backends.jax.generation.hosts import MEETING, Hosts, join, plan_of
from .backends.jax.generation.loading import Loader
from .backends.jax.generation.options import TextOptions
from .backends.jax.generation.weights import open_checkpoint
from .config import load_model_config
from .errors import InvalidArgument, TritonError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the processes; its exit status."""
    parser = argparse.ArgumentParser(prog="triton_trio.several_hosts", allow_abbrev=False, description=__doc__)
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="of process 0; PORT + 1 is used, too")
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--process", type=int, required=True, metavar="0..N-1")
    parser.add_argument("--plan-port", type=int, metavar="PORT", help="in the place of PORT + 1")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the version's directory")
    args, rest = parser.parse_known_args(argv)
    if args.process and rest:
        parser.error(f"only process 0 takes the server's flags, got {' '.join(rest)}")
    try:
        hosts = join(args.coordinator, args.processes, args.process, port=args.plan_port)
    except InvalidArgument as exc:
        parser.error(exc.message)
    if args.process == 0:
        return cli.main(rest)
    try:
        trio.run(_follow, hosts, args.model)
    except* TritonError as group:
        _die(group)
    return 0


async def _follow(hosts: Hosts, directory: Path) -> None:
    config = await trio.to_thread.run_sync(load_model_config, directory.parent)
    options = TextOptions.read(config)
    checkpoint = await trio.to_thread.run_sync(open_checkpoint, options.find_weights(directory))
    programs = await Loader(config.name, checkpoint, options, jax.devices()).load(SlotPrograms)
    plan = plan_of(programs)
    async with await connect(hosts.host, hosts.port, plan, hosts.process, within=MEETING) as stream:
        await follow(stream, plan, programs)


def _die(group: BaseExceptionGroup[TritonError]) -> NoReturn:
    for error in cli.leaves(group):
        print(f"triton_trio: {error}", file=sys.stderr, flush=True)
    # At once: a program that waits for a host that is gone would keep the interpreter from ending.
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
