"""The three forms, as an author writes them and a client sees them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import trio

from triton_trio.errors import InternalError, InvalidArgument
from triton_trio.request import RESPONSE_BUFFER
from triton_trio.testing.device import DeviceGate

from .world import (
    COUNTDOWN,
    COUNTDOWN_CONFIG,
    TICKER,
    TICKER_CONFIG,
    countdown,
    open_world,
    ticks,
    until,
    write_model,
)

VECTOR = """
input [{ name: "X" data_type: TYPE_FP32 dims: [3] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [3] }]
"""


def vector(*rows: list[float]) -> dict[str, np.ndarray]:
    return {"X": np.array(rows, np.float32)}


# apply


async def test_apply_sees_one_row_and_its_params(tmp_path: Path) -> None:
    code = """
        import numpy as np

        def load(context):
            assert context.version == 1
            assert context.device.platform == "cpu"
            return {"scale": np.load(context.directory / "scale.npy"), "shift": 1.0}

        def apply(params, inputs):
            assert inputs["X"].shape == (3,)
            return {"Y": inputs["X"] * params["scale"] + params["shift"]}
    """
    context = write_model(tmp_path, code, VECTOR, max_batch_size=4)
    np.save(context.version_directory / "scale.npy", np.float32([1, 10, 100]))
    async with open_world(context) as world:
        responses = await world.execute(vector([1, 2, 3]), vector([4, 5, 6], [7, 8, 9]))
        assert [response["Y"].tolist() for (response,) in responses] == [
            [[2, 21, 301]],
            [[5, 51, 601], [8, 81, 901]],
        ]
        assert world.placed.compiles == 3  # buckets 1, 2 and 4
        assert world.placed.compiles_after_load == 0


async def test_a_model_that_does_not_batch_sees_tensors_as_they_are(tmp_path: Path) -> None:
    code = """
        def apply(params, inputs):
            assert inputs["X"].shape == (3,)
            return {"Y": inputs["X"][::-1]}
    """
    async with open_world(write_model(tmp_path, code, VECTOR, max_batch_size=0)) as world:
        ((response,),) = await world.execute({"X": np.float32([1, 2, 3])})
        assert response["Y"].tolist() == [3, 2, 1]


async def test_functions_return_what_the_model_has_before_reshape(tmp_path: Path) -> None:
    config = """
        input [{ name: "X" data_type: TYPE_FP32 dims: [3] }]
        output [{ name: "SUM" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }]
    """
    code = "def apply(params, inputs):\n    return {'SUM': inputs['X'].sum()}\n"
    async with open_world(write_model(tmp_path, code, config, max_batch_size=2)) as world:
        responses = await world.execute(vector([1, 2, 3]), vector([4, 5, 6]))
        assert [response["SUM"].tolist() for (response,) in responses] == [[6], [15]]


DATATYPES = {
    "BOOL": [True, False],
    "UINT8": np.array([0, 2**8 - 1], np.uint8),
    "UINT16": np.array([0, 2**16 - 1], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "INT8": np.array([-(2**7), 2**7 - 1], np.int8),
    "INT16": np.array([-(2**15), 2**15 - 1], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32),
    "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "FP16": np.array([1 / 3, 65504], np.float16),
    "FP32": np.array([1 / 3, 1e38], np.float32),
    "FP64": np.array([1 / 3, 1e300], np.float64),
    "BF16": np.array([1 / 3, 1e38], ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("wide", [False, True], ids=["32 bit", "64 bit"])
async def test_every_datatype_comes_back_as_it_went(tmp_path: Path, wide: bool) -> None:
    # One model for the 64-bit types, one without them: they run in different modes of JAX.
    names = [name for name in DATATYPES if wide or not name.endswith("64")]
    tensors = ",".join(f'{{ name: "{{kind}}_{name}" data_type: TYPE_{name} dims: [2] }}' for name in names)
    config = "\n".join(f"{kind} [{tensors.replace('{kind}', kind)}]" for kind in ("input", "output"))
    code = """
        def apply(params, inputs):
            return {name.replace("input", "output"): value for name, value in inputs.items()}
    """
    inputs = {f"input_{name}": np.array([DATATYPES[name]]) for name in names}
    async with open_world(write_model(tmp_path, code, config, max_batch_size=2)) as world:
        ((response,),) = await world.execute(inputs)
        for name, sent in inputs.items():
            got = response[name.replace("input", "output")]
            assert got.dtype == sent.dtype
            assert got.tobytes() == sent.tobytes()


async def test_64_bit_arithmetic_beside_a_32_bit_model(tmp_path: Path) -> None:
    config = VECTOR.replace("FP32", "FP64")
    code = "import jax.numpy as jnp\ndef apply(params, inputs):\n    return {'Y': inputs['X'] / 3 + jnp.zeros(3)}\n"
    narrow = write_model(tmp_path, code, VECTOR, max_batch_size=1, name="narrow")
    wide = write_model(tmp_path, code, config, max_batch_size=1, name="wide")
    async with open_world(narrow) as first, open_world(wide) as second:
        ((response,),) = await second.execute({"X": np.float64([[1, 2, 3]])})
        assert response["Y"].tolist() == [[1 / 3, 2 / 3, 1.0]]
        ((response,),) = await first.execute(vector([1, 2, 3]))
        assert response["Y"].dtype == np.float32


async def test_variable_dims_compile_when_first_seen(tmp_path: Path) -> None:
    config = VECTOR.replace("[3]", "[-1]")
    code = "def apply(params, inputs):\n    return {'Y': inputs['X'] * 2}\n"
    async with open_world(write_model(tmp_path, code, config, max_batch_size=2, shapes=2)) as world:
        assert world.placed.compiles == 0
        for shape in (3, 5, 3, 5):
            for rows in (1, 2):
                ((response,),) = await world.execute({"X": np.ones((rows, shape), np.float32)})
                assert response["Y"].tolist() == [[2.0] * shape] * rows
        assert world.placed.compiles_for_shapes == 4
        await world.execute({"X": np.ones((1, 7), np.float32)})
        assert [bucket.bucket for bucket in world.placed.buckets] == [1, 2, 1]  # of 5 and 7: the cache is bounded
        await world.execute({"X": np.ones((2, 3), np.float32)})
        assert [bucket.bucket for bucket in world.placed.buckets] == [1, 2]  # of 7 and 3
        assert world.placed.compiles_for_shapes == 6
        assert world.placed.compiles_after_load == 0


# Step models


@pytest.mark.parametrize("ladder", ["1", "4", "1,2,4"])
async def test_steps_are_counted_exactly_whatever_the_chunk(tmp_path: Path, ladder: str) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=4, buckets=4, ladder=ladder)
    async with open_world(context) as world:
        inputs = [countdown(steps, seed=steps) for steps in (0, 1, 7, 10)]
        responses = await world.execute(*inputs)
        assert [response["MADE"].tolist() for (response,) in responses] == [[[0]], [[1]], [[7]], [[10]]]
        for sent, (response,) in zip(inputs, responses, strict=True):
            x = sent["X"]
            for made in range(int(response["MADE"][0, 0])):
                x = np.sin(x) * np.float32(1.1) + np.float32(made * 0.01)
            np.testing.assert_allclose(response["Y"], x, rtol=1e-4)
        assert world.placed.compiles_after_load == 0
        assert world.placed.device_seconds > 0


async def test_a_row_that_is_done_is_answered_while_the_rest_goes_on(tmp_path: Path) -> None:
    gate = DeviceGate()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=2, buckets=2, ladder=1)
    async with open_world(context, gate=gate) as world:
        async with world.running([countdown(1), countdown(50)]) as run:
            # Chunk, chunk, and behind them the finish of the row that was done in the first.
            gate.let_end(3)
            await until(lambda: run.responses[0])
            assert gate.steps[:3] == [1, 1, 0]
            assert not run.responses[1]
            gate.open()
        assert run.responses[1][0]["MADE"].tolist() == [[50]]


async def test_a_request_of_several_rows_is_answered_when_all_are_done(tmp_path: Path) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=4, buckets=4, ladder="1,2,4")
    async with open_world(context) as world:
        inputs = countdown(0, rows=3)
        inputs["STEPS"][:, 0] = [9, 2, 5]
        ((response,),) = await world.execute(inputs)
        assert response["MADE"].tolist() == [[9], [2], [5]]


async def test_max_steps_ends_a_row_and_makes_done_optional(tmp_path: Path) -> None:
    code = COUNTDOWN.replace("def done(carry):", "def unused(carry):")
    context = write_model(
        tmp_path, code, COUNTDOWN_CONFIG, max_batch_size=1, max_steps=6, ladder="1,2,4,8", target_chunk_ms=1000
    )
    async with open_world(context) as world:
        ((response,),) = await world.execute(countdown(100))
        assert response["MADE"].tolist() == [[6]]
        assert world.device.steps == 6  # the last step is known beforehand: no chunk too much
        assert world.placed.compiles == 1 + 3 + 1  # a chunk of 8 is never needed


async def test_a_carry_that_is_the_input_does_not_write_into_the_request(tmp_path: Path) -> None:
    code = """
        def init(params, inputs):
            return inputs["X"]
        def step(params, carry):
            return carry + 1
        def done(carry):
            return carry[0] >= 5
        def finish(params, carry):
            return {"Y": carry}
    """
    async with open_world(write_model(tmp_path, code, VECTOR, max_batch_size=1, ladder="1,2")) as world:
        sent = vector([0, 1, 2])
        ((response,),) = await world.execute(sent)
        assert response["Y"].tolist() == [[5, 6, 7]]
        assert sent["X"].tolist() == [[0, 1, 2]]


# Decoupled step models


async def test_emit_is_called_after_every_step_in_order(tmp_path: Path) -> None:
    context = write_model(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=4, buckets=4, ladder="1,2,4")
    async with open_world(context) as world:
        responses = await world.execute(ticks(5), ticks(1), ticks(12))
        assert [[response["MADE"].item() for response in each] for each in responses] == [
            list(range(1, 6)),
            [1],
            list(range(1, 13)),
        ]


async def test_finish_of_a_decoupled_model_is_its_final_response(tmp_path: Path) -> None:
    code = TICKER + "\ndef finish(params, carry):\n    return {'MADE': -carry['made'][None]}\n"
    async with open_world(write_model(tmp_path, code, TICKER_CONFIG, max_batch_size=1, ladder="1,2")) as world:
        ((*emitted, final),) = await world.execute(ticks(3))
        assert [response["MADE"].item() for response in emitted] == [1, 2, 3]
        assert final["MADE"].item() == -3


async def test_the_rows_of_one_decoupled_request_step_together(tmp_path: Path) -> None:
    context = write_model(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=2, buckets=2, ladder="1,4")
    async with open_world(context) as world:
        (responses,) = await world.execute({"STEPS": np.array([[3], [1]], np.int32)})
        assert [response["MADE"].tolist() for response in responses] == [[[1], [1]], [[2], [1]], [[3], [1]]]


async def test_a_reader_that_is_behind_parks_its_own_row_only(tmp_path: Path) -> None:
    context = write_model(tmp_path, TICKER, TICKER_CONFIG, max_batch_size=2, buckets=2, ladder="1,2,4")
    async with open_world(context) as world:
        async with (
            world.running([ticks(100), ticks(60)], read=False) as run,
            trio.open_nursery() as nursery,
        ):
            slow, quick = run.requests
            nursery.start_soon(run.read, 1)
            with slow:
                await until(lambda: quick.outcome is not None and len(run.responses[1]) == 60)
                await trio.testing.wait_all_tasks_blocked(0.01)
                steps = world.device.steps
                # What the slow reader has not asked for has not been computed, but for what was under way.
                assert len(slow._buffer) == RESPONSE_BUFFER
                assert steps < 60 + 3 * 4 + 4
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert world.device.steps == steps
                assert not run.ended.is_set()
                got = []
                while not (response := await slow.receive()).final:
                    got.append(response.outputs["MADE"].item())
        assert got == list(range(1, 101))


# Explicit checkpoints

SOLVER = """
import functools
import jax
import jax.numpy as jnp

