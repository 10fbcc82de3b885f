"""One request's part in a batch, and those that came together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import trio

from .request import InferenceRequest, NullRequest

if TYPE_CHECKING:
    from .request import Array


class Cohort:
    """Members that came together: those a batch was formed of, or those that joined it at one checkpoint.

    For Triton's statistics each is an execution, of :attr:`rows` rows, which ends with the last of its members.
    """

    __slots__ = ("began_at", "compute_infer_at", "compute_output_at", "rows", "unretired")

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        #: Inputs are on the device / results start to come back; 0 until then.
        self.compute_infer_at = 0.0
        self.compute_output_at = 0.0
        self.rows = 0
        self.unretired = 0  #: members


class MemberScope(Protocol):
    """What a member's leaving cancels: a ``trio.CancelScope``, or who passes the cancel on at that instant."""

    def cancel(self, *, reason: str | None = None) -> None: ...


class Member:
    """One request's part in a batch: its inputs, its rows, and whether anybody still wants them.

    ``[start, stop)`` are its rows among those of its cohort.
    """

    __slots__ = (
        "_on_released",
        "cohort",
        "failed",
        "kept",
        "left_at",
        "queue_seconds",
        "released",
        "request",
        "retired",
        "saved_seconds",
        "scope",
        "seconds_after_cancel",
        "served",
        "start",
        "steps_after_cancel",
        "stop",
        "useful_seconds",
        "wasted_seconds",
    )

    def __init__(
        self, request: InferenceRequest, cohort: Cohort, start: int, on_released: Callable[[Member], None]
    ) -> None:
        # Not the batch, which has the members: a cycle would keep all their tensors until the garbage is collected.
        self._on_released = on_released
        self.request = request
        self.cohort = cohort
        self.start = start
        self.stop = start + request.batch_size
        self.served = False
        self.failed = False  #: served with an error
        #: How long it has waited for this execution.  Kept, for the request may be queued again before the execution ends.
        self.queue_seconds = 0.0
        self.left_at: float | None = None
        #: Cancelled, and its row goes on all the same: for its sequence's state, where the configuration says so.
        self.kept = False
        self.released = False
        self.retired = False  #: of :meth:`Batch.retire`
        #: From the cancel until the device had let go.
        self.seconds_after_cancel = 0.0
        #: A backend that runs each member in a scope of its own puts it here: cancelled when the member leaves.
        self.scope: MemberScope | None = None
        #: Device steps dispatched or finished for this member after it was cancelled; the backend counts them.
        self.steps_after_cancel = 0
        # Device time; see Batch.charge().
        self.useful_seconds = 0.0
        self.wasted_seconds = 0.0  #: of programs that had not ended when the member left
        self.saved_seconds = 0.0  #: the backend's estimate of what it would have gone on to take

    def __repr__(self) -> str:
        state = "served" if self.served else "live" if self.live else "left"
        return f"<Member rows {self.start}:{self.stop} of {self.request!r} {state}>"

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays by tensor name; with a batching model the first dimension has ``stop - start`` rows."""
        return self.request.inputs

    @property
    def ready(self) -> bool:
        """False for a row that no request fills (Triton's READY control)."""
        return not isinstance(self.request, NullRequest)

    @property
    def live(self) -> bool:
        """True while the request waits for (more of) its result."""
        return not self.served and (self.left_at is None or self.kept)

    @property
    def can_send(self) -> bool:
        """False while the reader is behind: leave this row out of the next step instead of buffering for it."""
        return self.request.can_send

    def release(self) -> None:
        """The device holds nothing for this member any more.  Idempotent; the instance calls it at the latest."""
        if not self.released:
            self.released = True
            if self.left_at is not None:
                self.seconds_after_cancel = trio.current_time() - self.left_at
            self._on_released(self)
