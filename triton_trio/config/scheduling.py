"""How a model's requests are scheduled: dynamic batching, sequence batching or an ensemble's steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..descriptors import enum_name
from .tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How long requests may wait, and how many; 0 is no limit."""

    timeout_action: str = "REJECT"  #: or ``DELAY``
    default_timeout_microseconds: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0

    @classmethod
    def read(cls, message: Any) -> QueuePolicy:
        """From a ``ModelQueuePolicy``."""
        return cls(
            timeout_action=enum_name(message, "timeout_action"),
            default_timeout_microseconds=message.default_timeout_microseconds,
            allow_timeout_override=message.allow_timeout_override,
            max_queue_size=message.max_queue_size,
        )

    def write(self, message: Any) -> None:
        """Into an empty ``ModelQueuePolicy``."""
        message.MergeFrom(
            type(message)(
                timeout_action=self.timeout_action,
                default_timeout_microseconds=self.default_timeout_microseconds,
                allow_timeout_override=self.allow_timeout_override,
                max_queue_size=self.max_queue_size,
            )
        )


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0  #: level 1 is served first; 0: one queue
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: Mapping[int, QueuePolicy] = field(default_factory=dict)  #: by level

    @classmethod
    def read(cls, message: Any) -> DynamicBatching:
        """From a ``ModelDynamicBatching``."""
        return cls(
            preferred_batch_size=tuple(message.preferred_batch_size),
            max_queue_delay_microseconds=message.max_queue_delay_microseconds,
            preserve_ordering=message.preserve_ordering,
            priority_levels=message.priority_levels,
            default_priority_level=message.default_priority_level,
            default_queue_policy=QueuePolicy.read(message.default_queue_policy),
            priority_queue_policy={
                level: QueuePolicy.read(policy) for level, policy in sorted(message.priority_queue_policy.items())
            },
        )

    def write(self, message: Any) -> None:
        """Into an empty ``ModelDynamicBatching``."""
        message.SetInParent()
        message.preferred_batch_size.extend(self.preferred_batch_size)
        message.max_queue_delay_microseconds = self.max_queue_delay_microseconds
        message.preserve_ordering = self.preserve_ordering
        message.priority_levels = self.priority_levels
        message.default_priority_level = self.default_priority_level
        if self.default_queue_policy != QueuePolicy():
            self.default_queue_policy.write(message.default_queue_policy)
        for level, policy in self.priority_queue_policy.items():
            policy.write(message.priority_queue_policy[level])


@dataclass(frozen=True, slots=True)
class SequenceControl:
    """One signal of the sequence batcher to the model: the tensor ``name`` says ``false`` or ``true``.

    For ``CONTROL_SEQUENCE_CORRID`` it is the correlation ID itself, and both values are None.
    """

    name: str
    kind: str
    datatype: str
    false: bool | int | float | None = None
    true: bool | int | float | None = None


@dataclass(frozen=True, slots=True)
class InitialState:
    """What a state holds when its sequence starts: zeros, or the contents of ``data_file``."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    data_file: str = ""  #: below ``initial_state/`` in the model's directory


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A tensor that is kept between the requests of a sequence; ``dims`` are without batch dimension."""

    input_name: str
    output_name: str
    datatype: str
    dims: tuple[int, ...]
    initial_state: InitialState | None = None  #: None: zeros
    use_same_buffer_for_input_output: bool = False
    use_growable_memory: bool = False


@dataclass(frozen=True, slots=True)
class DirectStrategy:
    """Each sequence owns a slot of a batch until it ends."""

    max_queue_delay_microseconds: int = 0
    minimum_slot_utilization: float = 0.0


@dataclass(frozen=True, slots=True)
class OldestStrategy:
    """Sequences share a dynamic batcher, oldest request first."""

    max_candidate_sequences: int = 0
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    preserve_ordering: bool = False


@dataclass(frozen=True, slots=True)
class SequenceBatching:
    strategy: DirectStrategy | OldestStrategy
    max_sequence_idle_microseconds: int
    controls: tuple[SequenceControl, ...] = ()
    states: tuple[SequenceState, ...] = ()
    iterative_sequence: bool = False

    @property
    def added_inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs that no client sends: controls, then states."""
        return (
            *(TensorSpec(control.name, control.datatype, (1,)) for control in self.controls),
            *(TensorSpec(state.input_name, state.datatype, state.dims) for state in self.states),
        )

    @property
    def state_outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs that its sequence keeps."""
        return tuple(TensorSpec(state.output_name, state.datatype, state.dims) for state in self.states)

    @classmethod
    def read(cls, message: Any) -> SequenceBatching:
        """From a ``ModelSequenceBatching``."""
        strategy: DirectStrategy | OldestStrategy
        if message.WhichOneof("strategy_choice") == "oldest":
            strategy = OldestStrategy(
                max_candidate_sequences=message.oldest.max_candidate_sequences,
                preferred_batch_size=tuple(message.oldest.preferred_batch_size),
                max_queue_delay_microseconds=message.oldest.max_queue_delay_microseconds,
                preserve_ordering=message.oldest.preserve_ordering,
            )
        else:
            strategy = DirectStrategy(
                message.direct.max_queue_delay_microseconds, message.direct.minimum_slot_utilization
            )
        return cls(
            strategy=strategy,
            max_sequence_idle_microseconds=message.max_sequence_idle_microseconds,
            controls=tuple(
                _read_control(tensor.name, control) for tensor in message.control_input for control in tensor.control
            ),
            states=tuple(map(_read_state, message.state)),
            iterative_sequence=message.iterative_sequence,
        )


def _datatype(message: Any) -> str:
    name = enum_name(message, "data_type").removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _read_control(name: str, message: Any) -> SequenceControl:
    kind = enum_name(message, "kind")
    for field_name, datatype in (
        ("int32_false_true", "INT32"),
        ("fp32_false_true", "FP32"),
        ("bool_false_true", "BOOL"),
    ):
        values = getattr(message, field_name)
        if len(values) == 2:
            return SequenceControl(name, kind, datatype, values[0], values[1])
    return SequenceControl(name, kind, _datatype(message))


def _read_state(message: Any) -> SequenceState:
    return SequenceState(
        input_name=message.input_name,
        output_name=message.output_name,
        datatype=_datatype(message),
        dims=tuple(message.dims),
        initial_state=next(
            (
                InitialState(initial.name, _datatype(initial), tuple(initial.dims), initial.data_file)
                for initial in message.initial_state
            ),
            None,
        ),
        use_same_buffer_for_input_output=message.use_same_buffer_for_input_output,
        use_growable_memory=message.use_growable_memory,
    )


@dataclass(frozen=True, slots=True)
class EnsembleStep:
    model_name: str
    model_version: int  #: -1: the latest
    input_map: Mapping[str, str]  #: the step's input to the ensemble's tensor
    output_map: Mapping[str, str]  #: the step's output to the ensemble's tensor
    model_namespace: str = ""


@dataclass(frozen=True, slots=True)
class EnsembleScheduling:
    steps: tuple[EnsembleStep, ...]
    max_inflight_requests: int = 0  #: per step; 0: no limit

    @classmethod
    def read(cls, message: Any) -> EnsembleScheduling:
        """From a ``ModelEnsembling``."""
        return cls(
            steps=tuple(
                EnsembleStep(
                    model_name=step.model_name,
                    model_version=step.model_version,
                    input_map=dict(step.input_map),
                    output_map=dict(step.output_map),
                    model_namespace=step.model_namespace,
                )
                for step in message.step
            ),
            max_inflight_requests=message.max_inflight_requests,
        )
