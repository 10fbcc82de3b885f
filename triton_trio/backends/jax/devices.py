"""Which devices an instance is on, and their threads.

Programs over several devices meet on each of them; were two of them dispatched in one order to one device and in the other to
another, each would wait for the other for ever.  So all programs over a set of devices come from one thread, that of its first
device, and sets that overlap have the same first device.  A program on one device waits for nobody, and may come from that
device's own thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import jax

from ...errors import InvalidArgument
from ..base import Placement
from .device import DeviceState, DeviceStatistics, DeviceThread, Executor

#: Seconds a Python thread may keep the GIL while a device thread waits for it; Python's own default is ten times that.
SWITCH_INTERVAL = 5e-4


@contextmanager
def short_switch_interval(seconds: float = SWITCH_INTERVAL) -> Iterator[None]:
    """Make Python threads give up the GIL sooner.  Process-wide; what was set before is set again.

    With Python's 5 ms, an event loop that never rests delays each dispatch of the device thread by up to 5 ms, more
    than a whole chunk takes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, seconds))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Devices:
    """The device threads of one backend: started with a device's first user, ended with its last."""

    def __init__(self, executor: Callable[[str], Executor]) -> None:
        self._executor = executor
        self._threads: dict[jax.Device, tuple[DeviceThread, list[object]]] = {}
        self._shared: list[tuple[jax.Device, ...]] = []  #: sets of several that are in use
        self._settings = ExitStack()

    def statistics(self) -> tuple[DeviceStatistics, ...]:
        return tuple(thread.statistics() for thread, _ in self._threads.values())

    @contextmanager
    def use(self, devices: Sequence[jax.Device]) -> Iterator[DeviceThread]:
        """The thread of ``devices``, which is the first one's; a dead one is replaced.

        Raises:
          InvalidArgument: others that begin at another device overlap with them; see the module.
        """
        with self._use_together(tuple(devices)), self._use(devices[0]) as thread:
            yield thread

    @contextmanager
    def _use_together(self, devices: tuple[jax.Device, ...]) -> Iterator[None]:
        if len(devices) == 1:
            yield
            return
        for others in self._shared:
            if others[0] != devices[0] and (both := [device for device in devices if device in others]):
                raise InvalidArgument(
                    f"{_span(devices)} cannot share a model while {_span(others)} share one: both have {device_name(both[0])}, "
                    "and their programs could wait for each other for ever; let both begin with the same device, or have "
                    "none in common"
                )
        self._shared.append(devices)
        try:
            yield
        finally:
            self._shared.remove(devices)

    @contextmanager
    def _use(self, device: jax.Device) -> Iterator[DeviceThread]:
        if not self._threads:
            self._settings.enter_context(short_switch_interval())
        entry = self._threads.get(device)
        if entry is None or entry[0].state is DeviceState.DEAD:
            name = device_name(device)
            entry = self._threads[device] = (DeviceThread(name, executor=self._executor(name)), [])
        thread, users = entry
        user = object()
        users.append(user)
        try:
            yield thread
        finally:
            users.remove(user)
            if not users:
                thread.close()
                if self._threads.get(device) is entry:
                    del self._threads[device]
            if not self._threads:
                self._settings.close()


def device_name(device: jax.Device) -> str:
    return f"{device.platform}:{device.id}"


def _span(devices: Sequence[jax.Device]) -> str:
    return f"devices {device_name(devices[0])} to {device_name(devices[-1])}"


def find_platform() -> tuple[str, int]:
    """JAX's default platform, and how many devices it has.  Blocking: the first call starts JAX's backends."""
    platform = jax.default_backend()
    return platform, len(jax.local_devices(backend=platform))


def find_devices(model_name: str, placement: Placement, count: int = 1) -> list[jax.Device]:
    """The ``count`` JAX devices that an instance is on.  Blocking: the first call starts JAX's backends.

    They are counted from the one that ``gpus`` lists.  With KIND_CPU and KIND_MODEL, instances take turns: the first one has
    the first ``count`` devices, the next one those behind, and so on from the first again.  Where there are several
    processes, ``count`` may be the number of devices of all of them.

    Raises:
      InvalidArgument: there is no such device, or not so many.
    """
    platform = {"KIND_CPU": "cpu", "KIND_GPU": "gpu"}.get(placement.kind)
    where = f"model '{model_name}': instance {placement.name} wants"
    try:
        here = jax.local_devices(backend=platform)
    except RuntimeError as exc:
        raise InvalidArgument(
            f"{where} {placement.kind}, and JAX has no {platform} here ({exc}); it has "
            f"{sorted({device.platform for device in jax.devices()})}"
        ) from None
    there = jax.devices(here[0].platform)
    if len(here) < count == len(there):
        return there
    listed = placement.kind not in ("KIND_CPU", "KIND_MODEL")
    first = placement.device if listed else placement.device % max(len(here) // count, 1) * count
    if first + count > len(here):
        wanted = (
            f"device {first}" if count == 1 else f"{count} devices (its tensor_parallel)" + f" from {first} on" * listed
        )
        more = f"; all processes together have {len(there)}" if len(there) > len(here) else ""
        raise InvalidArgument(f"{where} {wanted}, JAX has {len(here)}: " + ", ".join(map(str, here)) + more)
    return list(here[first : first + count])
