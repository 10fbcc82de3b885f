"""A JAX backend for a process of these tests whose device breaks, once in all."""

from __future__ import annotations

import os
from pathlib import Path

from triton_trio.backends.jax import Executor, JaxBackend
from triton_trio.backends.jax.device import Turn

#: The variable that names a file: while it is there, the next program breaks the device, and the file is gone.
TO_BREAK = "TRITON_TRIO_TESTS_TO_BREAK"


class Breaking(Executor):
    def wait(self, turn: Turn) -> None:
        turn.wait()
        to_break = Path(os.environ[TO_BREAK])
        if not turn.at_load and to_break.exists():
            to_break.unlink()
            raise RuntimeError(
                "INTERNAL: CUDA error: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
            )


def breaking() -> JaxBackend:
    return JaxBackend(executor=lambda device: Breaking(), workers=False)
