"""How an ensemble's steps fit together: checked against the models that are loaded, and compiled for its requests.

What the configuration alone tells, such as a tensor that nobody makes, is in :mod:`triton_trio.config.ensemble_graph`.
Texts are Triton's, and so is the rule for decoupled steps: each response of one starts the steps behind it anew, and no
step joins tensors that stem from different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.tensor_spec import WILDCARD
from ..errors import InvalidArgument
from ..tensor import format_shape

if TYPE_CHECKING:
    from ..config import EnsembleStep, ModelConfig, TensorSpec
    from ..request import Array

    Fit = Callable[[Array], Array]

#: Plans that are kept, one for each choice of outputs that clients make.
MAX_PLANS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of an ensemble, as far as a request needs it."""

    index: int  #: in the configuration
    decoupled: bool
    inputs: int  #: how many must be there before it starts
    wanted: tuple[str, ...]  #: the outputs that it is asked for
    makes: tuple[tuple[str, str], ...]  #: these outputs, and the tensors that they are
    task_name: str


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """Where a tensor goes: to ``input`` of ``step``, in the form that ``fit`` gives it."""

    step: Step
    input: str
    fit: Fit | None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The part of an ensemble that is needed for some of its outputs."""

    outputs: Mapping[str, Fit | None]  #: in the order of the configuration
    edges: Mapping[str, Sequence[Edge]]  #: by tensor
    optional: tuple[str, ...]  #: of the ensemble's inputs, what a request may leave out


class Graph:
    """The steps of one ensemble, joined by the names of tensors.

    Args:
      config: the ensemble's.
      models: of each step, its model's.

    Raises:
      InvalidArgument: they do not fit together.
    """

    def __init__(self, config: ModelConfig, models: Sequence[ModelConfig]) -> None:
        assert config.ensemble_scheduling is not None
        self._config = config
        self._steps = list(zip(config.ensemble_scheduling.steps, models, strict=True))
        _check_tensors(config, self._steps)
        #: Whether a request may have any number of responses.
        self.decoupled = _count_origins(config, self._steps) > 0
        self._makers = {
            tensor: index for index, (step, _) in enumerate(self._steps) for tensor in step.output_map.values()
        }
        self._plans: dict[frozenset[str], Plan] = {}
        self._whole = self._make_plan([output.name for output in config.outputs])

    def plan(self, requested: Sequence[str]) -> Plan:
        """What it takes to make the requested outputs; none means all."""
        if not requested:
            return self._whole
        key = frozenset(requested)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan([output.name for output in self._config.outputs if output.name in key])
            if len(self._plans) < MAX_PLANS:
                self._plans[key] = plan
        return plan

    def _make_plan(self, outputs: Sequence[str]) -> Plan:
        needed = dict.fromkeys(outputs)
        steps: dict[int, Step | None] = {}
        upstream = list(outputs)
        while upstream:
            index = self._makers.get(upstream.pop())
            if index is not None and index not in steps:
                steps[index] = None
                inputs = self._steps[index][0].input_map.values()
                upstream += [tensor for tensor in inputs if tensor not in needed]
                needed.update(dict.fromkeys(inputs))
        edges: dict[str, list[Edge]] = {}
        for index in sorted(steps):
            config, model = self._steps[index]
            step = _step(index, config, model, needed, self._config.name)
            for name, tensor in config.input_map.items():
                edges.setdefault(tensor, []).append(Edge(step, name, self._fit(tensor, model.input(name).dims, model)))
        return Plan(
            outputs={name: self._fit(name, _model_dims(self._config.output(name)), self._config) for name in outputs},
            edges=edges,
            optional=tuple(spec.name for spec in self._config.inputs if spec.optional and spec.name in edges),
        )

    def _fit(self, tensor: str, dims: tuple[int, ...], user: ModelConfig) -> Fit | None:
        """What makes ``tensor`` fit where it is used; None if it goes there as it is."""
        maker = self._makers.get(tensor)
        made_by = self._config if maker is None else self._steps[maker][1]
        if (made_by.max_batch_size > 0) == (user.max_batch_size > 0):
            return None
        return _batch_of_one(dims) if user.max_batch_size > 0 else _row_of_one(dims)


def _step(index: int, step: EnsembleStep, model: ModelConfig, needed: Mapping[str, None], ensemble: str) -> Step:
    tensors = step.output_map
    makes = tuple((output.name, tensors[output.name]) for output in model.outputs if tensors.get(output.name) in needed)
    return Step(
        index=index,
        decoupled=model.decoupled,
        inputs=len(step.input_map),
        wanted=tuple(output for output, _ in makes),
        makes=makes,
        task_name=f"step {step.model_name} of {ensemble}",
    )


# Between models with a batch dimension and models without


def _batch_of_one(dims: tuple[int, ...]) -> Fit:
    # A tensor that has the batch dimension already, as a part of its shape, goes as it is.
    return lambda array: array[None] if _same_shape(dims, array.shape) else array


def _row_of_one(dims: tuple[int, ...]) -> Fit:
    return lambda array: (
        array[0] if array.shape and array.shape[0] == 1 and not _same_shape(dims, array.shape) else array
    )


def _same_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(a == b or WILDCARD in (a, b) for a, b in zip(one, other, strict=True))


def _model_dims(spec: TensorSpec) -> tuple[int, ...]:
    return spec.dims if spec.reshape is None else spec.reshape


# Checks


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as one model has it."""

    model: str
    datatype: str
    dims: tuple[int, ...]
    batched: bool

    @property
    def full_dims(self) -> tuple[int, ...]:
        return (WILDCARD, *self.dims) if self.batched else self.dims

    def check(self, other: _Tensor, where: str) -> None:
        if self.datatype != other.datatype:
            raise InvalidArgument(
                f"{where}inconsistent data type: {self.datatype} is inferred from model {self.model} while "
                f"{other.datatype} is inferred from model {other.model}"
            )
        # A model without batching may have the batch dimension as a part of its shape.
        if not _same_shape(self.dims, other.dims) and not _same_shape(self.full_dims, other.full_dims):
            raise InvalidArgument(
                f"{where}inconsistent shape: {format_shape(self.full_dims)} is inferred from model {self.model} while "
                f"{format_shape(other.full_dims)} is inferred from model {other.model}"
            )


