"""How an RPC is cancelled: every signal reaches its scope at once, with its reason, and nothing else notices."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError
from hyperframe.frame import GoAwayFrame, RstStreamFrame

from triton_trio.scopes import Reason

from .wire import CANCEL, NO_ERROR, REFUSED_STREAM, BytesStream, RawClient, Service, World, message, open_world

settle = trio.testing.wait_all_tasks_blocked


async def test_A1_rst_cancels_a_waiting_unary_handler() -> None:
    async with open_world() as world:
        client = await world.connect()
        stream_id = await client.start("hold")
        assert world.server.statistics().running == 1
        await client.reset(stream_id)
        assert world.service.cancelled == [("client_reset", "explicit")]
        assert world.server.statistics().running == 0
        assert stream_id not in client.answers, "nothing goes to a stream that was reset"
        await client.assert_serves()


async def test_A5_rst_in_the_same_bytes_as_the_request_starts_nothing() -> None:
    async with open_world() as world:
        client = await world.connect()
        frames = client.call("hold")
        await client.send(*frames, RstStreamFrame(frames[0].stream_id, error_code=CANCEL))
        await settle()
        assert world.service.entered == 0
        assert world.server.statistics().started == 0
        await client.assert_serves()


async def test_A5_rst_one_read_after_the_request_but_before_its_task_ran() -> None:
    """Both segments are parsed before the handler's task has had its first turn."""
    async with open_world() as world:
        client = await world.connect()
        frames = client.call("hold")
        await client.send(*frames)
        await client.reset(frames[0].stream_id)
        assert all(reason == "client_reset" for reason, _ in world.service.cancelled)
        assert world.server.statistics().running == 0
        await client.assert_serves()


async def test_D4_half_close_is_not_a_cancel_and_rst_after_it_is() -> None:
    async with open_world() as world:
        client = await world.connect()
        served = await client.start("hold")  # half-closed with its DATA
        doomed = await client.start("hold")
        await client.reset(doomed)
        assert world.service.cancelled == [("client_reset", "explicit")]
        world.service.release.set()
        await settle()
        assert client.answers[served].messages == [b"released"]
        assert client.answers[served].status == 0


async def test_D4_half_close_ends_a_bidi_handlers_input() -> None:
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("bidi")
        await client.send(head, client.data(head.stream_id, message(b"a") + message(b"b")))
        await settle()
        assert client.answers[head.stream_id].messages == [b"a", b"b"]
        await client.send(client.data(head.stream_id, end=True))
        await settle()
        assert client.answers[head.stream_id].status == 0
        assert world.service.cancelled == []


async def test_A1_fin_cancels_everything_below_the_connection() -> None:
    async with open_world() as world:
        client, other = await world.connect(), await world.connect()
        for path in ("hold", "hold"):
            await client.start(path)
        await client.send(client.headers("bidi"))
        await client.stream.send_eof()
        await settle()
        assert world.service.cancelled == [("connection_lost", "explicit")] * 3
        assert world.server.statistics().connections == 1
        await other.assert_serves()


async def test_A1_goaway_of_a_dying_peer_cancels_everything_below_the_connection() -> None:
    async with open_world() as world:
        client = await world.connect()
        await client.start("hold")
        await client.send(GoAwayFrame(0, error_code=2))
        await settle()
        assert world.service.cancelled == [("connection_lost", "explicit")]


async def test_A1_goaway_without_an_error_lets_running_calls_finish() -> None:
    async with open_world() as world:
        client = await world.connect()
        stream_id = await client.start("hold")
        await client.send(GoAwayFrame(0))
        await settle()
        world.service.release.set()
        await settle()
        assert client.answers[stream_id].status == 0


async def test_A1_goodbye_in_the_same_bytes_as_the_last_cancel(caplog: pytest.LogCaptureFixture) -> None:
    """The engine is finished when it hands out the events of such a read; what they set off must not need it."""
    async with open_world() as world:
        client = await world.connect()
        running = await client.start("hold")
        half = client.headers("bidi")
        await client.send(
            half,
            client.data(half.stream_id, message(b"unread")[:8]),
            *[RstStreamFrame(each, error_code=CANCEL) for each in (running, half.stream_id)],
            GoAwayFrame(0),
        )
        await settle()
        assert world.service.cancelled[0] == ("client_reset", "explicit")
        assert world.server.statistics().connections == 0
    assert caplog.records == []


