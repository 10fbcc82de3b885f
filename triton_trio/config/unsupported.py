"""What a configuration asks for and this server does not do: said at load, never passed over in silence."""

from __future__ import annotations

from ..errors import Unsupported
from .model_config import ModelConfig

_IGNORED = {
    "batch_input": "the backend gets no batch inputs",
    "batch_output": "outputs are split by rows",
    "model_repository_agents": "no agent runs",
    "model_warmup": "programs are compiled at load anyway",
    "model_operations": "no library is loaded",
    "metric_tags": "metrics are not exported yet",
    "model_metrics": "metrics are not exported yet",
}


def refuse_unsupported(config: ModelConfig) -> None:
    """Raise :exc:`Unsupported` for what would change the model's answers if it were left out."""
    for step in config.ensemble_scheduling.steps if config.ensemble_scheduling else ():
        if step.model_namespace:
            raise Unsupported(
                f"ensemble '{config.name}': model_namespace of step '{step.model_name}' is not supported: a name belongs to "
                "one model, in whatever repository it is"
            )


def ignored_fields(config: ModelConfig) -> list[str]:
    """Fields that are set and have no effect here, each with what happens instead."""
    present = {field.name for field, _ in config.message.ListFields()}
    return [f"{name}: {why}" for name, why in _IGNORED.items() if name in present]
