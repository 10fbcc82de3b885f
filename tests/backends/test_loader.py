"""Loading: what is wrong is said with its place, what was loaded is gone afterwards, and a cancel is obeyed between stages."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import trio

from triton_trio.backends import Placement
from triton_trio.backends.jax import JaxBackend, JaxOptions, short_switch_interval
from triton_trio.backends.jax.checks import callback_problem
from triton_trio.backends.jax.devices import find_devices
from triton_trio.backends.jax.job import DeviceJob
from triton_trio.backends.jax.loader import imported
from triton_trio.backends.jax.options import default_buckets
from triton_trio.backends.jax.placed import PlacedModel
from triton_trio.backends.jax.probe import Probe
from triton_trio.errors import InvalidArgument
from triton_trio.testing.device import DeviceGate

from .world import (
    COUNTDOWN,
    COUNTDOWN_CONFIG,
    CPU,
    TICKER,
    TICKER_CONFIG,
    countdown,
    open_world,
    write_model,
)

Call = Callable[[jax.Array], jax.Array]

VECTOR = """
input [{ name: "X" data_type: TYPE_FP32 dims: [3] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [3] }]
"""
DOUBLE = "def apply(params, inputs):\n    return {'Y': inputs['X'] * 2}\n"
CARRY = """
import jax.numpy as jnp
def init(params, inputs):
    return {"x": inputs["X"], "n": 0}
def step(params, carry):
    return {"x": carry["x"] + 1, "n": carry["n"] + 1}
def done(carry):
    return carry["n"] > 3
def finish(params, carry):
    return {"Y": carry["x"]}