async def test_A8_grpc_timeout_is_the_scopes_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world() as world:
        client = await world.connect()
        began = trio.current_time()
        stream_id = await client.start("hold", extra=[("grpc-timeout", "1500m")])
        await trio.sleep(1.4)
        assert stream_id not in client.answers
        await trio.sleep(0.2)
        assert trio.current_time() - began == pytest.approx(1.6)
        answer = client.answers[stream_id]
        assert (answer.status, answer.text) == (Status.DEADLINE_EXCEEDED.value, "Deadline Exceeded")
        assert [source for _, source in world.service.cancelled] == ["deadline"]
        await client.assert_serves()


async def test_A8_handler_sees_the_time_that_is_left(mock_clock: trio.testing.MockClock) -> None:
    seen: list[float] = []

    async def look(stream: BytesStream) -> None:
        assert stream.deadline is not None
        seen.append(stream.deadline.time_remaining())
        await stream.recv_message()
        await stream.send_message(b"")

    service = Service()
    service.add("look", look)
    async with open_world(service) as world:
        client = await world.connect()
        await client.start("look", extra=[("grpc-timeout", "2S")])
        assert seen == [2.0]


async def test_deadline_wins_over_a_reset_in_the_same_instant(mock_clock: trio.testing.MockClock) -> None:
    reasons: list[Reason | None] = []

    async def record(stream: BytesStream) -> None:
        await stream.recv_message()
        try:
            await trio.sleep_forever()
        finally:
            reasons.append(stream.cancel_reason)
            assert stream.cancel_scope.cancel_called

    service = Service()
    service.add("record", record)
    async with open_world(service) as world:
        client = await world.connect()
        stream_id = await client.start("record", extra=[("grpc-timeout", "1S")])
        # The reader has the reset in its hands at the very moment at which the deadline passes.
        (connection,) = world.server._connections
        (stream,) = connection.running
        mock_clock.jump(1.0)
        assert not stream.request_cancel(Reason.CLIENT_RESET), "too late: the deadline has passed"
        await client.reset(stream_id)
        assert stream.cancel_reason is Reason.DEADLINE
        assert reasons == [None], "the reset did not claim it"


@pytest.mark.parametrize(
    ("before", "reason"),
    [(0.005, Reason.DEADLINE), (0.5, Reason.CLIENT_RESET)],
    ids=["its clock rang first", "long before"],
)
async def test_a_reset_just_before_the_deadline_is_the_deadline(
    before: float, reason: Reason, mock_clock: trio.testing.MockClock
) -> None:
    async with open_world() as world:
        client = await world.connect()
        stream_id = await client.start("hold", extra=[("grpc-timeout", "1S")])
        (connection,) = world.server._connections
        (stream,) = connection.running
        mock_clock.jump(1 - before)
        await client.reset(stream_id)
        assert stream.cancel_reason is reason
        assert not connection.running