def _check_tensors(config: ModelConfig, steps: Sequence[tuple[EnsembleStep, ModelConfig]]) -> None:
    where = f"in ensemble {config.name}"
    known: dict[str, _Tensor] = {}

    def meet(name: str, spec: TensorSpec, dims: tuple[int, ...], model: ModelConfig) -> None:
        tensor = _Tensor(model.name, spec.config_datatype, dims, model.max_batch_size > 0)
        known.setdefault(name, tensor).check(tensor, f"{where}, ensemble tensor {name}: ")

    for spec in (*config.inputs, *config.outputs):
        meet(spec.name, spec, _model_dims(spec), config)
    for step, model in steps:
        if 0 < model.max_batch_size < config.max_batch_size:
            raise InvalidArgument(
                f"ensemble {config.name} allows maximum batch size {config.max_batch_size}, but it contains model "
                f"{model.name} which only allows maximum batch size to be {model.max_batch_size}"
            )
        inputs = {spec.name: spec for spec in model.inputs}
        outputs = {spec.name: spec for spec in model.outputs}
        for name, tensor in step.input_map.items():
            if name not in inputs:
                raise InvalidArgument(
                    f"{where}, ensemble tensor {tensor} is mapping to non-existing input {name} in model {model.name}"
                )
        for name, spec in inputs.items():
            if name in step.input_map:
                meet(step.input_map[name], spec, spec.dims, model)
            elif not spec.optional:
                raise InvalidArgument(
                    f"{where}, input {name} in model {model.name} is not mapped to any ensemble tensors"
                )
        for name, tensor in step.output_map.items():
            if name not in outputs:
                raise InvalidArgument(
                    f"{where}, ensemble tensor {tensor} is mapped from non-existing output {name} in model {model.name}"
                )
            meet(tensor, outputs[name], outputs[name].dims, model)


def _count_origins(config: ModelConfig, steps: Sequence[tuple[EnsembleStep, ModelConfig]]) -> int:
    """How many decoupled steps there are; raises if tensors are to be joined that do not stem from the same one."""
    count = 0
    origins = {spec.name: 0 for spec in config.inputs}
    waiting = list(steps)

    def origin_of(tensors: Iterator[str], model: str) -> int:
        found = {origins[tensor] for tensor in tensors}
        if len(found) > 1:
            raise InvalidArgument(
                f"in ensemble {config.name}, step of model '{model}' receives inputs originated from different decoupled "
                "models"
            )
        return found.pop()

    while waiting:
        ready = next(pair for pair in waiting if all(name in origins for name in pair[0].input_map.values()))
        waiting.remove(ready)
        step, model = ready
        origin = origin_of(iter(step.input_map.values()), model.name)
        if model.decoupled:
            count = origin = count + 1
        origins.update(dict.fromkeys(step.output_map.values(), origin))
    origin_of((output.name for output in config.outputs), config.name)
    return count
