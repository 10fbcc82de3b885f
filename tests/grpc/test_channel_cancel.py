"""Leaving a call, wherever it is, cancels the server's side of it; a deadline around it goes along."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import trio
import trio.testing
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline

from triton_trio.grpc.channel import Channel, open_channel
from triton_trio.grpc.server import GrpcOptions
from triton_trio.grpc.stream import TrioDeadline

from .channel_world import BIDI, ask, call, finished, open_raw, open_world, settle, start
from .wire import BytesCodec, BytesStream, Service

MockClock = trio.testing.MockClock


# -- leaving -----------------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("how", ["cancelled", "error", "early", "cancel()"])
async def test_leaving_a_call_resets_it_once_and_returns_what_nobody_read(how: str) -> None:
    async with open_raw(connection_window_size=8 << 20) as (channel, server, nursery):
        scope = trio.CancelScope()
        leave = trio.Event()

        async def use() -> None:
            with scope:
                async with call(channel, "bidi", BIDI) as rpc:
                    await rpc.send_message(b"question")
                    async for reply in rpc:
                        assert reply == b"first"
                        break
                    await leave.wait()
                    if how == "error":
                        raise Boom
                    if how == "cancel()":
                        await rpc.cancel()

        async def use_and_catch() -> None:
            try:
                await use()
            except Boom:
                assert how == "error"

        nursery.start_soon(use_and_catch)
        await settle()
        await server.send(server.head(1), server.data(1, b"first"), *[server.data(1, bytes(500_000))] * 12)
        (statistics,) = channel.statistics().connections
        assert statistics.unacknowledged_bytes == 12 * 500_005
        if how == "cancelled":
            scope.cancel()
        leave.set()
        await settle()
        assert server.resets == [(1, 8)]
        assert server.heard == ["Headers 1", "Data 1", "RstStream 1"]
        (statistics,) = channel.statistics().connections
        assert statistics.unacknowledged_bytes == statistics.open_streams == 0
        assert statistics.local_window == channel.options.connection_window_size
        assert finished(channel) == {"CANCELLED": 1}


async def test_a_call_that_has_ended_is_not_reset() -> None:
    async with open_world() as world:
        for _ in range(3):
            assert await ask(world.channel) == b"hi"
        with pytest.raises(GRPCError):
            await ask(world.channel, "nope")
        assert world.channel.statistics().connections[0].resets_sent == 0
        assert world.server.statistics().resets_received == 0


async def test_the_handler_is_cancelled_when_its_caller_leaves() -> None:
    async with open_world() as world:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, world.channel, "hold")
                await settle()
                assert world.server.statistics().running == 1
                scope.cancel()
        await settle()
        assert world.service.cancelled == [("client_reset", "explicit")]
        assert world.server.statistics().running == 0


async def test_whoever_still_uses_a_call_that_was_left_is_told() -> None:
    async with open_world() as world:
        async with trio.open_nursery() as nursery:
            told: list[str] = []

            async def receive() -> None:
                with pytest.raises(GRPCError) as failed:
                    await rpc.recv_message()
                told.append(f"{failed.value.status.name}: {failed.value.message}")

            async with call(world.channel, "bidi", BIDI) as rpc:
                await rpc.send_request()
                nursery.start_soon(receive)
                await settle()
        assert told == ["CANCELLED: The caller left the call before its end"]


async def test_cancel_storm_costs_one_reset_each_and_nothing_of_the_window() -> None:
    async with open_world(server_options=GrpcOptions(max_concurrent_streams=2_000)) as world:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(1_000):
                    nursery.start_soon(ask, world.channel, "hold", bytes(5_000))
                await settle()
                assert world.service.entered == 1_000
                scope.cancel()
        await settle()
        assert world.channel.statistics().connections[0].resets_sent == 1_000
        assert world.server.statistics().running == 0
        assert world.service.cancelled == [("client_reset", "explicit")] * 1_000
        assert await ask(world.channel) == b"hi", "on the same connection"
        assert world.channel.statistics().dials == 1


async def test_a_call_in_an_async_generator_owns_no_scope() -> None:
    """Law 13: a consumer's scopes and a producer's call may end in any order."""

    async def replies(channel: Channel) -> AsyncIterator[bytes]:
        async with call(channel, "bidi", BIDI, timeout=60) as rpc:
            for number in range(3):
                await rpc.send_message(b"%d" % number)
                reply = await rpc.recv_message()
                assert reply is not None
                yield reply  # noqa: ASYNC119  # the very thing that must be harmless

    async with open_world() as world:
        async with aclosing(replies(world.channel)) as stream:
            with trio.CancelScope() as inner:
                assert await stream.__anext__() == b"0"
            inner.cancel()
            with trio.move_on_after(5):
                assert await stream.__anext__() == b"1"
        await settle()
        assert world.service.cancelled == [("client_reset", "explicit")]


async def test_clean_up_in_the_block_may_still_call() -> None:
    async with open_world() as world:
        said: list[bytes | None] = []
        with trio.CancelScope() as scope:
            async with open_channel("test", 1, codec=BytesCodec(), connect=world.line.dial) as channel:
                await ask(channel)
                try:
                    scope.cancel()
                    await ask(channel, "hold")
                finally:
                    with trio.move_on_after(5, shield=True):
                        said.append(await ask(channel, payload=b"goodbye"))
        assert said == [b"goodbye"]


# -- each place where a call waits -------------------------------------------------------------------------------------


async def test_cancel_while_waiting_for_the_dial() -> None:
    gate = trio.Event()

    async with open_world() as world:

        async def dial() -> trio.abc.Stream:
            await gate.wait()
            return await world.line.dial()

        async with open_channel("test", 1, codec=BytesCodec(), connect=dial) as channel:
            async with trio.open_nursery() as nursery:
                first, second = start(nursery, channel), start(nursery, channel)
                await settle()
                assert channel.statistics().waiting == 2
                first.scope.cancel()
                await settle()
                assert (first.done, channel.statistics().waiting) == (True, 1)
                gate.set()
            assert second.reply == b"hi", "the dial was for both"
            assert finished(channel) == {"OK": 1, "CANCELLED": 1}


async def test_cancel_while_waiting_for_a_slot_sends_nothing() -> None:
    async with open_raw({3: 1}) as (channel, server, nursery):
        first = start(nursery, channel)
        await settle()
        waiting = start(nursery, channel)
        await settle()
        behind = start(nursery, channel)
        await settle()
        waiting.scope.cancel()
        await settle()
        assert waiting.done
        assert channel.statistics().waiting == 1
        await server.send(*server.whole(1))
        await server.send(*server.whole(3))
        assert first.reply == behind.reply == b"answer"
        assert server.heard == ["Headers 1", "Data+END 1", "Headers 3", "Data+END 3"]


async def test_a_cancelled_call_hands_its_slot_on() -> None:
    async with open_world(server_options=GrpcOptions(advertised_streams=1)) as world:
        async with trio.open_nursery() as nursery:
            first = start(nursery, world.channel, "hold")
            await settle()
            second = start(nursery, world.channel)
            await settle()
            assert world.channel.statistics().waiting == 1
            first.scope.cancel()
            await settle()
            assert second.reply == b"hi"
        assert len(world.channel.statistics().connections) == 1, "never more than the server allowed"


async def test_cancel_while_sending_under_back_pressure() -> None:
    async with open_raw({4: 1 << 16}) as (channel, server, nursery):
        upload = start(nursery, channel, payload=bytes(4 << 20))
        await settle()
        assert channel.statistics().connections[0].queued_bytes > 3 << 20
        upload.scope.cancel()
        await settle()
        assert upload.done
        assert server.resets == [(1, 8)]
        assert channel.statistics().connections[0].queued_bytes == 0
        assert len(server.received[1]) <= 1 << 16


async def test_cancel_before_the_headers_have_left() -> None:
    async with open_raw() as (channel, server, nursery):
        first = start(nursery, channel)
        await settle()
        await server.send(*server.whole(1))
        assert first.reply == b"answer"
        async with call(channel) as rpc:
            await rpc.send_message(b"never mind", end=True)  # queued, and the writer has not run
        await settle()
        assert server.heard == ["Headers 1", "Data+END 1"], "the server never hears of it"
        second = start(nursery, channel)
        await settle()
        number = max(server.headers)
        await server.send(*server.whole(number))
        assert second.reply == b"answer"


@pytest.mark.parametrize("first", ["reply", "cancel"])
async def test_B1_reply_and_cancel_in_the_same_tick(first: str) -> None:
    async with open_raw() as (channel, server, nursery):
        for number in range(1, 60, 2):
            result = start(nursery, channel)
            await settle()
            if first == "cancel":
                result.scope.cancel()
            await server.stream.send_all(b"".join(frame.serialize() for frame in server.whole(number)))
            if first == "reply":
                result.scope.cancel()
            await settle()
            assert result.done
            assert result.error is None
            assert (result.reply == b"answer") != result.scope.cancelled_caught, "one of both"
        counts = finished(channel)
        assert sum(counts.values()) == 30
        assert counts.get("CANCELLED", 0) >= len(server.resets)
        assert channel.statistics().connections[0].open_streams == 0


async def test_a_cancel_after_the_end_takes_nothing_away() -> None:
    async with open_world() as world:
        with trio.CancelScope() as scope:
            async with call(world.channel) as rpc:
                await rpc.send_message(b"done", end=True)
                await settle()
                assert await rpc.recv_message() == b"done"
                scope.cancel()
        assert not scope.cancelled_caught
        assert finished(world.channel) == {"OK": 1}


async def test_cancel_between_reply_and_status() -> None:
    async with open_raw() as (channel, server, nursery):
        result = start(nursery, channel)
        await settle()
        await server.send(server.head(1), server.data(1, b"reply, but no status"))
        assert not result.done
        result.scope.cancel()
        await settle()
        assert result.reply is None, "no status, no result"
        assert server.resets == [(1, 8)]


# -- deadlines ---------------------------------------------------------------------------------------------------------


class Timekeeper(Service):
    """Answers with what is left of the deadline, in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.add("left", self.left)

    async def left(self, stream: BytesStream) -> None:
        await stream.recv_message()
        left = b"none" if stream.deadline is None else b"%d" % round(stream.deadline.time_remaining() * 1000)
        await stream.send_message(left)


