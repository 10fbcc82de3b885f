"""Whatever happens in whatever order: a server is given random operations, and after each the laws hold.

Time is simulated and a run of Trio takes place inside each example, so hypothesis can shrink what it finds.
"""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.callers import Call
from triton_trio import InferenceServer, InternalError, Model, Outcome, Reason, Stage
from triton_trio.instance import InstanceState
from triton_trio.testing import ScriptedBackend, assert_quiescent, open_test_server, scripted_config

RELEASE_LIMIT = 10.0

CONFIGS = st.sampled_from(
    [
        scripted_config(max_batch_size=3, instances=2),
        scripted_config(max_batch_size=3, instances=2, batching=""),
        scripted_config(max_batch_size=3, instances=1, batching="max_queue_delay_microseconds: 2000000"),
        scripted_config(max_batch_size=3, instances=2, batching="preserve_ordering: true"),
        scripted_config(
            max_batch_size=3,
            instances=1,
            batching="""priority_levels: 2, default_priority_level: 2, preferred_batch_size: [2]
                max_queue_delay_microseconds: 1000000
                default_queue_policy { max_queue_size: 3, default_timeout_microseconds: 3000000,
                    allow_timeout_override: true }
                priority_queue_policy { key: 1, value { timeout_action: DELAY, default_timeout_microseconds: 1000000 } }
            """,
        ),
    ]
)
index = st.integers(0, 20)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0, 500_000])),
        st.tuples(st.just("submit"), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0, 500_000])),
        st.tuples(st.just("leave"), index),
        st.tuples(st.just("cancel"), index),
        st.tuples(st.just("deadline"), index, st.sampled_from([0, 1, 4])),
        st.tuples(st.just("step"), index),
        st.tuples(st.just("finish"), index),
        st.tuples(st.just("fail"), index),
        st.tuples(st.just("stick"), st.booleans()),
        st.tuples(st.just("let go"), index),
        st.tuples(st.just("advance"), st.sampled_from([0.5, 1, 3, 11])),
        st.tuples(st.just("settle down")),
        st.tuples(st.just("stop")),
    ),
    max_size=25,
)


@dataclass
class World:
    server: InferenceServer
    model: Model
    backend: ScriptedBackend
    nursery: trio.Nursery
    calls: list[Call] = field(default_factory=list)

    def pick(self, things: list[Any], number: int) -> Any:
        return things[number % len(things)] if things else None

    def alive(self, number: int) -> Call | None:
        return self.pick([call for call in self.calls if call.outcome is None], number)  # type: ignore[no-any-return]

    async def do(self, name: str, *args: Any) -> None:
        """One operation; most of them do not let any task run, so that several fall into one tick."""
        if name == "submit":
            rows, priority, timeout_us = args
            value = float(len(self.calls))
            call = Call(self.model, f"{value:g}", value=value, rows=rows, priority=priority, timeout_us=timeout_us)
            self.calls.append(call)
            self.nursery.start_soon(call.run, name=f"client {value:g}")
        elif name == "leave" and (call := self.alive(args[0])):
            call.leave(Reason.CONNECTION_LOST)
            self.check_left_at_once(call)
        elif name == "cancel" and (call := self.alive(args[0])):
            call.request.cancel(Reason.ADMIN)
            self.check_left_at_once(call)
        elif name == "deadline" and (call := self.alive(args[0])):
            call.scope.deadline = trio.current_time() + args[1]
        elif name in ("step", "finish", "fail", "let go"):
            execution = self.pick(self.backend.running, args[0])
            if execution is not None:
                act = {"step": execution.step, "finish": execution.finish, "let go": execution.let_go}.get(name)
                if act is None:
                    execution.fail(InternalError("the device failed"))
                else:
                    act()
        elif name == "stick":
            self.backend.misbehaviour.ignore_release = args[0]
        elif name == "advance":
            await trio.sleep(args[0])
        elif name == "settle down":
            await wait_all_tasks_blocked()
        elif name == "stop":
            self.model.stop()

    def check_left_at_once(self, call: Call) -> None:
        request = call.request
        if request.stage is not Stage.RECEIVED and request.waiting_task is not None:
            raise AssertionError("a cancelled request is still waiting")
        if request.outcome is None:
            # Its caller has not begun to wait, or has its response in hand: the next tick decides.
            return
        assert request not in self.model.scheduler.queued()
        assert request.place is None
        for instance in self.model.instances:
            assert instance.batch is None or request not in instance.batch.scope

    def check(self) -> None:
        model, counters = self.model, self.model.counters
        # Law 16: the books balance at every moment.
        assert counters.started == sum(counters.outcomes.values()) + len(model._live)
        assert sum(counters.reasons.values()) == (
            counters.outcomes[Outcome.CANCELLED] + counters.outcomes[Outcome.DEADLINE]
        )
        queue = model.scheduler.queue
        assert len(queue) == len(list(queue)) == sum(queue.statistics().by_level.values())
        assert set(queue._timed) <= {request.generation for request in queue}
        executing = [
            request for instance in model.instances if instance.batch is not None for request in instance.batch.scope
        ]
        # A request is in one place, and alive wherever it is.
        assert len(set(executing)) == len(executing)
        assert not set(executing) & set(queue)
        for request in (*queue, *executing):
            assert request.outcome is None
            assert request in model._live
        for request in queue:
            assert request.stage is Stage.QUEUED
            assert request.place is model.scheduler
        for request in executing:
            assert request.stage in (Stage.EXECUTING, Stage.RESPONDING)
        # Law 12 and the watchdog: nobody wants it, so it ends in time, or its instance is out.
        for instance in model.instances:
            batch = instance.batch
            if batch is None:
                assert instance.state is not InstanceState.EXECUTING
            elif not len(batch.scope) and not any(member.served for member in batch.members):
                left = max(member.left_at or 0 for member in batch.members)
                late = trio.current_time() - left > RELEASE_LIMIT
                assert not late or instance.state is InstanceState.QUARANTINED
        if model.scheduler.order is not None:
            assert len(model.scheduler.order) <= len(model._live)


async def run(config: str, operations: list[tuple[Any, ...]], root: Path) -> None:
    backend = ScriptedBackend(lambda stacked: stacked * 2)
    await trio.sleep(1)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            open_test_server(root, {"m": config}, backend, release_limit=RELEASE_LIMIT, limit=1000)
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        world = World(server, server.model("m"), backend, nursery)
        for operation in operations:
            await world.do(*operation)
            world.check()
        await wait_all_tasks_blocked()
        world.check()
        # Everybody goes home: what runs is finished, what waits is served, what sticks is quarantined.
        backend.misbehaviour.ignore_release = False
        backend.automatic = True
        for execution in backend.running:
            execution.finish()
        await trio.sleep(3 * RELEASE_LIMIT)
        for call in world.calls:
            if not call.ended.is_set():
                call.leave()
        for execution in backend.running:
            execution.let_go()
        await wait_all_tasks_blocked()
        world.check()
        assert world.model.counters.started == len(world.calls)
        for call in world.calls:
            call.check()
            if call.output is not None:
                value = float(call.request.request_id)
                assert (call.output == np.float32(value * 2)).all()  # its own rows, and nobody else's
        assert_quiescent(server)


@settings(max_examples=150, deadline=None)
@given(CONFIGS, OPERATIONS)
def test_the_laws_hold_after_every_operation(config: str, operations: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        trio.run(run, config, operations, Path(root), clock=MockClock(autojump_threshold=0))
