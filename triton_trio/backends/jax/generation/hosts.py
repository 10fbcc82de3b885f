"""One language model over several hosts: who is there, and where they meet.

Each host runs one process of :mod:`triton_trio.several_hosts`.  Process 0 is the server and leads; the others follow.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address

import jax
import numpy as np
import trio

from ....errors import InvalidArgument, Unavailable
from ..device import LOGGER, DeviceThread
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
          coordinator: ``HOST:PORT`` of process 0, for JAX; an IPv6 address in brackets.
          port: for the plan, on the same host; by default the one above the coordinator's.

        Raises:
          InvalidArgument: the address is none, a port cannot be, or there is no such process.
        """
        found = re.fullmatch(r"(?:\[([^][]+)\]|([^][:]+)):([0-9]+)", coordinator)
        if found is None:
            raise InvalidArgument(
                f"the coordinator is HOST:PORT of process 0, or [ADDRESS]:PORT with IPv6, got '{coordinator}'"
            )
        if not 0 <= process < processes:
            raise InvalidArgument(f"{processes} processes have the numbers 0 to {processes - 1}, got {process}")
        host, number = found[1] or found[2], int(found[3])
        plan = number + 1 if port is None else port
        for what, one in (("the coordinator's PORT", number), ("--plan-port, PORT + 1 by default,", plan)):
            if not 1 <= one <= 65535:
                raise InvalidArgument(f"{what} must be 1 to 65535, got {one}")
        return cls(coordinator, process, processes, host, plan)

    def only_here(self) -> str:
        """The address that the coordinator's name has on this host, if no other host would find it there; else empty.

        As with Debian, whose /etc/hosts has 127.0.1.1 for the host's own name.  Blocking.
        """
        if self.host == "localhost" or _address(self.host) is not None:
            return ""  # it is meant
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)}
        except OSError:
            return ""  # who needs it will say so
        return ", ".join(sorted(found)) if all(ip_address(one).is_loopback for one in found) else ""


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


_joined: Hosts | None = None  # like JAX's own: there is one for each process, and it is made once


def join(hosts: Hosts) -> None:
    """Become one of several processes; blocks until all are there.  Before anything else is done with JAX."""
    global _joined
    if hosts.process == 0 and (address := hosts.only_here()):
        # No error: with all processes on this host it works.
        LOGGER.warning(
            "the coordinator '%s' is %s on this host, and that is where port %d will be opened: other hosts will not find it; "
            "use an address of this host that they reach, or correct the name in /etc/hosts",
            hosts.host,
            address,
            hosts.port,
        )
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
      Unavailable: the port cannot be opened, not all have come, or one is lost; as PlanBroken, one of them has another
        model, and nothing has been loaded.

    **Cancellation:** where the load is, and while it waits for the others; then see :meth:`Leader.run`.
    """
    assert _joined is not None, "devices of several processes without hosts.join()"
    _joined.parted = False
    plan = await trio.to_thread.run_sync(loader.plan)
    async with AsyncExitStack() as stack:
        try:
            listeners = await trio.open_tcp_listeners(_joined.port, host=_joined.host)
        except OSError as exc:
            raise Unavailable(
                f"port {_joined.port} of '{_joined.host}' cannot be opened for the other processes: {exc.strerror}; "
                "see --coordinator and --plan-port"
            ) from None
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
