"""What hostile peers do, each with a live neighbour.

Which errors cost one stream and which cost the connection is libnghttp2's choice where RFC 9113 leaves one; the table
below is that choice, written down.  A neighbour on *another* connection is never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hpack
import pytest
import trio
import trio.testing
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from .wire import CANCEL, ENHANCE_YOUR_CALM, PREFACE, PROTOCOL_ERROR, RawClient, message, open_world

settle = trio.testing.wait_all_tasks_blocked


def window_update(stream_id: int, increment: int) -> bytes:
    return b"\0\0\x04\x08\0" + stream_id.to_bytes(4, "big") + increment.to_bytes(4, "big")


def priority(stream_id: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + b"\x02\0" + stream_id.to_bytes(4, "big") + body


# -- D8: one stream's error --------------------------------------------------------------------------------------------

Malformed = Callable[[RawClient], list[Any]]


def uppercase_header(client: RawClient) -> list[Any]:
    return [client.headers("hold", end=True, extra=[("Upper", "case")])]


def missing_path(client: RawClient) -> list[Any]:
    return [client.headers("hold", end=True, without=[":path"])]


def connection_header(client: RawClient) -> list[Any]:
    return [client.headers("hold", end=True, extra=[("connection", "close")])]


def trailers_without_end(client: RawClient) -> list[Any]:
    head = client.headers("bidi")
    return [head, HeadersFrame(head.stream_id, data=client.encoder.encode([("late", "1")]), flags=["END_HEADERS"])]


def content_length_mismatch(client: RawClient) -> list[Any]:
    head = client.headers("hold", extra=[("content-length", "3")])
    return [head, client.data(head.stream_id, message(b"longer"), end=True)]


@pytest.mark.parametrize(
    "malformed", [uppercase_header, missing_path, connection_header, trailers_without_end, content_length_mismatch]
)
async def test_D8_malformed_request_costs_only_its_stream(malformed: Malformed) -> None:
    async with open_world() as world:
        client = await world.connect()
        neighbour = await client.start("hold")
        frames = malformed(client)
        await client.send(*frames)
        await settle()
        assert client.answers[frames[0].stream_id].reset == PROTOCOL_ERROR
        assert not client.closed
        assert world.server.statistics().running == 1
        world.service.release.set()
        await settle()
        assert client.answers[neighbour].messages == [b"released"]


async def test_D8_unknown_frame_types_are_ignored() -> None:
    async with open_world() as world:
        client = await world.connect()
        await client.send(b"\0\0\x04\x0b\x0f\0\0\0\0grea", b"\0\0\x00\xfa\xff\0\0\0\x07")
        await client.assert_serves()


# -- errors that cost the attacker its connection, MadeYouReset's primitives among them --------------------------------


def zero_window_update(client: RawClient, stream_id: int) -> list[Any]:
    return [window_update(stream_id, 0)]


def window_overflow(client: RawClient, stream_id: int) -> list[Any]:
    return [window_update(stream_id, (1 << 31) - 1)]


def data_after_end(client: RawClient, stream_id: int) -> list[Any]:
    return [DataFrame(stream_id, data=b"more")]


def headers_after_end(client: RawClient, stream_id: int) -> list[Any]:
    return [client.headers("hold", stream_id=stream_id)]


def priority_of_wrong_length(client: RawClient, stream_id: int) -> list[Any]:
    return [priority(stream_id, b"\0\0")]


def data_on_stream_zero(client: RawClient, stream_id: int) -> list[Any]:
    return [b"\0\0\x01\0\0\0\0\0\0x"]


def oversized_frame(client: RawClient, stream_id: int) -> list[Any]:
    return [b"\xff\xff\xff\0\0" + stream_id.to_bytes(4, "big")]


def even_stream_id(client: RawClient, stream_id: int) -> list[Any]:
    return [client.headers("echo", stream_id=2)]


def broken_hpack(client: RawClient, stream_id: int) -> list[Any]:
    return [HeadersFrame(stream_id + 2, data=b"\xff\xff\xff\xff\xff\xff\xff\xff\xff", flags=["END_HEADERS"])]


def too_many_headers(client: RawClient, stream_id: int) -> list[Any]:
    return [client.headers("echo", extra=[(f"h{number}", "v") for number in range(200)])]


def too_large_headers(client: RawClient, stream_id: int) -> list[Any]:
    return [client.headers("echo", extra=[("h", "v" * 15_000), ("i", "v" * 2_000)])]


def hpack_bomb(client: RawClient, stream_id: int) -> list[Any]:
    """One large header in the dynamic table, then one byte per reference to it."""
    head = client.headers("echo", extra=[("bomb", "x" * 2_000)])
    head.data += b"\xbe" * 1_000
    return [head]


def continuation_flood(client: RawClient, stream_id: int) -> list[Any]:
    head = HeadersFrame(stream_id + 2, data=b"", flags=[])
    return [head, *[ContinuationFrame(stream_id + 2, data=b"") for _ in range(100)]]


def second_preface(client: RawClient, stream_id: int) -> list[Any]:
    return [PREFACE]


@pytest.mark.parametrize(
    "attack",
    [
        zero_window_update,
        window_overflow,
        data_after_end,
        headers_after_end,
        priority_of_wrong_length,
        data_on_stream_zero,
        oversized_frame,
        even_stream_id,
        broken_hpack,
        too_many_headers,
        too_large_headers,
        hpack_bomb,
        continuation_flood,
        second_preface,
    ],
)
async def test_D8_connection_errors_flush_goaway_and_spare_other_connections(
    attack: Callable[[RawClient, int], list[Any]],
) -> None:
    async with open_world() as world:
        attacker, neighbour = await world.connect(), await world.connect()
        held = await neighbour.start("hold")
        target = await attacker.start("hold")
        await attacker.send(*attack(attacker, target))
        await settle()
        assert attacker.goaways, "the peer is told why"
        assert attacker.goaways[-1][0] != 0
        assert attacker.closed
        assert world.service.cancelled == [("connection_lost", "explicit")]
        assert world.server.statistics().connections == 1
        world.service.release.set()
        await settle()
        assert neighbour.answers[held].messages == [b"released"]


@pytest.mark.parametrize("priority_frame", [b"\0\0\0\x01\x10"])
async def test_priority_self_dependency_is_ignored_with_all_of_rfc_7540_priorities(priority_frame: bytes) -> None:
    async with open_world() as world:
        client = await world.connect()
        await client.send(priority(1, priority_frame))
        await client.assert_serves()


# -- bytes that are not HTTP/2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(range(256)) * 100,
        b"\0",
        PREFACE[:-1] + b"!",
        PREFACE + b"\0\0\x08\x06\0\0\0\0\0" + bytes(8),  # PING where SETTINGS must be
    ],
)
async def test_garbage_closes_only_its_connection(garbage: bytes) -> None:
    async with open_world() as world:
        neighbour = await world.connect()
        stranger = await world.connect(handshake=False)
        await stranger.send(garbage)
        await settle()
        assert stranger.closed
        assert world.server.statistics().connections == 1
        await neighbour.assert_serves()


@pytest.mark.parametrize("keep", range(1, 60, 7))
async def test_truncated_frames_then_fin(keep: int) -> None:
    async with open_world() as world:
        neighbour, client = await world.connect(), await world.connect()
        whole = b"".join(frame.serialize() for frame in client.call("hold", b"x" * 40))
        await client.send(whole[:-keep])
        await settle()
        await client.stream.send_eof()
        await settle()
        assert client.closed
        assert world.server.statistics().running == 0
        await neighbour.assert_serves()


async def test_a_request_byte_by_byte() -> None:
    async with open_world() as world:
        client = await world.connect()
        frames = client.call("echo", b"slow")
        for frame in frames:
            for byte in frame.serialize():
                await client.send(bytes([byte]))
                await settle()
        assert client.answers[frames[0].stream_id].messages == [b"slow"]


# -- floods ------------------------------------------------------------------------------------------------------------


async def test_rapid_reset_runs_nothing_and_disturbs_nobody() -> None:
    """CVE-2023-44487.  2,000 streams opened and reset on one connection; a client is never cut off for cancelling."""
    async with open_world() as world:
        attacker, neighbour = await world.connect(), await world.connect()
        for _ in range(20):
            frames: list[Any] = []
            for _ in range(100):
                call = attacker.call("hold")
                frames += [*call, RstStreamFrame(call[0].stream_id, error_code=CANCEL)]
            await attacker.send(*frames)
            await neighbour.assert_serves()
        assert world.service.entered == 0
        assert world.server.statistics().resets_received == 2_000
        await attacker.assert_serves()


async def test_honest_client_that_cancels_its_own_running_work_is_never_cut_off() -> None:
    async with open_world() as world:
        client = await world.connect()
        for _ in range(15):
            ids = []
            for _ in range(100):
                call = client.call("hold")
                ids.append(call[0].stream_id)
                await client.send(*call)
            await settle()
            assert world.server.statistics().running == 100
            await client.send(*[RstStreamFrame(each, error_code=CANCEL) for each in ids])
            await settle()
            assert world.server.statistics().running == 0
        assert world.service.cancelled == [("client_reset", "explicit")] * 1_500
        assert client.goaways == []
        await client.assert_serves()


async def test_more_streams_than_advertised_cost_the_connection() -> None:
    async with open_world(advertised_streams=3) as world:
        client, neighbour = await world.connect(), await world.connect()
        assert client.settings[3] == 3
        for _ in range(4):
            await client.start("hold")
        assert client.goaways[-1][0] == PROTOCOL_ERROR
        assert client.closed
        await neighbour.assert_serves()


@pytest.mark.parametrize("flood", ["ping", "settings"])
async def test_control_frames_that_nobody_reads_the_answers_of(
    flood: str, autojump_clock: trio.testing.MockClock
) -> None:
    """CVE-2019-9512, -9515: the backlog of ACKs is bounded."""
    async with open_world() as world:
        neighbour = await world.connect()
        frame = PingFrame(0, opaque_data=b"12345678") if flood == "ping" else SettingsFrame(0)
        ours, theirs = trio.testing.lockstep_stream_pair()  # it never receives: the server's first write blocks
        done = trio.Event()

        async def serve() -> None:
            await world.server.serve_connection(theirs)
            done.set()

        world.nursery.start_soon(serve)

        async def attack() -> None:
            await ours.send_all(PREFACE + SettingsFrame(0).serialize())
            for _ in range(200):
                await ours.send_all(frame.serialize() * 50)

        with pytest.raises(trio.BrokenResourceError):
            await attack()
        await neighbour.assert_serves()
        await ours.aclose()
        await done.wait()


async def test_answered_pings_are_never_punished() -> None:
    async with open_world() as world:
        client = await world.connect()
        for _ in range(3_000):
            await client.send(PingFrame(0, opaque_data=b"keepaliv"))
            await trio.lowlevel.checkpoint()
        await client.assert_serves()


async def test_empty_frame_flood() -> None:
    """CVE-2019-9518."""
    async with open_world(max_empty_frames=1_000) as world:
        attacker, neighbour = await world.connect(), await world.connect()
        head = attacker.headers("bidi")
        await attacker.send(head, DataFrame(head.stream_id).serialize() * 1_001)
        await settle()
        assert attacker.goaways == [(ENHANCE_YOUR_CALM, b"too many empty DATA frames")]
        assert attacker.closed
        await neighbour.assert_serves()


async def test_refusals_that_nobody_reads_are_bounded() -> None:
    async with open_world(max_backlog=100, stall_limit=1e6, handshake_timeout=1e6) as world:
        neighbour = await world.connect()
        ours, theirs = trio.testing.lockstep_stream_pair()
        client = RawClient(ours)
        world.nursery.start_soon(world.server.serve_connection, theirs)
        await ours.send_all(PREFACE + SettingsFrame(0).serialize())
        await settle()

        async def attack() -> None:
            for _ in range(500):
                head = client.headers("/nowhere", end=True)
                await ours.send_all(head.serialize())
                await ours.send_all(RstStreamFrame(head.stream_id, error_code=CANCEL).serialize())

        with pytest.raises(trio.BrokenResourceError):
            await attack()
        await ours.aclose()
        await neighbour.assert_serves()


# -- D7: the window ----------------------------------------------------------------------------------------------------


async def test_D7_a_thousand_cancelled_uploads_give_their_bytes_back() -> None:
    async with open_world(initial_window_size=1 << 20, connection_window_size=1 << 20) as world:
        client = await world.connect()
        chunk = bytes(5_000)
        for _ in range(20):
            frames: list[Any] = []
            for _ in range(50):
                head = client.headers("echo")
                upload = client.data(head.stream_id, b"\0\0\1\0\0" + chunk)
                frames += [head, upload, RstStreamFrame(head.stream_id, error_code=CANCEL)]
            await client.send(*frames)
            await settle()
        statistics = world.only_connection().http2
        assert statistics.unacknowledged_bytes == 0
        assert statistics.local_window >= (1 << 20) // 2, "all of it is free; updates go out in halves"
        await client.assert_serves()


@pytest.mark.parametrize("when", ["unread", "read", "finished"])
async def test_D7_unread_bytes_of_a_bidi_stream_return_with_its_end(when: str) -> None:
    async with open_world(initial_window_size=1 << 16, connection_window_size=1 << 16) as world:
        client = await world.connect()
        for _ in range(100):
            head = client.headers("hold" if when == "unread" else "bidi")
            await client.send(head, client.data(head.stream_id, message(bytes(3_000)) + message(bytes(3_000))[:2_000]))
            await settle()
            await client.send(window_update(0, 3_005))
            if when == "finished":
                await client.send(client.data(head.stream_id, end=True))
                await settle()
                assert client.answers[head.stream_id].status == 13
            else:
                await client.reset(head.stream_id)
        assert world.only_connection().http2.unacknowledged_bytes == 0
        await client.assert_serves()


async def test_D7_a_frame_torn_by_our_own_reset_gives_its_bytes_back() -> None:
    """The engine forgets what it has read of a frame whose stream is reset; so the reset waits for the frame's end."""
    async with open_world(initial_window_size=1 << 16, connection_window_size=1 << 16) as world:
        client = await world.connect()
        for _ in range(40):
            head = client.headers("/nowhere")  # answered, then reset, while its upload is in the middle of a frame
            frame = client.data(head.stream_id, bytes(10_000)).serialize()
            await client.send(head, frame[:8_000])
            await settle()
            assert client.answers[head.stream_id].status == 12
            await client.send(frame[8_000:])
            await settle()
            assert client.answers[head.stream_id].reset == 0
        await client.assert_serves()


