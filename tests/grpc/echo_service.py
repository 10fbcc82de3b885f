"""A service as one writes it for grpclib: it knows grpclib's ``server.Stream`` and nothing of what is underneath.

It runs as it is on our transport and on grpclib's own server, so what a client gets must be the same.
"""

from __future__ import annotations

import queue
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.exceptions import GRPCError

from triton_trio.testing._pb.echo import EchoReply, EchoRequest

PATH = "/triton_trio.testing.Echo/"


class BytesDetails(StatusDetailsCodecBase):
    """Details are bytes, and travel as they are."""

    def encode(self, status: Status, message: str | None, details: Any) -> bytes:
        assert isinstance(details, bytes)
        return details

    def decode(self, status: Status, message: str | None, data: bytes) -> bytes:
        return data


class EchoService:
    """Echo, steered by the request and its metadata.

    * ``fail_with`` ends the RPC in place of the last reply, with the text as message and the payload as details.
    * ``echo-initial…`` and ``echo-trailing…`` come back as initial and trailing metadata.
    * metadata ``deadline`` in the message comes back as the seconds that are left.
    * a text of ``hold`` waits until somebody cancels: for a message that never comes if the client may still send one,
      otherwise for ``wait_forever()``, the one thing a handler cannot say without naming its event loop.
    * ``log`` tells what happens to the handlers, to any thread.
    """

    def __init__(self, wait_forever: Callable[[], Awaitable[Any]] | None = None) -> None:
        self.wait_forever = wait_forever
        self.log: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __mapping__(self) -> dict[str, Handler]:
        return {
            PATH + "UnaryUnary": Handler(self.UnaryUnary, Cardinality.UNARY_UNARY, EchoRequest, EchoReply),
            PATH + "UnaryStream": Handler(self.UnaryStream, Cardinality.UNARY_STREAM, EchoRequest, EchoReply),
            PATH + "StreamUnary": Handler(self.StreamUnary, Cardinality.STREAM_UNARY, EchoRequest, EchoReply),
            PATH + "StreamStream": Handler(self.StreamStream, Cardinality.STREAM_STREAM, EchoRequest, EchoReply),
        }

    async def UnaryUnary(self, stream: Any) -> None:
        with self._logged("UnaryUnary"):
            request = await stream.recv_message()
            await self._begin(stream)
            await self._maybe_hold(stream, request)
            if request.fail_with:
                raise _failure(request)
            times = request.repeat or 1
            metadata = dict(request.metadata)
            if "deadline" in metadata:
                metadata["deadline"] = "none" if stream.deadline is None else str(stream.deadline.time_remaining())
            await stream.send_message(
                EchoReply(text=request.text * times, payload=request.payload * times, metadata=metadata)
            )
            await self._end(stream)

    async def UnaryStream(self, stream: Any) -> None:
        with self._logged("UnaryStream"):
            request = await stream.recv_message()
            await self._begin(stream)
            await self._repeat(stream, request, 0)
            await self._end(stream)

    async def StreamUnary(self, stream: Any) -> None:
        with self._logged("StreamUnary"):
            await self._begin(stream)
            requests = []
            async for request in stream:
                await self._maybe_hold(stream, request)
                if request.fail_with:
                    raise _failure(request)
                requests.append(request)
            text = "".join(request.text for request in requests)
            payload = b"".join(request.payload for request in requests)
            await stream.send_message(EchoReply(text=text, payload=payload, index=len(requests)))
            await self._end(stream)

    async def StreamStream(self, stream: Any) -> None:
        with self._logged("StreamStream"):
            await self._begin(stream)
            index = 0
            async for request in stream:
                index = await self._repeat(stream, request, index)
            await self._end(stream)

    async def _repeat(self, stream: Any, request: EchoRequest, index: int) -> int:
        """Send the replies to one request; the failure, or the wait, takes the place of the last."""
        times = request.repeat or 1
        for number in range(times):
            if number == times - 1:
                await self._maybe_hold(stream, request)
                if request.fail_with:
                    raise _failure(request)
            await stream.send_message(EchoReply(text=request.text, payload=request.payload, index=index))
            index += 1
        return index

    async def _maybe_hold(self, stream: Any, request: EchoRequest) -> None:
        if request.text != "hold":
            return
        self.log.put("holding")
        if await stream.recv_message() is None and self.wait_forever is not None:
            await self.wait_forever()
        raise AssertionError("somebody ended a hold without a cancel")

    async def _begin(self, stream: Any) -> None:
        metadata = [(key, value) for key, value in stream.metadata.items() if key.startswith("echo-initial")]
        if metadata:
            await stream.send_initial_metadata(metadata=metadata)

    async def _end(self, stream: Any) -> None:
        metadata = [(key, value) for key, value in stream.metadata.items() if key.startswith("echo-trailing")]
        if metadata:
            await stream.send_trailing_metadata(metadata=metadata)

    @contextmanager
    def _logged(self, name: str) -> Iterator[None]:
        try:
            yield
        except GRPCError as exc:
            self.log.put(f"{name} failed: {exc.status.name}")
            raise
        except Exception as exc:
            self.log.put(f"{name} broke: {exc!r}")
            raise
        except BaseException:  # Trio's Cancelled, asyncio's CancelledError
            self.log.put(f"{name} cancelled")
            raise
        self.log.put(f"{name} ended")


def _failure(request: EchoRequest) -> GRPCError:
    return GRPCError(Status(request.fail_with), request.text or None, request.payload or None)
