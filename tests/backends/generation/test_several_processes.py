"""Two processes, each with half of a model, say what one process says: the real server, with a real client."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as tritonclient

from .served import CHUNK, SLOTS, alone, drawn, write_language_model

TOKENS = 30


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def processes(root: Path) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """Process 0 and 1, and the address of the server; killed at the end, if they have not ended."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    flags = [f"--coordinator=127.0.0.1:{free_port()}", f"--plan-port={free_port()}", "--processes=2"]
    flags.append(f"--model={root / 'llm' / '1'}")
    server = [f"--model-repository={root}", "--grpc-address=127.0.0.1", "--grpc-port=0"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "triton_trio.several_hosts", *flags, f"--process={number}", *more],
            env=environment,
            stderr=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number, more in enumerate((server, []))
    ]
    try:
        log = started[0].stderr
        assert log is not None
        found = next(filter(None, (re.search(r"Started GRPCInferenceService at (\S+)", line) for line in log)))
        yield started, found[1]
    finally:
        for process in started:
            process.kill()
            process.communicate()


class Reader:
    """A client with one text."""

    def __init__(self, address: str, number: int) -> None:
        self.ids: list[int] = []
        self._answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._client = tritonclient.InferenceServerClient(address)
        self._client.start_stream(lambda result, error: self._answers.put(error or result))
        tensors = []
        for name, value in drawn(number, tokens=TOKENS).items():
            kind = {"int32": "INT32", "float32": "FP32", "uint64": "UINT64", "bool": "BOOL"}[str(value.dtype)]
            tensors.append(tritonclient.InferInput(name, value.shape, kind).set_data_from_numpy(value))
        self._client.async_stream_infer("llm", tensors)

    def read(self, count: int) -> None:
        while len(self.ids) < count:
            answer = self._answers.get(timeout=30)
            assert isinstance(answer, tritonclient.InferResult), str(answer)
            self.ids += np.atleast_1d(answer.as_numpy("token_id")).tolist()

    def leave(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


@pytest.mark.network
def test_two_processes_say_what_one_says_and_a_cancel_is_the_same_record_on_both(tmp_path: Path) -> None:
    write_language_model(tmp_path, tensor_parallel=2, slots=SLOTS, prefill_chunk=CHUNK)
    with processes(tmp_path) as (started, address):
        readers = [Reader(address, number) for number in range(SLOTS)]
        readers[1].read(5)
        readers[1].leave()
        readers.append(Reader(address, SLOTS))  # in the slot of the one who has left
        for number in (0, 2, 3):
            readers[number].read(TOKENS)
            assert readers[number].ids == alone(number, tokens=TOKENS)[0]
            readers[number].leave()
        assert readers[1].ids == alone(1, tokens=TOKENS)[0][: len(readers[1].ids)]
        started[0].send_signal(signal.SIGTERM)
        assert [process.wait(20) for process in started] == [0, 0]
