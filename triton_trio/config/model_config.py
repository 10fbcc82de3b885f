"""A model's configuration, as the server uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._pb import inference as pb
from ..descriptors import message_class
from ..errors import InvalidArgument
from .defaults import normalise
from .instance_group import InstanceGroup
from .scheduling import DynamicBatching, EnsembleScheduling, SequenceBatching
from .tensor_spec import WILDCARD, TensorSpec
from .validate import validate
from .version_policy import VersionPolicy
from .warmup import ModelWarmup

MESSAGE = message_class("inference.ModelConfig")


@dataclass(frozen=True)
class ModelConfig:
    """What ``config.pbtxt`` says, checked and with its defaults filled in.

    At most one of ``dynamic_batching``, ``sequence_batching`` and ``ensemble_scheduling`` is set.  Made by
    :func:`~triton_trio.config.load_model_config` and friends; changed with :meth:`replace`.
    """

    name: str
    backend: str
    platform: str
    default_model_filename: str  #: in the version's directory; empty: the backend's own
    version_policy: VersionPolicy
    max_batch_size: int  #: above 0, every tensor has a batch dimension in front
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    decoupled: bool  #: any number of responses to a request
    dynamic_batching: DynamicBatching | None
    sequence_batching: SequenceBatching | None
    ensemble_scheduling: EnsembleScheduling | None
    instance_groups: tuple[InstanceGroup, ...]
    parameters: Mapping[str, str]
    response_cache: bool
    model_warmup: tuple[ModelWarmup, ...]
    #: Everything, also what has no attribute here: a protobuf message that nobody changes.
    message: Any = field(repr=False)

    @classmethod
    def read(cls, message: Any) -> ModelConfig:
        """From a ``ModelConfig`` message that is normalised and valid; the message is kept."""
        choice = message.WhichOneof("scheduling_choice")
        return cls(
            name=message.name,
            backend=message.backend,
            platform=message.platform,
            default_model_filename=message.default_model_filename,
            version_policy=VersionPolicy.read(message.version_policy),
            max_batch_size=message.max_batch_size,
            inputs=tuple(map(TensorSpec.read, message.input)),
            outputs=tuple(map(TensorSpec.read, message.output)),
            decoupled=message.model_transaction_policy.decoupled,
            dynamic_batching=DynamicBatching.read(message.dynamic_batching) if choice == "dynamic_batching" else None,
            sequence_batching=(
                SequenceBatching.read(message.sequence_batching) if choice == "sequence_batching" else None
            ),
            ensemble_scheduling=(
                EnsembleScheduling.read(message.ensemble_scheduling) if choice == "ensemble_scheduling" else None
            ),
            instance_groups=tuple(map(InstanceGroup.read, message.instance_group)),
            parameters={key: value.string_value for key, value in sorted(message.parameters.items())},
            response_cache=message.response_cache.enable,
            model_warmup=tuple(map(ModelWarmup.read, message.model_warmup)),
            message=message,
        )

    def input(self, name: str) -> TensorSpec:
        """The input of that name; raises :exc:`InvalidArgument` if there is none."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise InvalidArgument(f"unexpected inference input '{name}' for model '{self.name}'")

    def output(self, name: str) -> TensorSpec:
        """The output of that name; raises :exc:`InvalidArgument` if there is none."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        raise InvalidArgument(f"unexpected inference output '{name}' for model '{self.name}'")

    def full_dims(self, spec: TensorSpec) -> tuple[int, ...]:
        """The dims of an input or output with its batch dimension: what ModelMetadata and error texts show."""
        return (WILDCARD, *spec.dims) if self.max_batch_size > 0 else spec.dims

    def backend_view(self) -> ModelConfig:
        """With the tensors that a sequence batcher adds: what the model itself has as ``inputs`` and ``outputs``.

        The clients' own come first.  A state that they may see, too, is in ``outputs`` once.  ``message`` stays theirs.
        """
        batching = self.sequence_batching
        if batching is None:
            return self
        shown = {output.name for output in self.outputs}
        return dataclasses.replace(
            self,
            inputs=(*self.inputs, *batching.added_inputs),
            outputs=(*self.outputs, *(state for state in batching.state_outputs if state.name not in shown)),
        )

    def replace(
        self,
        *,
        max_batch_size: int | None = None,
        inputs: Iterable[TensorSpec] | None = None,
        outputs: Iterable[TensorSpec] | None = None,
        decoupled: bool | None = None,
        dynamic_batching: DynamicBatching | None = None,
        instance_groups: Iterable[InstanceGroup] | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> ModelConfig:
        """A copy with what a backend has found out of its model; None leaves things as they are.

        Raises:
          InvalidArgument: the result is not a valid configuration.
        """
        message = MESSAGE()
        message.CopyFrom(self.message)
        if max_batch_size is not None:
            message.max_batch_size = max_batch_size
        if decoupled is not None:
            message.model_transaction_policy.decoupled = decoupled
        if dynamic_batching is not None:
            message.ClearField("dynamic_batching")
            dynamic_batching.write(message.dynamic_batching)
        if parameters is not None:
            message.ClearField("parameters")
            for key, value in parameters.items():
                message.parameters[key].string_value = value
        for name, specs in (("input", inputs), ("output", outputs), ("instance_group", instance_groups)):
            if specs is not None:
                message.ClearField(name)
                for spec in specs:
                    spec.write(getattr(message, name).add())
        normalise(message)
        validate(message, complete=False)
        return ModelConfig.read(message)

    def check_complete(self) -> ModelConfig:
        """Self, once every input and output has its datatype and dims; else raises :exc:`InvalidArgument`.

        For after auto-complete: until then a backend may still fill them in.
        """
        validate(self.message, complete=True)
        return self


def config_to_pb(config: ModelConfig) -> pb.ModelConfig:
    """The message of the ModelConfig RPC."""
    return pb.ModelConfig.parse(config.message.SerializeToString())
