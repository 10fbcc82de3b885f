"""The programs of one model for one bucket and one shape: what the author wrote for a row, lifted to a batch.

Functions of one row are ``vmap``-ed, so a row cannot touch its neighbours by construction.  A chunk is a ``lax.scan`` of
static length over masked steps: a row that is done, parked or cancelled keeps its carry bit for bit, whatever the others
do.  The carry is donated from chunk to chunk; the masks are not, so they can be read while the next chunk runs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ...tensor import DTYPES
from .checks import Avals, aval, model_dims, refuse_callbacks
from .controller import ChunkController
from .memory import ProgramMemory, donation_problem

if TYPE_CHECKING:
    from ...config import TensorSpec
    from .loader import ModelFunctions
    from .options import JaxOptions

Compiled = Callable[..., Any]
#: Shapes of one row by input name: with the bucket, what a set of programs is compiled for.
RowShapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(slots=True)
class ProgramSet:
    """Compiled programs of one bucket."""

    bucket: int
    controller: ChunkController
    apply: Compiled | None = None
    init: Compiled | None = None
    finish: Compiled | None = None
    chunks: dict[int, Compiled] = field(default_factory=dict)
    #: By the smaller bucket: from carry, flags and the rows to take (int32[smaller]) to carry and flags there.
    compact: dict[int, Compiled] = field(default_factory=dict)
    #: From carry and flags, those of rows that begin, and which rows these are (bool[bucket]) to carry and flags; None:
    #: nobody joins.
    join: Compiled | None = None
    #: Of the program that takes most of it; None until one is compiled, and where the platform does not tell.
    memory: ProgramMemory | None = None
    not_donated: str = ""  #: why chunks copy the carry, if they do


@contextlib.contextmanager
def precision(x64: bool) -> Iterator[None]:
    """JAX's 64-bit mode for this thread.  Programs must be called in the mode they were traced in."""
    home = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # before JAX 0.8
    with getattr(home, "enable_x64")(x64):  # noqa: B009
        yield


