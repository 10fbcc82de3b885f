"""A model over several hosts: one decides, all dispatch the same, and none goes on without the others."""

from __future__ import annotations

import errno
import math
import os
import random
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from triton_trio import several_hosts
from triton_trio.backends.jax.device import DeviceThread, Turn
from triton_trio.backends.jax.generation import SlotSpec
from triton_trio.backends.jax.generation import fingerprint as fingerprints
from triton_trio.backends.jax.generation import hosts as hosts_module
from triton_trio.backends.jax.generation.fingerprint import fingerprint
from triton_trio.backends.jax.generation.follower import connect, follow, load_with_leader
from triton_trio.backends.jax.generation.hosts import Hosts, lead, run_for_nobody
from triton_trio.backends.jax.generation.leader import LAG, greet_followers, load_with_followers, read_word
from triton_trio.backends.jax.generation.plan import Kind, PlanBroken, PlanFormat, PlanReader, PlanRecord
from triton_trio.backends.jax.generation.schedule import Generation, Program, Settings, SlotSchedule
from triton_trio.errors import InvalidArgument, Unavailable
from triton_trio.testing.device import DeviceGate

from ..world import until
from .hosts import LADDER, PLAN, Follows, Host, Leads, Text, alone, inputs, open_hosts
from .served import write_language_model
from .test_schedule import Somebody, emitted
from .test_weights import write_directory
from .tiny import CHUNK, CONFIG, SPEC, prompt

# Records: decided once, replayed anywhere


@given(st.data())
def test_every_follower_replays_what_the_leader_decided(data: st.DataObject) -> None:
    """Clients come and go as they like; the bytes arrive at each follower in pieces, and whenever."""
    schedule = SlotSchedule(SPEC, (CHUNK,))
    live: list[Generation] = []
    out: list[Program] = []
    decided: list[object] = []
    stream = b""
    for action in data.draw(st.lists(st.sampled_from(["come", "go", "dispatch", "dispatch", "end"]), max_size=60)):
        if action == "come" and (free := {*range(SPEC.slots)} - {row.slot for row in live}):
            settings = Settings(
                max_tokens=data.draw(st.integers(1, 50)),
                temperature=data.draw(st.floats(0, 2)),
                top_k=data.draw(st.integers(0, 9)),
                top_p=data.draw(st.floats(0.1, 1)),
                seed=data.draw(st.integers(0, 2**64 - 1)),
            )
            live.append(schedule.admit(min(free), np.array(prompt(len(live), 40), np.int32), settings, Somebody()))
        elif action == "go" and live:
            schedule.leave(live.pop(data.draw(st.integers(0, len(live) - 1))))
        elif action == "end" and out:
            program = out.pop(0)
            schedule.receive(program, emitted(program), 0.0)
        elif action == "dispatch" and len(out) < 2:
            program = schedule.next_program(waiting=False, steps=data.draw(st.sampled_from(LADDER)))
            if program is not None:
                out.append(program)
                decided.append(inputs(program))
                stream += PlanRecord.of(len(decided), program, SPEC).encode()
    stream += PlanRecord(len(decided) + 1, Kind.END).encode()
    for _ in range(2):
        reader = PlanReader(PLAN)
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=9))), len(stream)]
        pieces = [stream[begin:end] for begin, end in pairwise(cuts)]
        records = [record for piece in pieces for record in reader.feed(piece)]
        assert [inputs(record.program()) for record in records[:-1]] == decided
        assert reader.ended


def test_law_3_a_cancel_between_decision_and_record_is_in_the_next_record() -> None:
    schedule = SlotSchedule(SPEC, (CHUNK,))
    stays, goes = (
        schedule.admit(slot, np.array(prompt(slot, 9), np.int32), Settings(max_tokens=50), Somebody())
        for slot in (0, 1)
    )
    for _ in range(4):
        schedule.next_program(waiting=False, steps=1)
    program = schedule.next_program(waiting=False, steps=1)
    assert program is not None
    decided = PlanRecord.of(1, program, SPEC).encode()
    schedule.leave(goes)
    assert PlanRecord.of(1, program, SPEC).encode() == decided
    following = schedule.next_program(waiting=False, steps=1)
    assert following is not None
    (record,) = PlanReader(PLAN).feed(PlanRecord.of(1, following, SPEC).encode())
    evict, hold = record.arrays
    assert evict.tolist() == [0, goes.owner, 0, 0]
    assert hold.tolist() == [False, True, True, True]
    assert stays.owner


