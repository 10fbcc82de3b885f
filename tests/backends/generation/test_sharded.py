"""One model over several devices says what it says on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from triton_trio.backends.jax.generation import LlamaConfig, Placement, slot_spec
from triton_trio.errors import InvalidArgument

from .tiny import CONFIG, Machine, params_of, prompt, random_tensors

#: Eight key/value heads, so that eight devices have one each.
WIDE = LlamaConfig(
    vocab_size=96, width=32, layers=1, heads=16, kv_heads=8, head_dim=8, hidden=64, context=64
)  # fmt: skip


def texts(devices: int) -> list[list[int]]:
    placement = Placement.on(jax.devices()[:devices])
    spec = slot_spec(WIDE, placement, slots=3, context=64, end_tokens=(7,))
    machine = Machine(spec, params_of(WIDE, random_tensors(WIDE)), placement)
    cache = machine.state.keys[0]
    assert cache.addressable_shards[0].data.nbytes * devices == cache.nbytes
    for slot in range(3):
        machine.start(slot, slot + 1, prompt(slot, 10 + slot), max_tokens=30, temperature=slot % 2, seed=slot)
    for _ in range(5):
        machine.run()
    machine.start(1, 4, prompt(4, 20), max_tokens=20)
    machine.run(evict={2: 3})
    machine.finish()
    assert machine.state.keys[0].sharding == cache.sharding
    return [machine.texts[owner] for owner in (1, 2, 3, 4)]


def test_eight_devices_say_what_one_says(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    # The number of devices is decided when JAX starts.
    code = f"""if True:
        import json
        from {__name__} import texts
        one, eight = texts(1), texts(8)
        assert one == eight, (one, eight)
        print(json.dumps(one))"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stays, replaced, evicted, follower = json.loads(done.stdout)
    assert (len(replaced), len(evicted)) == (6, 6)
    assert len({*stays, *follower}) > 10


def test_a_model_that_cannot_be_cut_evenly_is_refused() -> None:
    one = Placement.on(jax.devices()[:1])
    three = Placement(jax.sharding.AbstractMesh((3,), ("tensor",)))
    slot_spec(CONFIG, one, slots=1, context=16)
    with pytest.raises(InvalidArgument, match="3 devices cannot share a model whose kv_heads is 2"):
        three.check(CONFIG)
