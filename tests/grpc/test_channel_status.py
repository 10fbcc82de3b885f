"""D3: whatever a server, a proxy or a dying connection does, the caller reads one status that says what and where."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import trio
import trio.testing
from grpclib.const import Cardinality, Status
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.exceptions import GRPCError
from hyperframe.frame import DataFrame, Frame, SettingsFrame

from triton_trio.grpc.call import encode_timeout
from triton_trio.grpc.channel import Channel, open_channel
from triton_trio.grpc.connection import decode_timeout

from .channel_world import BIDI, Line, Outcome, RawServer, ask, call, finished, open_raw, open_world, settle, start
from .wire import BytesCodec, message

Frames = Callable[[RawServer], list[Frame]]


async def outcome_of(frames: Frames, **options: int) -> tuple[Outcome, RawServer]:
    """What becomes of a unary call that is answered with ``frames``."""
    async with open_raw(**options) as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        await server.send(*frames(server))
        assert result.done
        await settle()
        statistics = channel.statistics().connections
        assert all(each.unacknowledged_bytes == each.open_streams == 0 for each in statistics)
        expected = result.status or Status.OK
        assert finished(channel) == {expected.name: 1}
    return result, server


OK_TYPE = ("content-type", "application/grpc")


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ([(":status", "200"), OK_TYPE, ("grpc-status", "5"), ("grpc-message", "no")], Status.NOT_FOUND, "no"),
        (
            [(":status", "200"), OK_TYPE, ("grpc-status", "3"), ("grpc-message", "n%C3%B6 %E2%82%AC%0A%25")],
            3,
            "nö €\n%",
        ),
        ([(":status", "200"), OK_TYPE, ("grpc-status", "3"), ("grpc-message", "%zz%ff%")], 3, "%zz�%"),
        ([(":status", "200"), OK_TYPE, ("grpc-status", "13")], Status.INTERNAL, ""),
        ([(":status", "200"), OK_TYPE, ("grpc-status", "77")], Status.UNKNOWN, "unknown grpc-status: '77'"),
        ([(":status", "200"), OK_TYPE, ("grpc-status", "-")], Status.UNKNOWN, "unknown grpc-status: '-'"),
        ([(":status", "200"), OK_TYPE], Status.UNKNOWN, "ended without a grpc-status"),
        # A status of gRPC's own counts, whatever HTTP says: grpclib's server refuses with 415.
        ([(":status", "415"), ("grpc-status", "12"), ("grpc-message", "no")], Status.UNIMPLEMENTED, "no"),
        ([(":status", "400")], Status.INTERNAL, "HTTP status 400"),
        ([(":status", "401")], Status.UNAUTHENTICATED, "HTTP status 401"),
        ([(":status", "403")], Status.PERMISSION_DENIED, "HTTP status 403"),
        ([(":status", "404")], Status.UNIMPLEMENTED, "HTTP status 404"),
        ([(":status", "429")], Status.UNAVAILABLE, "HTTP status 429"),
        ([(":status", "502")], Status.UNAVAILABLE, "HTTP status 502"),
        ([(":status", "503")], Status.UNAVAILABLE, "HTTP status 503"),
        ([(":status", "504")], Status.UNAVAILABLE, "HTTP status 504"),
        ([(":status", "500")], Status.UNKNOWN, "HTTP status 500"),
        ([(":status", "302")], Status.UNKNOWN, "HTTP status 302"),
    ],
)
async def test_answers_without_a_body(fields: list[tuple[str, str]], status: Status | int, text: str) -> None:
    result, server = await outcome_of(lambda server: [server.head(1, fields, end=True)])
    assert result.status is Status(status)
    assert text in result.text
    assert result.text.endswith(text)
    assert server.resets == []


async def test_OK_without_the_reply_is_an_error() -> None:
    result, _ = await outcome_of(lambda server: [server.trailers_only(1, 0)])
    assert (result.status, result.text) == (
        Status.UNIMPLEMENTED,
        "/test.Service/echo ended with OK, but without its one reply",
    )


async def test_more_than_one_reply_is_an_error() -> None:
    result, server = await outcome_of(lambda s: [s.head(1), s.data(1, b"one"), s.data(1, b"two")])
    assert (result.status, result.text) == (
        Status.UNIMPLEMENTED,
        "/test.Service/echo has one reply, and the server sent more",
    )
    assert server.resets == [(1, 8)]


async def test_a_status_after_the_reply_counts() -> None:
    result, _ = await outcome_of(lambda s: [s.head(1), s.data(1, b"x"), s.trailers(1, 8, ("grpc-message", "late"))])
    assert (result.reply, result.status, result.text) == (None, Status.RESOURCE_EXHAUSTED, "late")


@pytest.mark.parametrize(
    ("frames", "status", "text"),
    [
        (
            lambda s: [s.head(1, [(":status", "503"), ("content-type", "text/html")]), DataFrame(1, data=b"<html>")],
            Status.UNAVAILABLE,
            "The server answered with HTTP status 503",
        ),
        (
            lambda s: [s.head(1, [(":status", "200"), ("content-type", "text/html")]), DataFrame(1, data=b"<html>")],
            Status.UNKNOWN,
            "The server answers in text/html, not in application/grpc",
        ),
        (
            lambda s: [s.head(1, [(":status", "200"), ("content-type", "application/grpc+json")])],
            Status.UNKNOWN,
            "The server answers in application/grpc+json, not in application/grpc",
        ),
        (
            lambda s: [s.head(1, [(":status", "200")])],
            Status.UNKNOWN,
            "The server answers in nothing, not in application/grpc",
        ),
        (
            lambda s: [s.head(1), DataFrame(1, data=b"\7\0\0\0\1x")],
            Status.INTERNAL,
            "Malformed message prefix: compression flag is 7",
        ),
        (
            lambda s: [s.head(1), s.data(1, b"x", flag=1)],
            Status.INTERNAL,
            "Message is marked as compressed, but grpc-encoding is identity",
        ),
        (
            lambda s: [s.head(1, [*s.OK_HEADERS, ("grpc-encoding", "zstd")]), s.data(1, b"x", flag=1)],
            Status.UNIMPLEMENTED,
            "Compression 'zstd' is not supported; use gzip, deflate or identity",
        ),
        (
            lambda s: [
                s.head(1, [*s.OK_HEADERS, ("grpc-encoding", "deflate")]),
                s.data(1, zlib.compress(bytes(2_000)), flag=1),
            ],
            Status.RESOURCE_EXHAUSTED,
            "Decompressed message is larger than max (1000 bytes)",
        ),
    ],
)
async def test_answers_that_the_client_ends(frames: Frames, status: Status, text: str) -> None:
    result, server = await outcome_of(frames, max_receive_message_size=1_000)
    assert (result.status, result.text) == (status, text)
    assert server.resets == [(1, 8)], "once"


async def test_a_body_that_ends_without_trailers() -> None:
    result, _ = await outcome_of(lambda s: [s.head(1), s.data(1, b"x", end=True)])
    assert (result.status, result.text) == (Status.UNKNOWN, "The answer ended without a grpc-status")


async def test_OK_after_half_a_message_is_not_OK() -> None:
    result, _ = await outcome_of(lambda s: [s.head(1), DataFrame(1, data=message(b"whole")[:-1]), s.trailers(1)])
    assert (result.status, result.text) == (Status.INTERNAL, "Stream ended within a message: 9 bytes of 10")


async def test_OK_after_half_a_message_is_not_OK_either_for_whoever_only_asks_for_the_status() -> None:
    async with open_raw() as (channel, server, _):
        async with call(channel, "bidi", BIDI) as rpc:
            await rpc.send_request(end=True)
            await settle()
            await server.send(server.head(1), DataFrame(1, data=message(b"whole")[:-1]), server.trailers(1))
            with pytest.raises(GRPCError, match="Stream ended within a message"):
                await rpc.recv_trailing_metadata()


@pytest.mark.parametrize("suffix", ["", "+proto", ";charset=utf-8"])
async def test_content_types_that_mean_the_same(suffix: str) -> None:
    fields = [(":status", "200"), ("content-type", "application/grpc" + suffix)]
    result, _ = await outcome_of(lambda s: [s.head(1, fields), s.data(1, b"x"), s.trailers(1)])
    assert result.reply == b"x"


@pytest.mark.parametrize(
    ("code", "status", "name"),
    [
        (0, Status.INTERNAL, "NO_ERROR before the end of the answer"),
        (1, Status.INTERNAL, "PROTOCOL_ERROR"),
        (2, Status.INTERNAL, "INTERNAL_ERROR"),
        (3, Status.INTERNAL, "FLOW_CONTROL_ERROR"),
        (7, Status.UNAVAILABLE, "REFUSED_STREAM: not processed, safe to retry"),
        (8, Status.CANCELLED, "CANCEL"),
        (11, Status.RESOURCE_EXHAUSTED, "ENHANCE_YOUR_CALM"),
        (12, Status.PERMISSION_DENIED, "INADEQUATE_SECURITY"),
        (99, Status.UNKNOWN, "error 99"),
    ],
)
async def test_resets(code: int, status: Status, name: str) -> None:
    result, server = await outcome_of(lambda s: [s.head(1), s.reset(1, code)])
    assert (result.status, result.text) == (status, f"The server reset the stream: {name}")
    assert server.resets == []


async def test_a_reset_after_the_status_changes_nothing() -> None:
    result, _ = await outcome_of(lambda s: [*s.whole(1), s.reset(1, 0)])
    assert (result.reply, result.error) == (b"answer", None)


async def test_a_server_that_breaks_http2_on_one_stream() -> None:
    result, _ = await outcome_of(lambda s: [s.head(1), s.head(1, [("upper", "x")])])  # trailers that do not end it
    assert result.status is Status.INTERNAL
    assert result.text == "The server broke HTTP/2 on this stream: PROTOCOL_ERROR"


async def test_messages_before_the_end_are_received_before_it_is_raised() -> None:
    async with open_raw() as (channel, server, _):
        async with call(channel, "bidi", BIDI) as rpc:
            await rpc.send_request()
            await settle()
            await server.send(server.head(1), server.data(1, b"a"), server.data(1, b"b"), server.reset(1, 2))
            assert await rpc.recv_message() == b"a"
            assert await rpc.recv_message() == b"b"
            for _ in range(2):
                with pytest.raises(GRPCError, match="INTERNAL_ERROR"):
                    await rpc.recv_message()


async def test_early_answer_ends_an_upload_and_the_sender_learns_why() -> None:
    """A server may refuse before it has read everything, and then never read."""
    async with open_raw({SettingsFrame.INITIAL_WINDOW_SIZE: 0}) as (channel, server, nursery):
        result = start(nursery, channel, payload=bytes(1 << 20))
        await settle()
        assert not result.done, "waits for the window"
        await server.send(server.trailers_only(1, 8, ("grpc-message", "too big for me")))
        assert (result.status, result.text) == (Status.RESOURCE_EXHAUSTED, "too big for me")
        assert server.resets == [(1, 8)], "the server need not wait for the rest"


async def test_a_server_that_is_satisfied_early() -> None:
    async with open_raw() as (channel, server, _):
        async with call(channel, "join", Cardinality.STREAM_UNARY) as rpc:
            await rpc.send_message(b"first")
            await settle()
            await server.send(*server.whole(1))
            await rpc.send_message(b"nobody wants it")
            await rpc.end()
            assert await rpc.recv_message() == b"answer"
        await settle()
        assert server.resets == [(1, 8)]
        assert server.received[1] == message(b"first")
        assert finished(channel) == {"OK": 1}


class Upper(StatusDetailsCodecBase):
    def encode(self, status: Status, message: str | None, details: object) -> bytes:
        raise AssertionError("a client only decodes")

    def decode(self, status: Status, message: str | None, data: bytes) -> str:
        return f"{status.name} {message} {data.decode().upper()}"


@pytest.mark.parametrize("codec", [None, Upper()])
async def test_details(codec: Upper | None) -> None:
    server = RawServer({})
    async with trio.open_nursery() as nursery:
        line = Line(nursery, server.serve)
        async with open_channel(
            "test", 1, codec=BytesCodec(), connect=line.dial, status_details_codec=codec
        ) as channel:
            for number, (wire, plain, decoded) in enumerate(
                [("aGk", b"hi", "ABORTED m HI"), ("aGk=", b"hi", "ABORTED m HI"), ("a", None, None)]
            ):
                result = start(nursery, channel)
                await settle()
                fields = (("grpc-message", "m"), ("grpc-status-details-bin", wire))
                await server.send(server.trailers_only(number * 2 + 1, 10, *fields))
                assert isinstance(result.error, GRPCError)
                assert result.error.details == (plain if codec is None else decoded)
        nursery.cancel_scope.cancel()


# -- connections that end ----------------------------------------------------------------------------------------------


async def two_calls(channel: Channel, nursery: trio.Nursery) -> tuple[Outcome, Outcome]:
    first = start(nursery, channel)
    await settle()
    second = start(nursery, channel)
    await settle()
    return first, second


async def test_goaway_serves_what_it_names_and_refuses_the_rest() -> None:
    async with open_raw() as (channel, server, nursery):
        first, second = await two_calls(channel, nursery)
        await server.send(server.goaway(last=1))
        assert second.status is Status.UNAVAILABLE
        assert second.text == "The server reset the stream: REFUSED_STREAM: not processed, safe to retry"
        assert not first.done
        await server.send(*server.whole(1))
        assert first.reply == b"answer"
        await settle()
        assert channel.statistics().connections == ()


async def test_goaway_with_an_error_ends_all() -> None:
    async with open_raw() as (channel, server, nursery):
        first, second = await two_calls(channel, nursery)
        await server.send(server.goaway(last=3, code=11))
        for each in (first, second):
            assert each.status is Status.UNAVAILABLE
            assert each.text == "Connection to test:1 lost: the peer sent GOAWAY: error 11"


async def test_a_lost_connection_ends_all_and_says_where() -> None:
    async with open_raw() as (channel, server, nursery):
        first, second = await two_calls(channel, nursery)
        await server.send(server.head(3), server.data(3, b"half of an answer"))
        await server.stream.aclose()
        await settle()
        for each in (first, second):
            assert (each.status, each.reply) == (Status.UNAVAILABLE, None)
            assert each.text.startswith("Connection to test:1 lost: the peer closed the connection")


async def test_goaway_with_the_settings_is_no_connection() -> None:
    async with open_raw(greets=False) as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        await server.send(SettingsFrame(0), server.goaway(last=0))
        assert result.status is Status.UNAVAILABLE
        assert result.text == "No connection to test:1: drained"


async def test_keepalive_finds_a_dead_server_if_asked_to(autojump_clock: trio.testing.MockClock) -> None:
    async with open_raw(keepalive_time=10, keepalive_timeout=5) as (channel, _, _n):
        with pytest.raises(GRPCError, match="did not answer a keepalive PING") as failed:
            await ask(channel)
        assert failed.value.status is Status.UNAVAILABLE
        assert trio.current_time() == 15


async def test_a_server_that_does_not_read_if_asked_to_notice(autojump_clock: trio.testing.MockClock) -> None:
    async with open_raw({SettingsFrame.INITIAL_WINDOW_SIZE: 0}, stall_limit=7) as (channel, server, _):
        with pytest.raises(GRPCError) as failed:
            await ask(channel, payload=bytes(1 << 20))
        assert failed.value.status is Status.UNAVAILABLE
        assert failed.value.message == "test:1 took nothing of what was sent for 7 s"
        assert trio.current_time() == 7
        await settle()
        assert server.resets == [(1, 8)]


async def test_neighbours_of_a_failed_call_do_not_notice() -> None:
    async with open_world() as world:
        async with trio.open_nursery() as nursery:
            holds = [start(nursery, world.channel, "hold") for _ in range(5)]
            await settle()
            for name in ("nope", "echo"):
                failed = start(nursery, world.channel, name, b"malformed")
                await settle()
                assert failed.status in (Status.UNIMPLEMENTED, Status.INTERNAL)
            world.service.release.set()
        assert [each.reply for each in holds] == [b"released"] * 5


@pytest.mark.parametrize(
    ("seconds", "wire"),
    [
        (0.0, b"1u"),
        (-1.0, b"1u"),
        (1e-9, b"1u"),
        (0.0000015, b"2u"),
        (1.5, b"1500000u"),
        (99.9999991, b"100000m"),
        (100.0, b"100000m"),
        (1e5 + 0.0001, b"100001S"),
        (1e9, b"99999999S"),
    ],
)
def test_timeouts_are_rounded_up(seconds: float, wire: bytes) -> None:
    assert encode_timeout(seconds) == wire
    assert decode_timeout(wire) >= min(seconds, 99_999_999)
