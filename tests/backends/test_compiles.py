"""After the load nothing is compiled, except for shapes that are new on purpose; and the counters tell which it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trio
import trio.testing

import triton_trio
from triton_trio.backends.jax.compilations import Compilations
from triton_trio.backends.jax.placed import PlacedModel
from triton_trio.backends.jax.programs import ProgramBuilder
from triton_trio.errors import InvalidArgument

from .world import (
    COUNTDOWN,
    COUNTDOWN_CONFIG,
    PlacedStatistics,
    World,
    countdown,
    open_world,
    until,
    write_model,
)

VECTOR = """
input [{ name: "X" data_type: TYPE_FP32 dims: [3] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [3] }]
"""
#: The author's mistake is in FACTOR, of which a request's first number picks one.
FACTORS = """
import numpy as np

FACTORS = [2, 2, np.int32(2), 3, np.int32(3)]

def scaled(x, factor):
    return x * factor

async def run(ctx, params, inputs):
    return {"Y": await ctx.run(scaled, inputs["X"], FACTORS[int(inputs["X"][0, 0])])}
"""


@contextmanager
def backend_compiles() -> Iterator[list[str]]:
    """What XLA compiles in this process, whoever asked for it."""
    compiles: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def after_load(placed: PlacedStatistics) -> tuple[int, int]:
    return placed.compiles_after_load, placed.compiles_for_shapes


def first(number: float, rows: int = 1) -> dict[str, np.ndarray]:
    return {"X": np.full((rows, 3), number, np.float32)}


async def test_batches_of_every_size_and_length_compile_nothing(tmp_path: Path) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=4, ladder="1,2,4")
    with backend_compiles() as compiles:
        async with open_world(context) as world:
            assert compiles  # the listener hears
            compiles.clear()
            for rows in range(1, 5):
                async with world.running([countdown(3 * row, seed=row) for row in range(rows)]) as run:
                    run.cancel(0)
            assert compiles == []
            assert after_load(world.placed) == (0, 0)


async def test_a_python_number_and_a_numpy_scalar_are_two_programs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(write_model(tmp_path, FACTORS, VECTOR, max_batch_size=1)) as world:
        with backend_compiles() as compiles:
            await world.execute(first(1))  # a Python number, as in the run on zeros
            await world.execute(first(3))  # another one
            assert compiles == []
            assert after_load(world.placed) == (0, 0)
            await world.execute(first(2))
            assert len(compiles) == 1
            assert after_load(world.placed) == (1, 0)
            await world.execute(first(4))
            assert after_load(world.placed) == (1, 0)
        (record,) = caplog.records
        assert record.getMessage().startswith(
            "model 'm': ctx.run: scaled() was compiled while a request waited, for no new"
        )


async def test_a_function_made_anew_for_each_request_is_compiled_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
        async def run(ctx, params, inputs):
            return {"Y": await ctx.run(lambda x: x + 1, inputs["X"])}
    """
    async with open_world(write_model(tmp_path, code, VECTOR, max_batch_size=1)) as world:
        for count in (1, 2):
            await world.execute(first(1))
            assert after_load(world.placed) == (count, 0)
    assert len(caplog.records) == 1  # told once


async def test_more_rows_than_the_run_on_zeros_had_are_another_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(write_model(tmp_path, FACTORS, VECTOR, max_batch_size=2)) as world:
        await world.execute(first(0, rows=2))
        assert after_load(world.placed) == (0, 1)
        await world.execute(first(2, rows=2))
        assert after_load(world.placed) == (1, 1)
    assert len(caplog.records) == 1


async def test_a_model_that_is_not_tried_at_load_compiles_at_its_first_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(write_model(tmp_path, FACTORS, VECTOR, max_batch_size=1, warmup="false")) as world:
        assert world.placed.compiles == 0
        await world.execute(first(0))
        assert after_load(world.placed) == (0, 1)
    assert not caplog.records


