"""triton_trio with gRPC on a free port, and a line of JSON in, a line of JSON out on the standard streams.

Executions, cancels and their times (CLOCK_MONOTONIC, shared by all processes of the machine) are recorded where they
happen: a wrapper around each backend instance, and the cancel log.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from bench.harness import rss_bytes
from triton_trio import open_server
from triton_trio._process import calm_garbage_collector, keep_large_buffers
from triton_trio.backends import DEFAULT_BACKENDS, Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch
from triton_trio.grpc.frontend import serve_grpc
from triton_trio.request import InferenceRequest, InferenceResponse
from triton_trio.server import InferenceServer

EVENTS: list[tuple[str, str, int]] = []


class RecordedInstance(BackendInstance):
    def __init__(self, inner: BackendInstance) -> None:
        self._inner = inner
        self.abandon = inner.abandon  # type: ignore[method-assign]

    async def execute(self, batch: Batch) -> None:
        ids = ",".join(member.request.request_id for member in batch.members)
        EVENTS.append(("start", ids, time.monotonic_ns()))
        try:
            await self._inner.execute(batch)
        finally:
            EVENTS.append(("end", ids, time.monotonic_ns()))


class RecordedModel(BackendModel):
    def __init__(self, inner: BackendModel) -> None:
        self._inner = inner

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[BackendInstance]:
        async with self._inner.open_instance(placement) as instance:
            yield RecordedInstance(instance)


class RecordedBackend(Backend):
    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.auto_complete = inner.auto_complete  # type: ignore[method-assign]

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[BackendModel]:
        async with self._inner.open_model(context) as model:
            yield RecordedModel(model)


def record_requests() -> None:
    """Note when each request is settled by a cancel, and when it is handed a response: in the functions that do it."""
    settle = InferenceRequest.settle

    def recorded(self: InferenceRequest, *args: object) -> bool:
        first = settle(self, *args)  # type: ignore[arg-type]
        if first and self.reason is not None:
            EVENTS.append(("settled", self.request_id, time.monotonic_ns()))
        return first

    deliver = InferenceRequest.deliver_nowait

    def delivered(self: InferenceRequest, response: InferenceResponse) -> None:
        if self.outcome is None:
            EVENTS.append(("response", self.request_id, time.monotonic_ns()))
        deliver(self, response)

    InferenceRequest.settle = recorded  # type: ignore[method-assign]
    InferenceRequest.deliver_nowait = delivered  # type: ignore[method-assign]


async def answer_questions(server: InferenceServer) -> None:
    """``{"ask": "events" | "stats" | "wait_idle" | "wait_in_flight", ...}``, one a line."""
    while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
        question = json.loads(line)
        ask = question["ask"]
        answer: dict[str, object] = {}
        if ask == "events":
            answer["events"] = EVENTS.copy()
            EVENTS.clear()
        elif ask == "stats":
            answer = {"in_flight": server.statistics().in_flight, "rss": rss_bytes(os.getpid())}
        elif ask in ("wait_idle", "wait_in_flight"):
            wanted = question.get("count", 0)
            while server.statistics().in_flight != wanted:  # noqa: ASYNC110 - looks from outside
                await trio.sleep(0.0005)
            answer["ns"] = time.monotonic_ns()
        elif ask == "drop":
            # Mass cancel from inside: what one cancel costs the loop, without the network.
            live = [request for model in server.repository.loaded() for request in model._live]
            began = time.perf_counter()
            for request in live:
                request.cancel()
            answer = {"count": len(live), "seconds": time.perf_counter() - began}
        print(json.dumps(answer), flush=True)


async def main() -> None:
    keep_large_buffers()  # as the command line does
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", required=True)
    parser.add_argument("--load", action="append", default=[])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    backends = {}
    logging.getLogger("triton_trio.cancel").setLevel(logging.WARNING)
    if args.record:
        backends = {
            name: lambda maker=maker: RecordedBackend(maker())  # type: ignore[misc]
            for name, maker in DEFAULT_BACKENDS.items()
        }
        record_requests()
    async with open_server(args.models, explicit=bool(args.load), load_models=args.load, backends=backends) as server:
        addresses = await serve_grpc(server, host="127.0.0.1", port=0)
        calm_garbage_collector()
        print("READY", json.dumps({"port": int(addresses[0].rpartition(":")[2])}), flush=True)
        async with trio.open_nursery() as nursery:
            # Owner: this nursery; ended by the signal below.
            nursery.start_soon(answer_questions, server, name="questions")
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel(reason="stopped")


trio.run(main)
