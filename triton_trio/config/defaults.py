"""What a configuration leaves out: the backend, which the model's files tell, and Triton's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InvalidArgument

ENSEMBLE_PLATFORM = "ensemble"
SEQUENCE_IDLE_MICROSECONDS = 1_000_000

#: What a version's directory holds -> backend, platform.  The first that is found decides.
_BACKEND_OF_FILE = {
    "model.savedmodel": ("tensorflow", "tensorflow_savedmodel"),
    "model.graphdef": ("tensorflow", "tensorflow_graphdef"),
    "model.plan": ("tensorrt", "tensorrt_plan"),
    "model.onnx": ("onnxruntime", "onnxruntime_onnx"),
    "model.xml": ("openvino", ""),
    "model.pt": ("pytorch", "pytorch_libtorch"),
    "model.pt2": ("pytorch", "torch_aoti"),
    "model.py": ("python", ""),
}
_FILE_OF_PLATFORM = {platform: file for file, (_, platform) in _BACKEND_OF_FILE.items() if platform}


def complete_backend(message: Any, directory: Path) -> None:
    """Fill in name, backend, platform and file name from what is in the model's ``directory``.

    Raises:
      InvalidArgument: nothing tells which backend it is.
    """
    message.name = message.name or directory.name
    if message.platform == ENSEMBLE_PLATFORM or message.HasField("ensemble_scheduling"):
        return
    if not message.backend:
        file = message.default_model_filename or _FILE_OF_PLATFORM.get(message.platform)
        if not file and not message.platform:
            file = _find_file(directory)
        if file in _BACKEND_OF_FILE:
            message.backend, platform = _BACKEND_OF_FILE[file]
            message.platform = message.platform or platform
            message.default_model_filename = message.default_model_filename or file
    if message.backend == "python" and not message.default_model_filename:
        message.default_model_filename = "model.py"
    if not (message.backend or message.platform or message.default_model_filename):
        _, dot, backend = directory.name.partition(".")
        if not dot:
            raise InvalidArgument(
                f"Invalid model name: Could not determine backend for model '{directory.name}' with no backend in "
                "model configuration. Expected model name of the form 'model.<backend_name>'."
            )
        message.backend, message.default_model_filename = backend, f"model.{backend}"


def _find_file(directory: Path) -> str | None:
    versions = sorted(int(child.name) for child in directory.iterdir() if child.name.isdecimal() and child.is_dir())
    if not versions:
        return None
    present = {child.name for child in (directory / str(versions[0])).iterdir()}
    return next((file for file in _BACKEND_OF_FILE if file in present), None)


def normalise(message: Any) -> None:
    """Fill in Triton's defaults.  Twice is as good as once."""
    if not message.HasField("version_policy"):
        message.version_policy.latest.num_versions = 1
    choice = message.WhichOneof("scheduling_choice")
    if choice == "dynamic_batching":
        _prefer_full_batches(message.dynamic_batching, message.max_batch_size)
    elif choice == "sequence_batching":
        sequences = message.sequence_batching
        sequences.max_sequence_idle_microseconds = (
            sequences.max_sequence_idle_microseconds or SEQUENCE_IDLE_MICROSECONDS
        )
        if sequences.WhichOneof("strategy_choice") == "oldest":
            _prefer_full_batches(sequences.oldest, message.max_batch_size)
    if choice == "ensemble_scheduling" or message.platform == ENSEMBLE_PLATFORM:
        return
    for memory in ("input_pinned_memory", "output_pinned_memory"):
        if not message.optimization.HasField(memory):
            getattr(message.optimization, memory).enable = True
    if not message.instance_group:
        message.instance_group.add(name=message.name)
    for index, group in enumerate(message.instance_group):
        group.name = group.name or f"{message.name}_{index}"
        group.count = group.count or 1


def _prefer_full_batches(batching: Any, max_batch_size: int) -> None:
    if not batching.preferred_batch_size and max_batch_size > 0:
        batching.preferred_batch_size.append(max_batch_size)
