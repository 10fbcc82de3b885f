"""A device that works without the host: an operation of XLA's that sleeps, and says on its own clock when it was busy.

On real hardware a program does not use the host's cores; on this machine's XLA:CPU it would, and what is measured would be
two programs that fight for two cores.  So the time between programs is read where it passes, on the device's side.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import jax
import numpy as np

from triton_trio.backends.jax.loader import LoadContext as LoadContext

from .harness import BENCH

OCCUPY = "triton_trio_bench_occupy"
FILLER = np.eye(16, dtype=np.float32)
MODEL = BENCH / "models" / "emulated"


class EmulatedDevice:
    """The compiled operation, registered with XLA:CPU; needs g++.

    Args:
      folder: for the compiled library.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "occupy.so"
        command = ["g++", "-O2", "-std=c++17", "-w", "-shared", "-fPIC", f"-I{jax.ffi.include_dir()}"]
        subprocess.run([*command, str(MODEL / "occupy.cc"), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.Count.restype = ctypes.c_int64
        jax.ffi.register_ffi_target(OCCUPY, jax.ffi.pycapsule(self._library.Occupy), platform="cpu")

    def reset(self) -> None:
        """Forget what was; nothing must be running."""
        self._library.Reset()

    def times(self) -> tuple[np.ndarray, np.ndarray]:
        """When operations began and ended, float64[n] seconds of ``time.perf_counter()``, in order."""
        count = int(self._library.Count())
        began, ended = np.zeros(count, np.int64), np.zeros(count, np.int64)
        pointer = ctypes.POINTER(ctypes.c_int64)
        self._library.Times(began.ctypes.data_as(pointer), ended.ctypes.data_as(pointer))
        order = np.argsort(began)
        return began[order] / 1e9, ended[order] / 1e9

    def idle_share(self) -> float:
        """Of the time from the first operation's begin to the last one's end, the share that was between operations."""
        began, ended = self.times()
        return 1 - float((ended - began).sum() / (ended[-1] - began[0]))


def write_model(root: Path, name: str, *, step_ms: float, **parameters: str) -> None:
    """A model directory below ``root``."""
    version = root / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text((MODEL / "1" / "model.py").read_text())
    settings = {"step_ms": f"{step_ms:g}", **parameters}
    (root / name / "config.pbtxt").write_text(
        (MODEL / "config.pbtxt").read_text()
        + "".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}\n' for key, text in settings.items()
        )
    )
