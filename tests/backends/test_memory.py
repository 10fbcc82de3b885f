"""Device memory: the carry is donated, what does not fit is refused, and what ran out ends one execution only."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from triton_trio.backends import Placement
from triton_trio.backends.jax import JaxBackend
from triton_trio.backends.jax import placed as placed_module
from triton_trio.backends.jax import programs as programs_module
from triton_trio.backends.jax.memory import ProgramMemory, donation_problem, tree_bytes
from triton_trio.errors import InvalidArgument

from .world import COUNTDOWN, COUNTDOWN_CONFIG, open_world, write_model

#: One row is a MiB: the input, the output, and on the way there something of the same size.
ROWS = """
import jax.numpy as jnp

def apply(params, inputs):
    return {"Y": jnp.sort(inputs["X"])[::-1]}
"""
ROWS_CONFIG = """
input [{ name: "X" data_type: TYPE_FP32 dims: [262144] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [262144] }]
"""


# Donation


async def test_every_byte_of_the_carry_is_reused_from_chunk_to_chunk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder="1,4")
    async with open_world(context) as world:
        ((placed, _),) = world.model._placed.values()
        (programs,) = placed.program_sets()
        for chunk in programs.chunks.values():
            assert chunk.memory_analysis().alias_size_in_bytes == 8 * (3 * 4 + 4 + 4)  # type: ignore[attr-defined]
        assert programs.not_donated == ""
    assert not caplog.records


async def test_a_carry_that_is_copied_is_told_at_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit = jax.jit
    monkeypatch.setattr(programs_module.jax, "jit", lambda function, donate_argnums: jit(function))
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=2, ladder="1,2")
    async with open_world(context):
        pass
    (record,) = caplog.records  # once, not for each bucket and chunk size
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "model 'm': bucket 1: only 0 of the carry's 20 bytes are reused from chunk to chunk, the others are copied"
    )


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_the_leaf_that_cannot_be_reused_is_named() -> None:
    def program(carry: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"x": carry["x"].astype(np.float16), "y": carry["y"] + 1}

    carry = {"x": jax.ShapeDtypeStruct((4,), np.float32), "y": jax.ShapeDtypeStruct((8,), np.float32)}
    compiled = jax.jit(program, donate_argnums=0).lower(carry).compile()
    memory = ProgramMemory.of(compiled, carry)
    assert donation_problem(memory, carry, compiled.out_info) == (
        "only 32 of the carry's 48 bytes are reused from chunk to chunk, the others are copied: carry['x'] goes in as "
        "float32[4] and comes out as float16[4]"
    )


def test_random_keys_and_narrow_numbers_have_a_size() -> None:
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert tree_bytes({"key": key, "half": jax.ShapeDtypeStruct((3, 2), jax.numpy.bfloat16)}) == 8 + 12


# The budget


async def test_a_bucket_that_needs_more_than_the_limit_is_refused_with_its_figures(tmp_path: Path) -> None:
    context = write_model(tmp_path, ROWS, ROWS_CONFIG, buckets="1,8", device_memory_limit_mb=12)
    backend = JaxBackend()
    with pytest.raises(InvalidArgument) as caught:
        async with open_world(context, backend=backend):
            pass
    text = caught.value.message
    assert text.startswith("model 'm': bucket 8 needs ")
    assert "MiB on device cpu:0, more than device_memory_limit_mb=12: 0.0 MiB of parameters and, for each of 1 " in text
    assert "(8.0 of arguments, 8.0 of outputs, " in text
    assert "make the largest batch or the tensors smaller" in text
    assert backend.statistics() == ()


async def test_parameters_and_every_instance_count(tmp_path: Path) -> None:
    code = ROWS + "\ndef load(context):\n    return jnp.zeros((10, 262144))\n"
    context = write_model(tmp_path, code, ROWS_CONFIG, max_batch_size=1, device_memory_limit_mb=13)
    async with open_world(context) as world:
        with pytest.raises(InvalidArgument, match=r"10\.0 MiB of parameters and, for each of 2 instance"):
            async with world.model.open_instance(Placement("test_1", "KIND_CPU", 0)):
                pass
        sent = np.arange(262144, dtype=np.float32)[None]
        ((response,),) = await world.execute({"X": sent})
        assert np.array_equal(response["Y"], sent[:, ::-1])


async def test_a_shape_that_is_too_large_is_refused_and_others_are_served(tmp_path: Path) -> None:
    config = ROWS_CONFIG.replace("262144", "-1")
    context = write_model(tmp_path, ROWS, config, max_batch_size=1, device_memory_limit_mb=1)
    async with open_world(context) as world:
        small, large = (np.zeros((1, size), np.float32) for size in (1000, 262144))
        with pytest.raises(InvalidArgument, match="more than device_memory_limit_mb=1"):
            await world.execute({"X": large})
        assert len(await world.execute({"X": small})) == 1


@pytest.mark.parametrize("value", ["0", "-1", "much", "inf"])
async def test_a_limit_that_makes_no_sense(tmp_path: Path, value: str) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, device_memory_limit_mb=value)
    with pytest.raises(
        InvalidArgument, match=r"device_memory_limit_mb in config\.pbtxt must be a positive number of MiB"
    ):
        async with open_world(context):
            pass


# Running out of it

#: A carry of the row's length, and on the way from one to the next the fourth power of that.
POWERS = """
import jax.numpy as jnp

