"""ModelStreamInfer without a transport: order, bounds, errors, and cancels of one request and of all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.parity.world import Gate, MemoryStream, Script, infer_message, open_world, repeat
from triton_trio import InferenceServer, Reason
from triton_trio._pb import inference as pb
from triton_trio.batch import Batch
from triton_trio.errors import Unavailable
from triton_trio.grpc.service_infer import Inference
from triton_trio.grpc.service_stream import serve_stream
from triton_trio.lifecycle import Outcome

EMPTY_FINAL = {"triton_enable_empty_final_response": pb.InferParameter(bool_param=True)}


class Rpc:
    """A stream that is being served: the client's side, and the RPC's scope and end."""

    def __init__(self, server: InferenceServer, stream: MemoryStream) -> None:
        self.server = server
        self.stream = stream
        self.scope = trio.CancelScope()
        self.error: GRPCError | None = None
        self.ended = trio.Event()

    async def run(self, **options: object) -> None:
        with self.scope:
            try:
                await serve_stream(Inference(self.server), self.stream, **options)  # type: ignore[arg-type]
            except GRPCError as exc:
                self.error = exc
        self.ended.set()

    async def settle(self) -> list[tuple[str, str]]:
        """Let everything happen that can; the replies so far as ``(id, value)``, an error's value being its text."""
        await trio.testing.wait_all_tasks_blocked()
        return [_reading(reply) for reply in self.stream.replies]


def _reading(reply: pb.ModelStreamInferResponse) -> tuple[str, str]:
    response = reply.infer_response
    assert response is not None
    assert "triton_final_response" in response.parameters
    if reply.error_message:
        return response.id, reply.error_message
    if not response.outputs:
        return response.id, "end"
    return response.id, str(np.frombuffer(response.raw_output_contents[0], np.int32)[0])


@asynccontextmanager
async def rpc(
    path: Path,
    scripts: dict[str, Script] | None = None,
    metadata: dict[str, str | bytes] | None = None,
    **options: object,
) -> AsyncIterator[Rpc]:
    async with open_world(path / "models", scripts) as server, trio.open_nursery() as nursery:
        call = Rpc(server, MemoryStream(metadata))
        nursery.start_soon(lambda: call.run(**options))
        yield call
        if not call.ended.is_set():
            call.stream.half_close()
            with trio.fail_after(1):
                await call.ended.wait()


