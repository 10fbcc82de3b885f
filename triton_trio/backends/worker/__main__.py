"""``python -m triton_trio.backends.worker FD LIFELINE MODULE:FUNCTION LEVELS``, which the server alone starts."""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys

import trio

from ..._process import keep_large_buffers
from ..base import Backend
from .connection import Connection
from .host import Host
from .logs import PostHandler, set_levels


def end_with_the_server(lifeline: int) -> None:
    """The kernel kills this process, and what it has started, when nobody holds the other end of the pipe ``lifeline``.

    No thread of ours could be sure to see that: native code may keep the GIL for ever.  SIGKILL and not SIGIO, which a
    library may handle.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline)
    if poll.poll(0):
        os.killpg(0, signal.SIGKILL)  # the server has gone before there was an owner to tell


async def host(backend: Backend, sock: socket.socket) -> None:
    connection = Connection(sock)
    root = logging.getLogger()
    root.addHandler(PostHandler(connection))
    await Host(backend, connection).run()


def main() -> None:
    # A service manager tells every process of a group to end; when the worker should, the server says so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # a crash says where, on the server's standard error
    fd, lifeline, factory, levels = sys.argv[1:]
    for each in (fd, lifeline):
        os.set_inheritable(int(each), False)
    end_with_the_server(int(lifeline))
    set_levels(json.loads(levels))
    sock = socket.socket(fileno=int(fd))
    keep_large_buffers()
    module, _, function = factory.partition(":")
    trio.run(host, getattr(importlib.import_module(module), function)(), sock)


if __name__ == "__main__":
    main()