PARTIAL = """
import functools
import jax.numpy as jnp

CONSTANTS = [1, 1.0, True, 0.0, -0.0]

def divided(x, by):
    return x * 0 + jnp.asarray(1) / jnp.asarray(by) + (jnp.asarray(by).dtype == jnp.int32)

async def run(ctx, params, inputs):
    constant = CONSTANTS[int(inputs["X"][0, 0])]
    return {"Y": await ctx.run(functools.partial(divided, by=constant), inputs["X"])}
"""


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)])
async def test_constants_that_are_equal_and_not_the_same_are_programs_of_their_own(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    """1, 1.0 and True; 0.0 and -0.0: what a request got was what the first one of them had asked for."""
    context = write_model(tmp_path, PARTIAL, VECTOR, max_batch_size=1, warmup="false")
    async with open_world(context) as world:
        made = {each: (await world.execute(first(each)))[0][0]["Y"][0, 0] for each in order}
    assert made == {0: 2, 1: 1, 2: 1, 3: np.inf, 4: -np.inf}


async def test_what_is_bound_to_a_function_that_donates_leaves_it_donating(tmp_path: Path) -> None:
    code = """
        import functools
        import jax

        @functools.partial(jax.jit, donate_argnums=1)
        def scaled(factor, x):
            return x * factor

        async def run(ctx, params, inputs):
            x = await ctx.run(lambda x: x + 0, inputs["X"])
            y = await ctx.run(functools.partial(scaled, 2.0), x)
            ctx.parameters["donated"].append(x.is_deleted())
            return {"Y": y}
    """
    donated: list[bool] = []
    async with open_world(write_model(tmp_path, code, VECTOR, max_batch_size=1, warmup="false")) as world:
        async with world.running([first(3)], parameters={"donated": donated}) as run:
            pass
        assert run.responses[0][0]["Y"].tolist() == [[6, 6, 6]]
    assert donated == [True]


# Requests that leave meanwhile

ANY = """
input [{ name: "X" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [-1] }]
"""
STEPS_OF_ANY = """
import jax.numpy as jnp

def init(params, inputs):
    return {"x": inputs["X"], "left": jnp.int32(3)}

def step(params, carry):
    return {"x": carry["x"] + 1, "left": carry["left"] - 1}

def done(carry):
    return carry["left"] <= 0

def finish(params, carry):
    return {"Y": carry["x"]}
"""
EXPLICIT_OF_ANY = """
def bump(x):
    return x + 1

async def run(ctx, params, inputs):
    x = inputs["X"]
    for _ in range(3):
        x = await ctx.run(bump, x)
    return {"Y": x}
"""


class Compiler:
    """Stops each compilation of one model until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.permits = threading.Semaphore(0)
        compile_one = PlacedModel.compile

        async def compile_when_told(placed: PlacedModel, job: Callable[[], None], **settings: bool) -> None:
            def wait() -> None:
                self.begun += 1
                self.permits.acquire(timeout=30)
                job()

            await compile_one(placed, wait, **settings)

        monkeypatch.setattr(PlacedModel, "compile", compile_when_told)


@pytest.mark.parametrize("code", [STEPS_OF_ANY, EXPLICIT_OF_ANY], ids=["steps", "explicit"])
async def test_clients_without_patience_have_their_shape_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Each compiled from the beginning, and left before the end: nobody was ever served."""
    compiler = Compiler(monkeypatch)
    context = write_model(tmp_path, code, ANY, max_batch_size=1, ladder="1,2", warmup="false")
    ones = {"X": np.ones((1, 4), np.float32)}
    async with open_world(context) as world:
        clients = 0
        while not clients or len(run.responses[0]) == 0:  # noqa: F821  # bound in the first round
            clients += 1
            assert clients < 20
            begun = compiler.begun
            async with world.running([ones]) as run:
                await until(lambda: compiler.begun > begun or run.ended.is_set())  # noqa: B023
                run.cancel(0)
                # At once: XLA is still at it.
                await run.ended.wait()
            compiler.permits.release()
            await until(lambda: not len(compilations(world)))
        compiled = world.placed.compiles
        compiler.permits.release(100)
        assert (await world.execute(ones))[0][0]["Y"].tolist() == [[4, 4, 4, 4]]
        assert world.placed.compiles == compiled
    # init, chunks of 1 and 2 steps, finish, and the check before them; or one function.
    assert compiler.begun == (5 if code is STEPS_OF_ANY else 1)


async def test_those_who_wait_for_one_shape_share_its_compilation_and_each_can_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch)
    context = write_model(tmp_path, EXPLICIT_OF_ANY, ANY, max_batch_size=1, warmup="false")
    ones = {"X": np.ones((1, 4), np.float32)}
    async with open_world(context) as world:
        async with world.running([ones, ones, ones]) as run:
            await until(lambda: compiler.begun)
            await trio.testing.wait_all_tasks_blocked()
            run.cancel(0, 1)
            await until(lambda: run.batch.members[0].released and run.batch.members[1].released)
            compiler.permits.release(10)
        assert run.responses[2][0]["Y"].tolist() == [[4, 4, 4, 4]]
        assert compiler.begun == world.placed.compiles == 1


