"""ModelStreamInfer: many requests on one RPC, each in a scope of its own.

One task per request.  It reads its message and, before it does anything else, starts the task that will read the next
one; that task cannot run before this one waits, and this one does not wait before its request is in its queue.  So
requests are queued in the order of the stream, and no more than :data:`MAX_IN_FLIGHT` are read ahead of their answers.

Responses of non-decoupled models leave in the order of their requests, those of decoupled models in any.  An error of a
request is a response like any other; the status belongs to the stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from .._pb import inference as pb
from ..errors import InvalidArgument, TritonError
from ..scopes import Reason
from .service_infer import decode_request, encode_error, encode_response, wants_empty_final

if TYPE_CHECKING:
    from ..model import Model
    from ..request import InferenceResponse
    from .service_infer import Classes, Inference
    from .stub import ServerStream

#: Requests of one stream that are in flight; the next one is not read before one of them has ended.
MAX_IN_FLIGHT = 256


class _InferStream:
    """The requests of one ModelStreamInfer RPC; see :func:`serve_stream`."""

    def __init__(
        self,
        inference: Inference,
        stream: ServerStream[pb.ModelInferRequest, pb.ModelStreamInferResponse],
        nursery: trio.Nursery,
        errors_end_rpc: bool,
        max_in_flight: int,
    ) -> None:
        self.failure: tuple[Status, str | None] | None = None
        self._inference = inference
        self._stream = stream
        self._nursery = nursery
        self._errors_end_rpc = errors_end_rpc
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._reader_held = False
        self._writing = trio.Lock()
        # Set when the last request of a non-decoupled model has been answered: the next one's turn.
        self._turn: trio.Event | None = None

    def start_reader(self) -> None:
        # Owner: the RPC's nursery.  Ends with the request it reads, or with the client's half of the stream.
        self._nursery.start_soon(self._read_and_serve, name="wait for a stream request")

    async def _read_and_serve(self) -> None:
        try:
            message = await self._stream.recv_message()
        except GRPCError as exc:
            self._end(exc.status, exc.message)
            return
        if message is None:
            return
        self._in_flight += 1
        self._reader_held = self._in_flight >= self._max_in_flight
        if not self._reader_held:
            self.start_reader()
        try:
            await self._serve(message)
        finally:
            self._in_flight -= 1
            if self._reader_held:
                self._reader_held = False
                self.start_reader()

    async def _serve(self, message: pb.ModelInferRequest) -> None:
        # No checkpoint from here until the request is in its queue.
        trio.lowlevel.current_task().name = f"request {message.id!r} of {message.model_name}"
        try:
            model = self._inference.model(message)
        except TritonError:
            model = None  # raised again below: such an error waits for its turn, too
        if model is not None and model.config.decoupled:
            await self._serve_decoupled(model, message)
        else:
            await self._serve_in_turn(message)

    async def _serve_in_turn(self, message: pb.ModelInferRequest) -> None:
        turn, self._turn = self._turn, trio.Event()
        served = self._turn
        try:
            try:
                response = await self._inference.infer(message, stream=True)
                await self._send(pb.ModelStreamInferResponse(infer_response=response), turn)
            except TritonError as exc:
                await self._send(self._error(message, exc), turn)
        finally:
            served.set()

    async def _serve_decoupled(self, model: Model, message: pb.ModelInferRequest) -> None:
        try:
            request, classes = decode_request(message)
            async with model.open_responses(request) as responses:
                async for response in responses:
                    if response.final:
                        break
                    await self._send_response(model, response, classes)
            # The last response leaves when its request is settled: a cancel can no longer come after it.
            if response.outputs or wants_empty_final(message):
                await self._send_response(model, response, classes)
        except TritonError as exc:
            await self._send(self._error(message, exc))

    async def _send_response(self, model: Model, response: InferenceResponse, classes: Classes) -> None:
        if classes:
            response = await self._inference.classify(model, response, classes)
        await self._send(pb.ModelStreamInferResponse(infer_response=encode_response(response, stream=True)))

    async def _send(self, reply: pb.ModelStreamInferResponse, turn: trio.Event | None = None) -> None:
        if turn is not None and not turn.is_set():
            await turn.wait()
        # The transport queues a message at once and then waits for room, for one sender at a time.
        async with self._writing:
            if self.failure is None:
                try:
                    await self._stream.send_message(reply)
                except GRPCError as exc:
                    # Nothing was sent: too large.  That is the request's failure, not the stream's.
                    raise InvalidArgument(exc.message) from None

    def _error(self, message: pb.ModelInferRequest, error: TritonError) -> pb.ModelStreamInferResponse:
        if self._errors_end_rpc:
            self._end(error.status, error.message)
        return encode_error(message, error.message)

    def _end(self, status: Status, text: str | None) -> None:
        # Status and text, not the exception: its frames hold the message and its tensors.
        if self.failure is None:
            self.failure = (status, text)
        self._nursery.cancel_scope.cancel(reason=Reason.SIBLING_FAILED.value)


async def serve_stream(
    inference: Inference,
    stream: ServerStream[pb.ModelInferRequest, pb.ModelStreamInferResponse],
    *,
    errors_end_rpc: bool = False,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> None:
    """Serve until the client has closed its side and everything it asked for is answered.

    Args:
      inference: of the server.
      stream: the RPC; its messages are read here and nowhere else.
      errors_end_rpc: the first error of a request ends the RPC with its status (``triton_grpc_error: true``).
      max_in_flight: see :data:`MAX_IN_FLIGHT`.

    Raises:
      GRPCError: a message could not be read, or a request failed and errors end this RPC.

    **Cancellation:** every request of the stream is cancelled, in its own scope and with its own outcome.  A cancel of
    one request becomes its error message and leaves the stream as it was.
    """
    async with trio.open_nursery() as nursery:
        requests = _InferStream(inference, stream, nursery, errors_end_rpc, max_in_flight)
        requests.start_reader()
    if requests.failure is not None:
        raise GRPCError(*requests.failure)