async def test_A8_deadline_of_a_call_whose_message_never_comes(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world() as world:
        client = await world.connect()
        head = client.headers("echo", extra=[("grpc-timeout", "3S")])
        await client.send(head)
        await settle()
        assert world.server.statistics().incomplete == 1
        await trio.sleep(4)
        answer = client.answers[head.stream_id]
        assert answer.status == Status.DEADLINE_EXCEEDED.value
        assert answer.reset == NO_ERROR, "the client is told to stop uploading, after its status"
        assert answer.frames == ["HEADERS", "RST_STREAM"]


@pytest.mark.parametrize("swallow", ["return", "answer", "raise"])
async def test_law_8_no_ok_after_cancel_whatever_the_handler_does(swallow: str) -> None:
    async def stubborn(stream: BytesStream) -> None:
        await stream.recv_message()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:  # noqa: ASYNC103  # this handler does what must not be done
            if swallow == "raise":
                raise RuntimeError("hides the cancel") from None  # noqa: ASYNC104
            if swallow == "answer":
                with trio.CancelScope(shield=True):
                    await stream.send_message(b"partial")
                    await stream.send_trailing_metadata(status=Status.OK)

    service = Service()
    service.add("stubborn", stubborn)
    async with open_world(service) as world:
        client = await world.connect()
        stream_id = await client.start("stubborn")
        world.server.cancel_all(Reason.ADMIN)
        await settle()
        answer = client.answers[stream_id]
        assert answer.status == Status.CANCELLED.value
        assert answer.text, "a CANCELLED without a message reads as success in Triton's clients"
        await client.assert_serves()


async def test_law_8_a_swallowed_cancel_from_outside_is_no_ok_either() -> None:
    async def stubborn(stream: BytesStream) -> None:
        await stream.recv_message()
        with contextlib.suppress(trio.Cancelled):
            await trio.sleep_forever()
        with trio.CancelScope(shield=True):
            await stream.send_message(b"partial")

    service = Service()
    service.add("stubborn", stubborn)
    client: RawClient
    async with open_world(service) as world:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                inner = World(world.server, service, nursery)
                ours, theirs = trio.testing.memory_stream_pair()
                client = RawClient(ours)
                world.nursery.start_soon(client.listen)
                nursery.start_soon(inner.server.serve_connection, theirs)
                await client.handshake()
                stream_id = await client.start("stubborn")
                scope.cancel()
        await settle()
        answer = client.answers[stream_id]
        assert answer.status == Status.UNAVAILABLE.value
        assert answer.text == "The server is shutting down"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.ADMIN, Status.CANCELLED),
        (Reason.SEQUENCE_CANCELLED, Status.CANCELLED),
        (Reason.MODEL_UNLOADING, Status.UNAVAILABLE),
        (Reason.SERVER_DRAIN, Status.UNAVAILABLE),
    ],
)
async def test_D3_status_of_every_cancel_that_has_a_reader(reason: Reason, status: Status) -> None:
    async with open_world() as world:
        client = await world.connect()
        stream_id = await client.start("hold")
        world.server.cancel_all(reason)
        await settle()
        assert client.answers[stream_id].status == status.value
        assert client.answers[stream_id].text
        assert world.service.cancelled == [(reason.value, "explicit")]
        await client.assert_serves()


async def test_the_handlers_own_use_of_the_scope_keeps_its_reason() -> None:
    async def self_cancelling(stream: BytesStream) -> None:
        await stream.recv_message()
        stream.cancel_scope.cancel(reason=Reason.SEQUENCE_CANCELLED.value)
        await trio.sleep_forever()

    service = Service()
    service.add("self", self_cancelling)
    async with open_world(service) as world:
        client = await world.connect()
        stream_id = await client.start("self")
        assert "sequence" in client.answers[stream_id].text


async def test_D2_a_cancelled_handler_cannot_write_to_its_dead_stream() -> None:
    wrote: list[str] = []

    async def write_late(stream: BytesStream) -> None:
        await stream.recv_message()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await stream.send_message(b"too late")
                await stream.send_trailing_metadata(status=Status.ABORTED)
            wrote.append("no exception")

    service = Service()
    service.add("late", write_late)
    async with open_world(service) as world:
        client = await world.connect()
        stream_id = await client.start("late")
        await client.reset(stream_id)
        assert wrote == ["no exception"]
        assert stream_id not in client.answers
        await client.assert_serves()


async def test_send_raises_if_cancelled_even_without_waiting() -> None:
    sent: list[int] = []

    async def endless(stream: BytesStream) -> None:
        await stream.recv_message()
        for number in range(100_000):
            await stream.send_message(b"x")
            sent.append(number)
            if number == 50:
                stream.request_cancel(Reason.ADMIN)

    service = Service()
    service.add("endless", endless, Cardinality.UNARY_STREAM)
    async with open_world(service) as world:
        client = await world.connect()
        stream_id = await client.start("endless")
        assert sent[-1] == 50
        answer = client.answers[stream_id]
        assert (len(answer.messages), answer.status) == (51, Status.CANCELLED.value)


