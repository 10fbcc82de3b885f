"""The vocabulary of cancellation: why a scope was cancelled, and who shares one.

Nesting needs nothing from this file: a step inside a request, a request inside an RPC, an RPC inside a connection are
plain Trio scopes.  What Trio does not have is a scope that belongs to several tasks in different branches of the tree.
A request waits in one branch, the execution that serves it runs in another, and a small object joins them:

:class:`BatchScope` ("all")
    Members share one execution.  A member that is cancelled leaves; when the *last* one has left, the execution is
    cancelled.  So one client can never stop a batch that another client still wants.
:class:`SequenceScope` ("any")
    Members are requests of one sequence, and each needs the state that those before it have left.  When *any* member is
    cancelled, the scope is cancelled and with it all members, for none of them can be answered any more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import trio

#: Of a wait whose end is a limit; see :func:`wait_in_parts`.
PARTS = 8

MemberT = TypeVar("MemberT", bound=Hashable)


class Reason(StrEnum):
    """Why a scope was cancelled.  A closed set: it labels log lines and metrics."""

    CLIENT_RESET = "client_reset"  #: RST_STREAM: the client cancelled the call
    CONNECTION_LOST = "connection_lost"  #: FIN, TCP reset, GOAWAY of a dying peer, keepalive timeout
    DEADLINE = "deadline"  #: ``grpc-timeout``, or a deadline on the caller's scope, has passed
    SEQUENCE_CANCELLED = "sequence_cancelled"  #: its sequence was: with another request of it, or by a START on its ID
    ADMIN = "admin"  #: somebody asked the server to cancel it
    SLOW_CONSUMER = "slow_consumer"  #: the client did not read its responses for the stall limit
    MODEL_UNLOADING = "model_unloading"
    SERVER_DRAIN = "server_drain"  #: the server's grace has ended
    SIBLING_FAILED = "sibling_failed"  #: another step of the same ensemble failed
    PROTOCOL_ERROR = "protocol_error"  #: the peer broke HTTP/2 on this stream
    CALLER = "caller"  #: in-process: the Trio scope around the call was cancelled

    @classmethod
    def of(cls, exc: trio.Cancelled) -> Reason:
        """The reason carried by a delivered ``Cancelled``; :attr:`CALLER` if whoever cancelled gave none of ours."""
        if exc.source == "deadline":
            return cls.DEADLINE
        return _BY_VALUE.get(exc.reason or "", cls.CALLER)


_BY_VALUE = {reason.value: reason for reason in Reason}


class BatchScope(Generic[MemberT]):
    """Joins the members of one shared piece of work to the scope it runs in: cancelled when the last has left.

    The work runs as ``with batch_scope.cancel_scope: ...`` in a task of its own, never in a member's.  Members
    :meth:`leave` (cancelled) or are :meth:`discard`-ed (served); both are synchronous, so membership can be decided
    in a scheduler's function or in an abort function.

    **Cancellation:** leaving never raises inside the work and never touches the other members.  After the last member
    has left, the work sees an ordinary ``Cancelled`` at its next checkpoint, with the last leaver's reason.
    """

    __slots__ = ("_members", "cancel_scope")

    def __init__(self, members: Iterable[MemberT] = ()) -> None:
        self.cancel_scope = trio.CancelScope()
        # A dict as an ordered set: iteration order is join order, membership is O(1).
        self._members: dict[MemberT, None] = dict.fromkeys(members)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[MemberT]:
        return iter(tuple(self._members))

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __repr__(self) -> str:
        state = "cancelled" if self.cancel_scope.cancel_called else f"{len(self._members)} members"
        return f"<BatchScope {state}>"

    def join(self, member: MemberT) -> bool:
        """Add ``member``; False if the work was already cancelled, and the member must start work of its own."""
        if self.cancel_scope.cancel_called:
            return False
        self._members[member] = None
        return True

    def leave(self, member: MemberT, reason: Reason) -> bool:
        """``member`` was cancelled; True if it was the last and the work has been cancelled.  Repeating is a no-op."""
        if member not in self._members:
            return False
        del self._members[member]
        if self._members:
            return False
        self.cancel_scope.cancel(reason=reason.value)
        return True

    def discard(self, member: MemberT) -> None:
        """``member`` has got what it came for.  Never cancels: the work that served everybody ends by itself."""
        self._members.pop(member, None)


class Cancellable(Hashable, Protocol):
    """A member of a :class:`SequenceScope`; cancelling it may come back as :meth:`SequenceScope.leave`, to no effect."""

    def cancel(self, reason: Reason, why: str) -> None: ...


CancellableT = TypeVar("CancellableT", bound=Cancellable)

#: Reasons that are as true of a member's mates as of itself.
_OF_ALL = frozenset({Reason.MODEL_UNLOADING, Reason.SERVER_DRAIN})


class SequenceScope(Generic[CancellableT]):
    """Joins the members of a sequence to the scope it lives in: cancelled with all of them when any of them is.

    The sequence lives as ``with sequence_scope.cancel_scope: ...`` in a task of its own, never in a member's.  Members
    :meth:`leave` (cancelled) or are :meth:`discard`-ed (served); both are synchronous.

    **Cancellation:** all members have been cancelled when :meth:`cancel` or the first :meth:`leave` returns; the task sees
    an ordinary ``Cancelled`` at its next checkpoint.  Nobody can join afterwards.
    """

    __slots__ = ("_members", "cancel_scope")

    def __init__(self, members: Iterable[CancellableT] = ()) -> None:
        self.cancel_scope = trio.CancelScope()
        self._members: dict[CancellableT, None] = dict.fromkeys(members)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[CancellableT]:
        return iter(tuple(self._members))

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __repr__(self) -> str:
        state = "cancelled" if self.cancel_scope.cancel_called else f"{len(self._members)} members"
        return f"<SequenceScope {state}>"

    def join(self, member: CancellableT) -> bool:
        """Add ``member``; False if the sequence was already cancelled."""
        if self.cancel_scope.cancel_called:
            return False
        self._members[member] = None
        return True

    def leave(self, member: CancellableT, reason: Reason, why: str = "") -> bool:
        """``member`` was cancelled, and so are all others; False if it was none any more."""
        if member not in self._members:
            return False
        del self._members[member]
        return self.cancel(reason, why)

    def discard(self, member: CancellableT) -> None:
        """``member`` has got what it came for.  Cancels nobody."""
        self._members.pop(member, None)

    def cancel(self, reason: Reason, why: str = "") -> bool:
        """Cancel the sequence and all members, now; False if it was cancelled before.

        Members get ``why``, and :attr:`Reason.SEQUENCE_CANCELLED` instead of a reason that is one member's own.
        """
        if self.cancel_scope.cancel_called:
            return False
        # First the scope: what a member's cancel sets off finds the decision made.
        self.cancel_scope.cancel(reason=reason.value)
        members, self._members = self._members, {}
        for member in members:
            member.cancel(reason if reason in _OF_ALL else Reason.SEQUENCE_CANCELLED, why)
        return True


class SequenceEndCause(StrEnum):
    """How a sequence ended.  A closed set."""

    END = "end"  #: its END request has been executed
    CANCELLED = "cancelled"  #: one of its requests was
    IDLE = "idle"  #: no request came for ``max_sequence_idle_microseconds``
    TIMEOUT = "timeout"  #: it got no slot within the time that a request of it allowed
    RESTARTED = "restarted"  #: a START came for its correlation ID
    UNLOADING = "unloading"  #: its model is being unloaded
    QUARANTINED = "quarantined"  #: its instance gets no more work


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """What a model is told when one of its sequences has ended."""

    sequence_id: int | str  #: the correlation ID: a label, which a later sequence may have again
    generation: int  #: the server's own identity of the sequence
    cause: SequenceEndCause
    reason: Reason | None = None  #: with ``CANCELLED``: of the request that was cancelled


async def wait_in_parts(event: trio.Event, seconds: float) -> float | None:
    """Wait for ``event`` while others can run; what it is waited for may need that, too.

    In parts, for of a time in which nobody could run (a stopped process, a library that holds the GIL) one part counts.

    Returns:
      None when it has come; else, after ``seconds``, by how much longer that has taken on the clock.

    **Cancellation:** at any time.
    """
    began = trio.current_time()
    for _ in range(PARTS):
        with trio.move_on_after(seconds / PARTS):
            await event.wait()
        if event.is_set():
            return None
    return max(0.0, trio.current_time() - began - seconds)