def decode(number: int, steps: int = 1) -> bytes:
    nobody = np.zeros(SPEC.slots, np.int32), np.zeros(SPEC.slots, bool)
    return PlanRecord(number, Kind.DECODE, steps, nobody).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (decode(1) + decode(3), "record 3 came after record 1"),
        (decode(1) + decode(1), "record 1 came after record 1"),
        (decode(1, steps=5), "a program of kind 2 and size 5, which this host does not have"),
        (b"GET / HTTP/1.1\r\n", "came after record 0"),
        (PlanRecord(1, Kind.END).encode() + decode(2), "record 2 came after the end"),
    ],
    ids=["gap", "again", "no such program", "no record", "after the end"],
)
def test_what_is_not_the_next_record_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(PlanBroken, match=says):
        list(PlanReader(PLAN).feed(data))


# Before the load: who is there, and whether all have the same


def another_plan(
    spec: SlotSpec = SPEC, ladder: tuple[int, ...] = LADDER, dtype: str = "float32", weights: str = "ours"
) -> PlanFormat:
    return PlanFormat(spec, (CHUNK,), ladder, dtype=dtype, weights=weights)


MODEL, OPTIONS = "another model (its numbers, or what is in its files)", "other options (slots, context, "
OTHERS = [
    (another_plan(weights="others"), MODEL),
    (another_plan(replace(SPEC, config=replace(CONFIG, layers=1))), MODEL),
    (another_plan(replace(SPEC, end_tokens=(7,))), MODEL),
    (another_plan(replace(SPEC, slots=3)), OPTIONS),
    (another_plan(ladder=(1, 4)), OPTIONS),
    (another_plan(dtype="int8"), OPTIONS),
]


@pytest.mark.parametrize(("other", "what"), OTHERS)
def test_a_process_of_another_plan_is_refused_by_name(other: PlanFormat, what: str) -> None:
    assert PLAN.difference(other.hello(1)).startswith(f"process 1 has {what}")


def test_a_process_of_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version__", "0.1")
    other = "process 1 has another version of JAX or of triton_trio than this one; "
    assert PLAN.difference(another_plan().hello(1)).startswith(other)


def test_a_process_of_the_same_plan_is_none_of_those() -> None:
    assert PLAN.difference(another_plan().hello(3)) == ""
    assert PLAN.speaker(PLAN.hello(3)) == 3
    assert PLAN.speaker(b"GET / HTTP/1.1\r\n") is None
    assert PLAN.speaker(b"GET / HTTP/1.1".ljust(PlanFormat.HELLO_BYTES)) is None


class Door(trio.abc.Listener[trio.abc.Stream]):
    """Lets in whoever comes, with what they say first."""

    def __init__(self, *words: bytes) -> None:
        self.words = list(words)
        self.ends: list[trio.abc.Stream] = []

    async def accept(self) -> trio.abc.Stream:
        if not self.words:
            await trio.sleep_forever()
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(self.words.pop(0))
        self.ends.append(theirs)
        return ours

    async def aclose(self) -> None: ...