"""

BAD_MODELS = {
    "no model at all": ("x = 1", "no model found; write apply(params, inputs), or init, step, done and finish, or"),
    "two forms": (
        DOUBLE + CARRY,
        "has apply() and init(), which belong to different forms; keep one form and rename the other functions",
    ),
    "three forms": (
        DOUBLE + "async def run(ctx, params, inputs): ...\ndef step(params, carry): ...\n",
        "has apply() and run() and step(), which belong to different forms",
    ),
    "half a step model": (
        "def init(params, inputs): ...\ndef step(params, carry): ...\n",
        "has init(), step(), but a step model also needs done(carry) and finish(params, carry)",
    ),
    "no done": (
        CARRY.replace("def done", "def over"),
        "also needs done(carry); or set the parameter max_steps in config.pbtxt",
    ),
    "emit without decoupled": (
        CARRY + "def emit(params, carry):\n    return {'Y': carry['x']}\n",
        "has emit(), which sends a response after every step; that needs 'model_transaction_policy { decoupled: true }'",
    ),
    "sync run": ("def run(ctx, params, inputs): ...", "run() must be 'async def'"),
    "async apply": ("async def apply(params, inputs): ...", "apply() must be a plain 'def'"),
    "async load": (DOUBLE + "async def load(context): ...", "load() must be a plain 'def'"),
    "arguments": ("def apply(inputs): ...", "apply() must take (params, inputs), it takes (inputs)"),
    "syntax": ("def apply(params, inputs)\n", "failed: SyntaxError: expected ':' (model.py, line 1)"),
    "import error": ("x = 1\nimport nowhere_to_be_found\n", "failed at line 2: ModuleNotFoundError: No module named"),
    "exit": ("import sys\nsys.exit(3)\n", "failed at line 2: SystemExit: 3"),
    "load raises": (DOUBLE + "def load(context): raise OSError('disk')", "load() failed: OSError: disk"),
    "params of strings": (
        DOUBLE + "def load(context): return {'a': ['text']}",
        "load() must return a pytree of arrays, params['a'][0] is a str; keep it in a global of model.py instead",
    ),
    "cannot be traced": (
        "def apply(params, inputs):\n    return {'Y': inputs['Z']}\n",
        "apply() cannot be traced at line 2: KeyError: 'Z'; its inputs are X",
    ),
    "value needed": (
        "def apply(params, inputs):\n    if inputs['X'].sum() > 0: return {}\n    return {'Y': inputs['X']}\n",
        "apply() cannot be traced at line 2: TracerBoolConversionError",
    ),
    "no dict": ("def apply(params, inputs):\n    return inputs['X']\n", "apply() must return a dict of arrays"),
    "missing output": ("def apply(params, inputs):\n    return {}\n", "apply(): output 'Y' is missing, got none"),
    "extra output": (
        "def apply(params, inputs):\n    return {'Y': inputs['X'], 'W': inputs['X']}\n",
        "apply(): output 'W' is not in config.pbtxt, which has ['Y']",
    ),
    "output dtype": (
        "def apply(params, inputs):\n    return {'Y': inputs['X'].astype('float16')}\n",
        "apply(): output 'Y' must be float32 (TYPE_FP32 in config.pbtxt), got float16",
    ),
    "output dims": (
        "def apply(params, inputs):\n    return {'Y': inputs['X'][:2]}\n",
        "apply(): output 'Y' must have dims [3] as in config.pbtxt, got [2]",
    ),
    "finish dims": (
        CARRY.replace("'x'", "'x'").replace('"Y": carry["x"]', '"Y": carry["x"][None]'),
        "finish(): output 'Y' must have dims [3] as in config.pbtxt, got [1, 3]",
    ),
    "carry shape": (
        CARRY.replace('"x": carry["x"] + 1', '"x": carry["x"][:2]'),
        "step() must return a carry like its argument: carry['x'] is float32[2], init() makes float32[3]",
    ),
    "carry dtype": (
        CARRY.replace('carry["n"] + 1}', 'carry["n"] + 1.0}'),
        "carry['n'] is float32[], init() makes int32[]",
    ),
    "carry leaf lost": (
        CARRY.replace(', "n": carry["n"] + 1', ""),
        "step() must return a carry like its argument: carry['n'] is missing",
    ),
    "carry leaf new": (
        CARRY.replace(', "n": carry["n"] + 1', ', "n": carry["n"], "m": carry["n"]'),
        "carry['m'] is new, init() does not make it",
    ),
    "done of many": (
        CARRY.replace('carry["n"] > 3', 'carry["x"] > 3'),
        "done() must return one bool (a scalar; use jnp.all or jnp.any), got bool[3]",
    ),
    "io_callback": (
        "import jax, numpy as np\nfrom jax.experimental import io_callback\n"
        "def apply(params, inputs):\n"
        "    y = jax.lax.fori_loop(0, 2, lambda i, x: io_callback(np.asarray, x, x), inputs['X'])\n"
        "    return {'Y': y}\n",
        "apply() calls back into Python (io_callback); the device would stop and wait",
    ),
    "pure_callback in step": (
        CARRY.replace(
            '"x": carry["x"] + 1',
            '"x": __import__("jax").pure_callback(lambda x: x, carry["x"], carry["x"])',
        ),
        "step() calls back into Python (pure_callback)",
    ),
    "debug.print in done": (
        CARRY.replace(
            'return carry["n"] > 3',
            '__import__("jax").debug.print("{}", carry["n"]); return carry["n"] > 3',
        ),
        "done() calls back into Python (debug_",
    ),
    "debug.print in a run": (
        "import jax\n"
        "def shown(x):\n    jax.debug.print('{}', x)\n    return x\n"
        "async def run(ctx, params, inputs):\n    return {'Y': await ctx.run(shown, inputs['X'])}\n",
        "ctx.run: shown() calls back into Python (debug_",
    ),
}


def _with_jvp(call: Call) -> Call:
    function = jax.custom_jvp(call)
    function.defjvps(lambda dx, y, x: dx)
    return function


def _with_vjp(call: Call) -> Call:
    function = jax.custom_vjp(call)
    function.defvjp(lambda x: (call(x), x), lambda x, dy: (dy,))
    return function


#: How a callback can hide from someone who looks at the outermost equations only.
HIDDEN: dict[str, Callable[[Call, jax.Array], jax.Array]] = {
    "scan": lambda call, x: jax.lax.scan(lambda c, _: (call(c), None), x, None, length=2)[0],
    "while": lambda call, x: jax.lax.while_loop(lambda c: call(c)[0] < 3, lambda c: c + 1, x),
    "cond": lambda call, x: jax.lax.cond(x[0] > 0, call, lambda c: c, x),
    "jit": lambda call, x: jax.jit(call)(x),
    "custom_jvp": lambda call, x: _with_jvp(call)(x),
    "custom_vjp": lambda call, x: _with_vjp(call)(x),
    "checkpoint": lambda call, x: jax.checkpoint(call)(x),
    "vmap": lambda call, x: jax.vmap(call)(x[:, None])[:, 0],
}


@pytest.mark.parametrize("case", BAD_MODELS, ids=str)
async def test_bad_models(tmp_path: Path, case: str) -> None:
    code, text = BAD_MODELS[case]
    context = write_model(tmp_path, code, VECTOR, max_batch_size=2, ladder=1)
    before = set(sys.modules)
    with pytest.raises(InvalidArgument) as caught:
        async with open_world(context):
            pass
    assert text in caught.value.message
    assert caught.value.message.startswith("model 'm': ")
    assert str(context.version_directory / "model.py") in caught.value.message
    assert not {name for name in set(sys.modules) - before if name.startswith("triton_trio_model")}


BAD_CONFIGS = {
    "strings": (
        VECTOR.replace("TYPE_FP32 dims: [3] }]\noutput", "TYPE_STRING dims: [3] }]\noutput"),
        {},
        "model 'm': input 'X' is TYPE_STRING, and devices have no strings",
    ),
    "no outputs": (VECTOR.splitlines()[1], {}, "model 'm': config.pbtxt lists no output"),
    "target": (VECTOR, {"target_chunk_ms": "fast"}, "parameter target_chunk_ms in config.pbtxt must be a positive"),
    "join": (VECTOR, {"join": "often"}, "parameter join in config.pbtxt must be 'true' or 'false', got 'often'"),
    "target zero": (VECTOR, {"target_chunk_ms": "0"}, "must be a positive number of milliseconds, got '0'"),
    "ladder": (VECTOR, {"ladder": "1,x"}, "parameter ladder in config.pbtxt must be chunk sizes such as '1,2,4,8'"),
    "steps": (VECTOR, {"max_steps": "0"}, "parameter max_steps in config.pbtxt must be a number of steps, 1 or more"),
    "buckets": (VECTOR, {"buckets": "2,4"}, "the largest of the parameter buckets must be 8 (max_batch_size), got 4"),
    "flag": (VECTOR, {"x64": "maybe"}, "parameter x64 in config.pbtxt must be 'true' or 'false', got 'maybe'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS, ids=str)
async def test_bad_configs(tmp_path: Path, case: str) -> None:
    config, parameters, text = BAD_CONFIGS[case]
    context = write_model(tmp_path, DOUBLE, config, **parameters)
    with pytest.raises(InvalidArgument) as caught:
        async with open_world(context):
            pass
    assert text in caught.value.message


async def test_no_model_py(tmp_path: Path) -> None:
    context = write_model(tmp_path, DOUBLE, VECTOR)
    (context.version_directory / "model.py").unlink()
    with pytest.raises(InvalidArgument, match=r"cannot read .*model\.py: No such file or directory"):
        async with open_world(context):
            pass


async def test_other_threads_may_import_while_a_model_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several models are loaded side by side: one of them failed with "dictionary changed size during iteration"."""

    class Growing(dict[str, ModuleType]):
        def items(self) -> Any:
            for number, item in enumerate(super().items()):
                if number == 10:
                    self[f"imported_meanwhile_{len(self)}"] = ModuleType("meanwhile")
                yield item

    monkeypatch.setattr(sys, "modules", Growing(sys.modules))
    path = tmp_path / "model.py"
    path.write_text("X = 3\n")
    with imported(path, "m", 1) as module:
        assert module.X == 3


