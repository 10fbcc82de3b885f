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
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import trio

from . import cli
from .backends.jax.generation.engine import SlotPrograms
from .backends.jax.generation.follower import connect, follow, load_with_leader
from .backends.jax.generation.hosts import MEETING, Hosts, join
from .backends.jax.generation.loading import Loader
from .backends.jax.generation.options import TextOptions
from .backends.jax.generation.weights import Checkpoint, open_checkpoint
from .config import load_model_config
from .errors import InvalidArgument, TritonError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the processes; its exit status.

    Does not return, but ends the process, where JAX would wait at exit for hosts that are gone.
    """
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
        hosts = Hosts.at(args.coordinator, args.processes, args.process, port=args.plan_port)
    except InvalidArgument as exc:
        parser.error(exc.message)
    if not args.process:
        cli.parse(rest)
    status = _status(hosts, args.model, rest)
    if status or not hosts.parted:
        # JAX waits at exit for the other processes, for minutes, and then aborts this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _status(hosts: Hosts, directory: Path, flags: Sequence[str]) -> int:
    """Of the process, when it has done its part; what went wrong has been said."""
    try:
        if hosts.process == 0:
            _meet(hosts, Model.read(directory))
            return cli.main(flags)
        model = Model.read(directory)
        _meet(hosts, model)
        trio.run(_follow, hosts, model)
        hosts.parted = True
        return 0
    except* (TritonError, OSError) as group:
        for error in cli.leaves(group):
            print(f"triton_trio: {error}", file=sys.stderr)
    except* (Exception, KeyboardInterrupt) as group:  # noqa: BLE001  (it is said, and the process ends)
        for error in cli.leaves(group):
            traceback.print_exception(error)
    return 1


@dataclass(frozen=True, slots=True)
class Model:
    """What its files say; nothing is loaded."""

    name: str
    options: TextOptions
    checkpoint: Checkpoint

    @classmethod
    def read(cls, directory: Path) -> Model:
        """Raises :exc:`TritonError` or :exc:`OSError`: a file is wrong, or not there."""
        config = load_model_config(directory.parent)
        options = TextOptions.read(config)
        return cls(config.name, options, open_checkpoint(options.find_weights(directory)))


def _meet(hosts: Hosts, model: Model) -> None:
    """Blocks until all are there.

    Raises:
      InvalidArgument: the model is not for all of their devices.
    """
    join(hosts)
    if model.options.devices != (count := jax.device_count()):
        raise InvalidArgument(
            f"model '{model.name}' is for {model.options.devices} device(s), and all processes together have {count}: set "
            f"tensor_parallel to {count} in its config.pbtxt, or start as many processes as it takes"
        )


async def _follow(hosts: Hosts, model: Model) -> None:
    loader = Loader(model.name, model.checkpoint, model.options, jax.devices())
    plan = await trio.to_thread.run_sync(loader.plan)
    async with await connect(hosts.host, hosts.port, plan, hosts.process, within=MEETING) as stream:
        programs = await load_with_leader(stream, partial(loader.load, SlotPrograms))
        await follow(stream, plan, programs)


if __name__ == "__main__":
    raise SystemExit(main())
