"""Generated stubs on a channel of our making, generated bases under a stream of our making."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError

from triton_trio._pb.inference_grpc import GrpcInferenceServiceBase
from triton_trio.testing._pb.echo import EchoReply, EchoRequest
from triton_trio.testing._pb.echo_grpc import EchoBase, EchoStub


class Script:
    """Both ends' stream: hands out what it was given, keeps what was sent."""

    def __init__(self, *incoming: Any) -> None:
        self.incoming = list(incoming)
        self.log: list[Any] = []

    async def send_request(self, *, end: bool = False) -> None:
        self.log.append("request")

    async def send_message(self, message: Any, *, end: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self.log.append((message, "end") if end else message)

    async def end(self) -> None:
        self.log.append("end")

    async def cancel(self) -> None:
        self.log.append("cancel")

    async def recv_message(self) -> Any:
        await trio.lowlevel.checkpoint()
        return self.incoming.pop(0) if self.incoming else None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if (message := await self.recv_message()) is None:
            raise StopAsyncIteration
        return message


class ScriptedChannel:
    def __init__(self, *replies: Any) -> None:
        self.stream = Script(*replies)
        self.calls: list[Any] = []

    @asynccontextmanager
    async def request(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Script]:
        self.calls.append((arguments, keywords))
        try:
            yield self.stream
        finally:
            self.stream.log.append("closed")


ASK, REPLY = EchoRequest(text="a"), EchoReply(text="a")
UNSET = {"timeout": None, "deadline": None, "metadata": None}


async def test_unary_unary() -> None:
    channel = ScriptedChannel(REPLY)
    assert await EchoStub(channel).unary_unary(ASK) is REPLY
    assert channel.stream.log == [(ASK, "end"), "closed"]
    route = "/triton_trio.testing.Echo/UnaryUnary"
    assert channel.calls == [((route, Cardinality.UNARY_UNARY, EchoRequest, EchoReply), UNSET)]


async def test_unary_stream() -> None:
    channel = ScriptedChannel(REPLY, REPLY)
    async with EchoStub(channel).unary_stream(ASK) as stream:
        assert [reply async for reply in stream] == [REPLY, REPLY]
        assert "closed" not in channel.stream.log
    assert channel.stream.log == [(ASK, "end"), "closed"]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_stream_unary(asynchronous: bool) -> None:
    async def asks() -> AsyncIterator[EchoRequest]:
        for ask in (ASK, ASK):
            await trio.lowlevel.checkpoint()
            yield ask

    channel = ScriptedChannel(REPLY)
    assert await EchoStub(channel).stream_unary(asks() if asynchronous else [ASK, ASK]) is REPLY
    assert channel.stream.log == ["request", ASK, ASK, "end", "closed"]


async def test_stream_stream_is_both_ways_at_once() -> None:
    channel = ScriptedChannel(REPLY)
    async with EchoStub(channel).stream_stream() as stream:
        await stream.send_message(ASK)
        assert await stream.recv_message() is REPLY
        await stream.end()
    assert channel.stream.log == ["request", ASK, "end", "closed"]


async def test_a_cancelled_call_closes_its_stream() -> None:
    channel = ScriptedChannel()
    with trio.CancelScope() as scope:
        async with EchoStub(channel).stream_stream():
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert channel.stream.log == ["request", "closed"]


async def test_a_missing_reply_is_an_error() -> None:
    with pytest.raises(GRPCError) as caught:
        await EchoStub(ScriptedChannel()).unary_unary(ASK)
    assert caught.value.status is Status.INTERNAL
    assert "/triton_trio.testing.Echo/UnaryUnary ended with status OK" in caught.value.message


async def test_call_options_override_the_stubs() -> None:
    channel = ScriptedChannel(REPLY, REPLY)
    stub = EchoStub(channel, timeout=5, metadata={"a": "stub"})
    await stub.unary_unary(ASK)
    await stub.unary_unary(ASK, timeout=0, metadata={})
    assert [keywords for _, keywords in channel.calls] == [
        {"timeout": 5, "deadline": None, "metadata": {"a": "stub"}},
        {"timeout": 0, "deadline": None, "metadata": {}},
    ]


class Echo(EchoBase):
    async def unary_unary(self, request: EchoRequest) -> EchoReply:
        return EchoReply(text=request.text)


async def test_a_unary_method_takes_a_message_and_returns_one() -> None:
    stream = Script(ASK)
    await Echo().__mapping__()["/triton_trio.testing.Echo/UnaryUnary"].func(stream)
    assert stream.log == [REPLY]


async def test_a_unary_call_without_a_message_is_refused() -> None:
    with pytest.raises(GRPCError) as caught:
        await Echo().__mapping__()["/triton_trio.testing.Echo/UnaryUnary"].func(Script())
    assert caught.value.status is Status.UNIMPLEMENTED


@pytest.mark.parametrize(
    "service", [EchoBase(), GrpcInferenceServiceBase()], ids=lambda service: type(service).__name__
)
async def test_what_a_service_leaves_out_is_unimplemented(service: Any) -> None:
    for route, handler in service.__mapping__().items():
        with pytest.raises(GRPCError) as caught:
            await handler.func(Script(handler.request_type()))
        assert caught.value.status is Status.UNIMPLEMENTED
        assert route.rpartition("/")[2] in caught.value.message
