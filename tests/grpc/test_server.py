"""What a client of the server reads: the four kinds of call, metadata, errors, limits, drain."""

from __future__ import annotations

import gzip
import logging
import zlib

import pytest
import trio
import trio.testing
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError

from triton_trio.errors import NotFound
from triton_trio.grpc.connection import decode_timeout
from triton_trio.scopes import Reason

from .wire import NO_ERROR, REFUSED_STREAM, BytesStream, RawClient, Service, message, open_world

settle = trio.testing.wait_all_tasks_blocked


async def test_four_kinds_of_call() -> None:
    async def repeat(stream: BytesStream) -> None:
        request = await stream.recv_message()
        assert request is not None
        for _ in range(3):
            await stream.send_message(request)

    async def join(stream: BytesStream) -> None:
        await stream.send_message(b"+".join([part async for part in stream]))

    service = Service()
    service.add("repeat", repeat, Cardinality.UNARY_STREAM)
    service.add("join", join, Cardinality.STREAM_UNARY)
    async with open_world(service) as world:
        client = await world.connect()
        unary = await client.start("echo", b"one")
        streamed = await client.start("repeat", b"three")
        joined, both = client.headers("join"), client.headers("bidi")
        await client.send(joined, both)
        for part in (b"a", b"b"):
            await client.send(client.data(joined.stream_id, message(part)), client.data(both.stream_id, message(part)))
            await settle()
        assert client.answers[both.stream_id].messages == [b"a", b"b"], "answers come while requests still go"
        await client.send(client.data(joined.stream_id, end=True), client.data(both.stream_id, end=True))
        await settle()
        answers = client.answers
        assert answers[unary].messages == [b"one"]
        assert answers[streamed].messages == [b"three"] * 3
        assert answers[joined.stream_id].messages == [b"a+b"]
        assert all(answers[each].status == 0 for each in (unary, streamed, joined.stream_id, both.stream_id))
        assert answers[unary].frames == ["HEADERS", "DATA", "HEADERS"]


async def test_responses_of_one_tick_leave_in_one_write() -> None:
    async with open_world() as world:
        client = await world.connect()
        calls = [client.call("echo", b"%d" % number) for number in range(20)]
        segments: list[bytes] = []
        (connection,) = world.server._connections
        send_all = connection.http2.transport.send_all

        async def spy(data: bytes) -> None:
            segments.append(data)
            await send_all(data)

        connection.http2.transport.send_all = spy
        await client.send(*[frame for call in calls for frame in call])
        await settle()
        assert len(segments) == 1
        assert all(client.answers[call[0].stream_id].status == 0 for call in calls)


async def test_metadata_both_ways() -> None:
    async def greet(stream: BytesStream) -> None:
        await stream.recv_message()
        assert stream.metadata["who"] == "Ada"
        assert stream.metadata.getall("twice") == ["1", "2"]
        assert stream.metadata["raw-bin"] == b"\x00\xff"
        assert "content-type" not in stream.metadata
        assert stream.user_agent == "raw/1"
        assert stream.peer.addr() is None
        await stream.send_initial_metadata(metadata={"early": "yes", "b-bin": b"\x01\x02"})
        await stream.send_message(b"ok")
        await stream.send_trailing_metadata(metadata=[("late", "indeed")])

    service = Service()
    service.add("greet", greet)
    async with open_world(service) as world:
        client = await world.connect()
        extra = [("who", "Ada"), ("twice", "1"), ("twice", "2"), ("raw-bin", "AP8"), ("user-agent", "raw/1")]
        answer = client.answers[await client.start("greet", extra=extra)]
        assert ("early", "yes") in answer.headers
        assert ("b-bin", "AQI") in answer.headers
        assert answer.trailers == [("grpc-status", "0"), ("late", "indeed")]


async def test_malformed_binary_metadata_is_the_clients_error(caplog: pytest.LogCaptureFixture) -> None:
    async def look(stream: BytesStream) -> None:
        await stream.recv_message()
        stream.metadata["raw-bin"]

    service = Service()
    service.add("look", look)
    async with open_world(service) as world:
        client = await world.connect()
        answer = client.answers[await client.start("look", extra=[("raw-bin", "A")])]
        assert answer.status == Status.INTERNAL.value
        assert "raw-bin is not base64" in str(answer.headers)
        assert not caplog.records  # nobody needs to look at the server


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (GRPCError(Status.NOT_FOUND, "nö such\nthing"), 5, "n%C3%B6 such%0Athing"),
        (GRPCError(Status.ABORTED), 10, ""),
        (NotFound("Request for unknown model: 'x' is not found"), 5, "Request for unknown model: 'x' is not found"),
        (RuntimeError("secret"), 2, "Internal Server Error"),
    ],
)
async def test_exceptions_become_statuses_and_never_tracebacks(
    error: Exception, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: BytesStream) -> None:
        await stream.recv_message()
        raise error

    service = Service()
    service.add("fail", fail)
    async with open_world(service) as world:
        client = await world.connect()
        with caplog.at_level(logging.INFO):
            answer = client.answers[await client.start("fail")]
        assert (answer.status, answer.text) == (status, text)
        assert answer.frames == ["HEADERS"], "an error before any message is trailers-only"
        tracebacks = [record for record in caplog.records if record.exc_info]
        assert len(tracebacks) == (1 if isinstance(error, RuntimeError) else 0)
        await client.assert_serves()