def init(params, inputs):
    return {"x": inputs["X"], "n": 0}

def step(params, carry):
    x = carry["x"]
    many = x[:, None, None, None] + x[:, None, None] * x[:, None] - x
    return {"x": x + jnp.sort(many.ravel())[0], "n": carry["n"] + 1}

def done(carry):
    return carry["n"] >= 3

def finish(params, carry):
    return {"Y": carry["x"]}
"""
POWERS_CONFIG = """
input [{ name: "X" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [-1] }]
"""


async def test_a_batch_that_runs_out_of_memory_fails_alone_and_leaves_nothing(tmp_path: Path) -> None:
    context = write_model(tmp_path, POWERS, POWERS_CONFIG, max_batch_size=2, buckets=2, ladder=1)
    ones, too_many = (np.ones((1, size), np.float32) for size in (2, 2048))  # the latter: 2 * 64 TiB
    async with open_world(context) as world:
        expected = (await world.execute({"X": ones}))[0][0]["Y"].tobytes()
        gc.collect()
        arrays = len(jax.live_arrays())
        for _ in range(2):
            async with world.running([{"X": too_many}, {"X": too_many}]) as run:
                pass
            assert run.responses == [[], []]
            assert {str(error) for error in run.errors.values()} == {str(run.error)}
            assert str(run.error).startswith(
                "model 'm' ran out of memory on device cpu:0: JaxRuntimeError: RESOURCE_EXHAUSTED"
            )
            assert "device_memory_limit_mb" in str(run.error)
            # A new carry is made from the next batch's inputs.
            assert (await world.execute({"X": ones}))[0][0]["Y"].tobytes() == expected
        assert world.device.jobs == 0
        del run
        gc.collect()
        assert len(jax.live_arrays()) == arrays


async def test_an_explicit_member_that_runs_out_of_memory_is_the_only_one(tmp_path: Path) -> None:
    code = """
        import jax.numpy as jnp

        def small(x):
            return x + 1

        def large(x):
            return jnp.sort(jnp.arange(1 << 42, dtype=jnp.float32) * x[0, 0])[:3][None]

        async def run(ctx, params, inputs):
            x = await ctx.run(large if inputs["X"][0, 0] == 13 else small, inputs["X"])
            await ctx.checkpoint(x)
            return {"Y": await ctx.fetch(small, x)}
    """
    config = ROWS_CONFIG.replace("262144", "3")
    async with open_world(write_model(tmp_path, code, config)) as world:
        async with world.running([{"X": np.full((1, 3), number, np.float32)} for number in (1, 13, 2)]) as run:
            pass
        assert [len(responses) for responses in run.responses] == [1, 0, 1]
        assert list(run.errors) == [1]
        assert "model 'm' ran out of memory on device cpu:0" in str(run.errors[1])


async def test_a_step_that_cannot_fit_is_found_when_it_is_measured(tmp_path: Path) -> None:
    config = POWERS_CONFIG.replace("-1", "2048")
    backend = JaxBackend()
    with pytest.raises(InvalidArgument) as caught:
        async with open_world(write_model(tmp_path, POWERS, config, max_batch_size=1, ladder=1), backend=backend):
            pass
    assert caught.value.message.startswith(
        "model 'm' ran out of memory on device cpu:0: JaxRuntimeError: RESOURCE_EXHAUSTED"
    )
    assert caught.value.message.endswith("set the parameter warmup to 'false' in config.pbtxt")
    assert backend.statistics() == ()


async def test_parameters_that_do_not_fit_are_told_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(params: object, device: jax.Device) -> object:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4194304 bytes.")

    monkeypatch.setattr(placed_module.jax, "device_put", no_room)
    code = ROWS + "\ndef load(context):\n    return jnp.zeros((4, 262144))\n"
    with pytest.raises(InvalidArgument) as caught:
        async with open_world(write_model(tmp_path, code, ROWS_CONFIG)):
            pass
    assert (
        "load() returned 4.0 MiB of parameters, and they do not fit: model 'm' ran out of memory"
        in caught.value.message
    )
