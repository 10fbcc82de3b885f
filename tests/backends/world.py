"""Models on disk, and batches executed without a server around them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent

import numpy as np
import trio

from triton_trio.backends import ModelContext, Placement
from triton_trio.backends.jax import DeviceStatistics, Executor, JaxBackend, PlacedStatistics
from triton_trio.backends.jax.backend import JaxInstance, JaxModel
from triton_trio.batch import Batch
from triton_trio.config import load_model_config
from triton_trio.errors import TritonError
from triton_trio.lifecycle import Event
from triton_trio.request import InferenceRequest
from triton_trio.scopes import Reason
from triton_trio.testing.device import DeviceGate

CPU = Placement("test_0", "KIND_CPU", 0)

#: Some arithmetic and a counter; a row is done after as many steps as it asks for.
COUNTDOWN = """
import jax.numpy as jnp

def init(params, inputs):
    return {"x": inputs["X"], "left": inputs["STEPS"][0], "made": 0}

def step(params, carry):
    return {"x": jnp.sin(carry["x"]) * 1.1 + carry["made"] * 0.01, "left": carry["left"] - 1, "made": carry["made"] + 1}

def done(carry):
    return carry["left"] <= 0

def finish(params, carry):
    return {"Y": carry["x"], "MADE": jnp.int32(carry["made"])[None]}
"""
COUNTDOWN_CONFIG = """
input [{ name: "X" data_type: TYPE_FP32 dims: [3] }, { name: "STEPS" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [3] }, { name: "MADE" data_type: TYPE_INT32 dims: [1] }]
"""
#: Sends the running count after every step.
TICKER = """
import jax.numpy as jnp

def init(params, inputs):
    return {"left": inputs["STEPS"][0], "made": jnp.int32(0)}

def step(params, carry):
    return {"left": carry["left"] - 1, "made": carry["made"] + 1}

def done(carry):
    return carry["left"] <= 0

def emit(params, carry):
    return {"MADE": carry["made"][None]}
"""
TICKER_CONFIG = """
input [{ name: "STEPS" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "MADE" data_type: TYPE_INT32 dims: [1] }]
model_transaction_policy { decoupled: true }
"""


def write_model(
    root: Path, code: str, config: str, *, name: str = "m", max_batch_size: int = 8, **parameters: object
) -> ModelContext:
    directory = root / name
    version = directory / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.py").write_text(dedent(code))
    text = f'name: "{name}" backend: "jax" max_batch_size: {max_batch_size}\n{config}\n'
    for key, value in parameters.items():
        text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    (directory / "config.pbtxt").write_text(text)
    return ModelContext(load_model_config(directory), 1, directory, version)


class World:
    """One loaded model and its instance."""

    def __init__(
        self, backend: JaxBackend, model: JaxModel, instance: JaxInstance, decoupled: bool, gate: DeviceGate | None
    ) -> None:
        self.gate = gate
        self.backend = backend
        self.model = model
        self.instance = instance
        self.decoupled = decoupled

    @property
    def device(self) -> DeviceStatistics:
        (statistics,) = self.backend.statistics()
        return statistics

    @property
    def placed(self) -> PlacedStatistics:
        (statistics,) = self.model.statistics()
        return statistics

    async def execute(self, *inputs: Mapping[str, np.ndarray]) -> list[list[Mapping[str, np.ndarray]]]:
        """Run a batch to its end; the responses of each member."""
        async with self.running(inputs) as run:
            pass
        run.raise_first()
        return run.responses

    @asynccontextmanager
    async def running(
        self,
        inputs: Sequence[Mapping[str, np.ndarray]],
        *,
        read: bool = True,
        parameters: Mapping[str, object] | None = None,
    ) -> AsyncIterator[Run]:
        """A batch that executes; the block is left when it has ended."""
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                run = Run(self, inputs, parameters)
                nursery.start_soon(run.execute, name="execute")
                if read:
                    for index in range(len(inputs)):
                        nursery.start_soon(run.read, index, name=f"client {index}")
                    # Every client waits for its response: a cancel is seen at once.
                    await until(lambda: all(request._consumer or request.outcome for request in run.requests))
                try:
                    yield run
                except BaseException:
                    if self.gate is not None:
                        self.gate.open()  # leaving waits for the device
                    raise


class Run:
    def __init__(
        self, world: World, inputs: Sequence[Mapping[str, np.ndarray]], parameters: Mapping[str, object] | None
    ) -> None:
        self.world = world
        self.requests = [InferenceRequest(each, parameters=parameters) for each in inputs]
        batched = world.model._context.config.max_batch_size > 0
        for request in self.requests:
            request.batch_size = next(iter(request.inputs.values())).shape[0] if batched else 1
            request.advance(Event.ENQUEUE)
        self.abandoned = trio.Event()
        self.batch = Batch(
            self.requests,
            decoupled=world.decoupled,
            output_names=[spec.name for spec in world.model._context.config.outputs],
            on_abandoned=lambda batch: self.abandoned.set(),
        )
        self.responses: list[list[Mapping[str, np.ndarray]]] = [[] for _ in inputs]
        self.errors: dict[int, TritonError] = {}
        self.ended = trio.Event()
        self.error: Exception | None = None

    async def execute(self) -> None:
        """What the model instance does with its backend."""
        try:
            with self.batch.scope.cancel_scope:
                await self.world.instance.execute(self.batch)
        except TritonError as exc:
            self.error = exc
            for member in self.batch.members:
                self.batch.fail(member, type(exc)(*exc.args))
        finally:
            for member in self.batch.members:
                if member.live and self.world.decoupled and self.error is None:
                    self.batch.finish(member)
                member.release()
            self.ended.set()

    async def read(self, index: int) -> None:
        request = self.requests[index]
        try:
            with request:
                while True:
                    response = await request.receive()
                    if response.outputs:
                        self.responses[index].append(response.outputs)
                    if response.final:
                        break
        except TritonError as exc:
            self.errors[index] = type(exc)(*exc.args)

    def cancel(self, *indices: int) -> None:
        for index in indices:
            self.requests[index].cancel(Reason.CLIENT_RESET)

    def raise_first(self) -> None:
        for error in self.errors.values():
            raise error


@asynccontextmanager
async def open_world(
    context: ModelContext, *, gate: DeviceGate | None = None, backend: JaxBackend | None = None
) -> AsyncIterator[World]:
    if backend is None:
        backend = JaxBackend(executor=gate.executor if gate else lambda name: Executor())
    async with backend.open_model(context) as model, model.open_instance(CPU) as instance:
        yield World(backend, model, instance, context.config.decoupled, gate)


async def until(condition: Callable[[], object]) -> None:
    """Look until another thread, or another task, has done its part."""
    while not condition():  # noqa: ASYNC110
        time.sleep(50e-6)  # noqa: ASYNC251 - to let the other thread have the GIL, and a core
        await trio.lowlevel.checkpoint()


def countdown(steps: int, seed: int = 0, rows: int = 1) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    return {"X": x, "STEPS": np.full((rows, 1), steps, np.int32)}


def ticks(steps: int) -> dict[str, np.ndarray]:
    return {"STEPS": np.array([[steps]], np.int32)}
