"""Two processes, each with half of a model, say what one process says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from .processes import asked, settings
from .tiny import machine


def one_process() -> list[list[int]]:
    return [machine().text(asked(number), **settings(number))[0] for number in range(3)]


async def free_port() -> int:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        return int(listener.socket.getsockname()[1])


@pytest.mark.network
async def test_two_processes_say_what_one_says_and_a_cancel_is_the_same_record_on_both() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    coordinator, plan = await free_port(), await free_port()
    run = partial(trio.run_process, env=environment, cwd=Path(__file__).parents[3], stdin=b"", capture_stdout=True)
    ended: list[subprocess.CompletedProcess[bytes]] = []

    async def start(number: int) -> None:
        command = [sys.executable, "-m", f"{__package__}.processes", *map(str, (number, coordinator, plan))]
        ended.append(await run(command, capture_stderr=True))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in (0, 1):
                nursery.start_soon(start, number)
            expected = await trio.to_thread.run_sync(one_process)
    said: dict[str, object] = {}
    for process in ended:
        said |= json.loads(process.stdout.splitlines()[-1])
    assert said["errors"] == []
    stays, cancelled, follows = said["texts"]  # type: ignore[misc]
    assert [stays, follows] == [expected[0], expected[2]]
    assert 5 <= len(cancelled) < 25
    assert cancelled == expected[1][: len(cancelled)]
    assert said["evictions"] == 1
