"""Several devices: which instance is where, and whose thread it uses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from triton_trio.backends.jax.device import Executor
from triton_trio.backends.jax.devices import Devices
from triton_trio.errors import InvalidArgument


def test_on_eight_devices() -> None:
    """How many there are is decided when JAX starts; so that file runs in a process of its own."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles in less time
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/eight_devices.py"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^8 passed", done.stdout, re.M)


@dataclass(frozen=True)
class Device:
    id: int
    platform: str = "tpu"


def devices(*numbers: int) -> Any:
    return [Device(number) for number in numbers]


async def test_programs_over_several_devices_come_from_one_thread_wherever_they_meet() -> None:
    pool = Devices(lambda name: Executor())
    with pool.use(devices(0, 1)) as pair, pool.use(devices(0, 1, 2, 3)) as four, pool.use(devices(4, 5)) as apart:
        assert pair is four
        assert (pair.name, apart.name) == ("tpu:0", "tpu:4")
        # Two threads, two devices in common: one could begin with the one, one with the other.
        with pytest.raises(InvalidArgument) as caught, pool.use(devices(2, 3)):
            pass
        assert str(caught.value).startswith(
            "devices tpu:2 to tpu:3 cannot share a model while devices tpu:0 to tpu:3 share one: both have tpu:2"
        )
        # A program on one device waits for no other.
        with pool.use(devices(1)) as alone, pool.use(devices(0)) as first:
            assert alone.name == "tpu:1"
            assert first is pair
    with pool.use(devices(2, 3)) as later:
        assert later.name == "tpu:2"
    assert pool.statistics() == ()
