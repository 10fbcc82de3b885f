"""Settings of the whole process, for a process that is a server: the command line makes them, a library must not."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading

#: How the names of threads begin that may hang in a device.
DEVICE_THREAD = "jax device "
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_large_buffers() -> bool:
    """Keep large buffers in the process; False where there is no glibc.

    glibc gives every block above a threshold back to the kernel at once, and a server that moves tensors of megabytes then
    spends its time on page faults: a 4 MiB echo over gRPC took about 40% more CPU without these two settings (and neither
    does anything alone).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20) and mallopt(_M_TRIM_THRESHOLD, 256 << 20))


def calm_garbage_collector() -> None:
    """Leave out of collections what lives as long as the server, and collect more rarely.

    A request makes no reference cycles, so the collector finds nothing of ours; but a full collection looks at every request
    in flight, and cancelling 10,000 of them took 2.5 times as long for each as cancelling 1,000.  Models' cycles are still
    collected, some milliseconds later.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def leave(status: int) -> int:
    """The exit status; where a device was given up, with it the process ends here.

    The thread of such a device is in the middle of a C++ library, and the interpreter's end cannot unwind it: the process would
    be aborted.
    """
    if any(thread.name.startswith(DEVICE_THREAD) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):  # None, or closed, if that is how the process was started
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status
