"""Messages as bytes, and the two ends of the socket."""

from __future__ import annotations

import gc
import logging
import math
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import ml_dtypes
import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from triton_trio import errors
from triton_trio.backends.worker import wire
from triton_trio.backends.worker.connection import Connection
from triton_trio.backends.worker.logs import FULL, PostHandler, levels, log, set_levels
from triton_trio.backends.worker.messages import (
    Execute,
    Fail,
    Leave,
    Log,
    Message,
    Part,
    Respond,
    Waiting,
    read_error,
    write_error,
)
from triton_trio.backends.worker.wire import PREFIX, NonsenseError, decode, encode, read_prefix
from triton_trio.errors import InternalError, RequestCancelled, TritonError


def there_and_back(message: Message) -> Message:
    frame = b"".join(encode(message))
    header, body = read_prefix(frame[: PREFIX.size])
    assert len(frame) == PREFIX.size + header + body
    return decode(frame[PREFIX.size : PREFIX.size + header], frame[PREFIX.size + header :])


ARRAYS = {
    "scalar": np.float64(1.5).reshape(()),
    "empty": np.zeros((0, 3), np.int8),
    "odd": np.arange(13, dtype=np.uint8),
    "flags": np.array([[True], [False]]),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16),
    "strings": np.array([[b"", "straße".encode()], [b"\x00", b"x" * 5000]], object),
    "columns": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "backwards": np.arange(2000, dtype=np.int64)[::-1],
    "big": np.random.default_rng(0).random((100, 7)).astype(np.float32),
    "not numbers": np.array([np.nan, np.inf, -0.0], np.float16),
}


def test_every_kind_of_array_arrives_as_it_was() -> None:
    message = Execute(1, "m_0", [], [ARRAYS, {}, {"odd": ARRAYS["odd"]}])
    arrived = there_and_back(message)
    assert [list(group) for group in arrived.tensors] == [list(ARRAYS), [], ["odd"]]
    for name, array in arrived.tensors[0].items():
        assert (array.dtype, array.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
        assert array.tolist() == ARRAYS[name].tolist() or array.tobytes() == ARRAYS[name].tobytes()


def test_parameters_and_ids_arrive_as_they_were() -> None:
    parameters = {"a": True, "b": 1, "c": 1.0, "d": math.inf, "e": 'quo"te', "f": 2**64 - 1}
    part = Part(3, True, "id \N{SNOWMAN}", 17, "sequence", True, False, parameters)
    arrived = Part(*there_and_back(Execute(1, "m_0", [part], [{}])).parts[0])
    assert arrived == part
    assert [type(value) for value in arrived.parameters.values()] == [bool, int, float, float, str, int]


@pytest.mark.parametrize(
    "error",
    [
        kind("what is wrong", "admin") if kind is RequestCancelled else kind("what is wrong")
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, TritonError)
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_arrives_as_what_it_was(error: TritonError) -> None:
    arrived = read_error(there_and_back(Fail(1, 0, write_error(error))).error)
    assert (type(arrived), arrived.args) == (type(error), error.args)


def test_an_error_of_a_models_own_arrives_as_the_nearest_that_is_known() -> None:
    class Own(errors.InvalidArgument):
        pass

    assert type(read_error(write_error(Own("x")))) is errors.InvalidArgument
    assert type(read_error(["SystemExit", ["x"]])) is InternalError


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b'["Nobody",[],[]]',
        b'["Message",[1],[]]',
        b'["Leave",[1],[]]',
        b'["Respond",[1,0,true,{}],[[["X","FP32",[3],12]]]]',  # and there is no body
        b'["Respond",[1,0,true,{}],[[["X","FP99",[0],0]]]]',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_what_is_no_message_is_nonsense_and_nothing_worse(header: bytes) -> None:
    with pytest.raises(NonsenseError):
        decode(header, b"")


@pytest.mark.parametrize(
    "prefix",
    [b"GET / HTTP/1.1\r\nHost"[: PREFIX.size], b"TTw1".ljust(PREFIX.size, b"\xff"), PREFIX.pack(b"TTw1", 5, 1 << 60)],
)
def test_what_is_no_frame_is_nonsense_and_takes_no_memory(prefix: bytes) -> None:
    with pytest.raises(NonsenseError):
        read_prefix(prefix)


# Two ends


@asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[Connection, Connection]]:
    one, other = map(Connection, socket.socketpair())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.write)
            yield one, other
            nursery.cancel_scope.cancel()
    one.close()
    other.close()


async def test_messages_arrive_in_order_however_long_they_are() -> None:
    sizes = [0, 1, 70_000, 3, 5_000_000, 16_300, 65_536, 2]
    async with two_ends() as (one, other):
        for number, size in enumerate(sizes):
            one.post(Respond(number, 0, True, {}, [{"X": np.full(size, number, np.uint8)}]))
            one.post(Leave(number, 1, "caller"))
        assert one.outbound_bytes > 4_000_000  # the kernel does not take everything
        for number, size in enumerate(sizes):
            message = await other.receive()
            assert message.tensors[0]["X"].tolist() == [number] * size
            assert await other.receive() == Leave(number, 1, "caller")
        await one.wait_written()
        assert one.outbound_bytes == 0


async def test_a_message_is_gone_when_post_returns() -> None:
    async with two_ends() as (one, other):
        one.post(Leave(1, 2, "caller"))
        assert other._socket.recv(1000)  # nobody else has run meanwhile


async def test_what_was_said_before_the_end_is_heard() -> None:
    async with two_ends() as (one, other):
        other.post(Waiting(1))
        other.post(Waiting(2))
        other.end()
        one.post(Waiting(3))  # to nobody: that is no error
        assert [await one.receive() for _ in range(3)] == [Waiting(1), Waiting(2), None]
        assert one.outbound_bytes == 0


