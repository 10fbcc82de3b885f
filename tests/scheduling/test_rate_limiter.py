"""The rate limiter without a server: who gets what, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import ClassVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.scheduling.requests import admitted, make
from triton_trio import InvalidArgument
from triton_trio.config import RateLimiter as Limits
from triton_trio.config import RateLimiterResource
from triton_trio.request import InferenceRequest
from triton_trio.scheduling import DefaultScheduler, Permit, RateLimiter, Resource, Scheduler, Seat


class World:
    """A limiter, and instances by the letter of their name: ``"a R1:2 G:1! x2 @1"``.

    a needs 2 of R1 on its device 1 and 1 of the global G, and has priority 2.
    """

    opened: ClassVar[list[World]] = []

    def __init__(self, instances: str = "", *resources: Resource) -> None:
        self.opened.append(self)
        self.limiter = RateLimiter(resources)
        self.loaded: dict[str, ExitStack] = {}
        self.permits: dict[str, Permit] = {}
        for text in filter(None, instances.split(",")):
            self.load(text)

    def load(self, text: str) -> Permit:
        name, *words = text.split()
        priority, device, needs = 1, 0, []
        for word in words:
            if word[0] == "x":
                priority = int(word[1:])
            elif word[0] == "@":
                device = int(word[1:])
            else:
                resource, number = word.rstrip("!").split(":")
                needs.append(RateLimiterResource(resource, int(number), word.endswith("!")))
        stack = ExitStack()
        permit = stack.enter_context(self.limiter.register(name, device, Limits(tuple(needs), priority)))
        self.loaded[name], self.permits[name] = stack, permit
        return permit

    def unload(self, name: str) -> None:
        self.loaded.pop(name).close()
        del self.permits[name]

    def ask(self, names: str) -> str:
        """Who of ``names``, asking in this order, gets it."""
        return "".join(name for name in names if self.permits[name].acquire_nowait())

    def release(self, name: str) -> str:
        """Whose turn it is afterwards."""
        self.permits[name].release()
        return self.turns()

    def turns(self) -> str:
        return "".join(permit.name for permit in self.limiter.turns())

    def pools(self) -> dict[str, tuple[int, int]]:
        """``{"R1@0": (in use, capacity)}``."""
        return {
            pool.name + ("" if pool.device is None else f"@{pool.device}"): (pool.in_use, pool.capacity)
            for pool in self.limiter.statistics().resources
        }


@pytest.fixture(autouse=True)
def close_worlds() -> Iterator[None]:
    yield
    while World.opened:
        world = World.opened.pop()
        for permit in world.permits.values():
            if permit.held:
                permit.release()
        for name in tuple(world.loaded):
            world.unload(name)
        assert not world.pools()


def test_a_pool_is_as_large_as_the_greatest_need() -> None:
    # The example of Triton's documentation.
    world = World("a R1:4 R2:4, b R2:5 R3:10 R4:5, c R1:1 R3:7 R4:2")
    assert world.pools() == {"R1@0": (0, 4), "R2@0": (0, 5), "R3@0": (0, 10), "R4@0": (0, 5)}
    world.unload("b")
    assert world.pools() == {"R1@0": (0, 4), "R2@0": (0, 4), "R3@0": (0, 7), "R4@0": (0, 2)}
    world.unload("a")
    world.unload("c")
    assert world.pools() == {}


def test_a_pool_is_as_large_as_the_flag_says() -> None:
    # The other example: R1 on every device, R2 on each its own, R3 global.
    world = World(
        "a R1:1 R2:1 R3:1! @0, b R1:1 R2:1 R3:1! @1",
        Resource("R1", 10), Resource("R2", 5, 0), Resource("R2", 8, 1), Resource("R3", 2),
    )  # fmt: skip
    assert world.pools() == {"R1@0": (0, 10), "R2@0": (0, 5), "R3": (0, 2), "R1@1": (0, 10), "R2@1": (0, 8)}


@pytest.mark.parametrize(
    ("instance", "resources", "limit", "needed"),
    [
        ("a R:4", [Resource("R", 3)], 3, 4),
        ("a R:4", [Resource("R", 10, 10)], 0, 4),  # of another device
        ("a R:4 @1", [Resource("R", 10, 0), Resource("R", 2)], 2, 4),
        ("a R:4!", [Resource("R", 3), Resource("R", 2, 1)], 3, 4),
    ],
)
def test_L0_rate_limiter_too_little_for_an_instance(
    instance: str, resources: list[Resource], limit: int, needed: int
) -> None:
    world = World("", *resources)
    with pytest.raises(InvalidArgument) as caught:
        world.load(instance)
    assert (
        f'Resource count for "R" is limited to {limit} which will prevent scheduling of one or more model instances, '
        f"the minimum required count is {needed}"
    ) in caught.value.message
    assert "instance a" in caught.value.message
    assert world.pools() == {}


def test_what_no_flag_names_has_its_default() -> None:
    # Triton takes it for unavailable as soon as any flag is given, against its own documentation.
    assert World("a R:1 S:4", Resource("R", 2)).pools() == {"R@0": (0, 2), "S@0": (0, 4)}


@pytest.mark.parametrize("loaded", ["b R:1", "b R:1 @1"])
def test_L0_rate_limiter_global_here_and_of_a_device_there(loaded: str) -> None:
    text = 'Resource "R" is present as both global and device-specific resource in the model configuration.'
    world = World(loaded)
    with pytest.raises(InvalidArgument, match=text):
        world.load("a R:1!")
    with pytest.raises(InvalidArgument, match=text):
        World("a R:1! R:1")
    world.unload("b")
    world.load("a R:1!")  # nobody uses it otherwise any more


def test_of_each_device_its_own_and_of_the_server_one() -> None:
    assert World("a R:1 @0, b R:1 @1, c R:1 @1").ask("abc") == "ab"
    assert World("a R:1! @0, b R:1! @1").ask("ab") == "a"


def test_all_or_nothing() -> None:
    world = World("a R:1, b R:1 S:1, c S:1")
    assert world.ask("ab") == "a"
    assert world.pools() == {"R@0": (1, 1), "S@0": (0, 1)}


def test_B2_a_permit_is_released_once_and_acquired_once() -> None:
    world = World("a R:1")
    permit = world.permits["a"]
    with pytest.raises(RuntimeError, match="not held"):
        permit.release()
    assert permit.acquire_nowait()
    with pytest.raises(RuntimeError, match="acquired twice"):
        permit.acquire_nowait()
    permit.release()
    with pytest.raises(RuntimeError, match="not held"):
        permit.release()
    assert world.pools() == {"R@0": (0, 1)}


def test_who_needs_nothing_never_waits() -> None:
    world = World("a, b, c R:1, d R:1")
    assert world.ask("cdab") == "cab"


# The order


def test_first_come_first_served_among_equals() -> None:
    world = World("a R:1, b R:1, c R:1")
    assert world.ask("acb") == "a"
    assert world.release("a") == "c"
    assert world.ask("abc") == "c"  # b and a look in vain, and keep their places
    assert world.release("c") == "b"


def test_fewest_executions_first() -> None:
    world = World("a R:1, b R:1")
    for _ in range(3):
        world.ask("a")
        world.release("a")
    world.ask("a")
    assert world.ask("b") == ""
    world.release("a")
    assert world.ask("ab") == "b"


def served(world: World, names: str, number: int) -> str:
    """``names`` always want to execute, and one can at a time."""
    found = ""
    world.ask(names)
    while len(found) < number:
        (name,) = (name for name in names if world.permits[name].held)
        found += name
        world.release(name)
        # An instance that has executed looks at once, before anybody it has woken.
        world.ask(name)
        world.ask("".join(other for other in names if not world.permits[other].held))
    world.release(next(name for name in names if world.permits[name].held))
    return found


def test_priority_2_gets_half_the_executions_of_priority_1() -> None:
    order = served(World("a R:1, b R:1 x2"), "ab", 30)
    assert (order.count("a"), order.count("b")) == (20, 10)
    order = served(World("a R:1, b R:1 x2, c R:1 x3"), "abc", 110)
    assert [order.count(name) for name in "abc"] == [60, 30, 20]


def test_who_takes_it_and_executes_nothing_has_not_had_his_turn() -> None:
    world = World("a R:1, b R:1")
    world.ask("ab")
    world.permits["a"].release(executed=False)
    world.permits["b"].leave_line()
    assert world.ask("a") == "a"
    world.ask("b")
    world.permits["a"].release(executed=False)
    assert world.ask("ab") == "b"  # a draw, and b was there first


def test_one_who_is_loaded_late_does_not_have_everything_to_himself() -> None:
    world = World("a R:1, b R:1")
    served(world, "ab", 100)
    world.load("c R:1")
    assert sorted(served(world, "abc", 9)) == list("aaabbbccc")


def test_a_newcomer_takes_what_the_line_does_not_want() -> None:
    world = World("a R:1, b R:1, c S:1, d R:1", Resource("R", 2))
    assert world.ask("ab") == "ab"
    assert world.ask("dc") == "c"  # d waits for R; nobody waits for S


def test_a_newcomer_does_not_overtake_the_one_whose_turn_it_is() -> None:
    world = World("a R:1, b R:1, c R:1")
    world.ask("ab")
    assert world.release("a") == "b"
    # b has been woken and has not looked yet: what it needs is free, and is not c's.
    assert world.ask("c") == ""
    assert world.ask("b") == "b"


def test_one_who_needs_much_is_not_passed_for_ever_by_those_who_need_little() -> None:
    world = World("a R:1, b R:1, c R:2, d S:1")
    assert world.ask("abc") == "ab"
    world.release("a")
    assert world.ask("a") == ""  # one is free, and c waits for two
    assert world.ask("d") == "d"  # which is no reason to wait for something else
    assert world.release("b") == "c"
    assert world.ask("c") == "c"


def test_what_is_more_than_the_first_needs_is_for_the_next() -> None:
    world = World("a R:2 S:1, b S:1, c R:2, d R:1", Resource("R", 5), Resource("S", 1))
    world.ask("b")
    assert world.ask("ac") == "c"  # a waits for S and has 2 of R spoken for
    assert world.ask("d") == "d"  # the fifth


def test_A4_one_who_leaves_the_line_was_never_there() -> None:
    world = World("a R:2, b R:2, c R:1")
    world.ask("a")
    world.ask("bc")
    world.permits["b"].leave_line()
    assert world.release("a") == "c"
    assert world.pools() == {"R@0": (0, 2)}
    world.permits["b"].leave_line()  # and a second time is nothing
    assert world.limiter.statistics().waiters == 1


# Loading and unloading


def test_a_pool_shrinks_when_it_can() -> None:
    world = World("a R:4, b R:2, c R:2")
    assert world.ask("bc") == "bc"
    world.unload("a")
    assert world.pools() == {"R@0": (4, 4)}  # 2 is enough for everybody who is left, and 4 are out
    world.release("b")
    assert world.pools() == {"R@0": (2, 2)}
    assert world.ask("b") == ""
    world.release("c")
    assert world.pools() == {"R@0": (0, 2)}


def test_a_pool_that_grows_serves_the_line() -> None:
    world = World("a R:2, b R:2")
    world.ask("ab")
    assert world.turns() == ""
    world.load("c R:4")
    assert world.turns() == "b"


def test_unloading_one_who_waits_lets_the_next_go_ahead() -> None:
    world = World("a R:1, b R:2, c R:1")
    world.ask("ab")
    assert world.ask("c") == ""
    world.unload("b")
    assert world.turns() == ""  # one is left, and a has it
    assert world.release("a") == "c"


def test_statistics_are_frozen() -> None:
    world = World("a R:2, b R:1")
    world.ask("ab")
    statistics = world.limiter.statistics()
    (pool,) = statistics.resources
    assert (pool.name, pool.device, pool.capacity, pool.in_use, pool.free, pool.waiters) == ("R", 0, 2, 2, 0, 1)
    with pytest.raises(AttributeError):
        pool.in_use = 0  # type: ignore[misc]
    assert str(world.permits["b"]) == "1 of 'R' (0 free)"


# Waiting in line, as a scheduler lets its instances do it


class Elsewhere(DefaultScheduler):
    """What waits here is for another instance than the one that asks."""

    def form_batch(self, now: float, seat: Seat) -> tuple[Sequence[InferenceRequest], float]:
        return (), float("inf")


async def wait_in_line(world: World, name: str, scheduler: Scheduler, scope: trio.CancelScope) -> None:
    scheduler.enqueue(admitted(make()))
    with scope:
        await scheduler.next_batch(Seat(0, world.permits[name]))


async def test_law_4_cancelled_in_the_tick_in_which_it_is_woken_it_leaves_the_line(nursery: trio.Nursery) -> None:
    world = World("a R:1, b R:1, c R:1")
    world.ask("a")
    scope = trio.CancelScope()
    nursery.start_soon(wait_in_line, world, "b", DefaultScheduler(), scope)
    await wait_all_tasks_blocked()
    world.ask("c")
    assert world.release("a") == "b"
    scope.cancel()
    await wait_all_tasks_blocked()
    assert world.turns() == "c"
    assert world.limiter.statistics().waiters == 1


async def test_woken_for_nothing_it_passes_the_turn_on_and_has_lost_none_of_its_own(nursery: trio.Nursery) -> None:
    world = World("a R:1, b R:1 x100, c R:1")
    world.ask("a")
    scope = trio.CancelScope()
    nursery.start_soon(wait_in_line, world, "b", Elsewhere(), scope)
    await wait_all_tasks_blocked()
    world.ask("c")
    assert world.release("a") == "b"
    await wait_all_tasks_blocked()
    assert world.turns() == "c"
    world.ask("cb")
    world.release("c")
    assert world.ask("c") == ""  # b has not executed: it is still before c
    scope.cancel()