async def test_what_is_wrong_with_a_shape_is_told_to_all_who_wait_for_it_and_again_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch)
    code = "def apply(params, inputs):\n    return {'Y': inputs['X'] @ inputs['X'][:3]}\n"
    async with open_world(write_model(tmp_path, code, ANY, max_batch_size=2)) as world:
        four = {"X": np.ones((1, 4), np.float32)}
        for _ in range(2):
            compiler.permits.release()
            async with world.running([four, four]) as run:
                pass
            assert {type(error) for error in run.errors.values()} == {InvalidArgument}
            assert "apply() cannot be traced at line 2" in run.errors[0].message
        assert compiler.begun == 2


@pytest.mark.parametrize("form", ["steps", "apply"])
async def test_a_compilation_that_was_left_before_it_began_is_made_for_the_next(tmp_path: Path, form: str) -> None:
    """Timeline: a compilation is about to go to its thread; the last who waits for it leaves.  It was counted as made."""
    code = STEPS_OF_ANY if form == "steps" else "def apply(params, inputs):\n    return {'Y': inputs['X'] + 3}\n"
    settings = {"max_batch_size": 2, "buckets": "1,2", "ladder": 1, "warmup": "false"}
    async with open_world(write_model(tmp_path, code, ANY, **settings)) as world:
        for ticks in range(1, 12):  # one of them is that in which the model's lock is had
            one, two = ({"X": np.ones((rows, ticks), np.float32)} for rows in (1, 2))
            await world.execute(one)  # so that nothing comes before the first compilation of bucket 2
            async with world.running([two]) as run:
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                run.cancel(0)
            await until(lambda: not len(compilations(world)))
            assert (await world.execute(two))[0][0]["Y"].tolist() == [[4] * ticks] * 2


async def test_a_shape_whose_compilation_failed_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, fails = ProgramBuilder.build, [False, True]

    def build_or_fail(builder: ProgramBuilder, *of: Any) -> Iterator[Callable[[], None]]:
        yield from build(builder, *of)
        if fails.pop():
            yield lambda: 1 / 0  # type: ignore[func-returns-value]

    monkeypatch.setattr(ProgramBuilder, "build", build_or_fail)
    async with open_world(write_model(tmp_path, STEPS_OF_ANY, ANY, max_batch_size=1, ladder=1)) as world:
        ones = {"X": np.ones((1, 4), np.float32)}
        with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
            await world.execute(ones)
        assert (await world.execute(ones))[0][0]["Y"].tolist() == [[4, 4, 4, 4]]


