"""An ensemble's data flow: steps joined by the names of tensors."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgument
from .defaults import ENSEMBLE_PLATFORM


def validate_ensemble(message: Any) -> None:
    """Raise :exc:`InvalidArgument` unless every tensor is made once, used, and can be computed from the inputs."""
    name = message.name
    if message.platform != ENSEMBLE_PLATFORM:
        raise InvalidArgument(
            f"ensemble scheduling cannot be set for model '{name}' whose platform is not {ENSEMBLE_PLATFORM}"
        )
    if message.instance_group:
        raise InvalidArgument(f"instance group should not be specified for ensemble '{name}'")
    if message.HasField("optimization"):
        raise InvalidArgument(f"optimization should not be specified for ensemble '{name}'")
    if message.model_warmup:
        raise InvalidArgument(f"model_warmup can not be specified for ensemble '{name}'")
    if not message.ensemble_scheduling.step:
        raise InvalidArgument(f"must specify 'step' for ensemble '{name}'")
    _validate_flow(message, _read_sources(message))


def _read_sources(message: Any) -> dict[str, set[str]]:
    """For each tensor that a step makes, the tensors it is made of."""
    name = message.name
    sources: dict[str, set[str]] = {}
    for index, step in enumerate(message.ensemble_scheduling.step):
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                raise InvalidArgument(f"must specify '{field}' in step {index} of ensemble '{name}'")
        for tensor in step.output_map.values():
            if tensor in sources:
                raise InvalidArgument(
                    f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{name}' "
                    f"step {index}"
                )
            sources[tensor] = set(step.input_map.values())
    return sources


def _validate_flow(message: Any, sources: dict[str, set[str]]) -> None:
    name = message.name
    used = set().union(*sources.values())
    for tensor in message.input:
        if tensor.name not in used and tensor.name not in sources:
            raise InvalidArgument(f"ensemble input '{tensor.name}' for ensemble {name} is not used")
    ready = {tensor.name for tensor in message.input}
    while made := {tensor for tensor, needed in sources.items() if tensor not in ready and needed <= ready}:
        ready |= made
    outputs = {tensor.name for tensor in message.output}
    for output in message.output:
        if output.name not in used and output.name not in sources:
            raise InvalidArgument(f"ensemble output '{output.name}' for ensemble {name} is not used")
        if output.name not in ready:
            text = f"output '{output.name}' for ensemble '{name}' is not written"
            if (missing := _first_missing(output.name, sources, ready)) != output.name:
                text += f": at least one of its depending tensors, '{missing}', is not connected"
            raise InvalidArgument(text)
    for unused in sorted((used | sources.keys()) - outputs):
        if unused not in ready or unused not in used:
            raise InvalidArgument(f"ensemble tensor '{unused}' is unused in ensemble '{name}'")


def _first_missing(tensor: str, sources: dict[str, set[str]], ready: set[str]) -> str:
    """Upstream of ``tensor``, where the flow starts that does not arrive; in a cycle, the last not seen before."""
    seen = {tensor}
    while upstream := sorted(sources.get(tensor, set()) - ready - seen):
        tensor = upstream[0]
        seen.add(tensor)
    return tensor
