"""A process of its own, for Python code that must not share one with the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

import trio

from .logs import levels

#: The writing ends of the pipes of workers that live.
_lifelines: set[int] = set()
#: Held while one is made or closed, so that nobody forks who could not know of it.  Reentrant: a finalizer may fork anywhere.
_forking = threading.RLock()


def _open_lifeline() -> tuple[int, int]:
    """The worker's end, and ours."""
    with _forking:
        theirs, ours = os.pipe()
        _lifelines.add(ours)
    return theirs, ours


def _close_lifeline(fd: int) -> None:
    with _forking:
        _lifelines.remove(fd)
        os.close(fd)


def _close_after_fork() -> None:
    """In a child that was forked: a copy of the server must not keep the server's workers alive."""
    while _lifelines:
        os.close(_lifelines.pop())
    _forking.release()


# What is executed anew has none of them, for they are not inheritable; a fork alone (multiprocessing's) would have them all.
os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_after_fork)


class Child(Protocol):
    """What there is to know of a worker process."""

    pid: int
    socket: socket.socket  #: the server's end of the connection

    def kill(self) -> None:
        """It, and what it has started.  Sync; nothing happens if :meth:`wait` has returned."""

    async def wait(self) -> int:
        """Its exit code, or minus the number of the signal.  **Cancellation:** only the wait ends."""


class ChildProcess:
    """Made by :func:`launch`.  Whatever the model has started is in its process group, and ends with it.

    Args:
      ended: a descriptor that is readable when the process has ended (``pidfd_open``).
      lifeline: the process is killed by the kernel when this is closed, by the end of this process at the latest.
    """

    def __init__(self, process: trio.Process, sock: socket.socket, ended: int, lifeline: int) -> None:
        self.pid = process.pid
        self.socket = sock
        self._process = process
        self._ended = ended
        self._lifeline = lifeline
        self._code: int | None = None

    def kill(self) -> None:
        # While the process has not been reaped, ended or not, the number of its group is nobody else's.
        if self._code is None:
            os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        if self._code is None:
            await trio.lowlevel.wait_readable(self._ended)
            self.kill()  # what it has left behind
            self._code = await self._process.wait()
            os.close(self._ended)
            _close_lifeline(self._lifeline)
        return self._code


def python(*arguments: str) -> list[str]:
    """The command of a process that runs what this one runs."""
    return [
        sys.executable,
        "-P",
        *arguments,
    ]  # -P: the current directory is no place for modules, unless it is one here


def worker_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment and ``more`` where it leaves that open; and its modules are found."""
    return {**more, **os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


async def launch(factory: str, environment: Mapping[str, str]) -> ChildProcess:
    """Start ``python -m triton_trio.backends.worker`` with the backend that ``factory`` (``module:function``) makes.

    Spawned, never forked: threads, locks and device contexts of the server mean nothing in a copy of it.  In a session
    of its own, so that a Ctrl-C in the terminal is the server's business.

    Args:
      environment: variables, for which a value in the server's own environment goes first.

    **Cancellation:** before, not while the process starts.
    """
    await trio.lowlevel.checkpoint()
    with ExitStack() as ours, ExitStack() as theirs:
        our_socket, their_socket = socket.socketpair()
        ours.enter_context(our_socket)
        theirs.enter_context(their_socket)
        their_lifeline, our_lifeline = _open_lifeline()
        ours.callback(_close_lifeline, our_lifeline)
        theirs.callback(os.close, their_lifeline)
        passed = (their_socket.fileno(), their_lifeline)
        command = python("-m", f"{__package__}", *map(str, passed), factory, json.dumps(levels()))
        # Shielded: a process that is started and not known is one that nobody ends.  Bounded by fork and exec, or by a kill.
        with trio.CancelScope(shield=True):
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,
                env=worker_environment(environment),
            )
            try:
                ended = os.pidfd_open(process.pid)
            except OSError:
                process.kill()
                await process.wait()  # noqa: ASYNC120 - shielded
                raise
        ours.pop_all()
    return ChildProcess(process, our_socket, ended, our_lifeline)


def describe_end(code: int | None) -> str:
    """``ended with exit code 7``, ``was killed by SIGSEGV``."""
    if code is None:
        return "does not end, though it was killed"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (not by this server: perhaps memory ran out)" if name == "SIGKILL" else "")