async def test_A8_the_earliest_deadline_travels(autojump_clock: MockClock) -> None:
    async with open_world(Timekeeper()) as world:
        channel = world.channel
        assert await ask(channel, "left") == b"none"
        assert await ask(channel, "left", timeout=5) == b"5000"
        with trio.move_on_after(3):
            assert await ask(channel, "left") == b"3000"
            assert await ask(channel, "left", timeout=5) == b"3000"
            assert await ask(channel, "left", timeout=2) == b"2000"
            ours = TrioDeadline(_timestamp=trio.current_time() + 1)
            assert await ask(channel, "left", timeout=2, deadline=ours) == b"1000"
            with trio.CancelScope(shield=True):
                assert await ask(channel, "left") == b"none", "a shielded call is not bounded by what is outside"
        left = await ask(channel, "left", deadline=Deadline.from_timeout(100))  # the system's clock
        assert left is not None
        assert 99_000 <= int(left) <= 100_000


async def test_what_is_left_travels_not_what_there_was(autojump_clock: MockClock) -> None:
    async with open_world(Timekeeper()) as world:
        async with call(world.channel, "left", timeout=5) as rpc:
            await trio.sleep(3)
            await rpc.send_message(b"", end=True)
            assert await rpc.recv_message() == b"2000"


async def test_timeout_is_DEADLINE_EXCEEDED(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        with pytest.raises(GRPCError) as failed:
            await ask(world.channel, "hold", timeout=5)
        assert failed.value.status is Status.DEADLINE_EXCEEDED
        assert failed.value.message == "Deadline exceeded while waiting for the reply"
        assert trio.current_time() == 5
        await settle()
        assert world.service.cancelled == [(None, "deadline")], "by its own clock, and not by our reset"
        assert finished(world.channel) == {"DEADLINE_EXCEEDED": 1}


async def test_a_scope_that_expires_is_ordinary_cancellation(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        with trio.move_on_after(5) as scope:
            await ask(world.channel, "hold", timeout=6)
        assert scope.cancelled_caught
        assert trio.current_time() == 5
        await settle()
        assert world.service.cancelled == [(None, "deadline")]
        assert finished(world.channel) == {"CANCELLED": 1}


async def test_both_at_once_is_cancellation(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        with trio.move_on_after(5) as scope:
            await ask(world.channel, "hold", timeout=5)
        assert scope.cancelled_caught


async def test_a_deadline_that_has_passed_sends_nothing(autojump_clock: MockClock) -> None:
    async with open_raw() as (channel, server, _):
        with pytest.raises(GRPCError, match="Deadline exceeded while waiting for a stream to test:1"):
            await ask(channel, timeout=0)
        assert server.headers == {}


async def test_deadline_while_waiting_for_a_slot(autojump_clock: MockClock) -> None:
    async with open_raw({3: 1}) as (channel, server, nursery):
        first = start(nursery, channel)
        await settle()
        with pytest.raises(GRPCError, match="Deadline exceeded while waiting for a stream to test:1") as failed:
            await ask(channel, timeout=2)
        assert failed.value.status is Status.DEADLINE_EXCEEDED
        assert trio.current_time() == 2
        assert list(server.headers) == [1]
        first.scope.cancel()


async def test_deadline_while_sending(autojump_clock: MockClock) -> None:
    async with open_raw({4: 1 << 16}) as (channel, server, _):
        with pytest.raises(GRPCError, match="Deadline exceeded while sending"):
            await ask(channel, payload=bytes(4 << 20), timeout=2)
        await settle()
        assert server.resets == [(1, 8)]


async def test_deadline_between_messages_of_a_stream(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        async with call(world.channel, "bidi", BIDI, timeout=5) as rpc:
            await rpc.send_message(b"a")
            assert await rpc.recv_message() == b"a"
            await trio.sleep(2)
            with pytest.raises(GRPCError) as failed:
                await rpc.recv_message()
            assert failed.value.status is Status.DEADLINE_EXCEEDED
            assert trio.current_time() == 5
            with pytest.raises(GRPCError):
                await rpc.send_message(b"b")
        assert finished(world.channel) == {"DEADLINE_EXCEEDED": 1}


# -- across processes --------------------------------------------------------------------------------------------------


class Proxy(Timekeeper):
    """Each call becomes a call to the next server.  Nothing here speaks of cancellation or deadlines."""

    def __init__(self, behind: Channel) -> None:
        super().__init__()
        for name in ("echo", "hold", "left", "nope"):
            self.add(name, self.forward)
        self.add("bidi", self.relay, Cardinality.STREAM_STREAM)
        self.behind = behind

    async def forward(self, stream: BytesStream) -> None:
        request = await stream.recv_message()
        assert request is not None
        reply = await ask(self.behind, stream.method.path.rpartition("/")[2], request)
        assert reply is not None
        await stream.send_message(reply)

    async def relay(self, stream: BytesStream) -> None:
        async with call(self.behind, "bidi", BIDI) as rpc, trio.open_nursery() as nursery:
            await rpc.send_request()

            async def upwards() -> None:
                async for request in stream:
                    await rpc.send_message(request)
                await rpc.end()

            nursery.start_soon(upwards)
            async for reply in rpc:
                await stream.send_message(reply)


async def test_cancellation_is_structured_across_processes() -> None:
    backend = Timekeeper()
    async with open_world(backend) as behind, open_world(Proxy(behind.channel)) as front:
        channel = front.channel
        assert await ask(channel, payload=b"through") == b"through"
        async with trio.open_nursery() as nursery:
            unary = start(nursery, channel, "hold")
            await settle()
            assert behind.server.statistics().running == 1
            unary.scope.cancel()
            await settle()
            assert unary.scope.cancelled_caught
        assert backend.cancelled == [("client_reset", "explicit")]
        assert front.server.statistics().running == behind.server.statistics().running == 0
        async with call(channel, "bidi", BIDI) as rpc:
            await rpc.send_message(b"a")
            assert await rpc.recv_message() == b"a"
            assert behind.server.statistics().running == 1
        await settle()
        assert backend.cancelled == [("client_reset", "explicit")] * 2
        assert behind.server.statistics().running == 0


async def test_A8_the_deadline_crosses_two_servers(autojump_clock: MockClock) -> None:
    backend = Timekeeper()
    async with open_world(backend) as behind, open_world(Proxy(behind.channel)) as front:
        assert await ask(front.channel, "left", timeout=4) == b"4000"
        with trio.move_on_after(3) as scope:
            await ask(front.channel, "hold")
        assert scope.cancelled_caught
        assert trio.current_time() == 3
        await settle()
        assert backend.cancelled == [(None, "deadline")]


async def test_errors_and_losses_cross_a_proxy_as_themselves() -> None:
    async with open_world() as behind, open_world(Proxy(behind.channel)) as front:
        with pytest.raises(GRPCError) as failed:
            await ask(front.channel, "nope")
        assert failed.value.status is Status.UNIMPLEMENTED
        async with trio.open_nursery() as nursery:
            held = start(nursery, front.channel, "hold")
            await settle()
            await behind.line.client_ends[0].send_stream.aclose()
            await settle()
            assert held.status is Status.UNAVAILABLE
            assert held.text.startswith("Connection to test:1 lost")
