"""(a) CPU µs for each unary RPC, and requests a second: our identity model through the whole server, against echoes.

h2load sends the same framed ModelInferRequest (FP32, 16 values) to each server in alternating rounds, 32 streams in flight on one
connection.  The echoes have no scheduler, no validation and no cancellation; they are the price of their gRPC stack alone.
Where the nvidia-pytriton wheel is installed (in this environment, or in the one that $TRITON_PEER_VENV names), the real Triton
serves its own Python-backend identity in the same run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import tritonclient.grpc as tritonclient
from tritonclient.grpc import service_pb2 as pb

from .harness import Server, cpu_seconds, machine, percentile, save, serving, table

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TRITON_MODEL = """import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0",
                pb_utils.get_input_tensor_by_name(r, "INPUT0").as_numpy())]) for r in requests]
"""
CONFIG = """backend: "%s" max_batch_size: 0
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] } output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] }
instance_group { count: 1 kind: KIND_CPU }
"""


def write_models(root: Path, backend: str) -> Path:
    version = root / "identity" / "1"
    version.mkdir(parents=True)
    (root / "identity" / "config.pbtxt").write_text(CONFIG % backend)
    if backend == "python":
        (version / "model.py").write_text(TRITON_MODEL)
    return root


def framed_request() -> bytes:
    request = pb.ModelInferRequest(model_name="identity", id="1")
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = "INPUT0", "FP32"
    tensor.shape.append(16)
    request.raw_input_contents.append(np.arange(16, dtype=np.float32).tobytes())
    body = request.SerializeToString()
    return struct.pack(">BI", 0, len(body)) + body


@contextmanager
def real_triton(models: Path) -> Iterator[Server | None]:
    """The real Triton, if its wheel is here: the server binary inside nvidia-pytriton, on loopback, without a GPU."""
    venv = Path(os.environ.get("TRITON_PEER_VENV") or sys.prefix)
    found = sorted(venv.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    if not found:
        yield None
        return
    root = found[0]
    stub = root / "backends/python/triton_python_backend_stub"
    if not stub.exists():
        version = root.parents[2].name.removeprefix("python")
        shutil.copy(root / "python_backend_stubs" / version / "triton_python_backend_stub", stub)
    ports = {"http": 18000, "grpc": 18001, "metrics": 18002}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [
                root / "bin/tritonserver",
                f"--model-repository={models}",
                f"--backend-directory={root / 'backends'}",
                "--allow-gpu-metrics=false",
                "--backend-config=python,shm-region-prefix-name=bench",
                *(f"--{name}-address=127.0.0.1" for name in ports),
                *(f"--{name}-port={port}" for name, port in ports.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"},
        )
        try:
            with tritonclient.InferenceServerClient(f"127.0.0.1:{ports['grpc']}") as client:
                for _ in range(240):
                    try:
                        if client.is_server_ready():
                            break
                    except tritonclient.InferenceServerException:
                        if process.poll() is not None:
                            log.seek(0)
                            raise SystemExit(f"the real Triton did not start:\n{log.read().decode()[-2000:]}") from None
                    subprocess.run(["sleep", "0.25"], check=True)
            yield Server("Triton 2.51.0, Python backend", process, {"port": ports["grpc"]})  # type: ignore[arg-type]
        finally:
            process.terminate()
            process.wait(60)


def check(server: Server) -> None:
    """An answer from the stock client, so that nobody measures errors."""
    data = np.arange(16, dtype=np.float32)
    tensor = tritonclient.InferInput("INPUT0", [16], "FP32")
    tensor.set_data_from_numpy(data)
    with tritonclient.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        answer = client.infer("identity", [tensor]).as_numpy("OUTPUT0")
    assert np.array_equal(answer, data), server.name


def load(server: Server, body: Path, requests: int, streams: int) -> tuple[float, float]:
    """(CPU µs of the server for each request, requests a second)."""
    before = cpu_seconds(server.pid)
    done = subprocess.run(
        ["h2load", "-c1", f"-m{streams}", f"-n{requests}", "-d", body, "-H", "content-type: application/grpc", "-H",
         "te: trailers", f"http://127.0.0.1:{server.port}{METHOD}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    used = cpu_seconds(server.pid) - before
    counted = re.search(r"(\d+) succeeded, (\d+) failed", done.stdout)
    rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", done.stdout)
    assert counted and rate and int(counted[1]) == requests, done.stdout
    return used / requests * 1e6, float(rate[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32)
    args = parser.parse_args()
    if shutil.which("h2load") is None:
        raise SystemExit("bench rpc needs h2load (Debian: apt-get install nghttp2-client)")
    before = machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = folder / "body"
        body.write_bytes(framed_request())
        ours = write_models(folder / "ours", "identity")
        servers = [
            stack.enter_context(serving("triton_trio, identity", "-m", "bench.servers.ours", "--models", str(ours))),
            stack.enter_context(serving("grpc.aio echo", "bench/servers/grpc_aio_echo.py")),
            stack.enter_context(serving("grpclib/asyncio echo", "bench/servers/grpclib_echo.py")),
        ]
        if triton := stack.enter_context(real_triton(write_models(folder / "triton", "python"))):
            servers.append(triton)
        for server in servers:
            check(server)
            load(server, body, args.requests // 10, args.streams)
        figures: dict[str, dict[str, list[float]]] = {server.name: {"cpu_us": [], "rps": []} for server in servers}
        for _ in range(args.rounds):
            for server in servers:
                cpu, rate = load(server, body, args.requests, args.streams)
                figures[server.name]["cpu_us"].append(round(cpu, 1))
                figures[server.name]["rps"].append(round(rate))
    median = {name: percentile(rounds["cpu_us"], 50) for name, rounds in figures.items()}
    echo = median["grpc.aio echo"]
    rows = [
        [
            name,
            f"{median[name]:.0f}",
            f"{min(rounds['cpu_us']):.0f}–{max(rounds['cpu_us']):.0f}",
            f"{median[name] / echo:.2f}",
            f"{percentile(rounds['rps'], 50):.0f}",
        ]
        for name, rounds in figures.items()
    ]
    text = (
        f"{args.streams} in flight on one connection, {args.rounds} alternating rounds of {args.requests} requests; "
        "medians. CPU is the server's (with its child processes).\n\n"
        + table(["server", "CPU µs/request", "range", "× grpc.aio echo", "requests/s"], rows)
        + ("" if triton else "\n\nThe real Triton was not measured: its wheel (nvidia-pytriton) is not installed.")
    )
    ratios = {name: round(value / echo, 3) for name, value in median.items()}
    save("rpc", "python -m bench rpc", {"rounds": figures, "cpu_us_ratio_to_grpc_aio": ratios}, text, before)


if __name__ == "__main__":
    main()
