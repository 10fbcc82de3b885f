"""``async def run(ctx, params, inputs)``: the author writes the checkpoints.

Each member of a batch is served on its own, sees its tensors as they were sent (with a batch dimension if
``max_batch_size`` is not 0), and has a task, a scope and a device job of its own.  The members run side by side and take
turns on the device, so that a short request does not wait for a long one, and one member's error or cancel is nobody
else's business.
"""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import trio

from ...errors import InternalError, InvalidArgument, TritonError, Unavailable, no_panic
from ...tensor import DTYPES
from .checks import Avals, aval, callback_problem, outputs_problem
from .device import Pause, Turn
from .job import DeviceJob, open_trial
from .loader import at_line
from .programs import precision, static_shapes

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...config import TensorSpec
    from ...request import Array, ParameterValue
    from .placed import PlacedModel

LOGGER = logging.getLogger("triton_trio.jax")

#: Compiled functions that one model keeps.
PROGRAMS = 64

#: A function's identity, and for each argument its tree and its leaves' shapes and types.
Key = tuple[object, tuple[Any, ...]]
Send = Callable[[dict[str, "Array"]], Awaitable[None]]


class RunTurn(Turn):
    """One call of a compiled function.  The fence is a second output that the author cannot donate away."""

    steps = 1

    def __init__(self, x64: bool, program: Callable[..., Any], args: tuple[Any, ...], *, fetch: bool) -> None:
        self._x64 = x64
        self._program = program
        self._args = args
        self._fence: Any = None
        self.reply_when_done = fetch
        self.value: Any = None

    def dispatch(self) -> bool:
        args, self._args = self._args, ()
        with precision(self._x64):
            self.value, self._fence = self._program(*args)
        if self.reply_when_done:
            for leaf in jax.tree.leaves(self.value):
                leaf.copy_to_host_async()
        return True

    def wait(self) -> None:
        fence, self._fence = self._fence, None
        if self.reply_when_done:
            self.value = jax.tree.map(np.asarray, self.value)
        fence.block_until_ready()

    def ready(self) -> bool:
        return bool(self._fence.is_ready())


