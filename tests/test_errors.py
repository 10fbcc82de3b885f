"""Errors as clients meet them, and what is made one."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from triton_trio import Outcome
from triton_trio.errors import InternalError, InvalidArgument, no_panic
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

from .callers import calling


class PanicException(BaseException):
    """As PyO3 raises it for a panic in Rust."""


PanicException.__module__ = "pyo3_runtime"


def test_a_panic_in_rust_is_an_error() -> None:
    with pytest.raises(InternalError, match=r"^it broke: PanicException: index out of bounds$"), no_panic("it broke"):
        raise PanicException("index out of bounds")
    with pytest.raises(InvalidArgument), no_panic("it broke", InvalidArgument):
        raise PanicException("index out of bounds")


@pytest.mark.parametrize("exc", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), ValueError("no")])
def test_nothing_else_is(exc: BaseException) -> None:
    with pytest.raises(type(exc)) as caught, no_panic("it broke"):
        raise exc
    assert caught.value is exc


def test_a_panic_that_comes_out_of_nurseries_is_the_same_error() -> None:
    groups = BaseExceptionGroup("", [ValueError("no"), BaseExceptionGroup("", [PanicException("index out of bounds")])])
    with pytest.raises(InternalError, match=r"^it broke: PanicException: index out of bounds$"), no_panic("it broke"):
        raise groups


@pytest.mark.parametrize("exc", [KeyboardInterrupt(), SystemExit(3)])
def test_what_must_go_on_does_with_a_panic_beside_it(exc: BaseException) -> None:
    group = BaseExceptionGroup("", [BaseExceptionGroup("", [exc]), PanicException("index out of bounds")])
    expected = pytest.RaisesGroup(pytest.RaisesGroup(type(exc)), PanicException)
    with expected as caught, no_panic("it broke"):
        raise group
    assert caught.value is group


async def test_a_cancel_goes_through() -> None:
    with trio.CancelScope() as scope, no_panic("it broke"):
        scope.cancel()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "exc", [PanicException("index out of bounds"), SystemExit("no licence")], ids=["panic", "exit"]
)
async def test_a_model_that_would_end_the_process_fails_its_request_and_the_server_goes_on(
    serve: Serve, exc: BaseException
) -> None:
    backend = ScriptedBackend()

    def panic() -> None:
        raise exc

    async with serve({"m": scripted_config()}, backend) as server:
        async with calling(server.model("m")) as callers:
            first, second = await callers.call_all("ab")
            execution = await backend.wait_execution()
            execution.call(panic)
            await first.ended.wait()
            assert isinstance(first.error, InternalError)
            assert first.error.message == f"model 'm' failed: {type(exc).__name__}: {exc}"
            (await backend.wait_execution(1)).finish()
        assert second.outcome is Outcome.OK


async def test_a_model_that_panics_when_it_is_cancelled_does_not_end_the_server(serve: Serve) -> None:
    backend = ScriptedBackend()

    async def panic_in_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise PanicException("index out of bounds")

    async def compute() -> bool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(panic_in_the_end)
            await trio.sleep_forever()

    async with serve({"m": scripted_config()}, backend) as server:
        async with calling(server.model("m")) as callers:
            first, second = await callers.call_all("ab")
            (await backend.wait_execution())._send.send_nowait(compute)
            await wait_all_tasks_blocked()
            first.leave()
            await first.ended.wait()
            (await backend.wait_execution(1)).finish()
        assert second.outcome is Outcome.OK