async def test_responses_of_non_decoupled_models_come_in_the_order_of_their_requests(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def slow_first(batch: Batch) -> None:
        for member in batch.live():
            await trio.sleep(5)
            batch.respond(member, {"OUT": member.inputs["IN"]})

    async with rpc(tmp_path, {"once": slow_first}) as call:
        values = np.ones((1, 4), np.float32)
        call.stream.send(
            infer_message("once", 1, id="a"),
            infer_message("simple", {"INPUT0": values}, id="b"),
            infer_message("unknown", 1, id="c"),
            infer_message("once", 2, id="d"),
        )
        await trio.sleep(4)
        assert call.stream.replies == []
        await trio.sleep(4)
        assert [reply.infer_response.id for reply in call.stream.replies if reply.infer_response] == ["a", "b", "c"]
        await trio.sleep(4)
        assert (await call.settle())[-1] == ("d", "2")


async def test_a_decoupled_request_overtakes(tmp_path: Path) -> None:
    gate = Gate()
    async with rpc(tmp_path, {"once": gate}) as call:
        call.stream.send(infer_message("once", 7, id="a"), infer_message("repeat", 2, id="b"))
        assert await call.settle() == [("b", "0"), ("b", "1")]
        gate.open()
        assert await call.settle() == [("b", "0"), ("b", "1"), ("a", "7")]


async def test_requests_send_one_at_a_time(tmp_path: Path) -> None:
    async with rpc(tmp_path) as call:
        call.stream.writable = trio.Event()
        call.stream.send(*(infer_message(name, 3) for name in ("repeat", "once", "repeat", "once")))
        assert len(await call.settle()) == 1
        call.stream.writable.set()
        assert sorted(value for _, value in await call.settle()) == ["0", "0", "1", "1", "2", "2", "3", "3"]


async def test_requests_reach_their_queue_in_the_order_of_the_stream(tmp_path: Path) -> None:
    """Trio runs tasks of one tick in any order; 40 of them would show it."""
    seen: list[int] = []

    async def record(batch: Batch) -> None:
        await batch.checkpoint()
        for member in batch.live():
            seen.append(int(member.inputs["IN"][0]))
            batch.finish(member)

    async with rpc(tmp_path, {"repeat": record}) as call:
        call.stream.send(*(infer_message("repeat", index) for index in range(40)))
        await call.settle()
        assert seen == list(range(40))


@pytest.mark.parametrize("wanted", [True, False])
async def test_an_end_without_outputs_is_sent_only_to_those_who_want_it(tmp_path: Path, wanted: bool) -> None:
    async with rpc(tmp_path) as call:
        call.stream.send(infer_message("repeat", 1, id="a", **(EMPTY_FINAL if wanted else {})))
        assert await call.settle() == [("a", "0"), ("a", "end")][: 1 + wanted]
        finals = [
            reply.infer_response.parameters["triton_final_response"].bool_param
            for reply in call.stream.replies
            if reply.infer_response
        ]
        assert finals == [False, True][: 1 + wanted]


async def test_a_final_response_with_outputs_is_always_sent(tmp_path: Path) -> None:
    async def final_with_outputs(batch: Batch) -> None:
        for member in batch.live():
            await batch.send(member, {"OUT": np.array([1], np.int32)})
            batch.respond(member, {"OUT": np.array([2], np.int32)}, final=True)

    async with rpc(tmp_path, {"repeat": final_with_outputs}) as call:
        call.stream.send(infer_message("repeat", 0, id="a"))
        assert await call.settle() == [("a", "1"), ("a", "2")]
        assert call.stream.replies[1].infer_response is not None
        assert call.stream.replies[1].infer_response.parameters["triton_final_response"].bool_param is True


async def test_nothing_is_read_beyond_the_limit_in_flight(tmp_path: Path) -> None:
    """Law 12: a stream may have any number of requests, and only so many are in the server at a time."""
    gate = Gate()
    async with rpc(tmp_path, {"once": gate}, max_in_flight=3) as call:
        call.stream.send(*(infer_message("once", index, id=str(index)) for index in range(10)))
        await call.settle()
        assert call.stream.taken == 3
        assert call.server.statistics().in_flight == 3
        gate.open()
        assert [value for _, value in await call.settle()] == [str(index) for index in range(10)]


async def test_a_reader_who_does_not_read_holds_the_model_back(tmp_path: Path) -> None:
    """D6: at most the buffer of one request, and one message, are made ahead of the client."""
    made = 0

    async def count(batch: Batch) -> None:
        nonlocal made
        for member in batch.members:
            for index in range(1000):
                await batch.send(member, {"OUT": np.array([index], np.int32)})
                made += 1
            batch.finish(member)

    async with rpc(tmp_path, {"repeat": count}) as call:
        call.stream.writable = trio.Event()
        call.stream.send(infer_message("repeat", 0, id="a"))
        await call.settle()
        assert made < 12
        call.stream.writable.set()
        assert len(await call.settle()) == 1000


async def test_d4_half_close_is_not_a_cancel(tmp_path: Path) -> None:
    gate = Gate()
    async with rpc(tmp_path, {"once": gate}) as call:
        call.stream.send(infer_message("once", 1, id="a"), infer_message("once", 2, id="b"))
        call.stream.half_close()
        assert await call.settle() == []
        assert not call.ended.is_set()
        gate.open()
        assert await call.settle() == [("a", "1"), ("b", "2")]
        assert call.ended.is_set()
        assert call.error is None


async def test_d5_an_error_of_one_request_leaves_the_stream(tmp_path: Path) -> None:
    async def fail_odd(batch: Batch) -> None:
        await batch.checkpoint()
        for member in batch.live():
            value = int(member.inputs["IN"][0])
            if value % 2:
                batch.fail(member, Unavailable(f"{value} is odd"))
            else:
                batch.respond(member, {"OUT": member.inputs["IN"]})

    async with rpc(tmp_path, {"once": fail_odd}) as call:
        call.stream.send(*(infer_message("once", index, id=str(index)) for index in range(4)))
        assert await call.settle() == [("0", "0"), ("1", "1 is odd"), ("2", "2"), ("3", "3 is odd")]
        call.stream.send(infer_message("once", 8, id="later"))
        assert (await call.settle())[-1] == ("later", "8")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("once", [("a", "too large"), ("b", "3")]),
        # A decoupled request ends with its error: what it would still have sent does not follow.
        ("repeat", [("a", "0"), ("b", "0"), ("b", "too large")]),
    ],
)
async def test_d5_a_response_that_is_too_large_is_its_requests_error(
    tmp_path: Path, model: str, expected: list[tuple[str, str]]
) -> None:
    class Limited(MemoryStream):
        async def send_message(self, message: pb.ModelStreamInferResponse) -> None:
            if message.infer_response and message.infer_response.raw_output_contents == [np.int32(1).tobytes()]:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, "too large")
            await super().send_message(message)

    async with open_world(tmp_path / "models") as server:
        call = Rpc(server, Limited())
        call.stream.send(infer_message(model, 1, id="a"), infer_message(model, 3, id="b"))
        call.stream.half_close()
        await call.run()
        assert call.error is None
        assert await call.settle() == expected