async def test_a_callback_in_a_rule_for_many_rows_is_found_too(tmp_path: Path) -> None:
    """It is not in the function of one row that is traced first."""
    code = """
        import jax
        import numpy as np

        @jax.custom_batching.custom_vmap
        def doubled(x):
            return x * 2

        @doubled.def_vmap
        def rule(size, batched, x):
            y = jax.pure_callback(lambda x: np.asarray(x) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
            return y, True

        def apply(params, inputs):
            return {"Y": doubled(inputs["X"])}
    """
    with pytest.raises(InvalidArgument, match=r"made of it for 1 rows calls back into Python \(pure_callback\)"):
        async with open_world(write_model(tmp_path, code, VECTOR)):
            pass


async def test_a_run_that_forgets_an_await_is_told_so(tmp_path: Path) -> None:
    code = """
        async def later(x):
            return {"Y": x}

        async def run(ctx, params, inputs):
            return later(inputs["X"])
    """
    with pytest.raises(InvalidArgument, match=r"by output name, got coroutine; is an await missing\?"):
        async with open_world(write_model(tmp_path, code, VECTOR)):
            pass


async def test_an_explicit_model_is_tried_on_zeros(tmp_path: Path) -> None:
    code = "async def run(ctx, params, inputs):\n    return {'Y': inputs['X'] / inputs['missing']}\n"
    with pytest.raises(InvalidArgument, match=r"tried on zeros at line 2: KeyError: 'missing'; .*warmup to 'false'"):
        async with open_world(write_model(tmp_path, code, VECTOR)):
            pass


