"""``python -m triton_trio.backends.worker FD MODULE:FUNCTION LEVELS``: what the server starts; nobody else can use it."""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading

import trio

from ..._process import keep_large_buffers
from ..base import Backend
from .connection import Connection
from .host import Host
from .logs import PostHandler, set_levels


def end_with_the_server(sock: socket.socket) -> None:
    """Wait in a thread until the server's end of the connection is closed, and then end the process.

    Nothing that blocks the event loop, a model's ``load`` or a hanging device can keep it alive.  (The kernel can send a
    signal when a parent ends, but means by that the thread that has started the process, which is one of a pool.)
    """
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


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
    fd, factory, levels = sys.argv[1:]
    set_levels(json.loads(levels))
    os.set_inheritable(int(fd), False)
    sock = socket.socket(fileno=int(fd))
    # Owner: nobody; a daemon, so that the process can end before the server.
    threading.Thread(target=end_with_the_server, args=(sock,), name="end with the server", daemon=True).start()
    keep_large_buffers()
    module, _, function = factory.partition(":")
    trio.run(host, getattr(importlib.import_module(module), function)(), sock)


if __name__ == "__main__":
    main()
