# Generated from protos/echo.proto by protos/generate.py.
# Do not edit: change those, then run `make protos`.
from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline
from triton_trio.grpc.stub import (
    ClientStream,
    Messages,
    Metadata,
    ServerStream,
    ServiceBase,
    ServiceStub,
)

from .echo import EchoReply, EchoRequest

__all__ = ("EchoBase", "EchoStub")


class EchoBase(ServiceBase):
    """Answers with what it was sent."""

    async def unary_unary(self, request: EchoRequest) -> EchoReply:
        """The request's text and payload, repeated `repeat` times, in one reply."""
        raise GRPCError(Status.UNIMPLEMENTED, "UnaryUnary is not implemented")

    async def unary_stream(self, stream: ServerStream[EchoRequest, EchoReply]) -> None:
        """`repeat` replies to one request."""
        raise GRPCError(Status.UNIMPLEMENTED, "UnaryStream is not implemented")

    async def stream_unary(self, stream: ServerStream[EchoRequest, EchoReply]) -> None:
        """All texts and payloads joined, once the client's side is closed; `index` counts the requests."""
        raise GRPCError(Status.UNIMPLEMENTED, "StreamUnary is not implemented")

    async def stream_stream(self, stream: ServerStream[EchoRequest, EchoReply]) -> None:
        """`repeat` replies to each request, while the client's side may still be open."""
        raise GRPCError(Status.UNIMPLEMENTED, "StreamStream is not implemented")

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/triton_trio.testing.Echo/UnaryUnary": Handler(
                self._unary_unary(self.unary_unary),
                Cardinality.UNARY_UNARY,
                EchoRequest,
                EchoReply,
            ),
            "/triton_trio.testing.Echo/UnaryStream": Handler(
                self.unary_stream, Cardinality.UNARY_STREAM, EchoRequest, EchoReply
            ),
            "/triton_trio.testing.Echo/StreamUnary": Handler(
                self.stream_unary, Cardinality.STREAM_UNARY, EchoRequest, EchoReply
            ),
            "/triton_trio.testing.Echo/StreamStream": Handler(
                self.stream_stream, Cardinality.STREAM_STREAM, EchoRequest, EchoReply
            ),
        }


class EchoStub(ServiceStub):
    """Answers with what it was sent."""

    async def unary_unary(
        self,
        request: EchoRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> EchoReply:
        """The request's text and payload, repeated `repeat` times, in one reply."""
        return await self._unary_unary(
            "/triton_trio.testing.Echo/UnaryUnary",
            request,
            EchoReply,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    def unary_stream(
        self,
        request: EchoRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> AbstractAsyncContextManager[ClientStream[EchoRequest, EchoReply]]:
        """`repeat` replies to one request."""
        return self._unary_stream(
            "/triton_trio.testing.Echo/UnaryStream",
            request,
            EchoReply,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def stream_unary(
        self,
        messages: Messages[EchoRequest],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> EchoReply:
        """All texts and payloads joined, once the client's side is closed; `index` counts the requests."""
        return await self._stream_unary(
            "/triton_trio.testing.Echo/StreamUnary",
            messages,
            EchoRequest,
            EchoReply,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    def stream_stream(
        self,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> AbstractAsyncContextManager[ClientStream[EchoRequest, EchoReply]]:
        """`repeat` replies to each request, while the client's side may still be open."""
        return self._stream_stream(
            "/triton_trio.testing.Echo/StreamStream",
            EchoRequest,
            EchoReply,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )
