"""An execution that runs in the worker, as the server sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from ...errors import InternalError, InvalidArgument
from ...request import RESPONSE_BUFFER
from ...scopes import Reason
from .messages import (
    Cancel,
    Ended,
    Execute,
    Fail,
    Finish,
    Leave,
    Lingers,
    Message,
    Part,
    Released,
    Reschedule,
    Respond,
    Taken,
    read_error,
    read_seconds,
    write_error,
)

if TYPE_CHECKING:
    from ...batch import Batch, Member
    from ...errors import TritonError
    from ...request import Array, InferenceRequest, ParameterValue
    from .connection import Connection
    from .messages import Tensors

#: Responses of one member that its reader takes before the worker hears of it: half of what may be on the way.
_TOGETHER = RESPONSE_BUFFER // 2

#: Characters of a request's ids and parameters together.  The event loops of both processes stand still for as long as they
#: take to write and to read them as JSON, 10 ms or so for this many.
LONGEST = 1 << 20


class _Leaving:
    """In the place of a member's scope: says in the worker, at the instant of the cancel, that the member has left."""

    __slots__ = ("_execution", "_index")

    def __init__(self, execution: RemoteExecution, index: int) -> None:
        self._execution = execution
        self._index = index

    def cancel(self, *, reason: str | None = None) -> None:
        self._execution.leave(self._index, reason or Reason.CALLER.value)