async def test_a_sender_that_never_waits_still_sees_a_reset() -> None:
    """A loop of small sends yields often enough for the reader to deliver the cancel."""
    count = 0
    begun = trio.Event()

    async def endless(stream: BytesStream) -> None:
        nonlocal count
        await stream.recv_message()
        while True:
            await stream.send_message(b"x")
            count += 1
            begun.set()

    service = Service()
    service.add("endless", endless, Cardinality.UNARY_STREAM)
    async with open_world(service) as world:
        client = await world.connect(settings={4: 1 << 30})
        await client.send(b"\0\0\x04\x08\0\0\0\0\0" + (1 << 30).to_bytes(4, "big"))
        frames = client.call("endless")
        await client.send(*frames)
        await begun.wait()
        await client.reset(frames[0].stream_id)
        assert world.server.statistics().running == 0
        assert count < 2_000
        await client.assert_serves()


async def test_D6_cancel_during_send_back_pressure() -> None:
    async def flood(stream: BytesStream) -> None:
        await stream.recv_message()
        try:
            while True:
                await stream.send_message(bytes(10_000))
        except trio.Cancelled as exc:
            service.cancelled.append((exc.reason, exc.source))
            raise

    service = Service()
    service.add("flood", flood, Cardinality.UNARY_STREAM)
    async with open_world(service, outbound_limit=100_000) as world:
        client = await world.connect()
        stream_id = await client.start("flood")
        queued = world.only_connection().http2.queued_bytes
        assert 100_000 < queued < 120_000, "the outbound queue is bounded"
        await client.reset(stream_id)
        assert service.cancelled == [("client_reset", "explicit")]
        assert world.only_connection().http2.queued_bytes == 0
        # The connection window is spent by what the client has received and not returned; give it back.
        await client.send(b"\0\0\x04\x08\0\0\0\0\0" + (65_535).to_bytes(4, "big"))
        await client.assert_serves()


async def test_D6_slow_consumer_is_cancelled_at_the_stall_limit(autojump_clock: trio.testing.MockClock) -> None:
    async def flood(stream: BytesStream) -> None:
        await stream.recv_message()
        try:
            while True:
                await stream.send_message(bytes(10_000))
        except trio.Cancelled as exc:
            service.cancelled.append((exc.reason, exc.source))
            raise

    service = Service()
    service.add("flood", flood, Cardinality.UNARY_STREAM)
    # Stream windows are small and the connection's is not, so the neighbour can always be answered.
    async with open_world(service, outbound_limit=20_000, stall_limit=30.0, keepalive_time=1000.0) as world:
        client = await world.connect(settings={4: 1_000})
        stream_id = await client.start("flood")
        await trio.sleep(20)
        assert service.cancelled == []
        # It takes a little: that is progress, and the limit starts anew.
        await client.send(b"\0\0\x04\x08\0" + stream_id.to_bytes(4, "big") + (100).to_bytes(4, "big"))
        await trio.sleep(30)
        assert service.cancelled == []
        await trio.sleep(45)
        assert service.cancelled == [("slow_consumer", "explicit")]
        assert client.answers[stream_id].reset == CANCEL
        await client.assert_serves()


async def test_D6_an_answer_nobody_takes_is_dropped_after_its_handler_has_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(stall_limit=30.0, keepalive_time=1000.0) as world:
        client = await world.connect(settings={4: 10})
        stream_id = await client.start("echo", bytes(5_000))
        assert world.server.statistics().running == 0
        assert world.only_connection().http2.queued_bytes > 4_000
        await trio.sleep(61)  # what it took of the answer at first was progress, so the limit began anew once
        assert client.answers[stream_id].reset == CANCEL
        assert world.only_connection().http2.queued_bytes == 0


