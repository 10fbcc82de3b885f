"""What goes through an ensemble, and what its steps are asked for.  (What can be cancelled is in tests/cancellation.)"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tests.ensemble.world import FAMILY, Steps, ensemble_config, join_config, step
from triton_trio import InferenceRequest, InvalidArgument, Unsupported
from triton_trio.backends import Backend, BackendInstance, BackendModel, ModelContext, Placement
from triton_trio.batch import Batch
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve

ONE = scripted_config()
ZERO = {"INPUT0": np.zeros(2, np.float32)}


class Recorder(Backend, BackendModel, BackendInstance):
    """Answers each input with itself, plus one, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[InferenceRequest] = []

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[Recorder]:
        yield self

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[Recorder]:
        yield self

    async def execute(self, batch: Batch) -> None:
        await batch.checkpoint()
        for member in batch.live():
            self.requests.append(member.request)
            batch.respond(member, {name.replace("IN", "OUT"): array + 1 for name, array in member.inputs.items()})

    def asked(self, model: str) -> InferenceRequest:
        (found,) = [request for request in self.requests if request.model_name == model]
        return found


async def test_every_step_gets_what_the_client_said(serve: Serve) -> None:
    recorder = Recorder()
    models = {"a": ONE, "b": ONE, "e": ensemble_config(step("a", "INPUT0", "x"), step("b", "x", "OUTPUT0"))}
    async with serve(models, recorder) as server:
        ensemble = server.model("e")
        request = ensemble.request(
            ZERO,
            request_id="7",
            priority=3,
            timeout_us=5_000_000,
            parameters={"temperature": 0.5},
            sequence_id=42,
            sequence_start=True,
            sequence_end=True,
        )
        response = await ensemble.infer(request)
        assert (response.request_id, response.model_name, response.model_version) == ("7", "e", 1)
        for model in "ab":
            child = recorder.asked(model)
            assert (child.request_id, child.priority, child.timeout_us) == ("7", 3, 5_000_000)
            assert child.parameters == {"temperature": 0.5}
            assert (child.sequence_id, child.sequence_start, child.sequence_end) == (42, True, True)
            assert child.parent is request
            assert child.generation != request.generation


async def test_only_the_steps_and_outputs_that_are_wanted(serve: Serve) -> None:
    recorder = Recorder()
    models = {
        "two": join_config(),
        "b": ONE,
        "c": ONE,
        "e": ensemble_config(
            step("two", "INPUT0 INPUT0=INPUT1", "x=OUTPUT0 y=OUTPUT1"),
            step("b", "x", "P"),
            step("c", "y", "Q"),
            outputs="Q P",
        ),
    }
    async with serve(models, recorder) as server:
        ensemble = server.model("e")
        response = await ensemble.infer(ensemble.request(ZERO, outputs=("P",)))
        assert list(response.outputs) == ["P"]
        assert [request.model_name for request in recorder.requests] == ["two", "b"]
        assert recorder.asked("two").requested_outputs == ("OUTPUT0",)
        response = await ensemble.infer(ensemble.request(ZERO, outputs=("P", "Q")))
        assert list(response.outputs) == ["Q", "P"], "in the order of the configuration"


async def test_an_input_that_is_left_out(serve: Serve) -> None:
    recorder = Recorder()
    optional = join_config().replace('name: "INPUT1"', 'name: "INPUT1" optional: true')
    config = ensemble_config(step("a", "INPUT0 MORE=INPUT1", "OUTPUT0"), inputs="INPUT0 MORE")
    models = {
        "a": optional,
        "e": config.replace('name: "MORE"', 'name: "MORE" optional: true'),
        "strict": config.replace('name: "MORE"', 'name: "MORE" optional: true').replace('"a"', '"join"'),
        "join": join_config(),
    }
    async with serve(models, recorder) as server:
        response = await server.model("e").infer(ZERO)
        assert list(response.outputs) == ["OUTPUT0"]
        assert list(recorder.asked("a").inputs) == ["INPUT0"]
        with pytest.raises(
            InvalidArgument, match=r"in ensemble 'strict', .*expected 2 inputs but got 1 inputs for model 'join'"
        ):
            await server.model("strict").infer(ZERO)