async def test_the_leader_waits_for_each_process_and_lets_nobody_else_in(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    strangers = [b"GET / HTTP/1.1", PLAN.hello(7), b""]
    door = Door(*strangers, PLAN.hello(2), PLAN.hello(2), PLAN.hello(1))
    found = await greet_followers([door], PLAN, [1, 2], within=60)
    assert sorted(found) == ["process 1", "process 2"]
    assert len(caplog.records) == 4
    # It says who it is to those whom it lets in.
    answers = [await read_word(end, PLAN.HELLO_BYTES) for end in door.ends]
    assert answers == [b"", b"", b"", PLAN.hello(0), b"", PLAN.hello(0)]
    with pytest.raises(Unavailable, match="no word from process 2, 3 within 60 s"):
        await greet_followers([Door(PLAN.hello(1))], PLAN, [1, 2, 3], within=60)


async def test_a_process_may_come_to_any_address_of_the_leader(autojump_clock: trio.testing.MockClock) -> None:
    found = await greet_followers([Door(), Door(PLAN.hello(2)), Door(PLAN.hello(1))], PLAN, [1, 2], within=60)
    assert sorted(found) == ["process 1", "process 2"]


class Meeting:
    """Leader and followers, and a byte stream in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](math.inf)
        self.accept = self._receive.receive
        self.socket = self._receive  # that of a listener
        monkeypatch.setattr(trio, "open_tcp_stream", self.dial)
        monkeypatch.setattr(trio, "open_tcp_listeners", self.listen)

    async def listen(self, port: int, *, host: str) -> list[Meeting]:
        await trio.lowlevel.checkpoint()
        return [self]

    async def dial(self, host: str, port: int) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self._send.send_nowait(theirs)
        await trio.lowlevel.checkpoint()
        return ours

    async def greet(self, processes: Sequence[int] = (1,)) -> dict[str, trio.abc.Stream]:
        doors: Any = [self, self]
        return await greet_followers(doors, PLAN, processes, within=60)


async def test_who_is_refused_knows_why(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    meeting, (other, what) = Meeting(monkeypatch), OTHERS[0]
    said: list[str] = []

    async def follow() -> None:
        with pytest.raises(PlanBroken) as caught:
            await connect("here", 1, other, 1, within=60)
        said.append(str(caught.value))

    async with trio.open_nursery() as followers:
        followers.start_soon(follow)
        with pytest.raises(PlanBroken, match=re.escape(f"process 1 has {what} than this one; start all")):
            await meeting.greet()
        # The leader's end would have ended the follower's process: it waits, but not for long.
        assert said == [f"process 0 has {what} than this one; start all processes with the same"]
        assert trio.current_time() < 1


async def test_who_is_not_known_does_not_try_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    meeting = Meeting(monkeypatch)
    async with trio.open_nursery() as leader:
        leader.start_soon(meeting.greet)
        with pytest.raises(Unavailable, match="what listens at here:1 does not know process 2; the leader's log says"):
            await connect("here", 1, PLAN, 2, within=60)
        leader.cancel_scope.cancel()


async def test_law_4_who_leaves_in_the_greeting_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The leader's buffer is full, or it has broken the connection once: neither is left open."""
    opened: list[trio.testing.MemorySendStream] = []

    async def send() -> None:
        if len(opened) == 1:
            raise trio.BrokenResourceError
        await trio.sleep_forever()

    async def dial(host: str, port: int) -> trio.testing.MemorySendStream:
        await trio.lowlevel.checkpoint()
        opened.append(stream := trio.testing.MemorySendStream(send_all_hook=send))
        return stream

    monkeypatch.setattr(trio, "open_tcp_stream", dial)
    with pytest.raises(Unavailable, match="no leader at here:1 within 2 s"):
        await connect("here", 1, PLAN, 1, within=2)
    assert len(opened) == 2
    for stream in opened:
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")


# The load: each by itself, and nobody without the others


class Load:
    """What a host loads; ends when it is let."""

    def __init__(self) -> None:
        self.began, self.ends = trio.Event(), trio.Event()
        self.left = False

    async def __call__(self) -> str:
        self.began.set()
        try:
            await self.ends.wait()
        except trio.Cancelled:
            self.left = True
            raise
        return "programs"


async def test_the_leader_waits_until_all_have_loaded(autojump_clock: trio.testing.MockClock) -> None:
    pairs = {f"process {number}": trio.testing.memory_stream_pair() for number in (1, 2)}
    ours, theirs = ({name: pair[end] for name, pair in pairs.items()} for end in (0, 1))
    loads = {name: Load() for name in ["leader", *pairs]}
    loaded: list[str] = []

    async def lead() -> None:
        assert await load_with_followers(ours, loads["leader"], within=60) == "programs"
        loaded.append("all")

    async def follow(name: str) -> None:
        assert await load_with_leader(theirs[name], loads[name]) == "programs"
        loaded.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lead)
        for name in pairs:
            nursery.start_soon(follow, name)
        for name in ("process 2", "leader"):
            loads[name].ends.set()
            await trio.testing.wait_all_tasks_blocked()
        assert loaded == ["process 2"]
        loads["process 1"].ends.set()
    assert loaded == ["process 2", "process 1", "all"]


