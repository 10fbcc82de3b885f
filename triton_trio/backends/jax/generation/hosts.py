"""One language model over several hosts: who is there, and where they meet.

Each host runs one process of :mod:`triton_trio.several_hosts`.  Process 0 is the server and leads; the others follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import jax
import trio

from ....errors import InvalidArgument
from .engine import SlotPrograms
from .leader import LeadingPrograms, greet_followers, open_leader
from .plan import PlanFormat

#: Seconds to wait for the others: they read the same files and compile the same programs.
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


def plan_of(programs: SlotPrograms) -> PlanFormat:
    return PlanFormat(programs.spec, programs.prefill, programs.decode)


@asynccontextmanager
async def lead(programs: SlotPrograms, on_lost: Callable[[str], None]) -> AsyncIterator[None]:
    """If these programs are over several hosts, wait for the others, and lead for as long as the block lasts.

    Raises:
      Unavailable: not all have come; as PlanBroken, one of them has another model.

    **Cancellation:** while it waits; then see :meth:`Leader.run`.
    """
    if not isinstance(programs, LeadingPrograms):
        yield
        return
    assert _joined is not None, "devices of several processes without hosts.join()"
    plan = plan_of(programs)
    listeners = await trio.open_tcp_listeners(_joined.port, host=_joined.host)
    try:
        followers = await greet_followers(listeners, plan, range(1, _joined.processes), within=MEETING)
    finally:
        for listener in listeners:
            listener.socket.close()
    _joined.parted = False
    try:
        async with open_leader(plan, followers, on_lost) as programs.leader:
            yield
    finally:
        _joined.parted = programs.leader.parted
