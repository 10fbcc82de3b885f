"""What the processes of these tests host: a backend that does what the request says, however bad."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch, Member

LOGGER = logging.getLogger("triton_trio.tests.children")


class Obedient(Backend, BackendModel, BackendInstance):
    """Each member's parameter ``do`` names a method; without one, it is answered with its input."""

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[BackendModel]:
        if "on_load" in context.config.parameters:
            getattr(self, context.config.parameters["on_load"])()
        yield self

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[BackendInstance]:
        yield self

    async def execute(self, batch: Batch) -> None:
        for member in batch.members:
            what = str(member.request.parameters.get("do", "answer"))
            if what == "wait":
                await trio.sleep_forever()
            getattr(self, what)()
            self.answer(batch, member)

    def answer(self, batch: Batch | None = None, member: Member | None = None) -> None:
        if batch is not None and member is not None:
            batch.respond(member, {"OUTPUT0": member.inputs["INPUT0"]})

    def exit(self) -> None:
        os._exit(7)

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self) -> None:
        """The event loop, too: whoever waits for an answer to anything waits for ever."""
        print(os.getpid(), flush=True)
        time.sleep(100)

    def hold(self) -> None:
        """The GIL: no thread of Python's runs any more."""
        print(os.getpid(), flush=True)
        ctypes.PyDLL(None).sleep(100)

    def start(self) -> None:
        """A process of the model's own, which has inherited standard output."""
        LOGGER.warning("it has started %d", subprocess.Popen(["sleep", "100"]).pid)

    def start_and_hang(self) -> None:
        self.start()
        self.hang()

    def start_and_exit(self) -> None:
        self.start()
        self.exit()

    def log(self) -> None:
        LOGGER.info("a detail")
        LOGGER.warning("one %s", "line")
        try:
            raise ValueError("which has reasons")
        except ValueError:
            LOGGER.exception("an error")

    def interrupt(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)

    def session(self) -> None:
        assert os.getsid(0) == os.getpid()
        assert sys.stdin is None or not sys.stdin.isatty()


def obedient() -> Obedient:
    return Obedient()
