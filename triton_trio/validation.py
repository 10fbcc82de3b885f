"""Does a request fit the model?  Decided once per request, on a hot path.

:class:`RequestValidator` is compiled from the configuration.  Its check is one pass that only finds out *whether* all
is well; what is wrong is found out by a second, slow look that goes through Triton's checks in Triton's order.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .errors import InternalError, InvalidArgument
from .tensor import DTYPES, datatype_of, format_shape

if TYPE_CHECKING:
    from .config import ModelConfig, TensorSpec
    from .request import InferenceRequest

_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


@dataclass(frozen=True, slots=True)
class _Input:
    spec: TensorSpec
    dtype: np.dtype[Any]
    dims: tuple[int, ...]
    #: Positions with a fixed size, and those sizes; None if all are fixed and ``dims`` is compared as a whole.
    fixed: tuple[tuple[int, int], ...] | None
    #: Requests in one batch must have the same shape here, and the configuration leaves room for different ones.
    in_signature: bool


class RequestValidator:
    """Checks requests against one model's configuration."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._max_batch_size = config.max_batch_size
        self._inputs = {spec.name: self._compile(spec) for spec in config.inputs}
        self._outputs = frozenset(spec.name for spec in config.outputs)
        self._required = frozenset(spec.name for spec in config.inputs if not spec.optional)
        self._optional = len(self._required) < len(self._inputs)
        self._reshapes = any(spec.reshape is not None for spec in config.inputs)

    def _compile(self, spec: TensorSpec) -> _Input:
        variable = -1 in spec.dims
        return _Input(
            spec=spec,
            dtype=DTYPES[spec.datatype],
            dims=spec.dims,
            fixed=tuple((i, dim) for i, dim in enumerate(spec.dims) if dim != -1) if variable else None,
            in_signature=variable and not spec.allow_ragged_batch and self._max_batch_size > 0,
        )

    def check(self, request: InferenceRequest) -> tuple[int, Hashable]:
        """Check the inputs and the requested outputs.

        Inputs that the configuration reshapes are replaced by arrays of the model's shape, and arrays of numpy's own
        string types by arrays of ``bytes``.

        Returns:
          The batch size (1 for a model that does not batch), and the signature: requests with equal ones may share a
          batch.

        Raises:
          InvalidArgument: in Triton's words, what was expected and what came.
        """
        inputs = request.inputs
        signature: tuple[Hashable, ...] = ()
        rows = -1
        compiled = self._inputs
        if len(inputs) != len(compiled):
            if not self._optional or len(inputs) > len(compiled):
                self._refuse(request)
            signature = tuple(sorted(inputs))
        for name, array in inputs.items():
            expected = compiled.get(name)
            if expected is None:
                self._refuse(request)
            if array.dtype is not expected.dtype and array.dtype != expected.dtype:
                return self._check_again(request)
            shape: tuple[int, ...] = array.shape
            if self._max_batch_size:
                if not shape or (shape[0] != rows and rows >= 0):
                    self._refuse(request)
                rows = shape[0]
                shape = shape[1:]
            if expected.fixed is None:
                if shape != expected.dims:
                    self._refuse(request)
            else:
                if len(shape) != len(expected.dims):
                    self._refuse(request)
                for index, size in expected.fixed:
                    if shape[index] != size:
                        self._refuse(request)
                if expected.in_signature:
                    signature += (name, shape)
        if rows == 0 or rows > self._max_batch_size > 0:
            self._refuse(request)
        if self._optional and not self._required <= inputs.keys():
            self._refuse(request)
        if request.requested_outputs and not self._outputs.issuperset(request.requested_outputs):
            self._refuse(request)
        if self._reshapes:
            self._reshape(request)
        return max(rows, 1), signature

    def _reshape(self, request: InferenceRequest) -> None:
        batch_dims = 1 if self._max_batch_size else 0
        request.inputs = {
            name: array.reshape(array.shape[:batch_dims] + spec.to_model_shape(array.shape[batch_dims:]))
            for name, array in request.inputs.items()
            if (spec := self._inputs[name].spec)
        }

    def _check_again(self, request: InferenceRequest) -> tuple[int, Hashable]:
        """For arrays that are of the right datatype in another form: numpy's strings, or big-endian."""
        changed = {}
        for name, array in request.inputs.items():
            expected = self._inputs.get(name)
            if expected is not None and array.dtype != expected.dtype and _datatype(array) == expected.spec.datatype:
                changed[name] = _strings(array) if expected.spec.datatype == "BYTES" else array.astype(expected.dtype)
        if not changed:
            self._refuse(request)
        request.inputs = {**request.inputs, **changed}
        return self.check(request)

    def _refuse(self, request: InferenceRequest) -> NoReturn:
        self._explain(request)
        raise AssertionError("a request was refused, and nothing is wrong with it")

    def _explain(self, request: InferenceRequest) -> None:
        model, label, inputs = self._config.name, request.label, request.inputs
        for output in request.requested_outputs:
            self._config.output(output)
        self._explain_count(request)
        rows = 0
        for name, array in inputs.items():
            self._config.input(name)
            if self._max_batch_size:
                if not array.shape:
                    raise InvalidArgument(
                        f"{label}input '{name}' has no shape but model requires batch dimension for '{model}'"
                    )
                if rows and array.shape[0] != rows:
                    raise InvalidArgument(f"{label}input '{name}' batch size does not match other inputs for '{model}'")
                rows = array.shape[0]
                if not rows:
                    raise InvalidArgument(f"{label}inference request batch-size must be >= 1 for '{model}'")
        if self._max_batch_size and rows > self._max_batch_size:
            raise InvalidArgument(
                f"{label}inference request batch-size must be <= {self._max_batch_size} for '{model}'"
            )
        for name, array in inputs.items():
            spec = self._inputs[name].spec
            if (got := _datatype(array)) != spec.datatype:
                raise InvalidArgument(
                    f"{label}inference input '{name}' data-type is '{got}', but model '{model}' expects "
                    f"'{spec.datatype}'"
                )
            full_dims = self._config.full_dims(spec)
            if len(array.shape) != len(full_dims) or any(
                dim not in (-1, size) for dim, size in zip(full_dims, array.shape, strict=True)
            ):
                raise InvalidArgument(
                    f"{label}unexpected shape for input '{name}' for model '{model}'. Expected "
                    f"{format_shape(full_dims)}, got {format_shape(array.shape)}. "
                    f"{_BATCH_NOTE if self._max_batch_size else ''}"
                )
        if missing := sorted(self._required - inputs.keys()):
            # The number is right and yet one is missing: Triton leaves this to the backend.
            raise InvalidArgument(
                f"{label}missing required input(s) {_names(missing)} for model '{model}'. Please provide all required "
                "input(s)."
            )

    def _explain_count(self, request: InferenceRequest) -> None:
        least, most, got = len(self._required), len(self._inputs), len(request.inputs)
        if not least <= got <= most:
            expected = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
            missing = [name for name in self._inputs if name in self._required and name not in request.inputs]
            raise InvalidArgument(
                f"{request.label}expected {expected} but got {got} inputs for model '{self._config.name}'. Got "
                f"input(s) {_names(request.inputs)}, but missing required input(s) {_names(missing)}. Please provide "
                "all required input(s)."
            )


def _names(names: Any) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _datatype(array: Any) -> str:
    try:
        return datatype_of(array)
    except InternalError:
        return str(array.dtype)


def _strings(array: Any) -> Any:
    elements = [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
    strings = np.empty(len(elements), dtype=object)
    strings[:] = elements
    return strings.reshape(array.shape)