async def test_reload_sees_new_code_and_two_models_have_their_own_helpers(tmp_path: Path) -> None:
    code = "import helper\ndef apply(params, inputs):\n    return {'Y': inputs['X'] * helper.FACTOR}\n"
    one = write_model(tmp_path, code, VECTOR, name="one", max_batch_size=1)
    two = write_model(tmp_path, code, VECTOR, name="two", max_batch_size=1)
    (one.version_directory / "helper.py").write_text("FACTOR = 2\n")
    (two.version_directory / "helper.py").write_text("FACTOR = 3\n")
    before = set(sys.modules), list(sys.path)
    sent = {"X": np.ones((1, 3), np.float32)}
    async with open_world(one) as first, open_world(two) as second:
        assert len([name for name in sys.modules if name.startswith("triton_trio_model_")]) == 2
        assert (await first.execute(sent))[0][0]["Y"].tolist() == [[2, 2, 2]]
        assert (await second.execute(sent))[0][0]["Y"].tolist() == [[3, 3, 3]]
        (one.version_directory / "helper.py").write_text("FACTOR = 4\n")  # as long as before, in the same second
        async with open_world(one) as reloaded:
            assert (await reloaded.execute(sent))[0][0]["Y"].tolist() == [[4, 4, 4]]
            assert (await first.execute(sent))[0][0]["Y"].tolist() == [[2, 2, 2]]
    assert not {name for name in set(sys.modules) - before[0] if "helper" in name or name.startswith("triton_trio_m")}
    assert sys.path == before[1]


async def test_model_py_may_define_dataclasses_and_import_its_own_json(tmp_path: Path) -> None:
    # A file that is called as a module of the standard library wins for its model, and for nobody else.
    import json

    code = """
        from __future__ import annotations
        import dataclasses, json

        @dataclasses.dataclass
        class Options:
            factor: int = json.FACTOR

        def apply(params, inputs):
            return {"Y": inputs["X"] * Options().factor}
    """
    context = write_model(tmp_path, code, VECTOR, max_batch_size=1)
    (context.version_directory / "json.py").write_text("FACTOR = 7\n")
    async with open_world(context) as world:
        assert (await world.execute({"X": np.ones((1, 3), np.float32)}))[0][0]["Y"].tolist() == [[7, 7, 7]]
    assert sys.modules["json"] is json


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4])
async def test_c8_a_load_that_is_cancelled_between_compilations_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    code = COUNTDOWN.replace("def init", "def load(context):\n    return {'big': jnp.ones(1000)}\n\ndef init")
    context = write_model(tmp_path, code, COUNTDOWN_CONFIG, max_batch_size=2, buckets=2, ladder="1,2,4")
    compiled = 0
    compile_one = PlacedModel.compile
    scope = trio.CancelScope()

    async def counting(self, job, *, count=True, **options):
        nonlocal compiled
        await compile_one(self, job, count=count, **options)
        compiled += count
        if compiled == stop_after:
            scope.cancel()

    monkeypatch.setattr(PlacedModel, "compile", counting)
    backend = JaxBackend()
    gc.collect()
    arrays = len(jax.live_arrays())
    modules = set(sys.modules)
    with scope:
        async with open_world(context, backend=backend):
            pytest.fail("the load went on")
    assert scope.cancelled_caught
    assert compiled == stop_after
    assert backend.statistics() == ()  # no device thread
    assert not {name for name in set(sys.modules) - modules if name.startswith("triton_trio_model")}
    gc.collect()
    assert len(jax.live_arrays()) == arrays


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_callback_is_found_wherever_it_hides(hidden: str) -> None:
    def call(x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.asarray, x, x, vmap_method="sequential")

    def found(call: Call) -> str:
        jaxpr = jax.make_jaxpr(lambda x: HIDDEN[hidden](call, x))(np.ones(3, np.float32))
        return callback_problem(jaxpr.jaxpr)

    assert "(pure_callback)" in found(call)
    assert "return what you need in the carry or the outputs" in found(call)
    assert found(lambda x: x) == ""


