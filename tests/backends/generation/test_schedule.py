"""What the device does next: decisions, without a device and without a loop."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_trio.backends.jax.generation.schedule import PATIENCE, UNREAD, Generation, Program, Settings, SlotSchedule
from triton_trio.backends.jax.generation.slots import NO_TOKEN, Emitted
from triton_trio.backends.jax.generation.text import StopFilter
from triton_trio.errors import InternalError

from .tiny import SPEC


def schedule() -> SlotSchedule:
    return SlotSchedule(SPEC, (4, 8))


class Somebody:
    """Whom a text is for."""

    def __init__(self) -> None:
        self.live = True
        self.cancelled = False
        self.charged = 0.0
        self.steps = 0
        self.spared = 0.0

    def cancel(self) -> None:
        self.live, self.cancelled = False, True

    def charge(self, seconds: float, steps: int) -> None:
        self.charged += seconds
        self.steps += steps

    def spare(self, seconds: float) -> None:
        self.spared = seconds


def admit(plan: SlotSchedule, slot: int, length: int, tokens: int = 20, reader: Somebody | None = None) -> Generation:
    prompt = np.arange(length, dtype=np.int32)
    return plan.admit(slot, prompt, Settings(max_tokens=tokens), reader or Somebody())


def following(plan: SlotSchedule, *, waiting: bool = False, steps: int = 4) -> Program:
    program = plan.next_program(waiting=waiting, steps=steps)
    assert program is not None
    return program


def kind(program: Program | None) -> object:
    """``(slot, start, tokens, length)`` of a piece of a prompt, or how many steps for which slots."""
    if program is None:
        return None
    if program.chunk is not None:
        return program.chunk.slot, program.chunk.start, len(program.chunk.tokens), program.length
    return program.steps, [row.slot for row in program.rows]


def emitted(program: Program, *, owner: int | None = None, log: float = -1.0) -> Emitted:
    """A token for each step of each row; 5 is nobody's end."""
    steps = max(program.steps, 1)
    found = Emitted(
        np.zeros(SPEC.slots, np.int32),
        np.full((steps, SPEC.slots), NO_TOKEN, np.int32),
        np.full((steps, SPEC.slots), log, np.float32),
        np.zeros((steps, SPEC.slots), bool),
    )
    for row in program.rows:
        if program.chunk is None or program.chunk.owner:
            found.owner[row.slot] = row.owner if owner is None else owner
            found.tokens[:, row.slot] = 5
    return found


def run(plan: SlotSchedule, program: Program) -> None:
    plan.receive(program, emitted(program), 0.5)


# Prompts and tokens


def test_a_row_that_makes_tokens_waits_for_one_piece_of_a_prompt_at_most() -> None:
    plan = schedule()
    admit(plan, 0, 3)
    admit(plan, 1, 19)
    admit(plan, 2, 9)
    made = [kind(plan.next_program(waiting=False, steps=4)) for _ in range(10)]
    assert made == [
        (0, 0, 3, 4),
        (1, [0]),
        (2, 0, 8, 8),
        (1, [0]),
        (2, 8, 1, 4),
        (1, [0, 2]),
        (1, 0, 8, 8),
        (1, [0, 2]),
        (1, 8, 8, 8),
        (1, [0, 2]),
    ]
    assert kind(following(plan)) == (1, 16, 3, 4)
    assert kind(following(plan)) == (4, [0, 1, 2])  # no prompt is left, and nobody waits: several at once
    assert kind(following(plan, waiting=True)) == (1, [0, 1, 2])


def test_a_short_prompt_goes_before_the_rest_of_a_long_one() -> None:
    plan = schedule()
    admit(plan, 0, 80)
    assert kind(following(plan)) == (0, 0, 8, 8)
    admit(plan, 1, 2)
    assert kind(following(plan)) == (1, 0, 2, 4)


def test_a_long_prompt_is_not_put_off_for_ever() -> None:
    plan = schedule()
    admit(plan, 0, 80)
    fed = []
    for _ in range(30):
        short = admit(plan, 1, 2, tokens=1)
        while short.made == 0:  # one short prompt after the other
            program = following(plan)
            fed.append(program.rows[0].slot)
            run(plan, program)
        plan.leave(short)
    assert fed.count(0) == 7
    assert "".join(map(str, fed)).startswith("1" * PATIENCE + "0" + "1" * PATIENCE + "0")


def test_of_equal_prompts_the_oldest_is_finished_first() -> None:
    plan = schedule()
    for slot in (2, 0, 1):
        admit(plan, slot, 24, tokens=1)
    fed = [following(plan).rows[0].slot for _ in range(9)]
    assert fed == [2, 2, 2, 0, 1, 0, 0, 1, 1]  # 1 had let PATIENCE pieces go before


def test_nothing_is_made_that_nobody_asked_for() -> None:
    plan = schedule()
    row = admit(plan, 0, 3, tokens=3)
    assert plan.next_program(waiting=False, steps=1) is not None
    assert plan.most_steps() == 2
    following(plan, steps=2)
    assert row.made == 3
    assert plan.next_program(waiting=False, steps=1) is None
    assert not plan.has_work()


