"""One language model over several hosts: who is there, and where they meet.

Each host runs one process of :mod:`triton_trio.several_hosts`.  Process 0 is the server and leads; the others follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import trio

from ....errors import InvalidArgument
from ..device import DeviceThread
from ..job import DeviceJob
from .leader import Leader, LeadingPrograms, greet_followers, load_with_followers, open_leader
from .loading import FirstRun, Loader
from .schedule import Program

#: Seconds to wait for the others, before the load and behind it: they read the same files and compile the same programs.
MEETING = 600.0


@dataclass(slots=True)
class Hosts:
    """Of this process: which it is of how many, and where the leader waits for followers.  Made by :meth:`at`."""

    coordinator: str
    process: int
    processes: int
    host: str
    port: int
    #: The plan has ended, and all have been told: they meet once more as they exit, for JAX.  Else there is nobody to wait for.
    parted: bool = False

    @classmethod
    def at(cls, coordinator: str, processes: int, process: int, *, port: int | None = None) -> Hosts:
        """Read what the command line says.

        Args:
          coordinator: ``HOST:PORT`` of process 0, for JAX.
          port: for the plan, on the same host; by default the one above the coordinator's.

        Raises:
          InvalidArgument: the address is none, or there is no such process.
        """
        host, _, number = coordinator.rpartition(":")
        if not host or not number.isdecimal():
            raise InvalidArgument(f"the coordinator is HOST:PORT of process 0, got '{coordinator}'")
        if not 0 <= process < processes:
            raise InvalidArgument(f"{processes} processes have the numbers 0 to {processes - 1}, got {process}")
        return cls(coordinator, process, processes, host, int(number) + 1 if port is None else port)


_joined: Hosts | None = None  # like JAX's own: there is one for each process, and it is made once


def join(hosts: Hosts) -> None:
    """Become one of several processes; blocks until all are there.  Before anything else is done with JAX."""
    global _joined
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call]  # GPUs have their own
    # Else JAX takes SIGTERM for a preemption that the training loop will ask for, and no process ends with it.
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process)
    _joined = hosts


@asynccontextmanager
async def lead(loader: Loader, thread: DeviceThread) -> AsyncIterator[LeadingPrograms]:
    """Load a model over several hosts while the others do, and lead them for as long as the block lasts.

    Raises:
      InvalidArgument: as :meth:`Loader.load`.
      Unavailable: not all have come, or one is lost; as PlanBroken, one of them has another model: nothing is loaded then.

    **Cancellation:** where the load is, and while it waits for the others; then see :meth:`Leader.run`.
    """
    assert _joined is not None, "devices of several processes without hosts.join()"
    _joined.parted = False
    plan = await trio.to_thread.run_sync(loader.plan)
    async with AsyncExitStack() as stack:
        listeners = await trio.open_tcp_listeners(_joined.port, host=_joined.host)
        try:
            followers = await greet_followers(listeners, plan, range(1, _joined.processes), within=MEETING)
        finally:
            for listener in listeners:
                listener.socket.close()
        for stream in followers.values():
            stack.push_async_callback(trio.aclose_forcefully, stream)
        programs = await load_with_followers(followers, partial(loader.load, LeadingPrograms), within=MEETING)
        leader: Leader | None = None
        try:
            async with open_leader(plan, followers, thread.abandon) as leader:
                programs.leader = leader
                await run_for_nobody(programs, thread)
                yield programs
        finally:
            _joined.parted = leader is not None and leader.parted


async def run_for_nobody(programs: LeadingPrograms, thread: DeviceThread) -> None:
    """One program on all hosts.  Their devices connect with each other now, and not when the first text comes.

    Raises:
      Unavailable: a host is lost.
      InternalError: the program failed here.

    **Cancellation:** when the device is idle, or given up.
    """
    slots = programs.spec.slots
    step = Program((), steps=1, evict=np.zeros(slots, np.int32), hold=np.zeros(slots, np.bool_))
    async with DeviceJob(thread, "first program over several hosts") as job:
        await job.call(FirstRun(programs, step))
