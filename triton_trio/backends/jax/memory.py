"""The device memory that a compiled program takes, by XLA's own account, and whether it writes where it was told to."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

MIB = 1 << 20
#: CUDA's errors after which every call of the process fails: the device is broken for it, and only for it.
_BREAKS_DEVICE = re.compile(
    "CUDA_ERROR_(ILLEGAL_ADDRESS|ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|INVALID_ADDRESS_SPACE|INVALID_PC|LAUNCH_FAILED|"
    "LAUNCH_TIMEOUT|HARDWARE_STACK_ERROR|ASSERT|ECC_UNCORRECTABLE|NVLINK_UNCORRECTABLE|CONTEXT_IS_DESTROYED)"
)


def tree_bytes(tree: Any) -> int:
    """Of arrays, abstract or not."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True, slots=True)
class ProgramMemory:
    """Bytes on the device while one program runs, the model's parameters aside."""

    arguments: int
    outputs: int  #: without those that take a donated argument's place
    temporary: int
    reused: int  #: of the arguments: donated, and an output is written there

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporary

    @classmethod
    def of(cls, compiled: Any, *arguments: Any) -> ProgramMemory | None:
        """None where the platform does not tell.

        Args:
          arguments: abstract, without the parameters; XLA's own figure has the parameters in it, but not those that the
            program does not use.
        """
        found = compiled.memory_analysis()
        if found is None:
            return None
        reused = found.alias_size_in_bytes
        return cls(
            arguments=tree_bytes(arguments),
            outputs=max(found.output_size_in_bytes - reused, 0),
            temporary=found.temp_size_in_bytes,
            reused=reused,
        )


def donation_problem(memory: ProgramMemory | None, before: Any, after: Any) -> str:
    """Why a program that donates ``before`` and returns ``after`` has both in memory; empty if it reuses every byte.

    Args:
      before, after: abstract, of one structure.
    """
    wanted = tree_bytes(before)
    if memory is None or memory.reused >= wanted:
        return ""
    text = f"only {memory.reused} of the carry's {wanted} bytes are reused from chunk to chunk, the others are copied"
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            where = f"carry{jax.tree_util.keystr(path)}"
            return (
                f"{text}: {where} goes in as {old.dtype}{list(old.shape)} and comes out as {new.dtype}{list(new.shape)}"
            )
    return text


def failure_text(what: str, device: str, failure: str) -> str:
    """What the client is told of a program that failed.

    Args:
      what: whose program it is.
      failure: the text of what JAX raised.
    """
    # A program that was queued behind the one that ran out says INTERNAL and the same words.
    if "RESOURCE_EXHAUSTED" not in failure and "out of memory" not in failure.lower():
        return f"{what} failed on device {device}: {failure}"
    return (
        f"{what} ran out of memory on device {device}: {failure}; send smaller batches or tensors, or set "
        "device_memory_limit_mb in config.pbtxt so that what cannot fit is refused before it runs"
    )


def breaks_device(failure: str) -> str:
    """What in the text of ``failure`` says that no program can run on the device any more; empty if nothing does."""
    found = _BREAKS_DEVICE.search(failure)
    return found.group() if found else ""
