"""The connection itself, both roles: our client engine against our server engine over memory streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from grpclib.exceptions import GRPCError

from triton_trio.grpc.frames import FrameFollower
from triton_trio.grpc.framing import MessageStream, compress, decompress
from triton_trio.grpc.http2 import ErrorCode, Http2Connection, Http2Options, Http2Stream
from triton_trio.grpc.http2_stream import RawHeaders

settle = trio.testing.wait_all_tasks_blocked

REQUEST = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"test"))
RESPONSE = ((b":status", b"200"),)
BIG = 1 << 40


class Recorder(MessageStream):
    """Writes down what it is told."""

    def __init__(self, connection: Http2Connection, stream_id: int) -> None:
        super().__init__(connection, stream_id, BIG, BIG)
        self.told: list[object] = []

    def on_headers(self, headers: RawHeaders, end_stream: bool) -> None:
        self.told.append(headers)

    def on_trailers(self, headers: RawHeaders) -> None:
        self.told.append(headers)
        super().on_trailers(headers)

    def on_reset(self, error_code: int, by_peer: bool) -> None:
        self.told.append(("reset", error_code, by_peer))
        super().on_reset(error_code, by_peer)

    def on_lost(self, why: str) -> None:
        self.told.append(("lost", why))
        super().on_lost(why)

    def on_stalled(self) -> None:
        self.told.append("stalled")


class Pair:
    def __init__(self, server: Http2Connection, client: Http2Connection, accepted: list[Recorder]) -> None:
        self.server, self.client, self.accepted = server, client, accepted

    def open(self, *, end_stream: bool = False) -> Recorder:
        stream = self.client.open_stream(Recorder, REQUEST, end_stream=end_stream)
        assert isinstance(stream, Recorder)
        return stream

    async def open_both(self) -> tuple[Recorder, Recorder]:
        ours = self.open()
        await settle()
        return ours, self.accepted[-1]


@asynccontextmanager
async def open_pair(*, refuse: bool = False, **options: float) -> AsyncIterator[Pair]:
    left, right = trio.testing.memory_stream_pair()
    accepted: list[Recorder] = []

    def accept(connection: Http2Connection, stream_id: int, headers: RawHeaders, end: bool) -> Http2Stream | None:
        if refuse:
            return None
        accepted.append(Recorder(connection, stream_id))
        return accepted[-1]

    settings = Http2Options(**options)  # type: ignore[arg-type]
    server = Http2Connection(left, "server", options=settings, accept=accept)
    client = Http2Connection(right, "client", options=settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        await nursery.start(client.run)
        await settle()
        yield Pair(server, client, accepted)
        client.close()
    assert not server.streams
    assert not client.streams
    assert server.statistics().unacknowledged_bytes == client.statistics().unacknowledged_bytes == 0


async def test_a_whole_exchange() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        ours.send_frame(b"question", end_stream=True)
        assert await theirs.receive_frame() == b"question"
        assert await theirs.receive_frame() is None
        theirs.send_headers(RESPONSE)
        theirs.send_frame(b"answer")
        theirs.send_trailers(((b"done", b"1"),))
        assert await ours.receive_frame() == b"answer"
        assert await ours.receive_frame() is None
        assert ours.told == [RESPONSE, ((b"done", b"1"),)]
        assert theirs.told == []
        assert ours.closed
        assert theirs.closed


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 1 << 20, 20 << 20])
async def test_messages_of_every_size_through_every_window(size: int) -> None:
    async with open_pair(initial_window_size=1 << 16, connection_window_size=1 << 17, max_frame_size=1 << 14) as pair:
        ours, theirs = await pair.open_both()
        theirs.send_headers(RESPONSE)
        payload = b"x" * size
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo_one, theirs)
            ours.send_frame(payload)
            await ours.wait_writable()
            assert await ours.receive_frame() == payload
        ours.reset()


async def echo_one(stream: Recorder) -> None:
    payload = await stream.receive_frame()
    assert payload is not None
    stream.send_frame(payload)
    await stream.wait_writable()


async def test_two_large_messages_behind_each_other_do_not_deadlock() -> None:
    """The second is acknowledged ahead only when the first has been taken, and then it must be."""
    async with open_pair(initial_window_size=1 << 16, connection_window_size=1 << 20) as pair:
        ours, theirs = await pair.open_both()
        ours.send_frame(b"small")
        ours.send_frame(bytes(500_000))
        await settle()
        assert theirs.unacknowledged <= 1 << 16, "an unread stream keeps its sender waiting"
        assert await theirs.receive_frame() == b"small"
        with trio.fail_after(5):
            assert await theirs.receive_frame() == bytes(500_000)
        ours.reset()


async def test_each_side_is_told_of_a_reset_by_the_other_only() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        ours.reset(ErrorCode.CANCEL)
        await settle()
        assert theirs.told == [("reset", ErrorCode.CANCEL, True)]
        assert ours.told == []
        ours, theirs = await pair.open_both()
        theirs.reset(ErrorCode.INTERNAL_ERROR)
        await settle()
        assert ours.told == [("reset", ErrorCode.INTERNAL_ERROR, True)]
        assert await ours.receive_frame() is None


async def test_D2_sends_on_a_closed_stream_are_no_ops() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        ours.reset()
        await settle()
        sent = pair.server.statistics().bytes_sent
        theirs.send_headers(RESPONSE)
        theirs.send_data(b"x")
        theirs.send_trailers(RESPONSE)
        theirs.reset()
        theirs.acknowledge(5)
        await theirs.wait_writable()
        await settle()
        assert pair.server.statistics().bytes_sent == sent


async def test_law_10_nothing_after_the_terminal_frame() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        theirs.send_headers(RESPONSE, end_stream=True)
        theirs.send_data(b"late")
        theirs.send_trailers(((b"late", b"1"),))
        await settle()
        assert ours.told[0] == RESPONSE
        assert ours.told[1:] == [("reset", ErrorCode.NO_ERROR, True)], "we had not half-closed"
        assert not ours.has_message or ours.remote_ended


async def test_refused_stream() -> None:
    async with open_pair(refuse=True) as pair:
        ours = pair.open()
        await settle()
        assert ours.told == [("reset", ErrorCode.REFUSED_STREAM, True)]


async def test_loss_of_the_connection_reaches_every_stream_and_every_waiter() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        results: list[object] = []

        async def receive(stream: Recorder) -> None:
            results.append(await stream.receive_frame())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, ours)
            nursery.start_soon(receive, theirs)
            await settle()
            pair.server.close(ErrorCode.INTERNAL_ERROR, "on purpose")
        assert results == [None, None]
        assert theirs.told == [("lost", "on purpose")]
        assert ours.told == [("lost", "the peer sent GOAWAY: error 2")]
        assert not pair.client.can_open
        with pytest.raises(trio.ClosedResourceError, match="takes no new streams"):
            pair.open()


async def test_drain_lets_open_streams_finish_and_tells_the_client() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        pair.server.start_drain()
        await settle()
        assert pair.client.draining
        assert not pair.client.can_open
        ours.send_frame(b"still", end_stream=True)
        assert await theirs.receive_frame() == b"still"
        theirs.send_headers(RESPONSE, end_stream=True)
        await settle()
        assert pair.server.ended == "drained"
        assert pair.client.ended is not None


async def test_an_answer_in_the_same_bytes_as_goaway_is_not_lost() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        ours.send_frame(b"last", end_stream=True)
        assert await theirs.receive_frame() == b"last"
        theirs.send_headers(RESPONSE)
        theirs.send_frame(b"words")
        theirs.send_trailers(((b"done", b"1"),))
        pair.server.start_drain()
        await settle()
        assert pair.client.ended is not None
        assert ours.told == [RESPONSE, ((b"done", b"1"),)]
        assert await ours.receive_frame() == b"words"
        assert await ours.receive_frame() is None


async def test_wait_writable_waits_for_the_windows_and_only_then(autojump_clock: trio.testing.MockClock) -> None:
    async with open_pair(initial_window_size=1 << 16, outbound_limit=10_000) as pair:
        ours, theirs = await pair.open_both()
        ours.send_frame(bytes(60_000))
        await ours.wait_writable()  # one turn of the writer, within the window
        ours.send_frame(bytes(60_000))
        waited = trio.Event()

        async def wait() -> None:
            await ours.wait_writable()
            waited.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await settle()
            assert not waited.is_set()
            assert ours.queued > 10_000
            assert len(await theirs.receive_frame() or b"") == 60_000
            await settle()
            assert waited.is_set()
        ours.reset()


async def test_a_stalled_stream_is_reset_and_its_owner_told(autojump_clock: trio.testing.MockClock) -> None:
    async with open_pair(initial_window_size=1 << 16, outbound_limit=10_000, stall_limit=5) as pair:
        ours, theirs = await pair.open_both()
        for _ in range(20):
            ours.send_frame(bytes(10_000))  # nobody takes them at the other end
        await settle()
        began = trio.current_time()
        await ours.wait_writable()
        assert trio.current_time() - began == 5
        assert ours.told == ["stalled"]
        await settle()
        assert theirs.told == [("reset", ErrorCode.CANCEL, True)]


async def test_cancelling_run_flushes_what_its_tasks_queued_at_their_end() -> None:
    left, right = trio.testing.memory_stream_pair()
    streams: list[Recorder] = []

    def accept(connection: Http2Connection, stream_id: int, headers: RawHeaders, end: bool) -> Http2Stream:
        streams.append(Recorder(connection, stream_id))
        connection.nursery.start_soon(last_words, streams[-1])
        return streams[-1]

    async def last_words(stream: Recorder) -> None:
        try:
            await trio.sleep_forever()
        finally:
            stream.send_headers(((b":status", b"503"),), end_stream=True)

    server = Http2Connection(left, "server", options=Http2Options(), accept=accept)
    client = Http2Connection(right, "client", options=Http2Options())
    async with trio.open_nursery() as clients:
        await clients.start(client.run)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            await settle()
            ours = client.open_stream(Recorder, REQUEST, end_stream=True)
            await settle()
            nursery.cancel_scope.cancel()
        await settle()
        assert isinstance(ours, Recorder)
        assert ours.told == [((b":status", b"503"),)]


async def test_two_receivers_on_one_stream_are_a_bug() -> None:
    async with open_pair() as pair:
        ours, theirs = await pair.open_both()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs.receive_frame)
            await settle()
            with pytest.raises(trio.BusyResourceError):
                await theirs.receive_frame()
            nursery.cancel_scope.cancel()
        ours.send_frame(b"not lost by the cancel")
        assert await theirs.receive_frame() == b"not lost by the cancel"
        ours.reset()


def test_frame_follower_in_any_pieces() -> None:
    def frame(kind: int, stream_id: int, length: int) -> bytes:
        return length.to_bytes(3, "big") + bytes([kind, 0]) + stream_id.to_bytes(4, "big") + bytes(length)

    wire = b"P" * 24 + frame(4, 0, 12) + frame(0, 7, 30) + frame(0, 9, 0) + frame(1, 11, 5) + frame(0, 13, 4)
    # After each byte: is it inside the payload of a DATA frame, and of which stream?
    truth: list[int] = [0] * 24
    for kind, stream_id, length in ((4, 0, 12), (0, 7, 30), (0, 9, 0), (1, 11, 5), (0, 13, 4)):
        inside = stream_id if kind == 0 else 0
        truth += [0] * 8 + [inside if length else 0] + [inside] * (length - 1) + [0] * (length > 0)
    assert len(truth) == len(wire)
    for step in (1, 2, 3, 5, 8, 9, 10, 24, 33, 50, len(wire)):
        follower = FrameFollower(24)
        for start in range(0, len(wire), step):
            follower.feed(wire[start : start + step])
            end = min(start + step, len(wire))
            assert follower.torn_stream == truth[end - 1], (step, end)


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_compression_round_trip_and_limit(encoding: bytes) -> None:
    squeezed = compress(b"a" * 1000, encoding)
    assert len(squeezed) < 100
    assert decompress(squeezed, encoding, 1000) == b"a" * 1000
    with pytest.raises(GRPCError, match="larger than max"):
        decompress(squeezed, encoding, 999)
