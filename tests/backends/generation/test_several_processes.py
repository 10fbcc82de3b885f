"""Two processes, each with half of a model, say what one process says: the real server, with a real client."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as tritonclient

from .served import CHUNK, SLOTS, alone, drawn, write_language_model
from .test_weights import MODEL, write_directory
from .tiny import random_tensors

TOKENS = 30
#: A process 1 that has joined the others, and does nothing more.
JOINED = """
import sys, jax
from triton_trio.backends.jax.generation.hosts import Hosts, join
join(Hosts.at(sys.argv[1], 2, 1))
jax.devices()
print("joined", file=sys.stderr, flush=True)
sys.stdin.read()
"""
#: A process 0 that loads parameters.
LOADS = """
import sys, jax, numpy
from triton_trio.backends.jax.generation.hosts import Hosts, join
from triton_trio.backends.jax.generation.placement import Placement
from triton_trio.backends.jax.generation.weights import quantise
join(Hosts.at(sys.argv[1], 2, 0))
matrix = numpy.arange(12, dtype=numpy.float32).reshape(2, 6)
placement = Placement.on(jax.devices())
for name, weight in ("norm", matrix[0]), ("q", matrix), ("down", matrix), ("up", quantise(matrix, axis=0)):
    for leaf in jax.tree.leaves(placement.put(name, weight)):
        print(name, [shard.data.tolist() for shard in leaf.addressable_shards], file=sys.stderr, flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Process:
    """A process with one device; whatever becomes of it, it is killed after a minute."""

    def __init__(self, *arguments: str) -> None:
        environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.log = ""
        self.signal = self._process.send_signal
        self._limit = threading.Timer(60, self._process.kill)
        self._limit.start()

    def wait_for(self, pattern: str) -> str:
        """The first group in the line that says so."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log += line
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"it never said {pattern}: {self.log}")

    def ended(self, within: float = 20) -> int:
        """Its status, and all that it has said is in ``log``."""
        _, rest = self._process.communicate(timeout=within)
        self.log += rest
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._limit.cancel()
        self._limit.join()


@contextmanager
def killed_at_the_end(*processes: Process) -> Iterator[tuple[Process, ...]]:
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def process_of(number: int, root: Path, coordinator: str, *flags: str) -> Process:
    server = [f"--model-repository={root}", "--grpc-address=127.0.0.1", "--grpc-port=0"] if number == 0 else []
    where = [f"--coordinator={coordinator}", "--processes=2", f"--process={number}", f"--model={root / 'llm' / '1'}"]
    return Process("-m", "triton_trio.several_hosts", *where, *flags, *server)


@contextmanager
def processes(root: Path) -> Iterator[tuple[Process, Process, str]]:
    """Process 0 and 1, and the address of the server."""
    write_language_model(root, tensor_parallel=2, slots=SLOTS, prefill_chunk=CHUNK)
    coordinator, port = f"127.0.0.1:{free_port()}", f"--plan-port={free_port()}"
    with killed_at_the_end(*(process_of(number, root, coordinator, port) for number in range(2))) as (leader, follower):
        yield leader, follower, leader.wait_for(r"Started GRPCInferenceService at (\S+)")


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
    with processes(tmp_path) as (leader, follower, address):
        readers = [Reader(address, number) for number in range(SLOTS)]
        readers[1].read(5)
        readers[1].leave()
        readers.append(Reader(address, SLOTS))  # in the slot of the one who has left
        for number in (0, 2, 3):
            readers[number].read(TOKENS)
            assert readers[number].ids == alone(number, tokens=TOKENS)[0]
            readers[number].leave()
        assert readers[1].ids == alone(1, tokens=TOKENS)[0][: len(readers[1].ids)]
        leader.signal(signal.SIGTERM)
        assert (leader.ended(), follower.ended()) == (0, 0), leader.log + follower.log


@pytest.mark.network
def test_sigterm_ends_a_follower_and_the_leader_that_has_lost_it(tmp_path: Path) -> None:
    with processes(tmp_path) as (leader, follower, _):
        follower.signal(signal.SIGTERM)
        assert follower.ended() == -signal.SIGTERM
        leader.wait_for("(the connection to process 1 is lost)")
        leader.signal(signal.SIGTERM)
        assert leader.ended() == 0


@pytest.mark.network
def test_sigterm_ends_the_leader_before_it_serves(tmp_path: Path) -> None:
    write_language_model(tmp_path, tensor_parallel=2)
    coordinator = f"127.0.0.1:{free_port()}"
    with killed_at_the_end(process_of(0, tmp_path, coordinator), Process("-c", JOINED, coordinator)) as (leader, other):
        other.wait_for("(joined)")
        leader.signal(signal.SIGTERM)
        assert leader.ended() == -signal.SIGTERM


@pytest.mark.network
def test_no_process_waits_for_another_while_it_loads() -> None:
    """The other one has joined, and does nothing more."""
    coordinator = f"127.0.0.1:{free_port()}"
    with killed_at_the_end(Process("-c", LOADS, coordinator), Process("-c", JOINED, coordinator)) as (loads, _):
        assert loads.wait_for("norm (.*)") == "[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]"
        assert loads.wait_for("q (.*)") == "[[[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]]"
        assert loads.wait_for("down (.*)") == "[[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]]"
        assert loads.wait_for("up (.*)") == "[[[0, 18, 32], [127, 127, 127]]]"
        assert loads.wait_for("up (.*)").startswith("[[0.04724")


def other_options(root: Path) -> None:
    write_language_model(root, tensor_parallel=2, dtype="int8")


def other_weights(root: Path) -> None:
    write_language_model(root, tensor_parallel=2)
    write_directory(root / "llm" / "1", random_tensors(MODEL, seed=1))


def fewer_layers(root: Path) -> None:
    write_language_model(root, tensor_parallel=2)
    shallow = replace(MODEL, layers=1)
    write_directory(root / "llm" / "1", random_tensors(shallow), num_hidden_layers=1)


@pytest.mark.network
@pytest.mark.parametrize("write", [other_options, other_weights, fewer_layers])
def test_a_follower_with_another_model_is_refused_by_name_and_all_end(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    roots = tmp_path / "one", tmp_path / "other"
    write_language_model(roots[0], tensor_parallel=2)
    write(roots[1])
    coordinator = f"127.0.0.1:{free_port()}"
    with killed_at_the_end(*(process_of(*which, coordinator) for which in enumerate(roots))) as (leader, follower):
        assert (leader.ended(), follower.ended()) == (1, 1), leader.log + follower.log
    what = "other options (" if write is other_options else "another model ("
    assert f"failed to load 'llm': process 1 has {what}" in leader.log
    assert f"triton_trio: process 0 has {what}" in follower.log
