"""The stock ``tritonclient``, seen from Trio: calls whose answers arrive as Trio events."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic_ns
from typing import Any

import numpy as np
import trio
import tritonclient.grpc as tritonclient
from tritonclient.grpc import InferenceServerException, InferInput, InferResult
from tritonclient.utils import np_to_triton_dtype

Inputs = Mapping[str, np.ndarray[Any, Any]]


def to_inputs(arrays: Inputs) -> list[InferInput]:
    """tritonclient's input objects for arrays by tensor name."""
    inputs = []
    for name, array in arrays.items():
        tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


class Call:
    """One ``async_infer``.  Its callback runs in a thread of gRPC's; :attr:`done` is set in Trio's."""

    def __init__(
        self,
        client: tritonclient.InferenceServerClient,
        model: str,
        arrays: Inputs,
        *,
        request_id: str = "",
        timeout: float | None = None,
        sequence_id: int = 0,
        sequence_start: bool = False,
    ) -> None:
        self.request_id = request_id
        self.done = trio.Event()
        self.result: InferResult | None = None
        self.error: InferenceServerException | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._context = client.async_infer(
            model,
            to_inputs(arrays),
            callback=self._answered,
            request_id=request_id,
            client_timeout=timeout,
            sequence_id=sequence_id,
            sequence_start=sequence_start,
        )

    def cancel(self) -> None:
        """The client's cancel: gRPC sends RST_STREAM."""
        self._context.cancel()

    def _answered(self, result: InferResult | None, error: InferenceServerException | None) -> None:
        def finish() -> None:
            self.result, self.error = result, error
            self.done.set()

        with suppress(trio.RunFinishedError):  # the demo has failed and gone
            self._token.run_sync_soon(finish)

    async def output(self, name: str) -> np.ndarray[Any, Any]:
        """The named output of the answer; raises the client's error."""
        await self.done.wait()
        if self.result is None:
            raise RuntimeError(f"request {self.request_id!r} failed: {self.error!r}")
        array: np.ndarray[Any, Any] = self.result.as_numpy(name)
        return array


class StreamCall:
    """One request on a stream of its own."""

    def __init__(self, address: str, model: str, arrays: Inputs, *, request_id: str) -> None:
        self._client = tritonclient.InferenceServerClient(address)
        token = trio.lowlevel.current_trio_token()
        sender, self._responses = trio.open_memory_channel[InferResult | InferenceServerException](inf)

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(sender.send_nowait, error if result is None else result)

        self._client.start_stream(answered)
        self._client.async_stream_infer(model, to_inputs(arrays), request_id=request_id)

    async def response(self) -> InferResult:
        """The next response; raises the client's error."""
        response = await self._responses.receive()
        if isinstance(response, Exception):
            raise RuntimeError(f"the stream failed: {response!r}")
        return response

    async def cancel(self) -> int:
        """``stop_stream(cancel_requests=True)``, which waits for the client's own thread; returns when it was called."""

        def stop() -> int:
            began = monotonic_ns()
            self._client.stop_stream(cancel_requests=True)
            return began

        return await trio.to_thread.run_sync(stop)

    def close(self) -> None:
        self._client.close()


class Victim:
    """A client in a process of its own, to be killed."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, nursery: trio.Nursery, address: str, model: str, request_id: str, sweeps: int) -> Victim:
        """Run this module as a program."""
        command = [sys.executable, "-m", __name__, address, model, request_id, str(sweeps)]
        # Owner: the scene's nursery; ends when the process has been killed.
        process: trio.Process = await nursery.start(partial(trio.run_process, command, check=False))
        return cls(process)

    def kill(self) -> None:
        """SIGKILL: no goodbye, the kernel closes the socket."""
        os.kill(self._process.pid, signal.SIGKILL)


def main(address: str, model: str, request_id: str, sweeps: str) -> None:
    from .pictures import damage, damaged, landscape

    mask = damage()
    with tritonclient.InferenceServerClient(address) as client:
        client.infer(
            model,
            to_inputs(
                {
                    "IMAGE": damaged(landscape(), mask)[None],
                    "MASK": mask[None],
                    "SWEEPS": np.array([[int(sweeps)]], np.int32),
                }
            ),
            request_id=request_id,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
