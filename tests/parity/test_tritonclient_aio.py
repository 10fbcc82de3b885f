"""``tritonclient.grpc.aio`` over a real socket; asyncio lives in the client's thread, never in the server's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from tests.parity.test_tritonclient import script_input, simple_input
from tests.parity.world import Gate, eventually, in_thread, serve_world
from triton_trio.lifecycle import Outcome

pytestmark = pytest.mark.network


async def in_asyncio(address: str, client: Callable[[triton.InferenceServerClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(15), triton.InferenceServerClient(address) as it:
            await client(it)

    await in_thread(lambda: asyncio.run(main()))


async def test_unary(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        async def client(it: triton.InferenceServerClient) -> None:
            assert await it.is_server_live()
            assert await it.is_server_ready()
            assert await it.is_model_ready("simple")
            metadata = await it.get_model_metadata("simple")
            assert metadata.inputs[0].name == "INPUT0"
            results = await asyncio.gather(
                *(it.infer("simple", simple_input(rows), request_id=str(rows)) for rows in range(1, 9))
            )
            for rows, result in enumerate(results, 1):
                assert result.get_response().id == str(rows)
                np.testing.assert_array_equal(
                    result.as_numpy("OUTPUT0"), np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
                )
            statistics = await it.get_inference_statistics("simple")
            assert statistics.model_stats[0].inference_count == 36
            with pytest.raises(InferenceServerException, match=r"Request for unknown model: 'nope' is not found"):
                await it.infer("nope", simple_input())

        await in_asyncio(address, client)


async def test_a_stream(tmp_path: Path) -> None:
    async with serve_world(tmp_path / "models") as (_server, address):

        async def requests() -> AsyncIterator[dict[str, Any]]:
            await asyncio.sleep(0)
            for index in range(3):
                yield {"model_name": "repeat", "inputs": script_input(index), "request_id": str(index)}
            yield {"model_name": "nope", "inputs": script_input(1), "request_id": "bad"}

        async def client(it: triton.InferenceServerClient) -> None:
            seen: dict[str, list[int]] = {"0": [], "1": [], "2": []}
            errors = []
            async for result, error in it.stream_infer(requests()):
                if error is not None:
                    errors.append(error.message())
                    continue
                seen[result.get_response().id].append(int(result.as_numpy("OUT")[0]))
            assert seen == {"0": [], "1": [0], "2": [0, 1]}
            assert errors == ["Request for unknown model: 'nope' is not found"]

        await in_asyncio(address, client)


async def wait_held(gate: Gate, held: threading.Event) -> None:
    await gate.wait_held()
    held.set()


async def test_cancelling_the_task_of_a_call(tmp_path: Path) -> None:
    gate = Gate()
    held = threading.Event()
    async with serve_world(tmp_path / "models", {"once": gate}) as (server, address), trio.open_nursery() as nursery:

        async def client(it: triton.InferenceServerClient) -> None:
            call = asyncio.create_task(it.infer("once", script_input(1)))
            await asyncio.to_thread(held.wait)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await it.is_server_ready()

        nursery.start_soon(wait_held, gate, held)
        await in_asyncio(address, client)
        await eventually(lambda: server.statistics().in_flight == 0)
        counters = server.model("once").counters
        assert counters.outcomes == {Outcome.CANCELLED: 1}
        assert counters.reasons == {("client_reset", "executing"): 1}


async def test_cancelling_a_stream(tmp_path: Path) -> None:
    gate = Gate()
    held = threading.Event()
    async with serve_world(tmp_path / "models", {"repeat": gate}) as (server, address), trio.open_nursery() as nursery:

        async def requests() -> AsyncIterator[dict[str, Any]]:
            await asyncio.sleep(0)
            for index in range(3):
                yield {"model_name": "repeat", "inputs": script_input(index)}

        async def client(it: triton.InferenceServerClient) -> None:
            responses = it.stream_infer(requests())
            reading = asyncio.ensure_future(anext(responses))
            await asyncio.to_thread(held.wait)
            assert responses.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

        nursery.start_soon(wait_held, gate, held)
        await in_asyncio(address, client)
        await eventually(lambda: server.statistics().in_flight == 0)
        assert set(server.model("repeat").counters.outcomes) == {Outcome.CANCELLED}