def load(context):
    return {"scale": jnp.float32(2.0)}

@functools.partial(jax.jit, donate_argnums=1)
def chunk(params, x):
    return x * params["scale"]

def init(x):
    return jnp.asarray(x)

async def run(ctx, params, inputs):
    if inputs["X"][0, 0] < 0:
        raise ValueError("negative")
    x = await ctx.run(begin, inputs["X"])
    for _ in range(5):
        x = await ctx.run(chunk, params, x)
        await ctx.checkpoint(x)
    assert (await ctx.fetch(sum_of, x)).shape == (ctx.batch_size,)
    return {"Y": x}

def begin(x):
    return x + 0.0

def sum_of(x):
    return x.sum(axis=1)
""".replace("def init(x):\n    return jnp.asarray(x)\n\n", "")


async def test_explicit_checkpoints(tmp_path: Path) -> None:
    async with open_world(write_model(tmp_path, SOLVER, VECTOR, max_batch_size=4)) as world:
        compiles = world.placed.compiles
        assert compiles == 3  # the run on zeros at load
        responses = await world.execute(vector([1, 2, 3]), vector([3, 2, 1]))
        assert [response["Y"].tolist() for (response,) in responses] == [[[32, 64, 96]], [[96, 64, 32]]]
        assert world.placed.compiles_after_load == 0
        ((response,),) = await world.execute(vector([1, 1, 1], [2, 2, 2]))
        assert response["Y"].tolist() == [[32, 32, 32], [64, 64, 64]]
        assert world.placed.compiles_for_shapes == 3  # two rows are another shape
        assert world.placed.compiles_after_load == 0
        assert world.placed.device_seconds > 0


async def test_an_explicit_member_that_fails_fails_alone(tmp_path: Path) -> None:
    async with open_world(write_model(tmp_path, SOLVER, VECTOR)) as world:
        async with world.running([vector([1, 2, 3]), vector([-1, 2, 3]), vector([3, 2, 1])]) as run:
            pass
        assert [len(responses) for responses in run.responses] == [1, 0, 1]
        assert list(run.errors) == [1]
        assert str(run.errors[1]) == "model 'm': run() failed: ValueError: negative"
        assert run.error is None


async def test_a_function_that_calls_back_is_the_models_mistake_at_a_request_too(tmp_path: Path) -> None:
    code = """
        import jax, numpy as np

        def calls_back(x):
            return jax.pure_callback(np.asarray, x, x)

        async def run(ctx, params, inputs):
            x = inputs["X"]
            return {"Y": await ctx.run(calls_back, x) if x.any() else x}
    """
    text = r"ctx.run: calls_back\(\) calls back into Python"
    async with open_world(write_model(tmp_path, code, VECTOR)) as world:
        with pytest.raises(InternalError, match=text):
            await world.execute(vector([1, 2, 3]))
        assert (await world.execute(vector([0, 0, 0])))[0][0]["Y"].tolist() == [[0, 0, 0]]
    with pytest.raises(InvalidArgument, match=text):
        async with open_world(write_model(tmp_path, code.replace("if x.any() else x", ""), VECTOR)):
            pass


async def test_explicit_decoupled_model_sends(tmp_path: Path) -> None:
    code = """
        import numpy as np

        def double(x):
            return x * 2

        async def run(ctx, params, inputs):
            made = np.zeros((1, 1), np.int32)
            for index in range(inputs["STEPS"].item()):
                made = made + 1
                await ctx.send({"MADE": await ctx.run(double, made)})
    """
    async with open_world(write_model(tmp_path, code, TICKER_CONFIG)) as world:
        responses = await world.execute(ticks(20), ticks(2))
        assert [[response["MADE"].item() for response in each] for each in responses] == [
            list(range(2, 42, 2)),
            [2, 4],
        ]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("None", "run\\(\\) must have a dict of arrays by output name, got NoneType"),
        ("{'Y': inputs['X'][0]}", "output 'Y' must have 1 rows, as the inputs, got shape \\[3\\]"),
        ("{'Y': inputs['X'].astype('f2')}", "output 'Y' must be float32 \\(TYPE_FP32 in config.pbtxt\\), got float16"),
        ("{'Z': inputs['X']}", "output 'Y' is missing, got \\['Z'\\]"),
    ],
)
async def test_wrong_outputs_of_run_are_that_requests_error(tmp_path: Path, result: str, text: str) -> None:
    code = f"async def run(ctx, params, inputs):\n    await ctx.checkpoint()\n    return {result}\n"
    async with open_world(write_model(tmp_path, code, VECTOR, warmup="false")) as world:
        with pytest.raises(InternalError, match=text):
            await world.execute(vector([1, 2, 3]))