class RemoteExecution:
    """Posts a batch to the worker, and passes on what comes back.

    Its methods are synchronous but for :meth:`join`; the members' actions and the worker's answers come in any order.
    """

    def __init__(self, number: int, instance: str, batch: Batch, connection: Connection) -> None:
        self.number = number
        self.batch = batch
        self._members: Sequence[Member] = tuple(batch.members)
        self._connection = connection
        self._ended = trio.Event()
        self._error: Sequence[object] | None = None  # as it was written: an exception would pin its frames
        self._readers: trio.Nursery | None = None
        self._untold = [0] * len(self._members)  # responses of which the worker does not know that they were taken
        self._behind: set[int] = set()  # members whose reader is waited for
        refused = [index for index, member in enumerate(self._members) if self._refuse(member)]
        if len(refused) == len(self._members):
            self._ended.set()
            return
        parts = [_row(member) if index in refused else _part(member) for index, member in enumerate(self._members)]
        connection.post(Execute(number, instance, parts, _inputs(self._members)))
        for index, member in enumerate(self._members):
            member.scope = _Leaving(self, index)
        for index in refused:
            self.leave(index, Reason.CALLER.value)

    def _refuse(self, member: Member) -> bool:
        """Whether its texts are too long; it has been told then, and nobody else notices."""
        size = _characters(member.request)
        if size > LONGEST:
            request = member.request
            why = (
                f"{request.label}the ids and parameters of this request have {size} characters together, and model "
                f"'{request.model_name}', which is in a worker process, takes {LONGEST}; send long texts as BYTES tensors"
            )
            self.batch.fail(member, InvalidArgument(why))
        return size > LONGEST

    # The server's side

    async def join(self) -> None:
        """Wait until the worker has nothing of this execution on its device any more.

        Raises:
          TritonError: what the backend raised there; or the worker was lost.

        **Cancellation:** the worker is told, and awaited all the same: that wait ends at the latest when somebody calls
        :meth:`lose`, which the server's watchdog does in its time.
        """
        try:
            if self.batch.decoupled:
                async with trio.open_nursery() as self._readers:
                    await self._join()
                    self._readers.cancel_scope.cancel(reason="the execution has ended")
            else:
                await self._join()
        finally:
            self._readers = None
            for member in self._members:
                member.scope = None
        if self._error is not None:
            raise read_error(self._error)

    async def _join(self) -> None:
        try:
            await self._ended.wait()
        except trio.Cancelled:
            if len(self.batch.scope):  # otherwise the worker knows: all have left
                self._connection.post(Cancel(self.number))
            # Shielded without a deadline of its own: the bound is the watchdog's abandon().
            with trio.CancelScope(shield=True):
                await self._ended.wait()
            raise

    def leave(self, index: int, reason: str) -> None:
        """A member has left."""
        self._connection.post(Leave(self.number, index, reason))

    def lose(self, error: TritonError) -> None:
        """The worker is gone: nothing will be answered any more."""
        if not self._ended.is_set():
            self._error = write_error(error)
            self._ended.set()

    # The worker's side

    def receive(self, message: Message) -> None:
        match message:
            case Respond(_, index, final, parameters, (outputs,)):
                member = self._members[index]
                self._respond(member, outputs, final, parameters)
                if not final:
                    self._take(index, member)
            case Finish(_, index):
                self.batch.finish(self._members[index])
            case Reschedule(_, index, tensors):
                self.batch.reschedule(self._members[index], tensors[0] if tensors else None)
            case Fail(_, index, error):
                self.batch.fail(self._members[index], read_error(error))
            case Released(_, index, steps):
                self._members[index].steps_after_cancel = int(steps)
                self._members[index].release()
            case Lingers(_, seconds):
                self.batch.watch_release(read_seconds(seconds))
            case Ended():
                self._end(message)

    def _respond(
        self, member: Member, outputs: Mapping[str, Array], final: bool, parameters: Mapping[str, ParameterValue]
    ) -> None:
        try:
            self.batch.respond(member, outputs, final=final, parameters=parameters)
        except Exception as exc:  # noqa: BLE001  # of shapes that the model has made up, and nobody else's business
            name = member.request.model_name
            self.batch.fail(member, InternalError(f"model '{name}' failed: {type(exc).__name__}: {exc}"))

    def _take(self, index: int, member: Member) -> None:
        if not member.live and member.left_at is None:
            # The response was not what it should have been, and the member has got an error instead.
            self.leave(index, Reason.CALLER.value)
            return
        self._untold[index] += 1
        if member.can_send:
            if self._untold[index] >= _TOGETHER:
                self._tell(index)
        elif self._readers is not None and index not in self._behind:
            self._behind.add(index)
            # Owner: the nursery of join(); ends when the reader has caught up or is gone, or with the execution.
            self._readers.start_soon(self._wait_reader, index, name=f"reader of request #{member.request.generation}")

    async def _wait_reader(self, index: int) -> None:
        await self._members[index].request.wait_can_send()
        self._behind.discard(index)
        self._tell(index)

    def _tell(self, index: int) -> None:
        count, self._untold[index] = self._untold[index], 0
        self._connection.post(Taken(self.number, index, count))

    def _end(self, ended: Ended) -> None:
        # Ages, for the two processes have clocks of their own.
        now, cohort = trio.current_time(), self._members[0].cohort
        if infer_age := read_seconds(ended.infer_age):
            cohort.compute_infer_at = max(cohort.began_at, now - infer_age)
        if output_age := read_seconds(ended.output_age):
            cohort.compute_output_at = max(cohort.compute_infer_at, now - output_age)
        self.batch.device_seconds = read_seconds(ended.device_seconds)
        for member, (*seconds, steps) in zip(self._members, ended.accounts, strict=True):
            member.useful_seconds, member.wasted_seconds, member.saved_seconds = map(read_seconds, seconds)
            member.steps_after_cancel = int(steps)
        if ended.error is not None:
            self._error = ended.error
        self._ended.set()


def _part(member: Member) -> Part:
    request = member.request
    return Part(
        member.stop - member.start,
        member.ready,
        request.request_id,
        request.generation,
        request.sequence_id,
        request.sequence_start,
        request.sequence_end,
        dict(request.parameters),
    )


def _row(member: Member) -> Part:
    """Of a member that is not there any more."""
    return Part(member.stop - member.start, member.ready, "", member.request.generation, 0, False, False, {})


def _characters(request: InferenceRequest) -> int:
    texts = (request.request_id, request.sequence_id, *request.parameters, *request.parameters.values())
    return sum(len(text) for text in texts if isinstance(text, str))


def _inputs(members: Sequence[Member]) -> Tensors:
    return [member.inputs for member in members]
