"""Whatever is loaded, wanted, given up and unloaded in whatever order: resources in + out = capacity, nobody starves."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from triton_trio import InvalidArgument
from triton_trio.config import RateLimiter as Limits
from triton_trio.config import RateLimiterResource
from triton_trio.scheduling import Permit, RateLimiter, Resource

EXPLICIT = st.lists(
    st.builds(Resource, st.sampled_from("PQ"), st.integers(1, 4), st.sampled_from([None, 0, 1])), max_size=3
)
NEEDS = st.dictionaries(st.sampled_from("PQR"), st.integers(0, 4), max_size=3)


class Instance:
    """What the test itself knows of an instance."""

    def __init__(self, limiter: RateLimiter, device: int, needs: dict[str, int], priority: int) -> None:
        # S is global, all others are of devices.
        self.needs = {(name, None if name == "S" else device): count for name, count in needs.items()}
        resources = tuple(RateLimiterResource(name, count, name == "S") for name, count in needs.items())
        self.stack = ExitStack()
        self.permit: Permit = self.stack.enter_context(limiter.register("i", device, Limits(resources, priority)))
        self.held = False
        self.waits = False


class Machine(RuleBasedStateMachine):
    """Acquire, give up (the last request was cancelled), release, load, unload."""

    instances = Bundle("instances")

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[Instance] = []

    @initialize(resources=EXPLICIT)
    def start(self, resources: list[Resource]) -> None:
        self.explicit = resources
        self.limiter = RateLimiter(resources)

    def limit(self, name: str, device: int | None) -> int:
        given = [r for r in self.explicit if r.name == name]
        if given:
            return max((r.count for r in given if r.device in (None, device)), default=0)
        return max(i.needs.get((name, device), 0) for i in self.loaded)

    @rule(
        target=instances,
        device=st.integers(0, 1),
        needs=NEEDS,
        shared=st.integers(0, 3),
        priority=st.integers(1, 3),
    )
    def load(self, device: int, needs: dict[str, int], shared: int, priority: int) -> object:
        if shared:
            needs = {**needs, "S": shared}
        explicit = {r.name for r in self.explicit}
        enough = all(n <= self.limit(name, device) for name, n in needs.items() if name in explicit)
        if not enough:
            with pytest.raises(InvalidArgument):
                Instance(self.limiter, device, needs, priority)
            return multiple()
        instance = Instance(self.limiter, device, needs, priority)
        self.loaded.append(instance)
        return instance

    @rule(instance=instances)
    def acquire(self, instance: Instance) -> None:
        if not instance.held:
            instance.held = instance.permit.acquire_nowait()
            instance.waits = not instance.held

    @rule(instance=instances)
    def give_up(self, instance: Instance) -> None:
        instance.permit.leave_line()
        instance.waits = False

    @rule(instance=instances, executed=st.booleans())
    def release(self, instance: Instance, executed: bool) -> None:
        if instance.held:
            instance.permit.release(executed=executed)
            instance.held = False
        with pytest.raises(RuntimeError):
            instance.permit.release()

    @rule(instance=consumes(instances))
    def unload(self, instance: Instance) -> None:
        if instance.held:
            instance.permit.release()
        self.loaded.remove(instance)
        instance.stack.close()

    @rule()
    def everybody_who_may_look_looks(self) -> None:
        for permit in self.limiter.turns():
            # Whoever is told that it is his turn gets it, whatever the others do in between.
            assert permit.acquire_nowait()
        for instance in self.loaded:
            instance.held, instance.waits = instance.permit.held, instance.permit.waiting

    @invariant()
    def in_and_out_is_the_capacity(self) -> None:
        statistics = self.limiter.statistics()
        assert {(pool.name, pool.device) for pool in statistics.resources} == {
            key for i in self.loaded for key in i.needs
        }
        for pool in statistics.resources:
            out = sum(i.needs.get((pool.name, pool.device), 0) for i in self.loaded if i.held)
            assert pool.in_use == out
            assert pool.free >= 0
            assert pool.in_use + pool.free == pool.capacity
            assert pool.capacity == max(out, self.limit(pool.name, pool.device))
        assert statistics.waiters == sum(i.waits for i in self.loaded)

    @invariant()
    def nobody_starves(self) -> None:
        # The best of those who wait cannot be kept waiting by anything but resources that are out.
        waiting = [i for i in self.loaded if i.waits]
        if waiting:
            free = {(pool.name, pool.device): pool.free for pool in self.limiter.statistics().resources}
            best = min(waiting, key=lambda i: (i.permit._turns, self.limiter._line[i.permit]))
            fits = all(free[key] >= n for key, n in best.needs.items())
            assert (best.permit in self.limiter.turns()) is fits
            # Nobody is kept waiting who wants nothing that others want.
            for one in waiting:
                rivals = [i for i in waiting if i is not one and any(i.needs[k] for k in i.needs.keys() & one.needs)]
                if not rivals and all(free[key] >= n for key, n in one.needs.items()):
                    assert one.permit in self.limiter.turns()

    def teardown(self) -> None:
        # When all are done, everybody who waits is served, without anybody asking again.
        while any(i.held or i.permit.waiting for i in self.loaded):
            for instance in self.loaded:
                if instance.permit.held:
                    instance.permit.release()
            self.everybody_who_may_look_looks()
        for instance in self.loaded:
            instance.stack.close()
        assert self.limiter.statistics().resources == ()


TestRateLimiter = Machine.TestCase
TestRateLimiter.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
