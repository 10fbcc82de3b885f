"""What can be known of a model's functions before anything is compiled: by tracing them on abstract arrays.

Every message names model.py, the function, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ...errors import InvalidArgument
from ...tensor import DTYPES
from .loader import at_line

if TYPE_CHECKING:
    from ...config import ModelConfig, TensorSpec
    from .loader import ModelFunctions

Avals = Any  #: a pytree of jax.ShapeDtypeStruct
#: ``aval(shape, dtype)``; JAX's stubs leave it untyped.
aval: Any = jax.ShapeDtypeStruct

_DEBUG = "remove jax.debug.print() and the like, or make what you want to see an output"
_RETURN = "return what you need in the carry or the outputs"
#: Primitives that make a program stop and call Python, with what to do instead.
_CALLBACKS = {
    "io_callback": _RETURN,
    "pure_callback": _RETURN,
    "debug_callback": _DEBUG,
    "debug_print": _DEBUG,  # of jax.debug.print(), in a JAX that has it as a primitive of its own
}


def check_config(config: ModelConfig) -> None:
    """Raises :exc:`InvalidArgument` if a tensor is missing or of a kind that JAX does not have."""
    batching = config.sequence_batching
    added = {spec.name for spec in (*batching.added_inputs, *batching.state_outputs)} if batching is not None else ()
    for kind, specs in (("input", config.inputs), ("output", config.outputs)):
        if not specs:
            raise InvalidArgument(
                f"model '{config.name}': config.pbtxt lists no {kind}; the jax backend compiles for the {kind}s listed there"
            )
        for spec in specs:
            where = f"model '{config.name}': {kind} '{spec.name}'"
            if spec.datatype == "BYTES" and spec.name in added:
                raise InvalidArgument(
                    f"{where}, which sequence_batching adds, is TYPE_STRING, and devices have no strings; for "
                    "CONTROL_SEQUENCE_CORRID use TYPE_UINT64, and keep states as numbers"
                )
            if spec.datatype == "BYTES":
                raise InvalidArgument(
                    f"{where} is TYPE_STRING, and devices have no strings; send numbers (token ids, UINT8 bytes), or "
                    "encode them in a python model in front of this one"
                )
            if spec.datatype not in DTYPES:
                raise InvalidArgument(f"{where} has no data_type in config.pbtxt")
            if spec.optional:
                raise InvalidArgument(f"{where} is optional; a compiled program always has all of its inputs")
            if spec.allow_ragged_batch:
                raise InvalidArgument(f"{where} has allow_ragged_batch; a compiled program needs rows of one shape")


def model_dims(spec: TensorSpec) -> tuple[int, ...]:
    """The row's shape as the model's functions see it."""
    return spec.dims if spec.reshape is None else spec.reshape


class FunctionChecker:
    """Traces the functions of one model for one shape of a row.

    Args:
      params: abstract; as ``load`` returned it.
      row: abstract inputs of one row, by name.
    """

    def __init__(self, config: ModelConfig, functions: ModelFunctions, params: Avals, row: Mapping[str, Any]) -> None:
        self._config = config
        self._functions = functions
        self._params = params
        self._row = dict(row)

    def check(self) -> None:
        """Raises :exc:`InvalidArgument` for the first thing that is wrong."""
        functions = self._functions
        if functions.apply is not None:
            self._check_outputs("apply", self._trace("apply", functions.apply, self._params, self._row))
            return
        assert functions.init is not None
        assert functions.step is not None
        carry = self._trace("init", functions.init, self._params, self._row)
        self._check_carry(carry, self._trace("step", functions.step, self._params, carry))
        if functions.done is not None:
            self._check_done(self._trace("done", functions.done, carry))
        for name in ("finish", "emit"):
            function = getattr(functions, name)
            if function is not None:
                self._check_outputs(name, self._trace(name, function, self._params, carry))

    def _bad(self, text: str) -> InvalidArgument:
        return InvalidArgument(f"model '{self._config.name}': {self._functions.path}: {text}")

    def _trace(self, name: str, function: Callable[..., Any], *args: Avals) -> Avals:
        try:
            jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  (any error of the author's function)
            where = at_line(exc, self._functions.path)
            hint = f"; its inputs are {', '.join(self._row)}" if isinstance(exc, KeyError) else ""
            raise self._bad(
                f"{name}() cannot be traced{where}: {type(exc).__name__}: {_first_paragraph(exc)}{hint}"
            ) from None
        problem = callback_problem(jaxpr.jaxpr)
        if problem:
            raise self._bad(f"{name}() {problem}")
        return out

    def _check_carry(self, before: Avals, after: Avals) -> None:
        trees: list[Any] = [jax.tree_util.tree_structure(before), jax.tree_util.tree_structure(after)]
        old = dict(jax.tree_util.tree_leaves_with_path(before))
        new = dict(jax.tree_util.tree_leaves_with_path(after))
        for path in old.keys() | new.keys():
            where = f"carry{jax.tree_util.keystr(path)}"
            if path not in new:
                raise self._bad(f"step() must return a carry like its argument: {where} is missing")
            if path not in old:
                raise self._bad(
                    f"step() must return a carry like its argument: {where} is new, init() does not make it"
                )
            if (old[path].shape, old[path].dtype) != (new[path].shape, new[path].dtype):
                raise self._bad(
                    f"step() must return a carry like its argument: {where} is {_show(new[path])}, "
                    f"init() makes {_show(old[path])}"
                )
        if trees[0] != trees[1]:
            raise self._bad(f"step() must return a carry like its argument: init() makes {trees[0]}, step() {trees[1]}")

    def _check_done(self, done: Avals) -> None:
        leaves = jax.tree_util.tree_leaves(done)
        if len(leaves) != 1 or leaves[0].shape != () or leaves[0].dtype != np.bool_:
            got = ", ".join(map(_show, leaves)) or "nothing"
            raise self._bad(f"done() must return one bool (a scalar; use jnp.all or jnp.any), got {got}")

    def _check_outputs(self, name: str, outputs: Avals) -> None:
        if not isinstance(outputs, Mapping):
            raise self._bad(f"{name}() must return a dict of arrays by output name, got {type(outputs).__name__}")
        problem = outputs_problem(
            self._config.outputs, {key: (leaf.shape, leaf.dtype) for key, leaf in _arrays(outputs)}
        )
        if problem:
            raise self._bad(f"{name}(): {problem}")


def _arrays(outputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in outputs.items():
        leaves = jax.tree_util.tree_leaves(value)
        yield name, leaves[0] if len(leaves) == 1 else aval((), np.dtype(object))


def outputs_problem(specs: Sequence[TensorSpec], outputs: Mapping[str, tuple[tuple[int, ...], Any]]) -> str:
    """What is wrong with a row's outputs, given as shape and dtype by name; empty if nothing is."""
    for spec in specs:
        if spec.name not in outputs:
            return f"output '{spec.name}' is missing, got {sorted(outputs) or 'none'}"
        shape, dtype = outputs[spec.name]
        if np.dtype(dtype) != DTYPES[spec.datatype]:
            return (
                f"output '{spec.name}' must be {DTYPES[spec.datatype]} ({spec.config_datatype} in config.pbtxt), "
                f"got {dtype}"
            )
        dims = model_dims(spec)
        if len(shape) != len(dims) or any(want not in (-1, size) for want, size in zip(dims, shape, strict=True)):
            return f"output '{spec.name}' must have dims {list(dims)} as in config.pbtxt, got {list(shape)}"
    extra = sorted(set(outputs) - {spec.name for spec in specs})
    if extra:
        return f"output '{extra[0]}' is not in config.pbtxt, which has {[spec.name for spec in specs]}"
    return ""


def refuse_callbacks(where: str, jaxpr: Any) -> None:
    """Raises :exc:`InvalidArgument` with ``where`` in front if a traced function calls Python."""
    problem = callback_problem(jaxpr)
    if problem:
        raise InvalidArgument(f"{where} {problem}")


def callback_problem(jaxpr: Any) -> str:
    """Where a traced function calls Python, at any depth (scan, cond, jit, custom_jvp, ...); empty if nowhere."""
    for primitive in _primitives(jaxpr):
        if primitive in _CALLBACKS:
            return (
                f"calls back into Python ({primitive}); the device would stop and wait for the server's interpreter at "
                f"each call, and no cancel could be seen meanwhile: {_CALLBACKS[primitive]}"
            )
    return ""


def _show(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(parameter):
                yield from _primitives(getattr(parameter, "jaxpr", parameter))


def _is_jaxpr(value: object) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _first_paragraph(exc: BaseException) -> str:
    # JAX's messages go on with pages of advice and traces.
    return str(exc).strip().split("\n\n", 1)[0][:500]
