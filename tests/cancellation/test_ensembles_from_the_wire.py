"""The whole path, from the bytes of a client to a step that waits in the queue of another model (A1, A7, server#6739)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.cancellation.test_from_the_wire import INFER, LEAVING, STREAM, TIMEOUT, Leave, status
from tests.ensemble.world import FAMILY, Steps, ensemble_config, in_flight, reasons, step
from tests.grpc.wire import World, message
from tests.parity.world import infer_message
from triton_trio import InferenceServer, Outcome
from triton_trio._pb import inference as pb
from triton_trio.grpc import GrpcOptions, GrpcServer, UpbCodec
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.grpc.service_metadata import model_statistics
from triton_trio.testing import ScriptedBackend, open_test_server, scripted_config


@asynccontextmanager
async def open_wire(
    root: Path, models: dict[str, str], backend: ScriptedBackend
) -> AsyncIterator[tuple[InferenceServer, World]]:
    async with open_test_server(root, models, backend) as server:
        grpc = GrpcServer([GrpcInferenceService(server)], codec=UpbCodec(), options=GrpcOptions())
        async with trio.open_nursery() as nursery:
            yield server, World(grpc, None, nursery)  # type: ignore[arg-type]
            await wait_all_tasks_blocked()
            end = grpc.statistics()
            assert (end.open_streams, end.running, end.queued, end.incomplete) == (0, 0, 0, 0)
            nursery.cancel_scope.cancel()


def infer(model: str, request_id: str = "", rows: int = 1) -> bytes:
    request = infer_message(model, {"INPUT0": np.zeros((rows, 2), np.float32)}, id=request_id)
    return UpbCodec().encode(request, pb.ModelInferRequest)


@LEAVING
async def test_A7_a_client_that_leaves_takes_its_step_out_of_the_queue_of_another_model(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    models = {
        "pre": scripted_config(max_batch_size=1),
        "busy": scripted_config(max_batch_size=1, batching="default_queue_policy { max_queue_size: 1 }"),
        "e": ensemble_config(step("pre", "INPUT0", "x"), step("busy", "x", "OUTPUT0"), max_batch_size=1),
    }
    async with open_wire(tmp_path, models, backend) as (server, world):
        holder, client = await world.connect(), await world.connect()
        held = await holder.start(INFER, infer("busy"))
        gone = await client.start(INFER, infer("e"), extra=TIMEOUT)
        await Steps(backend).finish("pre")
        assert len(server.model("busy").scheduler) == 1
        await leave(client, gone, mock_clock)
        await wait_all_tasks_blocked()
        # The instance has not moved: nothing but the client's bytes has done this, across two models.
        assert len(server.model("busy").scheduler) == 0
        assert in_flight(server) == {"busy": 1}
        assert reasons(server) == {"e": {(reason, "executing")}, "busy": {(reason, "queued")}}
        following = await holder.start(INFER, infer("e"))
        await Steps(backend).finish("pre")
        for _ in range(2):
            await Steps(backend).finish("busy")
        assert (status(holder, held), status(holder, following)) == (0, 0)
        assert server.model("e").counters.outcomes == {outcome: 1, Outcome.OK: 1}


@LEAVING
async def test_A7_and_stops_what_executes_two_ensembles_away(
    leave: Leave, reason: str, outcome: Outcome, tmp_path: Path, mock_clock: MockClock
) -> None:
    backend = ScriptedBackend()
    steps = Steps(backend)
    async with open_wire(tmp_path, dict(FAMILY), backend) as (server, world):
        client = await world.connect()
        gone = await client.start(INFER, infer("family"), extra=TIMEOUT)
        await steps.finish("pre")
        assert steps.running == ["left", "one"]
        await leave(client, gone, mock_clock)
        await wait_all_tasks_blocked()
        assert backend.running == []
        assert in_flight(server) == {}
        assert reasons(server) == {name: {(reason, "executing")} for name in ("family", "inner", "left", "one")}


async def test_the_error_of_a_step_reaches_the_client_once(tmp_path: Path) -> None:
    backend = ScriptedBackend()
    models = {**FAMILY, "one": scripted_config(max_batch_size=4, batching="default_queue_policy { max_queue_size: 1 }")}
    async with open_wire(tmp_path, models, backend) as (_, world):
        client = await world.connect()
        busy = [await client.start(INFER, infer("one")) for _ in range(2)]
        failing = await client.start(INFER, infer("family", "7"))
        await Steps(backend).finish("pre")
        assert status(client, failing) == 14
        assert client.answers[failing].text == (
            "in ensemble 'family', in ensemble 'inner', [request id: 7] Exceeds maximum queue size"
        )
        for _ in busy:
            await Steps(backend).finish("one")
        assert [status(client, call) for call in busy] == [0, 0]


async def test_a_stream_of_an_ensemble_and_its_reset(tmp_path: Path) -> None:
    backend = ScriptedBackend()
    models = {
        "source": scripted_config(max_batch_size=1, decoupled=True),
        "after": scripted_config(max_batch_size=1),
        "e": ensemble_config(
            step("source", "INPUT0", "x"), step("after", "x", "OUTPUT0"), max_batch_size=1, max_inflight_requests=4
        ),
    }
    async with open_wire(tmp_path, models, backend) as (server, world):
        client = await world.connect()
        head = client.headers(STREAM)
        await client.send(head, client.data(head.stream_id, message(infer("e", "7"))))
        source = await backend.wait_execution()
        for _ in range(32):
            source.emit()
        await wait_all_tasks_blocked()
        await Steps(backend).finish("after")
        (reply,) = client.answers[head.stream_id].messages
        response = UpbCodec().decode(reply, pb.ModelStreamInferResponse).infer_response
        assert (response.id, response.model_name) == ("7", "e")
        assert response.parameters["triton_final_response"].bool_param is False
        await client.reset(head.stream_id)
        assert in_flight(server) == {}
        assert backend.running == []
        assert len(client.answers[head.stream_id].messages) == 1


@pytest.mark.parametrize("name", ["family", ""])
async def test_statistics_show_ensembles_beside_their_steps(tmp_path: Path, name: str) -> None:
    backend = ScriptedBackend(automatic=True)
    async with open_wire(tmp_path, dict(FAMILY), backend) as (server, world):
        client = await world.connect()
        call = await client.start(INFER, infer("family", rows=3))
        assert status(client, call) == 0
        found = {each.name: each for each in model_statistics(server, pb.ModelStatisticsRequest(name=name)).model_stats}
        assert found.keys() == ({"family"} if name else set(FAMILY))
        family = found["family"]
        assert (family.inference_count, family.execution_count) == (3, 1)
        assert (family.inference_stats.success.count, family.inference_stats.queue.ns) == (1, 0)
        assert [each.batch_size for each in family.batch_stats] == [3]