async def test_who_is_lost_in_the_load_ends_it_for_all(autojump_clock: trio.testing.MockClock) -> None:
    for lost in ("leader", "follower"):
        ours, theirs = trio.testing.memory_stream_pair()
        loads = Load(), Load()

        async def lead(ours: trio.abc.Stream = ours, load: Load = loads[0]) -> None:
            async with ours:
                await load_with_followers({"process 1": ours}, load, within=60)

        async def follow(theirs: trio.abc.Stream = theirs, load: Load = loads[1]) -> None:
            async with theirs:
                await load_with_leader(theirs, load)

        goes, stays = (lead, follow) if lost == "leader" else (follow, lead)
        words = "the connection to the leader is lost" if lost == "leader" else "to process 1 was lost while it loaded"
        async with trio.open_nursery() as other:
            other.start_soon(goes)
            with pytest.raises(Unavailable, match=words):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stays)
                    for load in loads:
                        await load.began.wait()
                    other.cancel_scope.cancel()
        assert [load.left for load in loads] == [True, True]


async def test_law_12_nobody_loads_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    ours, _theirs = trio.testing.memory_stream_pair()
    load = Load()
    load.ends.set()
    with pytest.raises(Unavailable, match="process 1 had not loaded 60 s after the leader"):
        await load_with_followers({"process 1": ours}, load, within=60)


class Alone(DeviceGate):
    """A device that never meets those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self._over = threading.Event()

    def wait(self, turn: Turn) -> None:
        self._over.wait()
        super().wait(turn)

    def open(self) -> None:
        self._over.set()
        super().open()


async def test_the_devices_of_all_hosts_meet_before_the_first_text() -> None:
    async with open_hosts(2) as hosts:
        await run_for_nobody(hosts.leader.programs, hosts.device)
        await until(lambda: all(host.dispatched for host in hosts.followers))
        for host in (hosts.leader, *hosts.followers):
            assert host.dispatched == [(1, [0] * SPEC.slots, [False] * SPEC.slots)]
        text = Text()
        await hosts.write(0, text)
        assert text.ids == alone(0)


async def test_a_device_that_does_not_meet_the_others_is_no_model() -> None:
    fails = DeviceGate()
    fails.open()
    fails.fail(1, "no way to process 0")
    async with open_hosts(1, gates={0: Alone(), 1: fails}) as hosts:
        with pytest.raises(Unavailable, match="the connection to process 1 is lost"):
            await run_for_nobody(hosts.leader.programs, hosts.device)


class Loads:
    """In the place of a loader: what is loaded, and compiled, once for all tests."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def plan(self) -> PlanFormat:
        return PLAN

    async def load(self, kind: object) -> Any:
        await trio.lowlevel.checkpoint()
        return self.host.programs


async def test_a_model_that_is_led_has_run_everywhere_and_ends_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    Meeting(monkeypatch)
    ours = Hosts.at("here:1", processes=3, process=0)
    monkeypatch.setattr(hosts_module, "_joined", ours)
    leader, *followers = Host(Leads, None), Host(Follows, None), Host(Follows, None)
    device = DeviceThread("cpu:0")

    async def follower(process: int, host: Host) -> None:
        async with await connect("here", 2, PLAN, process, within=60) as stream:
            programs = await load_with_leader(stream, partial(Loads(host).load, Follows))
            await follow(stream, PLAN, programs)

    loader: Any = Loads(leader)
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for process, host in enumerate(followers, 1):
                    nursery.start_soon(follower, process, host)
                async with lead(loader, device) as programs:
                    assert programs is leader.programs
                    assert len(leader.dispatched) == 1
                    assert not ours.parted
                assert ours.parted
        assert leader.dispatched == followers[0].dispatched == followers[1].dispatched
    finally:
        device.close()


async def test_a_port_that_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(port: int, *, host: str) -> list[trio.SocketListener]:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    monkeypatch.setattr(trio, "open_tcp_listeners", listen)
    monkeypatch.setattr(hosts_module, "_joined", Hosts.at("here:1", 2, 0))
    nothing: Any = Loads(Host(Leads, None))
    with pytest.raises(Unavailable, match="port 2 of 'here' cannot be opened for the other processes: Address already"):
        async with lead(nothing, nothing):
            pass