# Leaving


def test_law_3_a_cancel_is_seen_by_the_next_decision_and_nobody_has_to_run_for_it() -> None:
    plan = schedule()
    reader = Somebody()
    first, second = admit(plan, 0, 2, reader=reader), admit(plan, 1, 2)
    programs = [following(plan) for _ in range(4)]
    assert kind(programs[-1]) == (4, [0, 1])
    reader.cancel()  # nothing else: what an abort function does
    program = following(plan)
    assert kind(program) == (4, [1])
    assert program.evict is not None
    assert program.hold is not None
    assert program.evict.tolist() == [first.owner, 0, 0, 0]
    assert program.hold.tolist() == [True, False, True, True]
    again = following(plan)
    assert again.evict is not None
    assert not again.evict.any()
    assert (first.busy, second.busy) == (3, 4)
    assert not plan.statistics().wasted_seconds
    for earlier in programs:
        run(plan, earlier)
    assert plan.statistics().wasted_seconds == 0.5 + 0.5 + 0.25  # its prompt, a token alone, a token with another
    assert first.busy == 0


def test_law_7_a_new_owners_first_piece_puts_the_old_one_out() -> None:
    plan = schedule()
    reader = Somebody()
    old = admit(plan, 0, 2, reader=reader)
    behind = following(plan)
    reader.cancel()
    assert not plan.has_work()
    assert plan.next_program(waiting=False, steps=1) is None  # nobody is there: no program for an eviction alone
    new = admit(plan, 0, 2)
    assert new.owner != old.owner
    assert kind(following(plan)) == (0, 0, 2, 4)
    decode = following(plan)
    assert decode.evict is not None
    assert not decode.evict.any()
    run(plan, behind)  # what was made for the old owner is nobody's
    assert (list(new.unread), list(old.unread), plan.statistics().stale_tokens) == ([], [], 1)
    assert old.busy == 0
    assert plan.statistics().wasted_seconds == reader.charged == 0.5


@given(st.lists(st.sampled_from(["admit", "cancel", "leave", "program", "receive"]), max_size=60), st.randoms())
def test_an_eviction_never_outlives_its_owner(acts: list[str], random: Random) -> None:
    """Whatever happens in whatever order: a program moves nobody who has left, and puts nobody out who has not."""
    plan = schedule()
    rows: dict[int, tuple[Generation, Somebody]] = {}
    behind: list[Program] = []
    for act in acts:
        if act == "admit" and (free := sorted(set(range(SPEC.slots)) - set(rows))):
            reader = Somebody()
            slot = random.choice(free)
            rows[slot] = admit(plan, slot, random.randint(1, 20), tokens=random.randint(1, 9), reader=reader), reader
        elif act in ("cancel", "leave") and rows:
            slot = random.choice(sorted(rows))
            rows[slot][1].cancel()
            if act == "leave":
                plan.leave(rows.pop(slot)[0])
        elif act == "program" and (program := plan.next_program(waiting=False, steps=2)) is not None:
            assert all(row.reader.live for row in program.rows)
            live = {row.owner for row, reader in rows.values() if reader.live}
            assert program.evict is None or not live & set(program.evict.tolist())
            behind.append(program)
        elif act == "receive" and behind:
            run(plan, behind.pop(0))
    for program in behind:
        run(plan, program)
    for slot in rows:
        plan.leave(rows[slot][0])
        assert rows[slot][0].busy == 0
    assert (len(plan), plan.has_work()) == (0, False)


def test_law_7_a_token_for_another_owner_reaches_nobody() -> None:
    plan = schedule()
    row = admit(plan, 0, 2)
    program = following(plan)
    plan.receive(program, emitted(program, owner=row.owner + 1), 0.0)
    assert not row.unread


def test_a_prompt_that_is_left_half_way_needs_no_eviction() -> None:
    plan = schedule()
    reader = Somebody()
    row = admit(plan, 0, 20, reader=reader)
    run(plan, following(plan))
    reader.cancel()
    plan.leave(row)
    plan.leave(row)
    assert (len(plan), plan.statistics().evictions, plan.has_work()) == (0, 0, False)


def test_b9_a_row_stands_still_while_its_reader_is_behind() -> None:
    plan = schedule()
    slow, quick = admit(plan, 0, 1, tokens=100), admit(plan, 1, 1, tokens=100)
    run(plan, following(plan))
    while plan.statistics().held == 0:
        run(plan, following(plan))
        quick.unread.clear()
    assert UNREAD <= len(slow.unread) < UNREAD + 4
    assert kind(following(plan)) == (4, [1])
    slow.unread.clear()
    assert kind(following(plan)) == (4, [0, 1])


