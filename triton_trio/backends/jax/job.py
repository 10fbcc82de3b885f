"""One execution's use of a device, as the Trio task sees it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import outcome
import trio

from ...errors import InternalError, Unavailable
from ...groups import WithoutGroups
from ...scopes import wait_in_parts
from .device import DeviceState
from .memory import failure_text

if TYPE_CHECKING:
    from types import TracebackType

    from .device import DeviceThread, Turn


LOGGER = logging.getLogger("triton_trio.jax")


@asynccontextmanager
async def open_trial(device: DeviceThread, name: str, limit: float) -> AsyncIterator[DeviceJob]:
    """The job of a model that is tried at load, when there is no instance yet, and so nobody else who watches the device.

    Args:
      limit: seconds; see Cancellation.

    Raises:
      Unavailable: see Cancellation.

    **Cancellation:** as a job's, but for ``limit``: if the device has not let go by then, it is given up.
    """
    owner, ended = object(), trio.Event()

    with WithoutGroups(nurseries=1):
        async with trio.open_nursery() as nursery:
            # Owner: this nursery; ends with the block, or is cancelled with it.
            nursery.start_soon(_watch_trial, device, name, owner, limit, ended, name=f"trial of {name}")
            try:
                async with DeviceJob(device, name, owner=owner) as job:
                    yield job
            finally:
                ended.set()


async def _watch_trial(device: DeviceThread, name: str, owner: object, limit: float, ended: trio.Event) -> None:
    try:
        with trio.move_on_after(limit):
            await ended.wait()
        if not ended.is_set() and device.holds(owner):
            LOGGER.warning(
                "%s is being tried on zeros, and has not come back from device %s for %.1f s; whoever else is there waits for "
                "it. If it never ends on zeros, unload it, and set the parameter warmup to 'false' in config.pbtxt",
                name,
                device.name,
                limit,
            )
        await ended.wait()
    except trio.Cancelled:  # noqa: ASYNC103  # the block has its own, which goes on; two would be a group
        # The load has been left.  Shielded, for that is what it bounds; it ends with the block, or at the limit.
        with trio.CancelScope(shield=True):
            seconds = limit
            while seconds > 0:
                unseen = await wait_in_parts(ended, seconds)
                if unseen is None:
                    return  # noqa: ASYNC104  # as above
                seconds = device.seconds_left(owner, limit, unseen)
        device.abandon(f"what {name} was tried with did not end within {limit:.1f} s, when its load was left")


class DeviceJob:
    """One execution's use of a device: ``async with DeviceJob(device, name) as job``.  Used by one task.

    Args:
      owner: who asks the device whether anything of theirs is there, should it not let go: see :meth:`DeviceThread.seconds_left`.
      late: a turn is put onto the device only when the one before it is about to end.

    **Cancellation:** :meth:`next` and :meth:`call` are where it is cancelled.  There, and when the block is left for
    another reason, the exception passes on when the device is idle for this job.  Only :meth:`DeviceThread.abandon` ends
    that wait earlier, with an error.
    """

    def __init__(
        self,
        device: DeviceThread,
        name: str,
        *,
        owner: object = None,
        late: bool = False,
    ) -> None:
        self.device = device
        self.name = name
        self.owner = owner
        self.late = late
        # Of both threads.  The lock is held for a few instructions, never during a dispatch.  It makes "not marked, so
        # one more is on the device" and "marked; is any on the device?" one after the other.
        self._lock = threading.Lock()
        self.turns: deque[Turn] = deque()
        self.draining = False
        self.in_flight = 0  #: turns on the device, or on their way there
        self.joined_at = 0.0
        # Of the device thread.
        self.in_rotation = False
        self.started = False
        self.finished = 0
        self.steps = 0  #: that have ended
        self.device_seconds = 0.0
        # Of the Trio thread.
        self._submitted = 0
        self._finished = 0
        self._inbox: deque[Turn] = deque()
        self._task: trio.lowlevel.Task | None = None
        self._raise_cancel: Callable[[], None] | None = None
        self._joining = False
        self._cancelled = False
        self._cancel_counted = False
        self._steps_at_cancel: int | None = None
        self._seconds_at_cancel: float | None = None
        self.cancelled_at = 0.0  #: the last time, by Trio's clock
        self._abandoned = ""

    async def __aenter__(self) -> DeviceJob:
        if self.device.state is not DeviceState.READY:
            why = f" ({self.device.why})" if self.device.why else ""
            raise Unavailable(f"device {self.device.name} is {self.device.state.value}; reload the model{why}")
        self.device.jobs[self] = None
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            cancelled = exc is not None and not isinstance(exc, Exception)
            if not self._abandoned and self._join(cancelled=cancelled and not self._cancel_counted):
                # Not cancellable and without a deadline of its own: the bound is the watchdog's abandon().
                await self._wait(lambda raise_cancel: trio.lowlevel.Abort.FAILED)  # noqa: ASYNC102
        finally:
            self.device.jobs.pop(self, None)
            self.owner = None  # what the device thread still has to say of the job must not keep a batch's tensors

    @property
    def outstanding(self) -> int:
        """Turns that were submitted and that :meth:`next` has yet to return."""
        return self._submitted - self._finished + len(self._inbox)

    @property
    def steps_after_cancel(self) -> int:
        """Steps of this job that ended after its last cancel."""
        return 0 if self._steps_at_cancel is None else self.steps - self._steps_at_cancel

    @property
    def seconds_after_cancel(self) -> float:
        """Device time of the same."""
        return 0.0 if self._seconds_at_cancel is None else self.device_seconds - self._seconds_at_cancel

    @property
    def waiting(self) -> bool:
        """Its task waits for the device, and does nothing else meanwhile."""
        return self._task is not None

    def submit(self, *turns: Turn) -> None:
        """Get in line; sync.  :meth:`next` returns the turns when they are complete, in this order.

        Turns that are submitted together are seen together: the device thread will not wait for the first one's end
        before it has dispatched the second.
        """
        self._check()
        self._submitted += len(turns)
        # Whoever was cancelled and goes on was cancelled by a scope of their own, and their work is wanted.
        self._cancel_counted = False
        self._steps_at_cancel = self._seconds_at_cancel = None
        self.turns.extend(turns)
        self.device.mail.put(self)

    async def next(self) -> Turn:
        """The next complete turn.

        Raises:
          InternalError: it failed on the device.
          Unavailable: the device was given up.
        """
        turn = await self._next()
        self._raise_failure(turn)
        return turn

    async def call(self, turn: Turn) -> None:
        """Submit one turn and wait for it; raises as :meth:`next`.

        Each way out is a checkpoint: who tries again and again does not keep everybody else from running.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self.submit(turn)
        except Unavailable:
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise
        while await self._next() is not turn:
            pass  # an answer to an earlier call that was cancelled
        self._raise_failure(turn)

    def leftover(self) -> list[Turn]:
        """Turns that completed and that nobody took, after the block was left."""
        turns = list(self._inbox)
        self._inbox.clear()
        return turns

    async def _next(self) -> Turn:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._inbox:
            self._check()
            await self._wait(self._abort)
        return self._inbox.popleft()

    def _raise_failure(self, turn: Turn) -> None:
        if turn.failure:
            raise InternalError(failure_text(self.name, self.device.name, turn.failure))

    def _check(self) -> None:
        if self._abandoned:
            raise Unavailable(self._abandoned)
        if self._task is not None:
            raise RuntimeError(f"{self.name} is used by two tasks at once; give each a job of its own")

    # Joining

    def _abort(self, raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        if not self._join(cancelled=True):
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED
        self._raise_cancel = raise_cancel
        return trio.lowlevel.Abort.FAILED

    def _join(self, *, cancelled: bool) -> bool:
        """From now on nothing of this job is dispatched; True if the device has to be waited for."""
        if cancelled:
            self._steps_at_cancel = self.steps
            self._seconds_at_cancel = self.device_seconds
            self.cancelled_at = trio.current_time()
            self._cancel_counted = True
        with self._lock:
            self._submitted -= len(self.turns)
            self.turns.clear()
            # A local: the device thread may end the draining, and say so, before the next line.
            waits = self.in_flight > 0
            if waits:
                self.joined_at = self.device.clock()
                self.draining = True
        if not waits:
            if cancelled:
                self.device.count_cancel(0.0)
            return False
        self._joining = True
        self._cancelled = cancelled
        self.device.mail.put(self)
        return True

    async def _wait(self, abort: Callable[[Callable[[], None]], trio.lowlevel.Abort]) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def abandon(self, why: str) -> None:
        """End the wait, if there is one, with an error; whatever the device still says is dropped."""
        self._abandoned = f"{self.name}: {why}"
        self._raise_cancel = None
        with self._lock:
            self.turns.clear()
        self._resume(outcome.Error(Unavailable(self._abandoned)))

    def _resume(self, value: outcome.Outcome[None]) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task, value)

    # Called by the device thread

    def take_turn(self) -> Turn | None:
        """The next turn, which counts as on the device from now on; None if there is none, or not any more."""
        with self._lock:
            if not self.turns:
                return None
            self.in_flight += 1
            return self.turns.popleft()

    def give_back(self) -> None:
        """A turn is not on the device any more, or never was."""
        with self._lock:
            self.in_flight -= 1

    def drop_turns(self) -> list[Turn]:
        """Nothing that is in line is dispatched; what that was."""
        with self._lock:
            dropped = list(self.turns)
            self.finished += len(dropped)
            self.turns.clear()
        return dropped

    # Called in the Trio thread, by the device thread's messages

    def receive_nowait(self, turn: Turn | None, finished: int, drained_after: float | None) -> None:
        """A turn is complete, or (``drained_after`` seconds of joining) the device is idle for this job."""
        if self._abandoned:
            self.device.dropped += 1
            return
        self._finished = finished
        if turn is not None:
            self._inbox.append(turn)
        if drained_after is not None:
            self._joining = False
            if self._cancelled:
                self.device.count_cancel(drained_after)
            raise_cancel, self._raise_cancel = self._raise_cancel, None
            self._resume(outcome.Value(None) if raise_cancel is None else outcome.capture(raise_cancel))
        elif turn is not None and not self._joining:
            self._resume(outcome.Value(None))