async def test_D7_data_that_crosses_our_reset_on_the_wire() -> None:
    async with open_world(initial_window_size=1 << 16, connection_window_size=1 << 16) as world:
        client = await world.connect()
        for _ in range(40):
            head = client.headers("/nowhere")
            await client.send(head)
            await settle()
            assert client.answers[head.stream_id].reset == 0
            await client.send(client.data(head.stream_id, bytes(10_000)))
            await settle()
        await client.assert_serves()


async def test_a_message_larger_than_the_window_arrives() -> None:
    async with open_world(initial_window_size=1 << 16, connection_window_size=1 << 17) as world:
        client = await world.connect()
        size = 1 << 20
        head = client.headers("echo")
        body = message(bytes(size))
        await client.send(head)
        granted = spent = 0
        position = 0
        while position < len(body):
            await settle()
            granted = 65_536 + client.updates.get(head.stream_id, 0)
            room = min(granted - spent, 16_384, len(body) - position)
            assert room > 0, "the server gives the window back while the message grows"
            await client.send(client.data(head.stream_id, body[position : position + room]))
            position += room
            spent += room
        await client.send(
            client.data(head.stream_id, end=True), window_update(0, size), window_update(head.stream_id, size)
        )
        await settle()
        assert client.answers[head.stream_id].messages == [bytes(size)]


