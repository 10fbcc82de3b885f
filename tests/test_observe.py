"""What the operator sees: the live tree."""

from __future__ import annotations

import re

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InferenceServer, Unavailable
from triton_trio.observe import name_nursery, tree
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

CONFIGS = {
    "solo": scripted_config(instances=2),
    "team": scripted_config(max_batch_size=4, batching=""),
}


def drawn() -> str:
    """The tree, without what differs from run to run."""
    text = re.sub(r"#\d+", "#N", tree())
    return re.sub(r"^.*<test .*>$", "test", text, flags=re.MULTILINE)


IDLE = """\
└── server
    └── models
        ├── model solo:1
        │   ├── instance solo_0_0
        │   ├── instance solo_0_1
        │   └── queue timeouts of solo:1
        ├── model team:1
        │   ├── instance team_0_0
        │   └── queue timeouts of team:1
        └── frontends"""

BUSY = """\
└── server
    └── models
        ├── model solo:1
        │   ├── queue: 1 waiting
        │   ├── instance solo_0_0
        │   │   └── batch of 1 rows: 1 of 1 requests live
        │   ├── instance solo_0_1
        │   │   └── batch of 1 rows: 1 of 1 requests live
        │   └── queue timeouts of solo:1
        ├── model team:1
        │   ├── instance team_0_0
        │   │   └── batch of 3 rows: 1 of 2 requests live
        │   └── queue timeouts of team:1
        └── frontends
            ├── client a
            │   └── request #N 'a' of solo:1, executing
            ├── client b
            │   └── request #N 'b' of solo:1, executing
            ├── client c
            │   └── request #N 'c' of solo:1, queued
            └── client 10
                └── request #N '10' of team:1, executing"""


async def test_the_tree_is_the_architecture(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve(CONFIGS, backend) as server:
        idle = below_server(drawn())
        assert idle == IDLE
        async with calling(server.model("solo")) as solo, calling(server.model("team")) as team:
            await solo.call_all("abc")
            first = await team.call("blocker", rows=4)
            calls = [await team.call("9", rows=1), await team.call("10", rows=2)]
            first.leave()
            await wait_all_tasks_blocked()
            calls[0].leave()
            await wait_all_tasks_blocked()
            assert below_server(drawn()) == BUSY
            for call in (*solo.calls, *team.calls):
                call.leave()
            await wait_all_tasks_blocked()
        assert below_server(drawn()) == idle


def below_server(text: str) -> str:
    """From the server's line on, without the indent."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("── server"))
    indent = lines[start].index("└")
    return "\n".join(line[indent:] for line in lines[start:])


async def test_a_caller_who_is_busy_is_not_forgotten(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(decoupled=True)}, backend) as server:
        model = server.model("m")
        async with model.open_responses({"INPUT0": np.zeros(2, np.float32)}):
            await wait_all_tasks_blocked()
            (line,) = [line for line in drawn().splitlines() if "request" in line and "batch" not in line]
            assert line.endswith("├── request #N of m:1, executing")


async def test_what_is_cancelled_is_crossed_out() -> None:
    async with trio.open_nursery() as outer:
        name_nursery(outer, "outer")
        async with trio.open_nursery() as nursery:

            async def stubborn() -> None:
                with trio.CancelScope(shield=True):
                    await release.wait()

            release = trio.Event()
            nursery.start_soon(stubborn, name="stubborn one")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            assert tree(nursery.parent_task).splitlines()[1:] == ["└── outer", "    └── stubborn one ✗"]
            release.set()


async def test_a_part_of_the_tree_and_tasks_without_a_name() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        nursery.start_soon(trio.sleep_forever, name="client 10")
        nursery.start_soon(trio.sleep_forever, name="client 9")
        await wait_all_tasks_blocked()
        drawing = tree(nursery.parent_task).splitlines()[1:]
        assert drawing == ["├── client 9", "├── client 10", "└── sleep_forever"]
        (task,) = [task for task in nursery.child_tasks if task.name == "client 9"]
        assert tree(task) == "client 9"
        nursery.cancel_scope.cancel()


async def test_law_15_every_task_of_a_live_server_has_a_name_of_its_own(serve: Serve) -> None:
    """Also those that exist for a moment only."""

    class Names(trio.abc.Instrument):
        def __init__(self) -> None:
            self.seen: set[str] = set()

        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            self.seen.add(task.name)

    async def work(server: InferenceServer) -> None:
        await server.model("m").infer({"INPUT0": np.zeros(2, np.float32)})
        with trio.move_on_after(0):
            await server.model("m").infer({"INPUT0": np.zeros(2, np.float32)})
        await server.load_model("m")
        await server.unload_model("m")
        with pytest.raises(Unavailable):
            server.model("m")

    names = Names()
    trio.lowlevel.add_instrument(names)
    async with serve({"m": scripted_config()}) as server:
        await work(server)
    trio.lowlevel.remove_instrument(names)
    assert names.seen == {
        "load m",
        "wait for load m",
        "model m:1",
        "instance m_0_0",
        "queue timeouts of m:1",
        "unload m:1",
    }