class FetchTurn(Turn):
    """Bring values to the host.  Leaves that are not on a device are left as they are."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def dispatch(self) -> bool:
        leaves = [leaf for leaf in jax.tree.leaves(self.value) if isinstance(leaf, jax.Array)]
        for leaf in leaves:
            leaf.copy_to_host_async()
        return bool(leaves)

    def wait(self) -> None:
        value, self.value = self.value, None
        self.value = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, value)

    def ready(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.value) if hasattr(leaf, "is_ready"))


class FunctionCache:
    """The compiled functions of one explicit model on one device; the least recently used are forgotten."""

    def __init__(self, placed: PlacedModel) -> None:
        self._placed = placed
        self._programs: OrderedDict[Key, Callable[..., Any]] = OrderedDict()
        self._compiling = trio.Lock()

    async def get(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        """The program for ``function`` and arguments like ``args``; compiled in a worker thread when first needed.

        **Cancellation:** see :meth:`Compilations.wait`.
        """
        key: Key = (_identity(function), tuple(map(self._signature, args)))
        while True:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
                return program
            assert self._placed.compilations is not None
            # Of the arguments only what they are like: nobody's arrays stay on the device for as long as it is compiled.
            with precision(self._placed.options.x64):
                avals = jax.tree.map(self._like, args)
            compile_it = functools.partial(self._compile, key, function, avals)
            await self._placed.compilations.wait(key, f"{_function_name(function)}()", compile_it)

    def _signature(self, arg: Any) -> object:
        if arg is not None and arg is self._placed.params:
            return "params"  # the same object each time: no need to look at a thousand leaves
        leaves, tree = jax.tree.flatten(arg)
        return tree, tuple(map(_leaf_signature, leaves))

    def _like(self, leaf: Any) -> Avals:
        sharding = jax.sharding.SingleDeviceSharding(self._placed.jax_device)
        if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
            # Weak, as a Python number in JAX: it must not turn bfloat16 into float32.
            return aval((), jax.dtypes.canonicalize_dtype(type(leaf)), sharding=sharding, weak_type=True)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return aval(leaf.shape, dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False))

    def _is_new_shape(self, key: Key) -> bool:
        """Whether a function that is known meets shapes that it has not met."""
        function, signature = key
        known = [_shapes(other) for identity, other in self._programs if identity == function]
        return bool(known) and _shapes(signature) not in known

    async def _compile(self, key: Key, function: Callable[..., Any], avals: tuple[Avals, ...]) -> None:
        def fenced(*args: Any) -> Any:
            return function(*args), np.int32(0)

        def job() -> None:
            traced = jax.jit(fenced, donate_argnums=_donated(function, avals)).trace(*avals)
            problem = callback_problem(traced.jaxpr.jaxpr)
            if problem:
                # Whatever the request was: the mistake is the model's.
                raise InternalError(f"{self._placed.name}: ctx.run: {_function_name(function)}() {problem}")
            # Here, so that it is kept if everybody has left meanwhile.
            self._programs[key] = traced.lower().compile()

        async with self._compiling:
            new_shape = not self._placed.warm or self._is_new_shape(key)
            if not new_shape:
                self._placed.warn_of_compile(f"ctx.run: {_function_name(function)}()")
            while len(self._programs) >= PROGRAMS:
                self._programs.popitem(last=False)
            await self._placed.compile(job, new_shape=new_shape)


def _identity(function: Callable[..., Any]) -> object:
    if isinstance(function, functools.partial):
        key = (_identity(function.func), _constant(function.args), _constant(sorted(function.keywords.items())))
        try:
            hash(key)
        except TypeError:
            return function
        return key
    return function


def _constant(value: Any) -> object:
    # 1, 1.0 and True are equal, as are 0.0 and -0.0, and make programs that are not.
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_constant, value))
    return type(value), repr(value) if isinstance(value, float | complex) else value


def _shapes(signature: tuple[Any, ...]) -> object:
    """A signature without the types."""
    return tuple(
        argument
        if isinstance(argument, str)
        else (argument[0], tuple(leaf[0] if isinstance(leaf, tuple) else () for leaf in argument[1]))
        for argument in signature
    )


def _function_name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _leaf_signature(leaf: Any) -> object:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)
    if isinstance(leaf, bool | int | float | complex):
        return type(leaf)
    raise TypeError(
        f"ctx.run: an argument of type {type(leaf).__name__} cannot go to the device; bind it with functools.partial"
    )


def _donated(function: Callable[..., Any], avals: tuple[Any, ...]) -> tuple[int, ...]:
    """The arguments that the author's own ``jax.jit(..., donate_argnums=...)`` donates."""
    bound: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    jitted: Any = function
    while isinstance(jitted, functools.partial):
        bound, keywords, jitted = jitted.args + bound, jitted.keywords | keywords, jitted.func
    if not hasattr(jitted, "lower"):
        return ()
    infos, _ = jitted.lower(*bound, *avals, **keywords).args_info
    return tuple(
        index
        for index, info in enumerate(infos[len(bound) :])
        if any(leaf.donated for leaf in jax.tree.leaves(info, is_leaf=_is_info))
    )


def _is_info(value: object) -> bool:
    return hasattr(value, "donated")


