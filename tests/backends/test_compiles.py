"""After the load nothing is compiled, except for shapes that are new on purpose; and the counters tell which it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from .world import COUNTDOWN, COUNTDOWN_CONFIG, PlacedStatistics, countdown, open_world, write_model

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