async def test_error_after_a_message_and_details() -> None:
    async def fail(stream: BytesStream) -> None:
        await stream.recv_message()
        await stream.send_message(b"first")
        raise GRPCError(Status.DATA_LOSS, "the rest is gone", b"\x08\x0f")

    service = Service()
    service.add("fail", fail, Cardinality.UNARY_STREAM)
    async with open_world(service) as world:
        client = await world.connect()
        answer = client.answers[await client.start("fail")]
        assert answer.messages == [b"first"]
        assert answer.trailers == [
            ("grpc-status", "15"),
            ("grpc-message", "the rest is gone"),
            ("grpc-status-details-bin", "CA8"),
        ]


async def test_unary_handler_without_an_answer_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def silent(stream: BytesStream) -> None:
        await stream.recv_message()

    service = Service()
    service.add("silent", silent)
    async with open_world(service) as world:
        client = await world.connect()
        assert client.answers[await client.start("silent")].status == Status.UNKNOWN.value
    assert "without sending its response" in caplog.text


@pytest.mark.parametrize(
    ("change", "http_status", "status", "text"),
    [
        ({"path": "/test.Service/Nope"}, "200", 12, "Method not found: /test.Service/Nope"),
        ({"without": ["content-type"]}, "415", 2, "Missing content-type header"),
        (
            {"without": ["content-type"], "extra": [("content-type", "text/plain")]},
            "415",
            2,
            "Unacceptable content-type header",
        ),
        ({"without": ["te"]}, "400", 2, 'Required "te: trailers" header is missing'),
        ({"without": [":method"], "extra": []}, None, None, ""),
        ({"extra": [("grpc-timeout", "soon")]}, "200", 13, "Invalid grpc-timeout header: 'soon'"),
    ],
)
async def test_requests_that_are_not_grpc(
    change: dict[str, object], http_status: str | None, status: int | None, text: str
) -> None:
    async with open_world() as world:
        client = await world.connect()
        head = client.headers(**change)  # type: ignore[arg-type]
        await client.send(head, client.data(head.stream_id, message(b"x"), end=True))
        await settle()
        answer = client.answers[head.stream_id]
        if http_status is None:
            assert answer.reset == 1, "no :method is malformed HTTP/2, not a bad call"
        else:
            assert dict(answer.headers)[":status"] == http_status
            assert (answer.status, answer.text) == (status, text)
        assert world.server.statistics().started == 0
        await client.assert_serves()


async def test_early_status_is_followed_by_a_reset_that_stops_the_upload() -> None:
    """D3: RST_STREAM(NO_ERROR) only behind the trailers, only while the client is still sending."""
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("/nowhere")
        await client.send(head, client.data(head.stream_id, bytes(1000)))
        await settle()
        answer = client.answers[head.stream_id]
        assert answer.frames == ["HEADERS", "RST_STREAM"]
        assert (answer.status, answer.reset) == (12, NO_ERROR)
        assert client.answers[await client.start("/nowhere")].frames == ["HEADERS"]


async def test_request_without_its_message() -> None:
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("echo", end=True)
        await client.send(head)
        await settle()
        answer = client.answers[head.stream_id]
        assert answer.status == Status.UNIMPLEMENTED.value
        assert "exactly one request message" in answer.text


