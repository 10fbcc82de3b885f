"""The client channel: calls of all kinds, its connections, its counts."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError
from hyperframe.frame import SettingsFrame

from triton_trio.grpc.channel import open_channel
from triton_trio.grpc.codec import UpbCodec
from triton_trio.grpc.server import GrpcOptions, GrpcServer
from triton_trio.testing._pb.echo import EchoReply, EchoRequest
from triton_trio.testing._pb.echo_grpc import EchoStub

from .channel_world import BIDI, Line, ask, call, finished, open_raw, open_world, settle, start
from .echo_service import EchoService
from .wire import BytesCodec, BytesStream, Service


async def test_all_four_kinds_through_a_generated_stub() -> None:
    server = GrpcServer([EchoService()], codec=UpbCodec())
    async with trio.open_nursery() as nursery:
        line = Line(nursery, server.serve_connection)
        async with open_channel("test", 1, connect=line.dial) as channel:
            stub = EchoStub(channel)
            assert await stub.unary_unary(EchoRequest(text="é", repeat=2)) == EchoReply(text="éé")
            async with stub.unary_stream(EchoRequest(text="a", repeat=3)) as stream:
                assert [reply.index async for reply in stream] == [0, 1, 2]
            joined = await stub.stream_unary([EchoRequest(text="a"), EchoRequest(text="b")])
            assert joined == EchoReply(text="ab", index=2)
            async with stub.stream_stream() as both:
                for text in ("x", "y"):
                    await both.send_message(EchoRequest(text=text))
                    reply = await both.recv_message()
                    assert reply is not None
                    assert reply.text == text
                await both.end()
                assert await both.recv_message() is None
            assert finished(channel) == {"OK": 4}
            assert channel.statistics().dials == 1
            assert channel.statistics().connections[0].resets_sent == 0
        nursery.cancel_scope.cancel()


async def test_betterproto2s_own_stub_takes_the_channel_for_grpclibs() -> None:
    from betterproto2.grpclib import ServiceStub

    class Stub(ServiceStub):
        path = "/triton_trio.testing.Echo/"

    server = GrpcServer([EchoService()], codec=UpbCodec())
    async with trio.open_nursery() as nursery:
        line = Line(nursery, server.serve_connection)
        async with open_channel("test", 1, connect=line.dial) as channel:
            stub: Any = Stub(channel)  # type: ignore[arg-type]
            request = EchoRequest(text="a", repeat=2)
            assert await stub._unary_unary(stub.path + "UnaryUnary", request, EchoReply) == EchoReply(text="aa")
            replies = [r.index async for r in stub._unary_stream(stub.path + "UnaryStream", request, EchoReply)]
            assert replies == [0, 1]
            joined = await stub._stream_unary(stub.path + "StreamUnary", [request, request], EchoRequest, EchoReply)
            assert joined == EchoReply(text="aa", index=2)
            with pytest.raises(GRPCError) as failed:
                await stub._unary_unary(stub.path + "UnaryUnary", EchoRequest(fail_with=5), EchoReply)
            assert failed.value.status is Status.NOT_FOUND
            assert finished(channel) == {"OK": 3, "NOT_FOUND": 1}
        nursery.cancel_scope.cancel()


async def test_metadata_both_ways() -> None:
    async def greet(stream: BytesStream) -> None:
        await stream.recv_message()
        assert stream.metadata["who"] == "Ada"
        assert stream.metadata["raw-bin"] == b"\x00\xff"
        await stream.send_initial_metadata(metadata={"early": "yes", "b-bin": b"\x01\x02"})
        await stream.send_message(b"ok")
        await stream.send_trailing_metadata(metadata=[("late", "indeed"), ("late", "twice")])

    service = Service()
    service.add("greet", greet)
    async with open_world(service) as world:
        metadata = {"who": "Ada", "raw-bin": b"\x00\xff"}
        async with call(world.channel, "greet", metadata=metadata) as rpc:
            assert rpc.initial_metadata is None
            await rpc.send_message(b"", end=True)
            await rpc.recv_initial_metadata()
            assert dict(rpc.initial_metadata or {}) == {"early": "yes", "b-bin": b"\x01\x02"}
            assert await rpc.recv_message() == b"ok"
            await rpc.recv_trailing_metadata()
            trailing = rpc.trailing_metadata
            assert trailing is not None
            assert trailing.getall("late") == ["indeed", "twice"]
            peer = rpc.peer
            assert peer is not None
            assert peer.addr() is None
        for bad, error in (({"Upper": "x"}, ValueError), ({"a": b"bytes"}, TypeError), ({"grpc-x": "y"}, ValueError)):
            with pytest.raises(error):
                call(world.channel, metadata=bad)


async def test_binary_metadata_of_the_wire() -> None:
    async with open_raw() as (channel, server, nursery):
        fields = [*server.OK_HEADERS, ("a-bin", "AP8, AQI="), ("n", "1")]

        async def answer() -> None:
            await settle()
            await server.send(server.head(1, fields), server.data(1, b""), server.trailers(1, 0, ("bad-bin", "A")))

        nursery.start_soon(answer)
        async with call(channel) as rpc:
            await rpc.send_message(b"", end=True)
            assert await rpc.recv_message() == b""
            metadata = rpc.initial_metadata
            assert metadata is not None
            assert metadata.getall("a-bin") == [b"\x00\xff", b"\x01\x02"]
            with pytest.raises(GRPCError, match="bad-bin is not base64"):
                _ = rpc.trailing_metadata


async def test_what_a_request_looks_like() -> None:
    async with open_raw() as (channel, server, nursery):
        start(nursery, channel, metadata={"who": "Ada"}, timeout=1.5)
        await settle()
        headers = server.headers[1]
        assert headers.pop("user-agent").startswith("grpc-python-triton-trio/")
        assert int(headers.pop("grpc-timeout").removesuffix("u")) <= 1_500_000
        assert headers == {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/test.Service/echo",
            ":authority": "test:1",
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-accept-encoding": "identity,deflate,gzip",
            "who": "Ada",
        }
        assert server.heard == ["Headers 1", "Data+END 1"]
        assert server.received[1] == b"\0\0\0\0\2hi"
        await server.send(*server.whole(1))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compression_both_ways(encoding: str) -> None:
    options = GrpcOptions(response_compression=encoding)
    async with open_world(server_options=options, request_compression=encoding) as world:
        assert await ask(world.channel, payload=bytes(100_000)) == bytes(100_000)
        (connection,) = world.channel.statistics().connections
        assert connection.bytes_sent < 2_000
        assert connection.bytes_received < 2_000


@pytest.mark.parametrize("size", [0, 1, 20_000, 5 << 20])
async def test_messages_of_every_size_both_ways(size: int) -> None:
    small = GrpcOptions(initial_window_size=1 << 16, connection_window_size=1 << 17, max_frame_size=1 << 14)
    async with open_world(server_options=small) as world:
        assert await ask(world.channel, payload=b"x" * size) == b"x" * size


async def test_message_size_limits() -> None:
    async with open_world(max_send_message_size=100, max_receive_message_size=50) as world:
        with pytest.raises(GRPCError) as failed:
            await ask(world.channel, payload=bytes(101))
        assert failed.value.status is Status.RESOURCE_EXHAUSTED
        assert failed.value.message == "Sent message larger than max (101 vs. 100)"
        with pytest.raises(GRPCError) as failed:
            await ask(world.channel, payload=bytes(51))
        assert failed.value.message == "Received message larger than max (51 vs. 50)"
        assert await ask(world.channel, payload=bytes(50)) == bytes(50)
        # The first was never sent, so it was left; the second is the server's fault.
        assert finished(world.channel) == {"CANCELLED": 1, "RESOURCE_EXHAUSTED": 1, "OK": 1}


async def test_misuse_says_what_to_do() -> None:
    async with open_world() as world:
        rpc = call(world.channel)
        with pytest.raises(ProtocolError, match="async with"):
            await rpc.send_request()
        async with rpc:
            with pytest.raises(ProtocolError, match="not sent yet"):
                await rpc.recv_message()
            with pytest.raises(ProtocolError, match="ended by its message"):
                await rpc.send_request(end=True)
            await rpc.send_message(b"one")
            with pytest.raises(ProtocolError, match="already sent"):
                await rpc.send_request()
            with pytest.raises(ProtocolError, match="no more messages"):
                await rpc.send_message(b"two")
            await rpc.end()  # a unary message has ended it; grpclib lets one say so
            assert await rpc.recv_message() == b"one"
            assert await rpc.recv_message() is None
        with pytest.raises(ProtocolError, match="used before"):
            await rpc.__aenter__()
        async with call(world.channel, "bidi", BIDI) as both:
            await both.send_request(end=True)
            with pytest.raises(ProtocolError, match="has ended"):
                await both.send_message(b"x")
            assert [reply async for reply in both] == []
        async with call(world.channel, "bidi", BIDI) as both:
            await both.send_request()
            with pytest.raises(ProtocolError, match="has not ended"):
                await both.recv_trailing_metadata()
            await both.cancel()
            with pytest.raises(ProtocolError, match="cancelled already"):
                await both.cancel()
            with pytest.raises(GRPCError, match="Cancelled by the caller"):
                await both.recv_message()
        assert finished(world.channel) == {"OK": 2, "CANCELLED": 1}


async def test_messages_that_are_none() -> None:
    async def answer(stream: BytesStream) -> None:
        await stream.recv_message()
        await stream.send_message(b"malformed")

    service = Service()
    service.add("malformed", answer)
    async with open_world(service) as world:
        with pytest.raises(AssertionError):
            await ask(world.channel, payload="text")  # type: ignore[arg-type]
        assert world.channel.statistics().dials == 0, "what cannot be encoded costs nothing"
        with pytest.raises(GRPCError, match=r"Malformed reply from /test.Service/malformed: ") as failed:
            await ask(world.channel, "malformed")
        assert failed.value.status is Status.INTERNAL


# -- connections -------------------------------------------------------------------------------------------------------


async def test_calls_that_come_together_share_one_dial() -> None:
    async with open_world() as world:
        async with trio.open_nursery() as nursery:
            calls = [start(nursery, world.channel, payload=b"%d" % number) for number in range(50)]
        assert [each.reply for each in calls] == [b"%d" % number for number in range(50)]
        statistics = world.channel.statistics()
        assert statistics.dials == len(statistics.connections) == 1


async def test_a_failed_dial_fails_those_who_wait_for_it_and_the_next_call_dials_again() -> None:
    async with open_world() as world:
        world.line.refuse = OSError("[Errno 111] Connection refused")
        async with trio.open_nursery() as nursery:
            calls = [start(nursery, world.channel) for _ in range(3)]
        for each in calls:
            assert each.status is Status.UNAVAILABLE
            assert each.text == "No connection to test:1: [Errno 111] Connection refused"
        assert world.channel.statistics().dials == 1
        world.line.refuse = None
        assert await ask(world.channel) == b"hi"
        assert finished(world.channel) == {"UNAVAILABLE": 3, "OK": 1}


async def test_a_dial_has_a_time_limit(autojump_clock: trio.testing.MockClock) -> None:
    async def never() -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    async with open_channel("test", 1, codec=BytesCodec(), connect=never) as channel:
        with pytest.raises(GRPCError, match="No connection to test:1: not within 20 s"):
            await ask(channel)
        assert trio.current_time() == 20


async def test_a_server_that_says_nothing_is_no_connection(autojump_clock: trio.testing.MockClock) -> None:
    async with open_raw(greets=False) as (channel, server, _):
        with pytest.raises(
            GRPCError, match="No connection to test:1: no HTTP/2 preface and SETTINGS in time"
        ) as failed:
            await ask(channel)
        assert failed.value.status is Status.UNAVAILABLE
        assert server.headers == {}, "nothing was sent to somebody whose limits are unknown"


async def test_nothing_is_sent_before_the_settings_are_whole() -> None:
    async with open_raw(greets=False) as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        settings = SettingsFrame(0, settings={3: 1}).serialize()
        await server.send(settings[:11])
        assert server.headers == {}
        await server.send(settings[11:])
        assert list(server.headers) == [1]
        await server.send(*server.whole(1))
        assert result.reply == b"answer"


async def test_somebody_who_does_not_speak_http2_is_no_connection() -> None:
    async with open_raw(greets=False) as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        await server.stream.send_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")
        await settle()
        assert result.status is Status.UNAVAILABLE
        assert result.text.startswith("No connection to test:1: ")
        assert result.text.endswith("(is that an HTTP/2 server?)")


async def test_after_goaway_new_calls_dial_and_old_ones_go_on() -> None:
    async with open_world() as world:
        async with trio.open_nursery() as nursery:
            old = start(nursery, world.channel, "hold")
            await settle()
            (first,) = world.server._connections
            first.http2.start_drain()
            await settle()
            assert await ask(world.channel) == b"hi"
            statistics = world.channel.statistics()
            assert statistics.dials == len(statistics.connections) == 2
            world.service.release.set()
        assert old.reply == b"released"
        await settle()
        assert len(world.channel.statistics().connections) == 1, "the old one has ended with its last call"
        assert finished(world.channel) == {"OK": 2}


async def test_a_lost_connection_is_dialled_again() -> None:
    async with open_world() as world:
        assert await ask(world.channel) == b"hi"
        await world.line.client_ends[0].send_stream.aclose()
        await settle()
        assert await ask(world.channel) == b"hi"
        assert world.channel.statistics().dials == 2


async def test_calls_in_flight_end_with_the_channel() -> None:
    async with open_world() as world:
        async with trio.open_nursery() as nursery:
            async with open_channel("test", 1, codec=BytesCodec(), connect=world.line.dial) as channel:
                running = start(nursery, channel, "hold")
                await settle()
                channel_statistics = channel.statistics()
                assert channel_statistics.in_flight == 1
        assert running.status is Status.CANCELLED
        assert running.text == "The channel to test:1 was closed"
        await settle()
        assert world.service.cancelled == [("client_reset", "explicit")], "a cancel, not a lost connection"
        with pytest.raises(trio.ClosedResourceError, match="The channel to test:1 is closed"):
            await ask(channel)


async def test_calls_that_wait_for_a_dial_end_with_the_channel() -> None:
    async def never() -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    async with trio.open_nursery() as nursery:
        async with open_channel("test", 1, codec=BytesCodec(), connect=never) as channel:
            waiting = start(nursery, channel)
            await settle()
            assert channel.statistics().waiting == 1
    assert waiting.status is Status.CANCELLED
    assert finished(channel) == {"CANCELLED": 1}


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    async with open_world() as world:
        with pytest.raises(GRPCError) as failed:
            async with open_channel("test", 1, codec=BytesCodec(), connect=world.line.dial) as channel:
                await ask(channel, "nope")
        assert failed.value.status is Status.UNIMPLEMENTED


async def test_MAX_CONCURRENT_STREAMS_is_respected_in_order() -> None:
    async with open_raw({3: 2}) as (channel, server, nursery):
        calls = []
        for number in range(5):
            calls.append(start(nursery, channel, payload=b"%d" % number))
            await settle()
        assert sorted(server.received) == [1, 3]
        assert channel.statistics().waiting == 3
        await server.send(*server.whole(1))
        assert sorted(server.received) == [1, 3, 5]
        await server.send(server.trailers_only(3))
        await server.send(*server.whole(5), *server.whole(7))
        await server.send(*server.whole(9))
        assert [each.reply for each in calls] == [b"answer", None, b"answer", b"answer", b"answer"]
        assert calls[1].status is Status.NOT_FOUND
        assert [server.received[number][5:] for number in (1, 3, 5, 7, 9)] == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_raised_limit_lets_the_waiting_in() -> None:
    async with open_raw({3: 0}) as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        assert server.headers == {}
        await server.send(SettingsFrame(0, settings={3: 1}))
        await server.send(*server.whole(1))
        assert result.reply == b"answer"


async def test_calls_that_wait_for_a_slot_outlive_its_connection() -> None:
    async with open_raw({3: 0}) as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        server.settings = {}
        await server.stream.aclose()
        await settle()
        await server.send(*server.whole(1))
        assert result.reply == b"answer"
        assert channel.statistics().dials == 2


async def test_law_16_counts_balance_at_every_moment() -> None:
    async with open_world() as world:
        channel = world.channel

        def balanced() -> bool:
            now = channel.statistics()
            return now.started == now.in_flight + sum(now.finished.values())

        async with trio.open_nursery() as nursery:
            for name in ("echo", "hold", "nope"):
                start(nursery, channel, name)
                assert balanced()
                await settle()
                assert balanced()
            world.service.release.set()
        assert balanced()
        assert finished(channel) == {"OK": 2, "UNIMPLEMENTED": 1}
        assert "0 calls" in repr(channel)