class ExplicitContext:
    """What ``run`` awaits.

    **Cancellation:** every method is a Trio checkpoint of this request; when ``Cancelled`` is raised, the device is idle
    for it.  Afterwards nothing more gets onto the device, whatever ``run`` catches or shields.

    Args:
      live: whether anybody wants what comes of it.
    """

    def __init__(
        self,
        placed: PlacedModel,
        functions: FunctionCache,
        job: DeviceJob,
        *,
        send: Send | None,
        batch_size: int = 1,
        parameters: Mapping[str, ParameterValue] | None = None,
        live: Callable[[], bool] = lambda: True,
    ) -> None:
        self._placed = placed
        self._functions = functions
        self._job = job
        self._send = send
        self._live = live
        self.batch_size = batch_size  #: rows of this request
        self.parameters = parameters or {}  #: that the client sent along
        self.rescheduled = False
        batching = placed.config.sequence_batching
        self._iterative = batching is not None and batching.iterative_sequence
        self._states = batching.state_outputs if batching is not None else ()

    async def run(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """Dispatch ``function(*args)`` as one compiled program and return its values on the device, not yet computed.

        ``function`` may be plain or from ``jax.jit`` with ``donate_argnums``; give the same object each time, for it is
        compiled once for each function and kind of arguments.  At most two programs are on the device: the third
        waits for its turn.
        """
        return await self._call(function, args, fetch=False)

    async def checkpoint(self, value: Any = None) -> None:
        """The place to let go: returns when there is room on the device, so at most one program of this request is there.

        ``value`` is what the author waits for, for the reader of the code; the device works in order.
        """
        await self._submit(Pause())

    async def fetch(self, what: Any, /, *args: Any) -> Any:
        """Values on the device → numpy arrays; or ``fetch(function, *args)``: run it and fetch its result."""
        if callable(what):
            return await self._call(what, args, fetch=True)
        turn = FetchTurn(what)
        await self._submit(turn)
        return turn.value

    async def send(self, outputs: Mapping[str, Any]) -> None:
        """Send one response of a decoupled model, waiting while the reader is behind.  Never the last one."""
        if self._send is None:
            raise InternalError(
                f"{self._placed.name}: ctx.send() needs 'model_transaction_policy {{ decoupled: true }}' in config.pbtxt"
            )
        await self._send(await self.to_response(outputs, "ctx.send()"))

    def reschedule(self) -> None:
        """What ``run`` returns is no answer: execute the request again, later, without START (``iterative_sequence``).

        Sync.  ``run`` then returns its state outputs and nothing else, or None to leave the states as they are.  Until the
        request's turn comes again its rows and the device are free for others.
        """
        if not self._iterative:
            raise InternalError(
                f"{self._placed.name}: ctx.reschedule() needs 'sequence_batching {{ iterative_sequence: true }}' in "
                "config.pbtxt"
            )
        self.rescheduled = True

    async def to_result(self, outputs: Mapping[str, Any] | None) -> dict[str, Array] | None:
        """What ``run`` returned, fetched and checked; None if it was nothing, and may be."""
        decoupled = self._placed.config.decoupled
        if outputs is None and (self.rescheduled or decoupled):
            return None
        if not self.rescheduled:
            return await self.to_response(outputs, "run()")
        states = {state.name for state in self._states}
        if isinstance(outputs, Mapping) and (extra := sorted(outputs.keys() - states)):
            raise InternalError(
                f"{self._placed.name}: run() has called ctx.reschedule(), so it may return states and nothing else, got "
                f"'{extra[0]}'"
            )
        return await self.to_response(outputs, "run()", self._states)

    async def to_response(
        self, outputs: Mapping[str, Any] | None, where: str, specs: Sequence[TensorSpec] | None = None
    ) -> dict[str, Array]:
        """Fetch ``outputs`` and check them against ``specs``, by default those of config.pbtxt."""
        if not isinstance(outputs, Mapping):
            got = f"got {type(outputs).__name__}"
            if inspect.iscoroutine(outputs):
                outputs.close()
                got += "; is an await missing?"
            raise InternalError(f"{self._placed.name}: {where} must have a dict of arrays by output name, {got}")
        config, batched = self._placed.config, self._placed.batched
        arrays = {name: np.asarray(value) for name, value in (await self.fetch(dict(outputs))).items()}
        if batched:
            for name, array in arrays.items():
                if array.shape[:1] != (self.batch_size,):
                    raise InternalError(
                        f"{self._placed.name}: {where}: output '{name}' must have {self.batch_size} rows, as the inputs, "
                        f"got shape {list(array.shape)}"
                    )
        if specs is None:
            # Each answer of a decoupled model may leave states as they were.
            optional = {state.name for state in self._states} - arrays.keys() if config.decoupled else ()
            specs = [spec for spec in config.outputs if spec.name not in optional]
        problem = outputs_problem(specs, {name: (array.shape[batched:], array.dtype) for name, array in arrays.items()})
        if problem:
            raise InternalError(f"{self._placed.name}: {where}: {problem}")
        return arrays

    async def _call(self, function: Callable[..., Any], args: tuple[Any, ...], *, fetch: bool) -> Any:
        try:
            program = await self._functions.get(function, args)
        except Exception:
            await trio.lowlevel.cancel_shielded_checkpoint()  # as in DeviceJob.call()
            raise
        turn = RunTurn(self._placed.options.x64, program, args, fetch=fetch)
        await self._submit(turn)
        return turn.value

    async def _submit(self, turn: Turn) -> None:
        if not self._live():
            # In a scope that is shielded from the request's, or it would be Cancelled.
            await trio.lowlevel.checkpoint()
            raise Unavailable(f"{self._placed.name}: the request is over; nothing of it gets onto the device any more")
        await self._job.call(turn)


async def warm_up(placed: PlacedModel, functions: FunctionCache) -> None:
    """Run the model once on zeros, so that its programs are compiled and its outputs checked before it is ready.

    Models with variable dims are not run.  **Cancellation:** see :func:`~.job.open_trial`.
    """
    shapes = static_shapes(placed.config.inputs)
    if shapes is None or not placed.options.warmup:
        return
    lead = (1,) if placed.batched else ()
    dtypes = {spec.name: DTYPES[spec.datatype] for spec in placed.config.inputs}
    inputs = {name: np.zeros((*lead, *dims), dtypes[name]) for name, dims in shapes}

    async def drop(outputs: dict[str, Array]) -> None:
        await trio.lowlevel.checkpoint()

    assert placed.functions.run is not None
    where = f"{placed.name}: {placed.functions.path}: run()"
    async with open_trial(placed.device, placed.name, placed.release_limit) as job:
        ctx = ExplicitContext(placed, functions, job, send=drop if placed.config.decoupled else None)
        try:
            await ctx.to_result(await placed.functions.run(ctx, placed.params, inputs))
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever the author's function raises
            LOGGER.error("%s failed when it was tried on zeros: %s", where, traceback.format_exc())
            raise InvalidArgument(
                f"{where} failed when it was tried on zeros{at_line(exc, placed.functions.path)}: {_told(exc)}; if zeros are no "
                "valid input, set the parameter warmup to 'false' in config.pbtxt"
            ) from None


def _told(exc: BaseException) -> str:
    return exc.message if isinstance(exc, TritonError) else f"{type(exc).__name__}: {exc}"


async def execute_explicit(placed: PlacedModel, functions: FunctionCache, batch: Batch) -> None:
    """Serve the members side by side, each in a task and scope of its own.

    **Cancellation:** a member's cancel is an ordinary ``Cancelled`` in its ``run``; when all have left, in all of them.
    """
    batch.compute_infer_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        for member in batch.members:
            # Owner: this nursery; ends with the member's run, cancelled by the member's leaving.
            nursery.start_soon(
                _serve, placed, functions, batch, member, name=f"run of request #{member.request.generation}"
            )


async def _serve(placed: PlacedModel, functions: FunctionCache, batch: Batch, member: Member) -> None:
    if not member.live:
        member.release()
        return
    job = DeviceJob(placed.device, placed.name, owner=batch)
    completed = False
    assert placed.functions.run is not None
    member.scope = trio.CancelScope()
    try:
        with member.scope:
            async with job:
                ctx = ExplicitContext(
                    placed,
                    functions,
                    job,
                    send=functools.partial(batch.send, member) if batch.decoupled else None,
                    batch_size=member.stop - member.start,
                    parameters=member.request.parameters,
                    live=lambda: member.live,
                )
                with no_panic(f"{placed.name}: run() failed"):
                    response = await ctx.to_result(await placed.functions.run(ctx, placed.params, dict(member.inputs)))
            completed = True
            batch.compute_output_at = batch.compute_output_at or trio.current_time()
            if ctx.rescheduled:
                batch.reschedule(member, response)
            elif response is None:
                batch.finish(member)
            else:
                batch.respond(member, response)
    except TritonError as exc:
        batch.fail(member, type(exc)(*exc.args))
    except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever a model raises is that request's error
        # As text: a record that keeps the exception would keep the arrays of every frame it passed.
        LOGGER.error("%s: run() failed: %s", placed.name, traceback.format_exc())
        batch.fail(member, InternalError(f"{placed.name}: run() failed: {type(exc).__name__}: {exc}"))
    finally:
        member.scope = None
        # The job has been cancelled by scopes of the model's own, too: what came of that was wanted.
        left = member.left_at is not None and not member.kept and member.left_at <= job.cancelled_at
        after = job.seconds_after_cancel if left else 0.0
        batch.charge(member, job.device_seconds - after, wasted=False)
        batch.charge(member, after, wasted=True)
        placed.typical.settle(member, job.steps, completed=completed)
        member.steps_after_cancel += job.steps_after_cancel if left else 0
        if not member.live:
            member.release()
