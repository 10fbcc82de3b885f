"""Exceptions on their way out of nurseries that the caller did not open."""

from __future__ import annotations

import gc
import weakref

import pytest
import trio

from triton_trio.groups import WithoutGroups


async def fail(exc: BaseException) -> None:
    raise exc


async def test_what_is_alone_goes_on_alone() -> None:
    with pytest.raises(KeyError):
        with WithoutGroups(nurseries=2):
            async with trio.open_nursery(), trio.open_nursery():
                raise KeyError


async def test_what_is_not_alone_and_groups_of_the_caller_stay_as_they_are() -> None:
    with pytest.RaisesGroup(KeyError, ValueError):
        with WithoutGroups(nurseries=1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail, KeyError())
                nursery.start_soon(fail, ValueError())
    with pytest.RaisesGroup(KeyError):
        with WithoutGroups(nurseries=1):
            async with trio.open_nursery():
                raise ExceptionGroup("the caller's", [KeyError()])


async def test_one_cancel_of_several_tasks_is_one() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(trio.Cancelled):
            with WithoutGroups(nurseries=1):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    nursery.start_soon(trio.sleep_forever)
                    await trio.sleep_forever()


async def test_C7_no_group_is_left_for_the_garbage_collector() -> None:
    class Tensor:
        pass

    async def hold(scope: trio.CancelScope) -> weakref.ref[Tensor]:
        tensor = Tensor()
        with scope, WithoutGroups(nurseries=1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        return weakref.ref(tensor)

    gc.disable()
    try:
        scope = trio.CancelScope()
        scope.cancel()
        alive = await hold(scope)
        assert alive() is None
    finally:
        gc.enable()
