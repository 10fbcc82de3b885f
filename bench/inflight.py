"""(d) 10,000 requests in flight over 100 connections: memory for each, and what it costs to cancel them all.

The client process opens the calls with our own channel; the server's one instance is busy for ever, so all but one wait in
the queue.  Then everything is cancelled, in two ways: each call by RST_STREAM, and from inside in one loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from .harness import Server, cpu_seconds, machine, percentile, save, serving, table

CONFIG = """backend: "identity" max_batch_size: 0
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] } output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] }
parameters { key: "execute_delay_ms" value { string_value: "100000000" } }
"""


SIZES = ((100, 1), (1_000, 10), (10_000, 100))


async def client(port: int, connections: int, requests: int) -> None:
    """Open the calls, wait for a line on standard input, reset them all, print when the last was left."""
    from triton_trio._pb import inference as pb
    from triton_trio._pb.inference_grpc import GrpcInferenceServiceStub
    from triton_trio.grpc.channel import open_channel

    tensor = pb.ModelInferRequestInferInputTensor(name="INPUT0", datatype="FP32", shape=[16])
    message = pb.ModelInferRequest(model_name="identity", inputs=[tensor], raw_input_contents=[bytes(64)])
    async with trio.open_nursery() as nursery:

        async def connection(calls: int) -> None:
            async with open_channel("127.0.0.1", port) as channel, trio.open_nursery() as inner:
                stub = GrpcInferenceServiceStub(channel)
                for _ in range(calls):
                    inner.start_soon(stub.model_infer, message, name="call")
                await trio.sleep_forever()

        for _ in range(connections):
            nursery.start_soon(connection, requests // connections, name="connection")
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


def measure(server: Server, requests: int, connections: int) -> dict[str, float]:
    idle = server.ask(ask="stats")["rss"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.inflight", "--client", json.dumps([server.port, connections, requests])],
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    began = time.monotonic()
    server.ask(ask="wait_in_flight", count=requests)
    opened = time.monotonic() - began
    full = server.ask(ask="stats")["rss"]
    cpu = cpu_seconds(server.pid)
    reset = time.monotonic_ns()
    process.stdin.write("\n")
    process.stdin.flush()
    idle_at = server.ask(ask="wait_idle")["ns"]
    cpu = cpu_seconds(server.pid) - cpu
    process.wait(60)
    return {
        "requests": requests,
        "connections": connections,
        "open_s": round(opened, 2),
        "kib_per_request": round((full - idle) / requests / 1024, 2),
        "reset_all_ms": round((idle_at - reset) / 1e6, 1),
        "server_cpu_us_per_reset": round(cpu / requests * 1e6, 1),
    }


def from_inside(server: Server, requests: int, connections: int) -> dict[str, float]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.inflight", "--client", json.dumps([server.port, connections, requests])],
        stdin=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    server.ask(ask="wait_in_flight", count=requests)
    answer = server.ask(ask="drop")
    server.ask(ask="wait_idle")
    process.kill()
    process.wait(60)
    return {"us_per_cancel": round(answer["seconds"] / answer["count"] * 1e6, 2)}


def row(server: Server, requests: int, connections: int) -> dict[str, float]:
    """Three rounds: the first one's memory (later ones find it in the allocator), the best time of a cancel, medians."""
    rounds = [measure(server, requests, connections) | from_inside(server, requests, connections) for _ in range(3)]
    row = {key: percentile([each[key] for each in rounds], 50) for key in rounds[0]}
    row["kib_per_request"] = rounds[0]["kib_per_request"]
    row["us_per_cancel"] = min(each["us_per_cancel"] for each in rounds)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        trio.run(client, *json.loads(args.client))
        return
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "identity"
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(CONFIG)
        with serving("triton_trio", "-m", "bench.servers.ours", "--models", folder) as server:
            rows = [row(server, requests, connections) for requests, connections in SIZES]
    text = table(list(rows[0]), [list(row.values()) for row in rows]) + (
        "\n\nreset_all: from telling the client to reset every call until the server has none in flight (client and server share "
        "two cores, so it includes the client's own work). us_per_cancel: `request.cancel()` in a loop inside the server, "
        "network excluded."
    )
    save("inflight", "python -m bench inflight", {"rows": rows}, text, before)


if __name__ == "__main__":
    main()
