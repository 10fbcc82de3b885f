"""Errors as clients meet them, and what is made one."""

from __future__ import annotations

import pytest
import trio

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


async def test_a_cancel_goes_through() -> None:
    with trio.CancelScope() as scope, no_panic("it broke"):
        scope.cancel()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_a_model_that_panics_fails_its_request_and_the_server_goes_on(serve: Serve) -> None:
    backend = ScriptedBackend()

    def panic() -> None:
        raise PanicException("index out of bounds")

    async with serve({"m": scripted_config()}, backend) as server:
        async with calling(server.model("m")) as callers:
            first, second = await callers.call_all("ab")
            execution = await backend.wait_execution()
            execution.call(panic)
            await first.ended.wait()
            assert isinstance(first.error, InternalError)
            assert first.error.message == "model 'm' failed: PanicException: index out of bounds"
            (await backend.wait_execution(1)).finish()
        assert second.outcome is Outcome.OK