async def test_a_step_that_is_longer_than_the_target_is_told_before_the_first_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder="2,4", target_chunk_ms=1e-6)
    gate = DeviceGate()  # stays shut: what the load measures needs no permission
    async with open_world(context, gate=gate) as world:
        (record,) = caplog.records
        step_ms = world.placed.step_ms_at_load
        assert step_ms is not None
        assert record.getMessage() == (
            f"model 'm': 2 calls of step() take {2 * step_ms:.1f} ms, more than target_chunk_ms=1e-06: the cancel latency of "
            f"this model is up to {4 * step_ms:.1f} ms (one chunk running, one queued); do less in a step, or raise the target"
        )
        assert (world.placed.executions, world.placed.device_seconds, gate.dispatched) == (0, 0.0, 0)
        assert (world.device.chunks, world.device.cancels, world.device.jobs) == (0, 0, 0)


async def test_a_short_step_is_measured_in_the_chunk_that_fills_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of short chunks nothing is known: here those of fewer than 8 steps are over before their dispatch is.
    tried = []

    async def call(self: DeviceJob, turn: Probe) -> None:
        turn.dispatch()
        turn.wait()
        tried.append(turn._k)
        turn.seconds = turn._k * 1e-3 if turn._k >= 8 else 0.0
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(DeviceJob, "call", call)
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder="1,4,8,16,32", target_chunk_ms=10)
    async with open_world(context) as world:
        assert world.placed.step_ms_at_load == pytest.approx(1.0)
    assert sorted(set(tried)) == [1, 4, 8, 16]  # 16 of 1 ms are more than the target


async def test_a_model_that_cannot_take_zeros_is_not_measured_if_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = write_model(
        tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, buckets=8, ladder=1, target_chunk_ms=1e-6, warmup="false"
    )
    async with open_world(context) as world:
        assert world.placed.step_ms_at_load is None
        assert world.device.device_seconds == 0
    assert not caplog.records


async def test_instances_on_one_device_share_its_thread_and_programs(tmp_path: Path) -> None:
    backend = JaxBackend()
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=1, ladder="1,2")
    async with open_world(context, backend=backend) as world:
        async with world.model.open_instance(Placement("test_1", "KIND_CPU", 0)):
            assert len(backend.statistics()) == 1
            assert world.placed.compiles == 4
        ((response,),) = await world.execute(countdown(3))
        assert response["MADE"].tolist() == [[3]]
    assert backend.statistics() == ()


async def test_no_such_device(tmp_path: Path) -> None:
    context = write_model(tmp_path, DOUBLE, VECTOR)
    async with JaxBackend().open_model(context) as model:
        with pytest.raises(InvalidArgument, match="wants device 7, JAX has"):
            async with model.open_instance(Placement("m_0", "KIND_AUTO", 7)):
                pass
    if jax.default_backend() == "cpu":
        with pytest.raises(InvalidArgument, match="wants KIND_GPU, and JAX has no gpu here"):
            find_devices("m", Placement("m_0", "KIND_GPU", 0))
    assert [device.platform for device in find_devices("m", CPU)] == ["cpu"]


async def test_python_threads_switch_sooner_while_a_device_thread_runs(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    async with open_world(write_model(tmp_path, DOUBLE, VECTOR, max_batch_size=1)):
        assert sys.getswitchinterval() <= 5e-4
    assert sys.getswitchinterval() == before
    with short_switch_interval(1e-3):
        assert sys.getswitchinterval() == pytest.approx(1e-3)
    assert sys.getswitchinterval() == before


async def test_decoupled_step_model_needs_emit_but_no_finish(tmp_path: Path) -> None:
    code = TICKER.replace("def emit", "def finish")
    with pytest.raises(InvalidArgument, match=r"also needs emit\(params, carry\)"):
        async with open_world(write_model(tmp_path, code, TICKER_CONFIG)):
            pass


@pytest.mark.parametrize(
    ("largest", "buckets"), [(0, (1,)), (1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_default_buckets(largest: int, buckets: tuple[int, ...]) -> None:
    assert default_buckets(largest) == buckets


def test_a_bucket_for_every_batch(tmp_path: Path) -> None:
    options = JaxOptions.read(write_model(tmp_path, DOUBLE, VECTOR, buckets="2, 3,8").config)
    assert [options.bucket(rows) for rows in range(1, 9)] == [2, 2, 3, 8, 8, 8, 8, 8]
