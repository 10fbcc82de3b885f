"""One service class, written for grpclib, unmodified on our transport and on grpclib's: every client gets the same.

{our server, grpclib's} × {our channel, grpclib's, grpcio's, grpcio.aio's}, and our channel against a grpcio server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from grpclib.const import Status

from triton_trio.testing._pb.echo import EchoReply, EchoRequest

from .echo_service import EchoService
from .interop_peers import CLIENTS, LIMIT, SERVERS, Ask, Got

pytestmark = pytest.mark.network

PAIRS = [(server, client) for server in ("ours", "grpclib") for client in CLIENTS] + [("grpcio", "ours")]
every_pair = pytest.mark.parametrize(("server", "client"), PAIRS, ids=lambda name: name)

LARGE = bytes(range(256)) * (4 << 12)  # 4 MiB


class Peers:
    """A service somewhere, and a client for it."""

    def __init__(self, service: EchoService, port: int, client: str) -> None:
        self.service = service
        self._port = port
        self._client = CLIENTS[client]

    async def ask(self, ask: Ask) -> Got:
        return await self._client(self._port, ask)

    async def next_event(self) -> str:
        """What a handler logs next."""
        return await trio.to_thread.run_sync(lambda: self.service.log.get(timeout=LIMIT))

    def wait_holding(self) -> None:
        assert self.service.log.get(timeout=LIMIT) == "holding"


@asynccontextmanager
async def open_peers(server: str, client: str) -> AsyncIterator[Peers]:
    with trio.fail_after(2 * LIMIT):
        async with AsyncExitStack() as stack:
            service, port = await stack.enter_async_context(SERVERS[server]())
            yield Peers(service, port, client)
            assert service.log.empty(), "the test has looked at everything that happened"


@every_pair
async def test_four_kinds(server: str, client: str) -> None:
    async with open_peers(server, client) as peers:
        one = EchoRequest(text="é", payload=b"\0\xff", repeat=2, metadata={"k": "v"})
        got = await peers.ask(Ask((one,), timeout=None))
        assert got == Got([EchoReply(text="éé", payload=b"\0\xff\0\xff", metadata={"k": "v"})])
        assert await peers.next_event() == "UnaryUnary ended"

        got = await peers.ask(Ask((EchoRequest(text="a", repeat=3),), "UnaryStream"))
        assert got == Got([EchoReply(text="a", index=index) for index in range(3)])
        assert await peers.next_event() == "UnaryStream ended"

        requests = tuple(EchoRequest(text=text) for text in "abc")
        got = await peers.ask(Ask(requests, "StreamUnary"))
        assert got == Got([EchoReply(text="abc", index=3)])
        assert await peers.next_event() == "StreamUnary ended"

        requests = (EchoRequest(text="a", repeat=2), EchoRequest(text="b"))
        got = await peers.ask(Ask(requests, "StreamStream"))
        assert got == Got([EchoReply(text=text, index=index) for index, text in enumerate("aab")])
        assert await peers.next_event() == "StreamStream ended"


@every_pair
async def test_empty_messages_and_empty_streams(server: str, client: str) -> None:
    async with open_peers(server, client) as peers:
        assert await peers.ask(Ask((EchoRequest(),), timeout=None)) == Got([EchoReply()])
        assert await peers.ask(Ask((), "StreamUnary")) == Got([EchoReply()])
        assert await peers.ask(Ask((), "StreamStream")) == Got([])
        assert await peers.ask(Ask((EchoRequest(),), "UnaryStream")) == Got([EchoReply()])
        for name in ("UnaryUnary", "StreamUnary", "StreamStream", "UnaryStream"):
            assert await peers.next_event() == f"{name} ended"


@every_pair
async def test_large_messages_both_ways(server: str, client: str) -> None:
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(payload=LARGE),), timeout=None))
        assert got == Got([EchoReply(payload=LARGE)])
        got = await peers.ask(Ask((EchoRequest(payload=LARGE),), "StreamStream"))
        assert got == Got([EchoReply(payload=LARGE)])
        assert [await peers.next_event() for _ in range(2)] == ["UnaryUnary ended", "StreamStream ended"]


@every_pair
@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"])
async def test_errors_with_their_messages_and_details(server: str, client: str, kind: str) -> None:
    text = "nö such\nthing: 100% €"
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(text=text, payload=b"\0why\xff", fail_with=5),), kind))
        assert got == Got(status=Status.NOT_FOUND, message=text, details=b"\0why\xff")
        assert await peers.next_event() == f"{kind} failed: NOT_FOUND"


@every_pair
async def test_errors_in_the_middle_of_a_stream(server: str, client: str) -> None:
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(text="x", repeat=3, fail_with=10),), "UnaryStream"))
        replies = [EchoReply(text="x", index=index) for index in range(2)]
        assert got == Got(replies, Status.ABORTED, "x")
        assert await peers.next_event() == "UnaryStream failed: ABORTED"


@every_pair
async def test_a_broken_handler_and_a_missing_method(server: str, client: str) -> None:
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(text="secret", fail_with=99),)))
        assert got.status is Status.UNKNOWN
        assert (await peers.next_event()).startswith("UnaryUnary broke: ValueError")
        if server != "grpcio":  # which tells its clients
            assert got.message == "Internal Server Error"
        got = await peers.ask(Ask((EchoRequest(),), "Nope"))
        # grpclib's server answers without a content-type, which its own client looks at first.
        assert got.status is (Status.UNKNOWN if server == client == "grpclib" else Status.UNIMPLEMENTED)


@every_pair
async def test_metadata_both_ways(server: str, client: str) -> None:
    metadata = (
        ("echo-initial", "one"),
        ("echo-initial", "two"),
        ("echo-initial-bin", b"\0\xff\x80"),
        ("echo-trailing", "a, b"),
        ("echo-trailing-bin", b""),
    )
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(text="a"),), metadata=metadata, timeout=None))
        assert got.initial == {"echo-initial": ["one", "two"], "echo-initial-bin": [b"\0\xff\x80"]}
        assert got.trailing == {"echo-trailing": ["a, b"], "echo-trailing-bin": [b""]}
        assert got.replies == [EchoReply(text="a")]
        assert await peers.next_event() == "UnaryUnary ended"


@every_pair
async def test_A8_the_server_knows_the_deadline(server: str, client: str) -> None:
    async with open_peers(server, client) as peers:
        question = EchoRequest(metadata={"deadline": "?"})
        got = await peers.ask(Ask((question,), timeout=5))
        assert 0 < float(got.replies[0].metadata["deadline"]) <= 5.2  # each client rounds a timeout up in its own way
        with trio.CancelScope(shield=True):  # from this test's own deadline, which would travel
            got = await peers.ask(Ask((question,), timeout=None))
        assert got.replies[0].metadata == {"deadline": "none"}
        assert [await peers.next_event() for _ in range(2)] == ["UnaryUnary ended"] * 2


@every_pair
@pytest.mark.parametrize("kind", ["UnaryUnary", "StreamStream"])
async def test_a_deadline_ends_both_sides(server: str, client: str, kind: str) -> None:
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(text="hold"),), kind, timeout=0.6))
        assert (got.status, got.replies) == (Status.DEADLINE_EXCEEDED, [])
        assert await peers.next_event() == "holding"
        assert await peers.next_event() == f"{kind} cancelled"


@every_pair
@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"])
async def test_a_cancel_of_the_client_cancels_the_handler(server: str, client: str, kind: str) -> None:
    async with open_peers(server, client) as peers:
        ask = Ask((EchoRequest(text="hold"),), kind, timeout=None, until=peers.wait_holding)
        assert (await peers.ask(ask)).status is Status.CANCELLED
        assert await peers.next_event() == f"{kind} cancelled"


@pytest.mark.parametrize(
    ("server", "client"), [("ours", "grpcio"), ("ours", "grpcio-aio"), ("ours", "ours"), ("grpcio", "ours")]
)
async def test_compressed_messages(server: str, client: str) -> None:
    """grpclib knows no compression.  The grpcio server compresses its replies, too."""
    async with open_peers(server, client) as peers:
        got = await peers.ask(Ask((EchoRequest(payload=bytes(100_000)),), timeout=None, compress=True))
        assert got == Got([EchoReply(payload=bytes(100_000))])
        assert await peers.next_event() == "UnaryUnary ended"
