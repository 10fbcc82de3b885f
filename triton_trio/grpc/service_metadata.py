"""What clients can ask about a model: its metadata, its configuration, its statistics."""

from __future__ import annotations

from collections.abc import Iterable

from .._pb import inference as pb
from ..config import TensorSpec
from ..errors import InvalidArgument
from ..model import Model
from ..observe.statistics import Duration
from ..server import InferenceServer
from .service_infer import parse_version


def model_metadata(server: InferenceServer, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
    """Tensors with their shapes, ``-1`` first where the model batches; and the versions that are ready."""
    version = parse_version(request.version)
    model = server.model(request.name, version)
    config = model.config

    def tensors(specs: Iterable[TensorSpec]) -> list[pb.ModelMetadataResponseTensorMetadata]:
        return [
            pb.ModelMetadataResponseTensorMetadata(
                name=spec.name, datatype=spec.datatype, shape=list(config.full_dims(spec))
            )
            for spec in specs
        ]

    ready = [model] if version is not None else _ready(server, request.name)
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[str(each.version) for each in ready],
        platform=config.platform or config.backend,
        inputs=tensors(config.inputs),
        outputs=tensors(config.outputs),
    )


def model_statistics(server: InferenceServer, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
    """Counts and times since each version was loaded; an empty name means all models.

    Raises:
      InvalidArgument: the model, or this version of it, is not ready.
    """
    version = parse_version(request.version)
    models = [model for model in server.repository.loaded() if model.ready]
    if request.name:
        models = _ready(server, request.name)
        if not models:
            raise InvalidArgument(f"requested model '{request.name}' is not available")
        if version is not None:
            models = [model for model in models if model.version == version]
            if not models:
                raise InvalidArgument(f"requested model version is not available for model '{request.name}'")
    return pb.ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])


def _ready(server: InferenceServer, name: str) -> list[Model]:
    return [model for model in server.repository.loaded() if model.name == name and model.ready]


def _statistics(model: Model) -> pb.ModelStatistics:
    counters = model.counters
    return pb.ModelStatistics(
        name=model.name,
        version=str(model.version),
        last_inference=int(counters.last_inference * 1e3),
        inference_count=counters.inference_count,
        execution_count=counters.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(counters.success),
            fail=_duration(counters.fail),
            queue=_duration(counters.queue),
            compute_input=_duration(counters.compute_input),
            compute_infer=_duration(counters.compute_infer),
            compute_output=_duration(counters.compute_output),
            cache_hit=_duration(counters.cache_hit),
            cache_miss=_duration(counters.cache_miss),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=_duration(times.compute_input),
                compute_infer=_duration(times.compute_infer),
                compute_output=_duration(times.compute_output),
            )
            for size, times in sorted(counters.by_batch_size.items())
        ],
    )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