async def test_what_the_other_end_would_not_take_is_the_senders_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_ends() as (one, other):
        for limit in ("_MAX_HEADER", "_MAX_BODY"):
            with monkeypatch.context() as patched:
                patched.setattr(wire, limit, 100)
                with pytest.raises(InternalError, match="too much for a message to or from"):
                    one.post(Respond(1, 0, True, {"text": "x" * 100}, [{"X": np.zeros(101, np.uint8)}]))
        one.post(Waiting(1))
        assert await other.receive() == Waiting(1)


@pytest.mark.parametrize("length", [1 << 16, (1 << 16) + 1, 12_000_000])
async def test_a_text_of_any_length_can_be_an_error_or_a_log_line(length: int) -> None:
    text = "\x01" * length
    logger = logging.getLogger("triton_trio.tests.long")
    async with two_ends() as (one, other):
        handler = PostHandler(one)
        logger.addHandler(handler)
        try:
            logger.warning("%s", text)
        finally:
            logger.removeHandler(handler)
        one.post(Fail(1, 0, write_error(InternalError(text))))
        line, fail = await other.receive(), await other.receive()
    for arrived in (line.text, read_error(fail.error).message):
        if length <= 1 << 16:
            assert arrived == text
        else:
            assert arrived == f"{text[: 1 << 16]}... (cut: it had {length} characters)"


async def test_an_array_that_has_no_datatype_is_the_senders_error() -> None:
    async with two_ends() as (one, other):
        with pytest.raises(InternalError, match="no datatype"):
            one.post(Respond(1, 0, True, {}, [{"X": np.zeros(1, complex)}]))
        one.post(Waiting(1))
        assert await other.receive() == Waiting(1)


# Log lines


async def test_a_bad_log_call_is_no_error_of_its_callers(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("triton_trio.tests.bad")
    logger.propagate = False  # pytest's own handler raises
    async with two_ends() as (one, other):
        handler = PostHandler(one)
        logger.addHandler(handler)
        try:
            logger.warning("%d rows", "three")
            await trio.to_thread.run_sync(logger.warning, "%d rows", "three")
            logger.warning("%d rows", 3)
        finally:
            logger.removeHandler(handler)
            logger.propagate = True
        assert (await other.receive()).text == "3 rows"
    assert capsys.readouterr().err.count("Message: '%d rows'") == 2


def test_levels_are_those_that_loggers_have_and_not_those_that_they_inherit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    caplog.set_level(logging.DEBUG, logger="triton_trio.tests.levels")
    logging.getLogger("triton_trio.tests.levels.below")
    servers = levels()
    assert (servers[""], servers["triton_trio.tests.levels"]) == (logging.ERROR, logging.DEBUG)
    assert not {"triton_trio.tests.levels.below", "triton_trio.tests"} & servers.keys()
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.WARNING, logger="triton_trio.tests.levels")
    set_levels(servers)
    assert levels() == servers


async def lines_until(end: Connection, text: str) -> list[Log]:
    lines: list[Log] = []
    while not (lines and lines[-1].text.endswith(text)):
        message = await end.receive()
        assert isinstance(message, Log)
        lines.append(message)
    return lines


def dropped(lines: list[Log]) -> int:
    """How many were, as they say."""
    return sum(int(line.text[1:].split()[0]) for line in lines if " lines were dropped) " in line.text)


async def test_a_flood_of_log_lines_is_cut_and_does_not_keep_answers_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("triton_trio.tests.flood")
    async with two_ends() as (one, other):
        handler = PostHandler(one)
        logger.addHandler(handler)
        try:
            await trio.to_thread.run_sync(lambda: [logger.warning("%s", "x" * 10_000) for _ in range(1000)])
            await wait_all_tasks_blocked()
            assert one.outbound_bytes < FULL + 20_000
            lines = []
            while one.outbound_bytes:
                lines.append(await other.receive())
                await trio.lowlevel.checkpoint()
            logger.warning("the last")
            lines += await lines_until(other, "the last")
        finally:
            logger.removeHandler(handler)
        assert len(lines) + dropped(lines) == 1001
        caplog.clear()
        log(lines[-1], pid=1234)
        (record,) = caplog.records
        assert (record.name, record.process, record.filename) == ("triton_trio.tests.flood", 1234, "test_connection.py")


@pytest.mark.parametrize(("length", "count"), [(10_000, 400), (0, 8000)])
async def test_law_12_lines_of_other_threads_do_not_pile_up_behind_an_event_loop_that_is_busy(
    length: int, count: int
) -> None:
    logger = logging.getLogger("triton_trio.tests.busy")

    def talk() -> None:
        for _ in range(count):
            logger.warning("%s", "x" * length)

    async with two_ends() as (one, other):
        handler = PostHandler(one)
        logger.addHandler(handler)
        try:
            for last in ("the last", "the very last"):  # what has been taken makes room
                thread = threading.Thread(target=talk)
                thread.start()
                thread.join()  # and the event loop stands still
                waiting = [500 + len(each.text) for each in gc.get_objects() if isinstance(each, Log)]
                assert 0 < sum(waiting) < 1.1 * FULL
                await trio.to_thread.run_sync(logger.warning, "enough")
                await wait_all_tasks_blocked()
                lines = []
                while one.outbound_bytes:
                    lines.append(await other.receive())
                    await trio.lowlevel.checkpoint()
                logger.warning(last)
                lines += await lines_until(other, last)
                assert len(lines) + dropped(lines) == count + 2
                del lines  # they are counted otherwise
        finally:
            logger.removeHandler(handler)