async def test_d5_an_admins_cancel_of_one_request_is_a_message_and_not_a_status(tmp_path: Path) -> None:
    gate = Gate()
    async with rpc(tmp_path, {"once": gate}) as call:
        call.stream.send(*(infer_message("once", index, id=str(index)) for index in range(10)))
        await call.settle()
        model = call.server.model("once")
        next(request for request in model._live if request.request_id == "4").cancel(Reason.ADMIN)
        gate.open()
        replies = dict(await call.settle())
        assert replies.pop("4") == "[request id: 4] request cancelled while queued: admin"
        assert replies == {str(index): str(index) for index in range(10) if index != 4}
        call.stream.send(infer_message("once", 8, id="later"))
        assert (await call.settle())[-1] == ("later", "8")
        assert model.counters.outcomes == {Outcome.OK: 10, Outcome.CANCELLED: 1}


async def test_d5_an_admins_cancel_of_a_decoupled_request_whose_client_does_not_read(tmp_path: Path) -> None:
    async with rpc(tmp_path) as call:
        call.stream.writable = trio.Event()
        call.stream.send(infer_message("repeat", 50, id="a"))
        await call.settle()
        model = call.server.model("repeat")
        next(iter(model._live)).cancel(Reason.ADMIN)
        call.stream.writable.set()
        call.stream.send(infer_message("repeat", 1, id="b"))
        assert await call.settle() == [
            ("a", "0"),
            ("a", "[request id: a] request cancelled while responding: admin"),
            ("b", "0"),
        ]


async def test_a_cancel_of_the_rpc_cancels_each_of_its_requests(tmp_path: Path) -> None:
    gates = {"once": Gate(), "repeat": Gate(repeat)}
    async with rpc(tmp_path, dict(gates)) as call:
        call.stream.send(*(infer_message(name, 1) for name in ("once", "repeat", "once", "repeat", "once")))
        await call.settle()
        assert call.server.statistics().in_flight == 5
        call.scope.cancel(reason=Reason.CLIENT_RESET.value)
        await call.settle()
        assert call.ended.is_set()
        assert call.stream.replies == []
        for name, count in (("once", 3), ("repeat", 2)):
            counters = call.server.model(name).counters
            assert counters.outcomes == {Outcome.CANCELLED: count}
            assert {reason for reason, _ in counters.reasons} == {Reason.CLIENT_RESET.value}


async def test_errors_end_the_rpc_where_the_client_asked_for_that(tmp_path: Path) -> None:
    gate = Gate()
    async with rpc(tmp_path, {"once": gate}, errors_end_rpc=True) as call:
        call.stream.send(infer_message("once", 1, id="a"), infer_message("unknown", 1, id="b"))
        await call.settle()
        assert call.ended.is_set()
        assert call.error is not None
        assert (call.error.status, call.error.message) == (
            Status.NOT_FOUND,
            "Request for unknown model: 'unknown' is not found",
        )
        assert call.stream.replies == []
        assert call.server.model("once").counters.outcomes == {Outcome.CANCELLED: 1}


async def test_a_message_that_cannot_be_read_ends_the_rpc_with_its_status(tmp_path: Path) -> None:
    class Broken(MemoryStream):
        async def recv_message(self) -> pb.ModelInferRequest | None:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too large")

    async with open_world(tmp_path / "models") as server:
        with pytest.raises(GRPCError) as caught:
            await serve_stream(Inference(server), Broken())
        assert (caught.value.status, caught.value.message) == (Status.RESOURCE_EXHAUSTED, "too large")


async def test_a_draining_server_takes_no_more_requests_on_old_streams(tmp_path: Path) -> None:
    gate = Gate()
    async with rpc(tmp_path, {"once": gate}) as call:
        call.stream.send(infer_message("once", 1, id="a"))
        await call.settle()
        call.server.draining = True
        call.stream.send(infer_message("once", 2, id="b"))
        gate.open()
        assert await call.settle() == [
            ("a", "1"),
            ("b", "GRPC server is shutting down and has stopped accepting new requests."),
        ]
