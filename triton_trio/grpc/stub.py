"""What generated services and stubs build on: the shapes of a stream, and calls that are scopes.

betterproto2's own runtime for grpclib imports asyncio, and its streaming calls are async generators that own a task.
Here a streaming call is an ``async with`` block: the block is the call, and leaving it early resets the stream.
"""

from __future__ import annotations

from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeVar

from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Sent = TypeVar("Sent", contravariant=True)
Received = TypeVar("Received", covariant=True)

Metadata = Mapping[str, str | bytes] | Collection[tuple[str, str | bytes]]
Messages = Iterable[Request] | AsyncIterable[Request]


class ServerStream(Protocol[Received, Sent]):
    """The part of ``grpclib.server.Stream`` that services rely on: requests in, replies out."""

    @property
    def metadata(self) -> Mapping[str, str | bytes] | None: ...

    async def recv_message(self) -> Received | None: ...
    async def send_message(self, message: Sent) -> None: ...
    def __aiter__(self) -> AsyncIterator[Received]: ...


class ClientStream(Protocol[Sent, Received]):
    """The part of ``grpclib.client.Stream`` that generated code relies on: requests out, replies in."""

    async def send_request(self, *, end: bool = False) -> None: ...
    async def send_message(self, message: Sent, *, end: bool = False) -> None: ...
    async def recv_message(self) -> Received | None: ...
    async def end(self) -> None: ...
    async def cancel(self) -> None: ...
    def __aiter__(self) -> AsyncIterator[Received]: ...


class Channel(Protocol):
    """What a stub calls through: this package's channel, or grpclib's."""

    def request(
        self,
        name: str,
        cardinality: Cardinality,
        request_type: type[Request],
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> AbstractAsyncContextManager[ClientStream[Request, Reply]]: ...


class ServiceBase:
    """A service in grpclib's shape.

    A method of a unary-unary RPC takes the request and returns the reply. A method of any other kind takes the stream,
    so that nothing has to be an async generator in order to send.

    **Cancellation:** the transport cancels the scope around a method; a method needs no code for it.
    """

    @staticmethod
    def _unary_unary(
        method: Callable[[Request], Awaitable[Reply]],
    ) -> Callable[[ServerStream[Request, Reply]], Coroutine[Any, Any, None]]:
        async def handle(stream: ServerStream[Request, Reply]) -> None:
            request = await stream.recv_message()
            if request is None:
                raise GRPCError(Status.UNIMPLEMENTED, "this RPC takes one request message, and none was sent")
            await stream.send_message(await method(request))

        return handle


class ServiceStub:
    """A client's view of a service. ``timeout``, ``deadline`` and ``metadata`` are defaults for each call.

    **Cancellation:** leaving the scope around a call, or a streaming call's block, before its end resets the stream,
    and the server cancels its side. Nothing is left behind.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        self.channel = channel
        self.timeout = timeout
        self.deadline = deadline
        self.metadata = metadata

    def _open(
        self,
        route: str,
        cardinality: Cardinality,
        request_type: type[Request],
        reply_type: type[Reply],
        timeout: float | None,
        deadline: Deadline | None,
        metadata: Metadata | None,
    ) -> AbstractAsyncContextManager[ClientStream[Request, Reply]]:
        return self.channel.request(
            route,
            cardinality,
            request_type,
            reply_type,
            timeout=self.timeout if timeout is None else timeout,
            deadline=self.deadline if deadline is None else deadline,
            metadata=self.metadata if metadata is None else metadata,
        )

    async def _unary_unary(
        self,
        route: str,
        request: Request,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> Reply:
        kind = Cardinality.UNARY_UNARY
        async with self._open(route, kind, type(request), reply_type, timeout, deadline, metadata) as stream:
            await stream.send_message(request, end=True)
            return await _only_reply(stream, route)

    @asynccontextmanager
    async def _unary_stream(
        self,
        route: str,
        request: Request,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncIterator[ClientStream[Request, Reply]]:
        kind = Cardinality.UNARY_STREAM
        async with self._open(route, kind, type(request), reply_type, timeout, deadline, metadata) as stream:
            await stream.send_message(request, end=True)
            yield stream

    async def _stream_unary(
        self,
        route: str,
        messages: Messages[Request],
        request_type: type[Request],
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> Reply:
        kind = Cardinality.STREAM_UNARY
        async with self._open(route, kind, request_type, reply_type, timeout, deadline, metadata) as stream:
            await stream.send_request()
            if isinstance(messages, AsyncIterable):
                async for message in messages:
                    await stream.send_message(message)
            else:
                for message in messages:
                    await stream.send_message(message)
            await stream.end()
            return await _only_reply(stream, route)

    @asynccontextmanager
    async def _stream_stream(
        self,
        route: str,
        request_type: type[Request],
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncIterator[ClientStream[Request, Reply]]:
        kind = Cardinality.STREAM_STREAM
        async with self._open(route, kind, request_type, reply_type, timeout, deadline, metadata) as stream:
            await stream.send_request()
            yield stream


async def _only_reply(stream: ClientStream[Any, Reply], route: str) -> Reply:
    reply = await stream.recv_message()
    if reply is None:
        raise GRPCError(Status.INTERNAL, f"{route} ended with status OK but without its reply")
    return reply
