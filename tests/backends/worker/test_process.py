"""Real processes: how they are started, how they end, and who notices.  Few, for each takes half a second to begin."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import trio

from tests.backends.world import until
from tests.callers import calling
from triton_trio import InferenceServer, Outcome, Unavailable
from triton_trio.backends import Backend, BackendModel, ModelContext
from triton_trio.backends.worker import WorkerLimits, launch, open_worker_model
from triton_trio.testing import open_test_server, scripted_config

INPUTS = {"INPUT0": np.float32([1, 2])}


class Processes(Backend):
    def open_model(self, context: ModelContext) -> AbstractAsyncContextManager[BackendModel]:
        start = partial(launch, f"{__package__}.children:obedient", {})
        return open_worker_model(context, start, limits=WorkerLimits(delay=0))


@asynccontextmanager
async def processes(root: Path, *, more: str = "", **options: object) -> AsyncIterator[InferenceServer]:
    async with open_test_server(
        root, {"m": scripted_config(instances=2, more=more)}, Processes(), limit=30, **options
    ) as server:
        yield server
        await idle(server)


async def idle(server: InferenceServer) -> None:
    """An answer comes before the news that the execution has ended."""
    for model in server.repository.loaded():
        await until(lambda model=model: all(instance.batch is None for instance in model.instances))


def pid_of(server: InferenceServer) -> int:
    return server.model("m").instances[0].statistics().backend.pid


def is_gone(pid: int) -> bool:
    """Reaped, too: of a zombie there would be an entry."""
    return not Path(f"/proc/{pid}").exists()


def runs(pid: int) -> bool:
    """Not our child: whose it is may not reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_process_is_killed_crashes_hangs_and_is_replaced_each_time(tmp_path: Path) -> None:
    async with processes(tmp_path, release_limit=0.2) as server, calling(server.model("m")) as callers:
        model = server.model("m")
        pids = []
        for do, how in (
            ("wait", "was killed by SIGKILL (not by this server: perhaps memory ran out)"),
            ("exit", "ended with exit code 7"),
            ("crash", "was killed by SIGSEGV"),
            ("hang", "was killed, for its device did not let go in time after a cancel"),
        ):
            pids.append(pid_of(server))
            waiting = await callers.call("waits", parameters={"do": "wait"})
            bad = await callers.call("bad", parameters={"do": do})
            await until(lambda requests=(waiting.request, bad.request): all(each.bound_at for each in requests))
            queued = await callers.call("queued")
            if do == "wait":
                os.kill(pids[-1], signal.SIGKILL)
            if do == "hang":
                bad.leave()
            await waiting.ended.wait()
            await bad.ended.wait()
            assert isinstance(waiting.error, Unavailable)
            assert waiting.error.message == f"the worker process of model 'm' {how}; it is being restarted"
            await queued.ended.wait()
            assert queued.outcome is Outcome.OK
            assert model.ready
        assert len({*pids, pid_of(server)}) == 5
        assert all(map(is_gone, pids))
        last = pid_of(server)
        answer = await model.infer(model.request(INPUTS, parameters={"do": "interrupt"}))
        assert answer.outputs["OUTPUT0"].tolist() == [1, 2]  # signals are the server's business
        await model.infer(model.request(INPUTS, parameters={"do": "session"}))
    assert is_gone(last)


async def test_log_lines_come_through_the_servers_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with processes(tmp_path) as server:
        model = server.model("m")
        await model.infer(model.request(INPUTS, parameters={"do": "log"}))
        first, second = [record for record in caplog.records if record.name == "triton_trio.tests.children"]
        assert (first.levelno, first.getMessage()) == (logging.WARNING, "one line")
        assert (first.filename, first.process) == ("children.py", pid_of(server))
        assert second.getMessage().startswith("an error\nTraceback")
        assert second.getMessage().endswith("ValueError: which has reasons")


async def test_a_worker_logs_what_its_server_logs_when_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="triton_trio.tests")
    more = 'parameters { key: "on_load" value { string_value: "log" } }'
    async with processes(tmp_path, more=more):
        lines = [record.getMessage() for record in caplog.records if record.name == "triton_trio.tests.children"]
        assert lines[:2] == ["a detail", "one line"]


async def test_megabytes_go_there_and_back(tmp_path: Path) -> None:
    config = scripted_config(max_batch_size=2, dims=(-1,))
    async with open_test_server(tmp_path, {"m": config}, Processes(), limit=30) as server:
        big = np.random.default_rng(0).random((2, 1_500_001)).astype(np.float32)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.model("m").infer, {"INPUT0": big})
            response = await server.model("m").infer({"INPUT0": big})
        assert np.array_equal(response.outputs["OUTPUT0"], big)
        await idle(server)


async def test_a_process_that_ends_in_the_load_says_how(tmp_path: Path) -> None:
    more = 'parameters { key: "on_load" value { string_value: "crash" } }'
    async with processes(tmp_path, more=more, explicit=True) as server:
        with pytest.raises(Unavailable, match="the worker process of model 'm' was killed by SIGSEGV"):
            await server.load_model("m")


async def test_what_a_model_has_started_ends_with_its_worker_however_that_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with processes(tmp_path, release_limit=0.2) as server:
        model = server.model("m")
        async with calling(model) as callers:
            for do in ("start_and_hang", "start_and_exit"):
                pid = pid_of(server)
                call = await callers.call(do, parameters={"do": do})
                await until(lambda request=call.request: request.bound_at)
                call.leave()
                await until(lambda pid=pid: pid_of(server) not in (pid, None))
        await model.infer(model.request(INPUTS, parameters={"do": "start"}))  # and then the model is unloaded
    started = [int(line.split()[-1]) for line in caplog.messages if line.startswith("it has started")]
    assert len(started) == 3
    with trio.fail_after(10):
        await until(lambda: not any(map(runs, started)))


SERVER = """
    import sys, trio
    from tests.backends.worker.test_process import *

    async def main():
        async with processes(Path(sys.argv[1])) as server:
            if "fork" in sys.argv and os.fork() == 0:
                os.close(1)
                sys.stdin.read()  # and it has all that the server had, for as long as the test goes on
                os._exit(0)
            model = server.model("m")
            await model.infer(model.request(INPUTS, parameters={"do": sys.argv[2]}))

    trio.run(main)
"""


@pytest.mark.parametrize("do", [["hang"], ["hold"], ["start_and_hang"], ["hang", "fork"]], ids="-".join)
async def test_no_process_outlives_a_server_that_was_killed_whatever_it_hangs_in(tmp_path: Path, do: list[str]) -> None:
    with trio.fail_after(30):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", dedent(SERVER), str(tmp_path), *do], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        async with process.stdin, process.stdout:
            said = b""
            while not said.endswith(b"\n"):
                said += await process.stdout.receive_some()
            assert not is_gone(int(said))
            process.kill()
            await process.wait()
            # Not our child, so there is nothing to wait for but its end of the pipe that it has inherited.
            assert await process.stdout.receive_some() == b""