MISTAKES = """
import sys

class PanicException(BaseException):
    pass

PanicException.__module__ = "pyo3_runtime"

class OfTwo(ValueError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def bad(x):
    raise WHAT

def good(x):
    return x + 3

async def run(ctx, params, inputs):
    if inputs["X"][0, 0] == 1:
        return {"Y": await ctx.run(good, inputs["X"])}
    try:
        return {"Y": await ctx.run(bad, inputs["X"])}
    except NotImplementedError as exc:
        assert any(note.startswith("It came from") and "in bad" in note for note in exc.__notes__)
        return {"Y": await ctx.run(good, inputs["X"])}
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("SystemExit('no licence')", "model 'm': run() failed: SystemExit: no licence"),
        ("PanicException('out of bounds')", "model 'm': compilation failed: PanicException: out of bounds"),
        ("OfTwo(1, 2)", "model 'm': compilation failed: OfTwo: 1 and 2"),
        ("NotImplementedError(x)", "model 'm': compilation failed: NotImplementedError: "),  # law 14: it has an array
        ("NotImplementedError('for this shape')", ""),
    ],
)
async def test_what_a_function_raises_while_it_is_traced_comes_to_who_asked_for_it(
    tmp_path: Path, what: str, message: str
) -> None:
    """It is traced in a task of the model's: it must not end the server, and an author may know what to do about it."""
    code = MISTAKES.replace("WHAT", what)
    async with open_world(write_model(tmp_path, code, VECTOR, max_batch_size=1, warmup="false")) as world:
        async with world.running([first(2)]) as run:
            pass
        if message:
            assert run.errors[0].message.startswith(message)
            assert message.endswith(": ") or run.errors[0].message == message
        else:
            assert run.responses[0][0]["Y"].tolist() == [[5, 5, 5]]
        assert (await world.execute(first(1)))[0][0]["Y"].tolist() == [[4, 4, 4]]


async def test_a_model_that_exits_while_it_is_traced_is_not_loaded_and_the_server_goes_on(tmp_path: Path) -> None:
    write_model(tmp_path, MISTAKES.replace("WHAT", "SystemExit('no licence')"), VECTOR, name="m", max_batch_size=1)
    code = "def apply(params, inputs):\n    raise SystemExit('no licence')\n"
    write_model(tmp_path, code, VECTOR, name="applies", max_batch_size=1)
    async with triton_trio.open_server(tmp_path, explicit=True) as server:
        with pytest.raises(
            InvalidArgument, match=r"run\(\) failed when it was tried on zeros.*: SystemExit: no licence"
        ):
            await server.load_model("m")
        with pytest.raises(InvalidArgument, match=r"apply\(\) cannot be traced at line 2: SystemExit: no licence"):
            await server.load_model("applies")
        assert server.live


KEEPING = """
import jax.numpy as jnp

def make(x):
    return jnp.zeros((1003,)) + x[0, 0]

def more(x):
    return x + 1

async def run(ctx, params, inputs):
    made = await ctx.run(make, inputs["X"])
    return {"Y": inputs["X"] + (await ctx.fetch(more, made))[0]}
"""


async def test_C7_a_compilation_keeps_nobodys_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    async with open_world(write_model(tmp_path, KEEPING, ANY, max_batch_size=1, warmup="false")) as world:
        async with world.running([{"X": np.ones((1, 4), np.float32)}]) as run:
            compiler.permits.release()
            await until(lambda: compiler.begun == 2)
            run.cancel(0)
            await run.ended.wait()
        del run
        gc.collect()
        assert [array.shape for array in jax.live_arrays() if array.shape == (1003,)] == []
        compiler.permits.release(10)
        await until(lambda: not len(compilations(world)))


def compilations(world: World) -> Compilations:
    ((placed, _),) = world.model._placed.values()
    assert placed.compilations is not None
    return placed.compilations