@pytest.mark.parametrize(
    ("payload", "status", "text"),
    [
        (message(b"malformed"), Status.INTERNAL, "Malformed request message: these bytes are no message"),
        (message(b"x", flag=2), Status.INTERNAL, "Malformed message prefix: compression flag is 2"),
        (message(b"x")[:4], Status.INTERNAL, "Stream ended within a message: 4 bytes of 5"),
        (message(b"abc")[:7], Status.INTERNAL, "Stream ended within a message: 7 bytes of 8"),
        (message(bytes(1001)), Status.RESOURCE_EXHAUSTED, "Received message larger than max (1001 vs. 1000)"),
        (message(b"x", flag=1), Status.INTERNAL, "Message is marked as compressed, but grpc-encoding is identity"),
    ],
)
async def test_bad_messages(payload: bytes, status: Status, text: str) -> None:
    async with open_world(max_receive_message_size=1000) as world:
        client = await world.connect()
        head = client.headers("echo")
        await client.send(head, client.data(head.stream_id, payload, end=True))
        await settle()
        answer = client.answers[head.stream_id]
        assert (answer.status, answer.text) == (status.value, text)
        await client.assert_serves()


async def test_message_over_the_limit_is_refused_at_its_prefix() -> None:
    async with open_world(max_receive_message_size=1000) as world:
        client = await world.connect()
        head = client.headers("bidi")
        await client.send(head, client.data(head.stream_id, message(b"ok") + b"\0\xff\xff\xff\xff"))
        await settle()
        answer = client.answers[head.stream_id]
        assert answer.messages == [b"ok"], "what came before it is served"
        assert answer.status == Status.RESOURCE_EXHAUSTED.value
        assert answer.text == "Received message larger than max (4294967295 vs. 1000)"


async def test_response_over_the_limit() -> None:
    async with open_world(max_send_message_size=1000) as world:
        client = await world.connect()
        answer = client.answers[await client.start("echo", bytes(1001))]
        assert (answer.status, answer.text) == (8, "Sent message larger than max (1001 vs. 1000)")
        await client.assert_serves()


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 8])
async def test_messages_in_any_pieces(cut: int) -> None:
    wire = message(b"first") + message(b"") + message(b"third one")
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("bidi")
        await client.send(head)
        for start in range(0, len(wire), cut):
            await client.send(client.data(head.stream_id, wire[start : start + cut]))
            await settle()
        await client.send(client.data(head.stream_id, end=True))
        await settle()
        assert client.answers[head.stream_id].messages == [b"first", b"", b"third one"]
        assert world.only_connection().http2.unacknowledged_bytes == 0