async def test_models_with_and_without_a_batch_dimension(serve: Serve) -> None:
    recorder = Recorder()
    models = {
        "rows": scripted_config(max_batch_size=4),
        "plain": ONE,
        "whole": scripted_config(dims=[-1, 2]),
        "plain_first": ensemble_config(step("plain", "INPUT0", "x"), step("rows", "x", "OUTPUT0")),
        "rows_first": ensemble_config(
            step("rows", "INPUT0", "x"), step("plain", "x", "y"), step("rows", "y", "OUTPUT0"), max_batch_size=4
        ),
        "as_it_is": ensemble_config(step("rows", "INPUT0", "x"), step("whole", "x", "OUTPUT0"), max_batch_size=4),
    }
    async with serve(models, recorder) as server:
        response = await server.model("plain_first").infer(ZERO)
        assert response.outputs["OUTPUT0"].tolist() == [2, 2]
        response = await server.model("rows_first").infer({"INPUT0": np.zeros((1, 2), np.float32)})
        assert response.outputs["OUTPUT0"].tolist() == [[3, 3]]
        response = await server.model("as_it_is").infer({"INPUT0": np.zeros((3, 2), np.float32)})
        assert response.outputs["OUTPUT0"].shape == (3, 2)
        with pytest.raises(InvalidArgument, match=r"model 'plain'. Expected \[2\], got \[3,2\]"):
            await server.model("rows_first").infer({"INPUT0": np.zeros((3, 2), np.float32)})


async def test_shapes_are_changed_where_the_ensemble_says_so(serve: Serve) -> None:
    config = ensemble_config(step("a", "INPUT0", "OUTPUT0")).replace(
        "dims: [ 2 ]", "dims: [ 2, 1 ] reshape { shape: [ 2 ] }"
    )
    async with serve({"a": ONE, "e": config}, Recorder()) as server:
        response = await server.model("e").infer({"INPUT0": np.zeros((2, 1), np.float32)})
        assert response.outputs["OUTPUT0"].shape == (2, 1)


async def test_an_output_that_is_an_input(serve: Serve) -> None:
    config = ensemble_config(step("a", "INPUT0", "P"), outputs="INPUT0 P")
    recorder = Recorder()
    async with serve({"a": ONE, "e": config}, recorder) as server:
        ensemble = server.model("e")
        response = await ensemble.infer(ensemble.request(ZERO, outputs=("INPUT0",)))
        assert response.outputs["INPUT0"].tolist() == [0, 0]
        assert recorder.requests == []


async def test_a_step_names_the_version_it_wants(serve: Serve) -> None:
    recorder = Recorder()
    models = {
        "a": ONE + "version_policy { all {} }",
        "e": ensemble_config(step("a", "INPUT0", "x", version=1), step("a", "x", "OUTPUT0"))
        + "version_policy { latest {} }",
    }
    async with serve(models, recorder, versions=(1, 3)) as server:
        await server.model("e").infer(ZERO)
        assert [request.model_version for request in recorder.requests] == [1, 3]


async def test_counters_are_those_of_a_model(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve(FAMILY, backend) as server:
        family = server.model("family")
        for _ in range(2):
            await family.infer({"INPUT0": np.zeros((3, 2), np.float32)})
        counters = family.counters
        assert (counters.started, counters.inference_count, counters.execution_count) == (2, 6, 2)
        assert (counters.success.count, counters.queue.count, counters.queue.seconds) == (2, 2, 0.0)
        assert counters.by_batch_size.keys() == {3}
        assert counters.by_batch_size[3].compute_infer.count == counters.compute_infer.count == 2
        assert counters.compute_infer.seconds > 0
        assert family.statistics().scheduler is None
        assert [len(Steps(backend).of(name)) for name in ("pre", "left", "one", "two", "join")] == [2] * 5


async def test_infer_is_for_one_response(serve: Serve) -> None:
    models = {"s": scripted_config(decoupled=True), "e": ensemble_config(step("s", "INPUT0", "OUTPUT0"))}
    async with serve(models) as server:
        with pytest.raises(Unsupported, match="'e' is decoupled"):
            await server.model("e").infer(ZERO)


async def test_an_ensemble_that_is_not_decoupled_can_be_read_as_if_it_were(serve: Serve) -> None:
    async with serve(FAMILY) as server:
        async with server.model("family").open_responses({"INPUT0": np.zeros((1, 2), np.float32)}) as responses:
            assert [list(response.outputs) async for response in responses] == [["OUTPUT0", "OUTPUT1"]]


async def test_tensors_that_nobody_asked_for_are_an_error_of_the_request(serve: Serve) -> None:
    async with serve(FAMILY) as server:
        family = server.model("family")
        with pytest.raises(InvalidArgument, match="unexpected inference output 'a' for model 'family'"):
            await family.infer(family.request({"INPUT0": np.zeros((1, 2), np.float32)}, outputs=("a",)))
        assert family.counters.failures == {"OTHER": 1}