def test_nonsense_fails_its_row_and_no_other() -> None:
    plan = schedule()
    bad, good = admit(plan, 0, 1), admit(plan, 1, 1)
    program = following(plan)
    plan.receive(program, emitted(program, log=float("nan")), 0.0)
    assert isinstance(bad.error, InternalError)
    run(plan, following(plan))
    decode = following(plan)
    assert decode.evict is not None
    assert kind(decode) == (4, [1])
    assert decode.evict[0] == bad.owner
    assert good.error is None


def test_a_lost_state_fails_those_who_were_there() -> None:
    plan = schedule()
    there, not_yet = admit(plan, 0, 30), admit(plan, 1, 30)
    out = [following(plan), following(plan)]
    plan.lose(InternalError("gone"), everybody=False)
    for program in out:
        plan.dropped(program, 0.5)
    assert isinstance(there.error, InternalError)
    assert (there.busy, not_yet.error) == (0, None)
    assert plan.statistics().useful_seconds == 1.0  # nobody has cancelled anything
    assert kind(following(plan)) == (1, 0, 8, 8)


# Accounts


def test_law_16_a_program_is_paid_by_those_it_worked_for() -> None:
    plan = schedule()
    readers = [Somebody(), Somebody()]
    first, second = (admit(plan, slot, 2, reader=readers[slot]) for slot in range(2))
    programs = [following(plan) for _ in range(4)]
    run(plan, programs[0])
    readers[0].cancel()
    for program in programs[1:3]:
        run(plan, program)
    found = emitted(programs[3])
    found.owner[first.slot] = 0  # had come to its end on the device
    plan.receive(programs[3], found, 0.5)
    assert (readers[0].charged, readers[1].charged) == (1.0, 1.0)
    assert readers[1].steps == 1 + 4
    statistics = plan.statistics()
    assert (statistics.useful_seconds, statistics.wasted_seconds) == (1.5, 0.5)
    assert second.busy == 0


def test_law_16_what_outlasts_its_text_is_paid_by_the_next_one() -> None:
    plan = schedule()
    readers = [Somebody(), Somebody()]
    row = admit(plan, 0, 2, reader=readers[0])
    programs = [following(plan) for _ in range(3)]
    run(plan, programs[0])
    readers[0].live = False  # it has found its stop string; two programs are under way
    plan.leave(row)
    plan.settle(row, completed=True)
    for program in programs[1:]:
        run(plan, program)
    assert (readers[0].charged, plan.statistics().unpaid_seconds) == (0.5, 1.0)
    admit(plan, 0, 2, reader=readers[1])
    run(plan, following(plan))
    assert (readers[1].charged, plan.statistics().unpaid_seconds) == (1.5, 0.0)
    assert plan.statistics().useful_seconds == 2.0


def test_what_a_cancel_has_saved() -> None:
    """A piece of a prompt takes half a second here, and a token an eighth."""
    plan = schedule()

    def cancelled(programs: int, tokens: int = 17) -> float:
        reader = Somebody()
        row = admit(plan, 0, 24, tokens=tokens, reader=reader)
        for _ in range(programs):
            run(plan, following(plan))
        reader.cancel()
        plan.leave(row)
        plan.settle(row, completed=False)
        return reader.spared

    assert cancelled(0) == 0  # nobody knows
    assert cancelled(1) == 1.0  # two more pieces, and what a token takes nobody knows
    assert cancelled(5) == 8 / 8  # of 17 tokens
    assert cancelled(2) == 0.5 + 16 / 8
    whole = admit(plan, 0, 24, tokens=9)
    while whole.made != 9:
        run(plan, following(plan))
    plan.leave(whole)
    plan.settle(whole, completed=True)
    assert cancelled(5) == 0  # it had as many as texts have
    assert cancelled(4) == 4 / 8
    assert cancelled(4, tokens=6) == 1 / 8
    assert plan.statistics().saved_seconds == 1.0 + 1.0 + 2.5 + 0.5 + 0.125


# Stop strings


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stopped"),
    [
        (["abc", "def"], ["cd"], ["ab", ""], True),
        (["abc", "xef"], ["cd"], ["ab", "cxef"], False),
        (["aab"], ["ab"], ["a"], True),
        (["a", "a", "b", "b"], ["aab"], ["", "", "", ""], True),
        (["one two"], ["two", "one two"], [""], True),
        (["ab"], [], ["ab"], False),
    ],
)
def test_text_up_to_a_stop_string(pieces: list[str], stops: list[str], shown: list[str], stopped: bool) -> None:
    found = StopFilter(stops)
    assert [found.add(piece) for piece in pieces] == shown
    assert found.stopped is stopped


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_however_text_comes_a_stop_string_is_never_shown(pieces: list[str], stops: list[str]) -> None:
    found = StopFilter(stops)
    shown = "".join(found.add(piece) for piece in pieces) + found.finish()
    whole = "".join(pieces)
    assert whole.startswith(shown)
    assert found.stopped == any(stop in whole for stop in stops)
    assert found.stopped or shown == whole
    assert not any(stop in shown for stop in stops)