# -- time --------------------------------------------------------------------------------------------------------------


async def test_slowloris_preface(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(handshake_timeout=10) as world:
        client = await world.connect(handshake=False)
        await client.send(PREFACE[:10])
        await trio.sleep(9)
        assert not client.closed
        await trio.sleep(2)
        assert client.closed


async def test_slowloris_settings(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(handshake_timeout=10) as world:
        client = await world.connect(handshake=False)
        await client.send(PREFACE + b"\0\0\6\4\0\0\0\0\0")
        await trio.sleep(11)
        assert client.closed


async def test_slowloris_first_message(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(first_message_timeout=30, keepalive_time=1e6) as world:
        client = await world.connect()
        head = client.headers("echo")
        await client.send(head, client.data(head.stream_id, b"\0\0\0\0\x64"))
        for _ in range(29):
            await trio.sleep(1)
            await client.send(client.data(head.stream_id, b"x"))
        assert world.server.statistics().incomplete == 1
        await trio.sleep(2)
        answer = client.answers[head.stream_id]
        assert (answer.status, answer.reset) == (4, 0)
        assert "did not arrive within 30 s" in answer.text
        assert world.server.statistics().incomplete == 0
        await client.assert_serves()


async def test_a_large_upload_that_keeps_coming_is_no_slowloris(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(first_message_timeout=10, keepalive_time=1e6) as world:
        client = await world.connect()
        head = client.headers("echo")
        body = message(bytes(2_000_000))
        await client.send(head)
        for start in range(0, len(body), 100_000):
            await trio.sleep(1)
            await client.send(
                *[
                    client.data(head.stream_id, body[at : min(at + 16_384, start + 100_000)])
                    for at in range(start, min(start + 100_000, len(body)), 16_384)
                ]
            )
        await client.send(client.data(head.stream_id, end=True), window_update(0, 2_000_000))
        await client.send(window_update(head.stream_id, 2_000_000))
        await settle()
        assert client.answers[head.stream_id].messages == [bytes(2_000_000)]


async def test_A9_black_holed_peer_is_lost_within_keepalive_time_and_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(keepalive_time=60, keepalive_timeout=20) as world:
        client = await world.connect()
        client.answer_pings = False
        await client.start("hold")
        await trio.sleep(59)
        assert client.pings == []
        await trio.sleep(2)
        assert len(client.pings) == 1
        assert world.service.cancelled == []
        await trio.sleep(20)
        assert world.service.cancelled == [("connection_lost", "explicit")]
        assert client.closed


async def test_A9_peer_that_answers_pings_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(keepalive_time=60, keepalive_timeout=20) as world:
        client = await world.connect()
        held = await client.start("hold")
        await trio.sleep(600)
        assert 8 <= len(client.pings) <= 10
        world.service.release.set()
        await settle()
        assert client.answers[held].status == 0


async def test_A9_idle_connection_without_calls_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(keepalive_time=60) as world:
        client = await world.connect()
        client.answer_pings = False
        await client.assert_serves()
        await trio.sleep(1000)
        assert client.pings == []
        await client.assert_serves()


async def test_A9_client_pinging_every_ten_seconds_during_a_long_call(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world() as world:
        client = await world.connect()
        held = await client.start("hold")
        for _ in range(30):
            await trio.sleep(10)
            await client.send(PingFrame(0, opaque_data=b"keepaliv"))
        assert client.goaways == []
        world.service.release.set()
        await settle()
        assert client.answers[held].status == 0


async def test_a_peer_that_stops_reading_is_dropped_at_the_stall_limit(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(stall_limit=30, keepalive_time=1e6) as world:
        ours, theirs = trio.testing.lockstep_stream_pair()
        client = RawClient(ours)
        lost = trio.Event()

        async def serve() -> None:
            await world.server.serve_connection(theirs)
            lost.set()

        world.nursery.start_soon(serve)
        await ours.send_all(PREFACE + SettingsFrame(0).serialize())  # and never receives
        for frame in client.call("hold"):
            await ours.send_all(frame.serialize())
        began = trio.current_time()
        await lost.wait()
        assert trio.current_time() - began == pytest.approx(30, abs=1)
        assert world.service.cancelled == [("connection_lost", "explicit")]
        await ours.aclose()


def test_the_hpack_bomb_above_is_one() -> None:
    client = RawClient(trio.testing.memory_stream_pair()[0])
    (frame,) = hpack_bomb(client, 1)
    assert len(frame.data) < 6_000
    decoder = hpack.Decoder(max_header_list_size=1 << 30)
    assert sum(len(name) + len(value) for name, value in decoder.decode(frame.data)) > 2_000_000


def test_window_update_helper() -> None:
    assert window_update(5, 7) == WindowUpdateFrame(5, window_increment=7).serialize()
