"""The demo is what a stranger runs first: it must hold what it claims."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triton_trio.config import load_model_config
from triton_trio.demo.__main__ import MODELS
from triton_trio.demo.pictures import damage, damaged, landscape


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
    assert {path.name for path in (tmp_path / "demo-output").iterdir()} >= {"restored.png", "previews.png"}