def row_avals(specs: tuple[TensorSpec, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Avals]:
    """Abstract inputs of one row."""
    return {spec.name: aval(shapes[spec.name], DTYPES[spec.datatype]) for spec in specs}


def static_shapes(specs: tuple[TensorSpec, ...]) -> RowShapes | None:
    """The one shape that rows can have; None if a dim is variable."""
    shapes = tuple((spec.name, model_dims(spec)) for spec in specs)
    return None if any(-1 in dims for _, dims in shapes) else shapes


class ProgramBuilder:
    """Builds the programs of one model on one device, one compilation at a time.

    Args:
      params: on the device.
      batched: the model has a batch dimension; without one, a bucket is one row and tensors are passed as they are.
    """

    def __init__(
        self, functions: ModelFunctions, options: JaxOptions, device: jax.Device, params: Any, *, batched: bool
    ) -> None:
        self._functions = functions
        self._options = options
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._params = jax.tree.map(self._aval, params)
        self._batched = batched

    def build(self, programs: ProgramSet, row: Mapping[str, Avals]) -> Iterator[Callable[[], None]]:
        """Jobs that fill ``programs``, each of them one compilation; call them in order, in a worker thread."""
        functions = self._functions
        bucket = programs.bucket
        inputs = {name: self._placed((bucket, *aval.shape), aval.dtype) for name, aval in row.items()}

        def compile_apply() -> None:
            assert functions.apply is not None
            programs.apply = self._compile(programs, self._lift(functions.apply), self._params, inputs)

        if functions.apply is not None:
            yield compile_apply
            return

        init = self._init()
        avals: list[Avals] = []

        def compile_init() -> None:
            programs.init = self._compile(programs, init, self._params, inputs)
            avals.extend(jax.tree.map(self._aval, jax.eval_shape(init, self._params, inputs)))

        def compile_chunk(k: int) -> None:
            carry, flags = avals
            keep = self._placed((bucket,), np.dtype(bool))
            programs.chunks[k] = self._compile(programs, self._chunk(k), self._params, carry, flags, keep, donate=1)

        def compile_compact(to: int) -> None:
            rows = self._placed((to,), np.dtype(np.int32))
            programs.compact[to] = self._compile(programs, _take_rows, *avals, rows)

        def compile_join() -> None:
            begin = self._placed((bucket,), np.dtype(bool))
            programs.join = self._compile(programs, _replace_rows, *avals, *avals, begin, donate=0)

        def compile_finish() -> None:
            assert functions.finish is not None
            programs.finish = self._compile(programs, self._lift(functions.finish), self._params, avals[0])

        yield compile_init
        for k in programs.controller.ladder:
            yield lambda k=k: compile_chunk(k)  # type: ignore[misc]
        for to in {self._options.compacted(bucket, rows) for rows in range(1, bucket)} - {None}:
            yield lambda to=to: compile_compact(to)  # type: ignore[misc]
        if self._options.join and bucket > 1:
            yield compile_join
        if functions.finish is not None:
            yield compile_finish

    def _compile(
        self, programs: ProgramSet, function: Callable[..., Any], *avals: Avals, donate: int | None = None
    ) -> Compiled:
        jitted = jax.jit(function, donate_argnums=() if donate is None else donate)
        traced = jitted.trace(*avals)
        # Of one row nobody has seen any; a rule for many rows (custom_vmap) may have its own.
        refuse_callbacks(f"{self._functions.path}: what is made of it for {programs.bucket} rows", traced.jaxpr.jaxpr)
        compiled: Any = traced.lower().compile()
        memory = ProgramMemory.of(compiled, *(each for each in avals if each is not self._params))
        if memory is not None and (programs.memory is None or memory.total > programs.memory.total):
            programs.memory = memory
        if donate is not None:
            programs.not_donated = programs.not_donated or donation_problem(memory, avals[donate], compiled.out_info[0])
        return cast("Compiled", compiled)

    def _aval(self, leaf: Any) -> Avals:
        return self._placed(leaf.shape, leaf.dtype)

    def _placed(self, shape: tuple[int, ...], dtype: Any) -> Avals:
        return aval(shape, dtype, sharding=self._sharding)

    # From one row to a batch

    def _lift(self, function: Callable[..., Any], *, with_params: bool = True) -> Callable[..., Any]:
        if self._batched:
            return jax.vmap(function, in_axes=(None, 0) if with_params else 0)

        def one_row(*args: Any) -> Any:
            *params, value = args
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], function(*params, jax.tree.map(_first, value)))

        return one_row

    def _done(self) -> Callable[[Any, jax.Array], jax.Array]:
        limit = self._options.max_steps
        by_author = None if self._functions.done is None else self._lift(self._functions.done, with_params=False)

        def done(carry: Any, count: jax.Array) -> jax.Array:
            reached = jnp.zeros(count.shape, bool) if limit is None else count >= limit
            return reached if by_author is None else reached | by_author(carry)

        return done

    def _init(self) -> Callable[..., Any]:
        assert self._functions.init is not None
        init, done = self._lift(self._functions.init), self._done()

        def program(params: Any, inputs: Any) -> Any:
            # Weak types (a Python 0 in the carry) would make the first chunk's program another one than the second's.
            carry = jax.tree.map(_strong, init(params, inputs))
            count = jnp.zeros(jax.tree.leaves(inputs)[0].shape[:1], np.int32)
            return carry, (done(carry, count), count)

        return program

    def _chunk(self, k: int) -> Callable[..., Any]:
        assert self._functions.step is not None
        step, done = self._lift(self._functions.step), self._done()
        emit = None if self._functions.emit is None else self._lift(self._functions.emit)

        def program(params: Any, carry: Any, flags: Any, keep: jax.Array) -> Any:
            def body(state: Any, _: None) -> Any:
                carry, (ended, count) = state
                active = keep & ~ended
                stepped = step(params, carry)
                carry = jax.tree.map(lambda new, old: jnp.where(_rows(active, old), new, old), stepped, carry)
                count = count + active.astype(count.dtype)
                ended = ended | (active & done(carry, count))
                return (carry, (ended, count)), None if emit is None else (emit(params, carry), active)

            (carry, flags), emitted = jax.lax.scan(body, (carry, flags), None, length=k)
            return carry, flags, emitted

        return program


def _take_rows(carry: Any, flags: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], (carry, flags))


def _replace_rows(carry: Any, flags: Any, new_carry: Any, new_flags: Any, begin: jax.Array) -> Any:
    def replace(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(_rows(begin, old), new, old)

    return jax.tree.map(replace, (carry, flags), (new_carry, new_flags))


def _first(leaf: Any) -> Any:
    return leaf[0]


def _strong(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def _rows(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - 1))