@pytest.mark.parametrize(("encoding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_request_compression(encoding: str, squeeze: object) -> None:
    assert callable(squeeze)
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("echo", extra=[("grpc-encoding", encoding)])
        await client.send(head, client.data(head.stream_id, message(squeeze(b"z" * 5000), flag=1), end=True))
        await settle()
        assert client.answers[head.stream_id].messages == [b"z" * 5000]


async def test_decompression_is_bounded() -> None:
    async with open_world(max_receive_message_size=10_000) as world:
        client = await world.connect()
        head = client.headers("echo", extra=[("grpc-encoding", "gzip")])
        bomb = gzip.compress(bytes(5_000_000))
        assert len(bomb) < 10_000
        await client.send(head, client.data(head.stream_id, message(bomb, flag=1), end=True))
        await settle()
        answer = client.answers[head.stream_id]
        assert (answer.status, answer.text) == (8, "Decompressed message is larger than max (10000 bytes)")


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [("br", b"??", 12), ("gzip", b"not gzip", 13), ("gzip", gzip.compress(bytes(999))[:-9], 13)],
)
async def test_broken_compression(encoding: str, body: bytes, status: int) -> None:
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("echo", extra=[("grpc-encoding", encoding)])
        await client.send(head, client.data(head.stream_id, message(body, flag=1), end=True))
        await settle()
        answer = client.answers[head.stream_id]
        assert answer.status == status
        if status == 12:
            assert ("grpc-accept-encoding", "identity,deflate,gzip") in answer.headers
        await client.assert_serves()


async def test_response_compression_for_clients_that_accept_it() -> None:
    async with open_world(response_compression="gzip") as world:
        client = await world.connect()
        plain = client.answers[await client.start("echo", b"p" * 500)]
        assert plain.messages == [b"p" * 500]
        squeezed = client.answers[await client.start("echo", b"s" * 500, extra=[("grpc-accept-encoding", "br, gzip")])]
        assert ("grpc-encoding", "gzip") in squeezed.headers
        assert squeezed.data[0] == 1
        assert gzip.decompress(squeezed.messages[0]) == b"s" * 500


async def test_E1_drain_goaway_refuse_new_finish_running() -> None:
    async with open_world() as world:
        client, idle = await world.connect(), await world.connect()
        running = await client.start("hold")
        world.server.start_drain()
        await settle()
        assert client.goaways[0] == (NO_ERROR, b"")
        assert idle.closed, "a connection without calls has nothing to wait for"
        refused = await client.start("echo")
        assert client.answers[refused].reset == REFUSED_STREAM
        assert not client.closed
        world.service.release.set()
        await settle()
        assert client.answers[running].messages == [b"released"]
        assert client.answers[running].status == 0
        assert client.closed
        assert world.server.statistics().connections == 0


async def test_E1_deadline_of_the_drain_gives_every_stream_a_status(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world() as world:
        ended: list[float] = []

        async def serve_until_drained() -> None:
            with trio.CancelScope() as scope:
                world.nursery.start_soon(drain_later, scope)
                await world.server.serve_connection(theirs)
            ended.append(trio.current_time())

        async def drain_later(scope: trio.CancelScope) -> None:
            await trio.sleep(10)
            world.server.start_drain()
            scope.deadline = trio.current_time() + 5

        ours, theirs = trio.testing.memory_stream_pair()
        client = RawClient(ours)
        world.nursery.start_soon(client.listen)
        world.nursery.start_soon(serve_until_drained)
        await client.handshake()
        began = trio.current_time()
        unary = await client.start("hold")
        bidi = client.headers("bidi")
        await client.send(bidi)
        await settle()
        await trio.sleep(20)
        for stream_id in (unary, bidi.stream_id):
            assert client.answers[stream_id].status == Status.UNAVAILABLE.value
            assert client.answers[stream_id].text == "The server is shutting down"
        assert [source for _, source in world.service.cancelled] == ["deadline", "deadline"]
        assert ended == [pytest.approx(began + 15, abs=0.1)]
        assert client.closed


async def test_cancel_all_answers_incomplete_requests_too() -> None:
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("echo")
        await client.send(head)
        await settle()
        world.server.cancel_all(Reason.SERVER_DRAIN)
        await settle()
        assert client.answers[head.stream_id].status == Status.UNAVAILABLE.value
        assert world.server.statistics().incomplete == 0


async def test_max_connection_age(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(max_connection_age=100, max_connection_age_grace=50, keepalive_time=1000) as world:
        client = await world.connect()
        await trio.sleep(99)
        running = await client.start("hold")
        await trio.sleep(2)
        assert client.goaways
        assert not client.closed
        await trio.sleep(50)
        assert client.answers[running].status == Status.UNAVAILABLE.value
        assert client.closed


async def test_tasks_are_named_after_what_they_serve() -> None:
    async with open_world() as world:
        client = await world.connect()
        await client.start("hold")
        root = trio.lowlevel.current_root_task()
        assert root is not None
        names: set[str] = set()
        todo = [root]
        while todo:
            task = todo.pop()
            names.add(task.name)
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        assert {"connection memory", "reader memory", "writer memory", "watchdog memory"} <= names
        assert "rpc /test.Service/hold #1" in names


async def test_statistics_balance() -> None:
    async with open_world() as world:
        client = await world.connect()
        await client.start("echo")
        held = await client.start("hold")
        statistics = world.server.statistics()
        assert (statistics.started, statistics.finished, statistics.running, statistics.open_streams) == (2, 1, 1, 1)
        await client.reset(held)
        statistics = world.server.statistics()
        assert (statistics.started, statistics.finished, statistics.running, statistics.open_streams) == (2, 2, 0, 0)
        assert statistics.resets_received == 1
        assert world.only_connection().peer == "memory"


@pytest.mark.parametrize(("value", "seconds"), [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6)])
def test_decode_timeout(value: bytes, seconds: float) -> None:
    assert decode_timeout(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"S", b"-1S", b"1", b"1s", b"123456789S", b" 1S", b"1_0S"])
def test_decode_timeout_rejects(value: bytes) -> None:
    with pytest.raises(ValueError, match="Invalid grpc-timeout"):
        decode_timeout(value)


async def test_serve_on_any_listener_until_drained() -> None:
    class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
        def __init__(self) -> None:
            self.send, self.receive = trio.open_memory_channel[trio.abc.Stream](1)

        async def accept(self) -> trio.abc.Stream:
            return await self.receive.receive()

        async def aclose(self) -> None:
            self.receive.close()
            await trio.lowlevel.checkpoint()

    async with open_world() as world:
        listener = MemoryListener()
        ours, theirs = trio.testing.memory_stream_pair()
        client = RawClient(ours)
        returned = trio.Event()

        async def serve() -> None:
            await world.server.serve([listener])
            returned.set()

        world.nursery.start_soon(serve)
        world.nursery.start_soon(client.listen)
        await listener.send.send(theirs)
        await client.handshake()
        await client.assert_serves()
        world.server.start_drain()
        await returned.wait()
        assert client.closed
        with pytest.raises(trio.BrokenResourceError):
            await listener.send.send(theirs)