async def test_law_11_slot_is_held_until_clean_up_has_ended_then_queue_then_refuse() -> None:
    clean = trio.Event()

    async def slow_clean_up(stream: BytesStream) -> None:
        await stream.recv_message()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await clean.wait()

    service = Service()
    service.add("slow", slow_clean_up)
    async with open_world(service, max_concurrent_streams=2, max_queued_streams=1, advertised_streams=10) as world:
        client = await world.connect()
        for stream_id in [await client.start("slow"), await client.start("slow")]:
            await client.reset(stream_id)
        assert world.server.statistics().running == 2, "reset, but still cleaning up"
        queued = await client.start("echo", b"queued")
        assert world.server.statistics().queued == 1
        refused = await client.start("echo", b"refused")
        assert client.answers[refused].reset == REFUSED_STREAM
        assert world.server.statistics().refused == 1
        assert queued not in client.answers
        clean.set()
        await settle()
        assert client.answers[queued].messages == [b"queued"]
        await client.assert_serves()


async def test_law_1_a_request_waiting_for_a_slot_is_in_its_scope(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(max_concurrent_streams=1, max_queued_streams=5) as world:
        client = await world.connect()
        await client.start("hold")
        reset = await client.start("echo")
        late = await client.start("echo", extra=[("grpc-timeout", "1S")])
        stays = await client.start("echo", b"stays")
        assert world.server.statistics().queued == 3
        await client.reset(reset)
        assert world.server.statistics().queued == 2
        await trio.sleep(1.1)
        assert client.answers[late].status == Status.DEADLINE_EXCEEDED.value
        assert world.server.statistics().queued == 1
        world.service.release.set()
        await settle()
        assert client.answers[stays].messages == [b"stays"]
        assert reset not in client.answers


async def test_D3_the_reset_that_stops_an_upload_never_overtakes_the_trailers() -> None:
    async def answer_early(stream: BytesStream) -> None:
        await stream.recv_message()
        await stream.send_message(bytes(995))

    service = Service()
    service.add("early", answer_early, Cardinality.STREAM_STREAM)
    async with open_world(service) as world:
        client = await world.connect(settings={4: 10})
        head = client.headers("early")
        await client.send(head, client.data(head.stream_id, message(b"and more would follow")))
        await settle()
        answer = client.answers[head.stream_id]
        assert answer.frames == ["HEADERS", "DATA"], "the rest waits for the window"
        await client.send(b"\0\0\x04\x08\0" + head.stream_id.to_bytes(4, "big") + (1_000).to_bytes(4, "big"))
        await settle()
        assert answer.frames == ["HEADERS", "DATA", "DATA", "HEADERS", "RST_STREAM"]
        assert (answer.status, answer.reset) == (0, NO_ERROR)


async def test_C2_an_error_beside_a_cancel_from_outside_is_logged_and_stays_in_its_rpc(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def clumsy(stream: BytesStream) -> None:
        await stream.recv_message()

        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise RuntimeError("clean-up failed")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(trio.sleep_forever)

    service = Service()
    service.add("clumsy", clumsy)
    async with open_world(service) as world:
        ours, theirs = trio.testing.memory_stream_pair()
        client = RawClient(ours)
        world.nursery.start_soon(client.listen)
        scope = trio.CancelScope()
        over = trio.Event()

        async def serve() -> None:
            with scope:
                await world.server.serve_connection(theirs)
            over.set()

        world.nursery.start_soon(serve)
        await client.handshake()
        clumsy_id, held = await client.start("clumsy"), await client.start("hold")
        scope.cancel()
        await over.wait()
        await settle()
        assert [client.answers[each].status for each in (clumsy_id, held)] == [Status.UNAVAILABLE.value] * 2
    assert "clean-up failed" in caplog.text


async def test_a_handlers_nursery_error_is_answered_like_the_error_itself() -> None:
    async def nested(stream: BytesStream) -> None:
        await stream.recv_message()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise GRPCError(Status.NOT_FOUND, "no such thing")

    service = Service()
    service.add("nested", nested)
    async with open_world(service) as world:
        client = await world.connect()
        stream_id = await client.start("nested")
        assert (client.answers[stream_id].status, client.answers[stream_id].text) == (5, "no such thing")
