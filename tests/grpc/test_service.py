"""The RPCs beside inference, called directly: settings, a draining server, and the statistics' balance."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from tests.parity.world import IDENTITY, Gate, infer_message, open_world, write_model
from triton_trio import Reason
from triton_trio._pb import inference as pb
from triton_trio._pb.health import HealthCheckRequest, HealthCheckResponseServingStatus
from triton_trio.errors import InternalError, InvalidArgument, RequestCancelled, Unavailable, Unsupported
from triton_trio.grpc.health import Health
from triton_trio.grpc.service import GrpcInferenceService
from triton_trio.instance import InstanceState
from triton_trio.observe.logs import configure_logging

LogValue = pb.LogSettingsRequestSettingValue


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    logger = logging.getLogger("triton_trio")
    before = logger.handlers[:], logger.propagate, logger.level
    handler = configure_logging(file=str(tmp_path / "log"))
    yield tmp_path / "log"
    handler.close()
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


async def test_log_settings_are_read_and_changed(tmp_path: Path, logs: Path) -> None:
    async with open_world(tmp_path / "models") as server:
        service = GrpcInferenceService(server)
        settings = (await service.log_settings(pb.LogSettingsRequest())).settings
        assert settings["log_file"].string_param == str(logs)
        assert settings["log_info"].bool_param is True
        assert settings["log_verbose_level"].uint32_param == 0
        assert settings["log_format"].string_param == "default"

        settings = (
            await service.log_settings(
                pb.LogSettingsRequest(
                    settings={
                        "log_info": LogValue(bool_param=False),
                        "log_verbose_level": LogValue(uint32_param=2),
                        "log_format": LogValue(string_param="ISO8601"),
                    }
                )
            )
        ).settings
        assert settings["log_info"].bool_param is False
        assert settings["log_warning"].bool_param is True
        assert settings["log_verbose_level"].uint32_param == 2
        assert settings["log_format"].string_param == "ISO8601"
        before = await trio.Path(logs).read_text()
        logger = logging.getLogger("triton_trio.test")
        logger.info("not written")
        logger.debug("written: verbose")
        logger.warning("written: warning")
        lines = (await trio.Path(logs).read_text()).removeprefix(before).splitlines()
        assert [line.rsplit("] ", 1)[1] for line in lines] == ["written: verbose", "written: warning"]
        assert " DEBUG " in lines[0]


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        (
            "log_file",
            LogValue(string_param="/etc/passwd"),
            Unsupported,
            "log file location can not be updated through network protocol",
        ),
        ("log_info", LogValue(string_param="x"), InvalidArgument, "expect boolean for 'log_info'"),
        ("log_verbose_level", LogValue(bool_param=True), InvalidArgument, "expect int32 for 'log_verbose_level'"),
        ("log_format", LogValue(bool_param=True), InvalidArgument, "expect string for 'log_format'"),
        ("log_format", LogValue(string_param="x"), InvalidArgument, "invalid argument for log_format, got: x"),
    ],
)
async def test_log_settings_that_are_refused_change_nothing(
    tmp_path: Path, logs: Path, name: str, value: LogValue, error: type[Exception], text: str
) -> None:
    async with open_world(tmp_path / "models") as server:
        service = GrpcInferenceService(server)
        change = pb.LogSettingsRequest(settings={"log_error": LogValue(bool_param=False), name: value})
        with pytest.raises(error) as caught:
            await service.log_settings(change)
        assert str(caught.value) == text
        assert (await service.log_settings(pb.LogSettingsRequest())).settings["log_error"].bool_param is True


async def test_logging_that_somebody_else_has_configured_is_left_alone(tmp_path: Path) -> None:
    async with open_world(tmp_path / "models") as server:
        with pytest.raises(Unavailable, match="does not support dynamic logging"):
            await GrpcInferenceService(server).log_settings(pb.LogSettingsRequest())


async def test_e1_a_draining_server_says_so(tmp_path: Path) -> None:
    async with open_world(tmp_path / "models", explicit=True, load_models=["once"]) as server:
        service, health = GrpcInferenceService(server), Health(server)
        serving = HealthCheckResponseServingStatus
        assert (await health.check(HealthCheckRequest())).status == serving.SERVING
        server.draining = True
        assert (await health.check(HealthCheckRequest())).status == serving.NOT_SERVING
        for call, text in (
            (service.server_live(pb.ServerLiveRequest()), "Server exiting"),
            (service.server_ready(pb.ServerReadyRequest()), "Server exiting"),
            (service.model_ready(pb.ModelReadyRequest(name="once")), "Server not ready"),
            (service.repository_model_load(pb.RepositoryModelLoadRequest(model_name="simple")), "Server not ready"),
            (service.repository_model_unload(pb.RepositoryModelUnloadRequest(model_name="once")), "Server not ready"),
            (
                service.model_infer(infer_message("once", 1)),
                "GRPC server is shutting down and has stopped accepting new requests.",
            ),
        ):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.message == text


async def test_b5_model_ready_turns_false_with_the_last_instance(tmp_path: Path) -> None:
    async with open_world(tmp_path / "models") as server:
        service = GrpcInferenceService(server)
        request = pb.ModelReadyRequest(name="once", version="1")
        assert (await service.model_ready(request)).ready is True
        [instance] = server.model("once").instances
        instance.state = InstanceState.QUARANTINED
        assert (await service.model_ready(request)).ready is False
        with pytest.raises(InvalidArgument, match="requested model 'once' is not available"):
            await service.model_statistics(pb.ModelStatisticsRequest(name="once"))
        assert (await service.server_ready(pb.ServerReadyRequest())).ready is False
        assert (await service.server_live(pb.ServerLiveRequest())).live is True


async def test_an_unload_answers_at_once_and_lets_requests_end(tmp_path: Path) -> None:
    gate = Gate()
    async with open_world(tmp_path / "models", {"once": gate}, explicit=True, load_models=["once"]) as server:
        service = GrpcInferenceService(server)
        replies: list[pb.ModelInferResponse] = []

        async def infer() -> None:
            replies.append(await service.model_infer(infer_message("once", 4)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(infer)
            await gate.wait_held()
            with trio.fail_after(5):
                await service.repository_model_unload(pb.RepositoryModelUnloadRequest(model_name="once"))
            with pytest.raises(Unavailable):
                await service.model_infer(infer_message("once", 5))
            assert not replies
            gate.open()
        assert replies[0].raw_output_contents == [np.int32(4).tobytes()]


async def test_e3_statistics_balance_over_all_outcomes(tmp_path: Path) -> None:
    async def fail_first(batch: object) -> None:
        await trio.lowlevel.checkpoint()
        raise InternalError("no")

    gate = Gate()
    async with open_world(tmp_path / "models", {"once": gate, "repeat": fail_first}) as server:
        service = GrpcInferenceService(server)
        model = server.model("once")

        async def cancelled() -> None:
            with pytest.raises(RequestCancelled):
                await service.model_infer(infer_message("once", 1, id="x"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled)
            await gate.wait_held()
            next(iter(model._live)).cancel(Reason.ADMIN)
        gate.open()
        for value in range(3):
            await service.model_infer(infer_message("once", value))
        with pytest.raises(InvalidArgument):
            await service.model_infer(infer_message("once", {"IN": np.zeros(2, np.int32)}))
        reply = await service.model_statistics(pb.ModelStatisticsRequest(name="once"))
        stats = reply.model_stats[0].inference_stats
        assert stats is not None
        assert stats.success is not None
        assert stats.fail is not None
        assert (stats.success.count, stats.fail.count) == (3, 2)
        assert model.counters.started == 5
        assert reply.model_stats[0].execution_count == 4


async def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "unlabelled", IDENTITY)
    async with open_world(tmp_path / "models") as server:
        message = infer_message("unlabelled", {"INPUT0": np.zeros((1, 4), np.float32)}, outputs=["OUTPUT0"])
        service = GrpcInferenceService(server)
        await service.model_infer(message)
        message.outputs[0].parameters = {"classification": pb.InferParameter(int64_param=1)}
        with pytest.raises(InternalError, match="cannot read label_filename of output 'OUTPUT0'"):
            await service.model_infer(message)
