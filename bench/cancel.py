"""(b) From the client's cancel to what it frees: a queued, an executing and a streaming request.

A grpcio client in this process cancels; the server process notes, on the same clock, when the request was settled and when
the next execution began.  The model is a JAX step model at the default chunk target, so "executing" ends at a chunk boundary.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from .harness import Server, machine, save, serving, spread, table

LONG = 1_000_000
ids = itertools.count()


def request(model: str, steps: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, id=f"r{next(ids)}")
    tensor = message.inputs.add()
    tensor.name, tensor.datatype = "INPUT0", "FP32"
    tensor.shape.extend([1, 1])
    message.raw_input_contents.append(np.array([steps], np.float32).tobytes())
    return message


class Watch:
    """The server's events; waits by asking, outside of any interval that is measured."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.events: list[tuple[str, str, int]] = []

    def until(self, kind: str, request_id: str) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for event, ident, ns in self.events:
                if event == kind and ident == request_id:
                    return ns
            time.sleep(0.02)  # asking keeps the server busy: not in the very moment that is measured
            self.events += [tuple(event) for event in self._server.ask(ask="events")["events"]]
        raise SystemExit(f"no event {kind} for {request_id}; got {self.events[-20:]}")

    def count_after(self, kind: str, request_id: str, ns: int) -> int:
        return sum(event == kind and ident == request_id and at > ns for event, ident, at in self.events)

    def in_flight(self, count: int) -> None:
        self._server.ask(ask="wait_in_flight", count=count)


def queued(stub: Any, watch: Watch, server: Server) -> dict[str, float]:
    """The instance is busy, the queue (of one) is full; the queued one is cancelled, and the next is accepted."""
    running, waiting, following = request("slow", LONG), request("slow", 1), request("slow", 1)
    first = stub.ModelInfer.future(running)
    watch.until("start", running.id)
    second = stub.ModelInfer.future(waiting)
    watch.in_flight(2)
    cancelled = time.monotonic_ns()
    second.cancel()
    settled = watch.until("settled", waiting.id)
    third = stub.ModelInfer.future(following)  # REJECTED if the cancelled one still had its place
    watch.in_flight(2)
    first.cancel()
    third.result(30)
    server.ask(ask="wait_idle")
    return {"settled": (settled - cancelled) / 1e6}


def executing(stub: Any, watch: Watch, server: Server) -> dict[str, float]:
    """The executing request is cancelled; one waits for the instance."""
    running, waiting = request("slow", LONG), request("slow", 1)
    first = stub.ModelInfer.future(running)
    watch.until("start", running.id)
    second = stub.ModelInfer.future(waiting)
    watch.in_flight(2)
    cancelled = time.monotonic_ns()
    first.cancel()
    second.result(30)
    settled, began = watch.until("settled", running.id), watch.until("start", waiting.id)
    server.ask(ask="wait_idle")
    return {"settled": (settled - cancelled) / 1e6, "next_start": (began - cancelled) / 1e6}


def streaming(stub: Any, watch: Watch, server: Server) -> dict[str, float]:
    """A stream is cancelled after five responses; another request waits for the instance."""
    running, waiting = request("slow_stream", LONG), request("slow_stream", 1)
    first = stub.ModelStreamInfer(iter([running]))
    for _ in range(5):
        next(first)
    second = stub.ModelStreamInfer(iter([waiting]))
    watch.in_flight(2)
    cancelled = time.monotonic_ns()
    first.cancel()
    list(second)
    settled, began = watch.until("settled", running.id), watch.until("start", waiting.id)
    server.ask(ask="wait_idle")
    return {
        "settled": (settled - cancelled) / 1e6,
        "next_start": (began - cancelled) / 1e6,
        "responses_after": watch.count_after("response", running.id, cancelled),
        "responses_after_settled": watch.count_after("response", running.id, settled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=100)
    args = parser.parse_args()
    # One core for the device, one for everybody else: on two cores XLA's threads would otherwise stand in for a host that is
    # busy, and a device of its own is what is to be measured.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    before = machine()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with serving("triton_trio", "-m", "bench.servers.ours", "--models", "bench/models", "--record") as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub, watch = pb_grpc.GRPCInferenceServiceStub(channel), Watch(server)
            for scenario in (queued, executing, streaming):
                runs = [scenario(stub, watch, server) for _ in range(args.repeat + 3)][3:]
                figures[scenario.__name__] = {key: spread([run[key] for run in runs]) for key in runs[0]}
    rows = [
        [name, key.replace("_", " "), *(measure[q] for q in ("p50", "p90", "p99", "max"))]
        for name, measures in figures.items()
        for key, measure in measures.items()
    ]
    text = (
        f"{args.repeat} cancels each, milliseconds from the client's `cancel()` (counts for responses). settled: the "
        "request is out of its queue or batch and its client is answered; next start: the instance began its next execution.\n\n"
        + table(["cancelled while", "until", "p50", "p90", "p99", "max"], rows)
    )
    save("cancel", "python -m bench cancel", figures, text, before)


if __name__ == "__main__":
    main()