# What is in the files


def test_a_fingerprint_is_of_what_is_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, copy = write_directory(tmp_path / "one"), write_directory(tmp_path / "copy")
    assert fingerprint(one) == fingerprint(copy)
    seen = {fingerprint(one), fingerprint(one / "model-0.safetensors"), fingerprint(one / "model-1.safetensors")}
    file = copy / "model-1.safetensors"
    whole = file.read_bytes()
    for at in range(0, len(whole), len(whole) // 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        seen.add(fingerprint(copy))
    file.write_bytes(whole[:-1])
    seen.add(fingerprint(copy))
    assert len(seen) == 3 + 8 + 1
    # Of a large file there are the head, and samples of all parts.
    for name, value in (("HEAD", 64), ("SAMPLE", 4), ("SAMPLES", 100)):
        monkeypatch.setattr(fingerprints, name, value)
    file.write_bytes(whole)
    assert fingerprint(copy) == fingerprint(one)
    stride = len(whole) // 100
    for at, length, shows in ((50, 1, True), (len(whole) // 2, stride, True), (stride * 50 + 4, 1, False)):
        file.write_bytes(whole[:at] + bytes(~byte & 255 for byte in whole[at : at + length]) + whole[at + length :])
        assert (fingerprint(copy) != fingerprint(one)) is shows


# The command: nobody waits for a process that cannot be, nor for one that is gone


class AtOnce(BaseException):
    """In the place of the process's end; Python's own would lead through JAX's, which waits for all processes."""


class Command:
    """``main()`` of a process, of which all but the command line is made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.joined = 0
        self.does: BaseException | None = None  #: what a follower meets when all have joined
        write_language_model(root)
        monkeypatch.setattr(several_hosts, "join", self.join)
        monkeypatch.setattr(several_hosts, "_follow", self.follow)
        monkeypatch.setattr(several_hosts.cli, "main", lambda flags: 0)
        monkeypatch.setattr(os, "_exit", self.leave)

    def join(self, hosts: Hosts) -> None:
        self.joined += 1

    async def follow(self, hosts: Hosts, model: object) -> None:
        await trio.lowlevel.checkpoint()
        if self.does is not None:
            raise self.does

    def leave(self, status: int) -> NoReturn:
        raise AtOnce(status)

    def run(self, *flags: str, process: int = 1) -> int:
        where = ["--coordinator=there:1", "--processes=2", f"--model={self.root / 'llm' / '1'}"]
        server = [f"--model-repository={self.root}"] * (process == 0)
        return several_hosts.main([*where, f"--process={process}", *server, *flags])


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("flag", "process", "says"),
    [
        ("--coordinator=foo", 0, "the coordinator is HOST:PORT of process 0, or [ADDRESS]:PORT with IPv6, got 'foo'"),
        ("--coordinator=foo:0", 0, "the coordinator's PORT must be 1 to 65535, got 0"),
        ("--coordinator=foo:65536", 1, "the coordinator's PORT must be 1 to 65535, got 65536"),
        ("--coordinator=foo:65535", 0, "--plan-port, PORT + 1 by default, must be 1 to 65535, got 65536"),
        ("--plan-port=99999", 0, "--plan-port, PORT + 1 by default, must be 1 to 65535, got 99999"),
        ("--plan-port=0", 1, "--plan-port, PORT + 1 by default, must be 1 to 65535, got 0"),
        ("--processes=1", 1, "1 processes have the numbers 0 to 0, got 1"),
        ("--grpc-prot=1", 0, "unrecognized arguments: --grpc-prot=1"),
        ("--grpc-port=1", 1, "only process 0 takes the server's flags, got --grpc-port=1"),
    ],
)
def test_a_flag_that_makes_no_sense_is_a_usage_error(
    command: Command, capsys: pytest.CaptureFixture[str], flag: str, process: int, says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(flag, process=process)
    assert (caught.value.code, command.joined) == (2, 0)
    assert says in capsys.readouterr().err


def test_an_ipv6_address_has_brackets_for_jax_and_none_for_the_plan() -> None:
    hosts = Hosts.at("[fd00::1]:8476", 2, 0)
    assert (hosts.coordinator, hosts.host, hosts.port) == ("[fd00::1]:8476", "fd00::1", 8477)
    assert Hosts.at("node0:8476", 2, 0, port=9).port == 9
    for wrong in ("fd00::1:8476", "[fd00::1]", "[]:8476", ":8476", "node0:", "node0:http"):
        with pytest.raises(InvalidArgument, match=r"or \[ADDRESS\]:PORT with IPv6, got"):
            Hosts.at(wrong, 2, 0)


@pytest.mark.parametrize(
    ("coordinator", "addresses", "only_here"),
    [
        ("node0:8476", ["127.0.1.1"], "127.0.1.1"),
        ("node0:8476", ["::1", "127.0.0.1"], "127.0.0.1, ::1"),
        ("node0:8476", ["127.0.1.1", "10.0.0.1"], ""),
        ("node0:8476", [], ""),
        # Whoever writes that means it.
        ("localhost:8476", ["127.0.0.1"], ""),
        ("127.0.0.1:8476", ["127.0.0.1"], ""),
        ("[::1]:8476", ["::1"], ""),
    ],
)
def test_a_name_that_other_hosts_have_another_address_for_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    coordinator: str,
    addresses: list[str],
    only_here: str,
) -> None:
    def find(host: str, port: int, **settings: object) -> list[object]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where: None)
    monkeypatch.setattr(hosts_module, "_joined", None)
    for process in range(2):
        hosts_module.join(hosts := Hosts.at(coordinator, 2, process))
        assert hosts.only_here() == only_here
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == bool(only_here)
    for text in warned:
        assert text.startswith(
            f"the coordinator 'node0' is {only_here} on this host, and that is where port 8477 will be"
        )


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_without_a_model_ends_before_anybody_waits_for_it(
    command: Command, capsys: pytest.CaptureFixture[str], process: int
) -> None:
    with pytest.raises(AtOnce, match="1"):
        command.run("--model=nowhere/1", process=process)
    assert command.joined == 0
    assert capsys.readouterr().err == "triton_trio: [Errno 2] No such file or directory: 'nowhere'\n"


@pytest.mark.parametrize("process", [0, 1])
def test_a_model_that_is_not_for_all_devices_is_refused_by_each_process(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], process: int
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(AtOnce, match="1"):
        command.run(process=process)
    assert "model 'llm' is for 1 device(s), and all processes together have 2: set " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("out of luck"), "ValueError: out of luck\n"),
        (ExceptionGroup("tasks", [Unavailable("lost")]), "triton_trio: lost\n"),
        (KeyboardInterrupt(), "KeyboardInterrupt\n"),
    ],
    ids=["bug", "lost", "interrupt"],
)
def test_whatever_goes_wrong_in_a_follower_ends_its_process_at_once(
    command: Command, capsys: pytest.CaptureFixture[str], error: BaseException, says: str
) -> None:
    command.does = error
    with pytest.raises(AtOnce, match="1"):
        command.run()
    assert capsys.readouterr().err.endswith(says)


def test_only_when_all_know_of_the_end_do_they_meet_for_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.run() == 0
    with pytest.raises(AtOnce, match="0"):  # it was told to stop, and there was no plan, or there is none any more
        command.run(process=0)

    monkeypatch.setattr(command, "join", lambda hosts: setattr(hosts, "parted", True))
    monkeypatch.setattr(several_hosts, "join", command.join)
    assert command.run(process=0) == 0


# Hosts: each with a device, a state and delays of its own


async def test_law_7_all_hosts_make_the_same_texts_whoever_comes_and_goes() -> None:
    delays = random.Random(1)

    async def between() -> None:
        for _ in range(delays.randrange(30)):
            await trio.lowlevel.checkpoint()

    texts = [Text() for _ in range(8)]
    cancelled = {1, 4, 6}
    async with open_hosts(3, between=between) as hosts:
        # Four readers with a slot each, one text after another.
        async def reader(slot: int) -> None:
            for number in (slot, slot + 4):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(hosts.write, number, texts[number])
                        if number in cancelled:
                            await until(lambda number=number: len(texts[number].ids) >= 3)
                            scope.cancel()

        async with trio.open_nursery() as readers:
            for slot in range(4):
                readers.start_soon(reader, slot)
    sequence = hosts.leader.dispatched
    assert any(any(program[1]) for program in sequence if len(program) == 3), "nobody was put out by a record"
    assert hosts.link.parted
    for host in hosts.followers:
        assert host.error == ""
        assert host.dispatched == sequence
        # Every number of cache, owners and positions.
        for ours, theirs in zip(hosts.leader.programs.last_state, host.programs.last_state, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for number, text in enumerate(texts):
        assert text.error == ""
        expected = alone(number)
        assert text.ids == expected[: len(text.ids)]
        assert len(text.ids) == len(expected) or number in cancelled


async def test_law_12_the_leader_is_never_further_ahead_than_it_may() -> None:
    gate = DeviceGate()
    text = Text()
    async with open_hosts(2, target=1e-9, gates={2: gate}) as hosts:
        async with trio.open_nursery() as readers:
            readers.start_soon(hosts.write, 0, text, 40)
            await gate.wait_dispatched(LAG)  # no window of its own: it dispatches what it is sent
            for ended in range(1, 4):
                gate.let_end()
                await gate.wait_dispatched(LAG + ended)
                await until(lambda ended=ended: len(hosts.leader.dispatched) == LAG + ended)
            gate.open()
            await until(lambda: len(text.ids) == 40)
        assert text.ids == alone(0, tokens=40)


@pytest.mark.parametrize("record", range(1, 8))
async def test_a_lost_follower_ends_every_text_at_whatever_record_it_is_lost(record: int) -> None:
    texts = [Text() for _ in range(3)]
    async with open_hosts(2) as hosts:
        lost = hosts.followers[1]
        async with trio.open_nursery() as readers:
            for number, text in enumerate(texts):
                readers.start_soon(hosts.write, number, text, 80)
            await until(lambda: len(lost.dispatched) >= record)
            lost.scope.cancel()
        for text in texts:
            assert text.error.startswith("Unavailable: ")
            assert "the connection to process 2 is lost" in text.error
        late = Text()
        await hosts.write(3, late)
        assert "the connection to process 2 is lost" in late.error
        await until(lambda: hosts.followers[0].error)
    # The other one has not been told that it was the end, for it was none.
    assert not hosts.link.parted
    assert hosts.followers[0].error == "the connection to the leader is lost; start all processes again"


async def test_a_follower_that_hangs_is_given_up(mock_clock: trio.testing.MockClock) -> None:
    gate, text = DeviceGate(), Text()
    async with open_hosts(1, patience=5, gates={1: gate}) as hosts:
        async with trio.open_nursery() as readers:
            readers.start_soon(hosts.write, 0, text, 40)
            await gate.wait_dispatched(LAG)
            mock_clock.jump(5)
        assert text.error.startswith("Unavailable: ")
        assert "process 1 did not end record 1 within 5 s" in text.error
        # Should the device thread have waited for it with the next record, it waits no more.
        hosts.device.close()
        await until(lambda: not hosts.device._thread.is_alive())


async def test_a_program_that_fails_on_a_follower_ends_the_plan() -> None:
    gate, text = DeviceGate(), Text()
    gate.open()
    gate.fail(3, "RESOURCE_EXHAUSTED")
    async with open_hosts(1, gates={1: gate}) as hosts:
        await hosts.write(0, text, 80)
        assert "the connection to process 1 is lost" in text.error
    assert "a program failed here: RuntimeError: RESOURCE_EXHAUSTED; start all" in hosts.followers[0].error


async def test_a_program_that_fails_on_the_leader_ends_the_plan() -> None:
    """Its state is made anew on one host; on several it would not be what the others have."""
    gate, text, following = DeviceGate(), Text(), Text()
    gate.open()
    gate.fail(3, "out of luck")
    async with open_hosts(1, gates={0: gate}) as hosts:
        await hosts.write(0, text, 80)
        assert "out of luck" in text.error
        await hosts.write(1, following)
        assert "a program failed on the leader, and the state that it had was lost" in following.error
    assert "the connection to the leader is lost" in hosts.followers[0].error


async def test_a_follower_leaves_what_is_no_plan() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with open_hosts(1) as hosts:
        await ours.send_all(b"GET / HTTP/1.1\r\n")
        with pytest.RaisesGroup(PlanBroken):
            await follow(theirs, PLAN, hosts.followers[0].programs)
