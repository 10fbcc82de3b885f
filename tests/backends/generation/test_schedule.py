"""What the device does next: decisions, without a device and without a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_trio.backends.jax.generation.schedule import UNREAD, Generation, Program, Settings, SlotSchedule
from triton_trio.backends.jax.generation.slots import NO_TOKEN, Emitted
from triton_trio.backends.jax.generation.text import StopFilter
from triton_trio.errors import InternalError

from .tiny import SPEC


def schedule() -> SlotSchedule:
    return SlotSchedule(SPEC, (4, 8))


def admit(plan: SlotSchedule, slot: int, length: int, tokens: int = 20) -> Generation:
    return plan.admit(slot, np.arange(length, dtype=np.int32), Settings(max_tokens=tokens))


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


def test_prompts_are_cut_by_themselves_and_alternate_with_tokens() -> None:
    plan = schedule()
    admit(plan, 0, 3)
    admit(plan, 1, 19)
    admit(plan, 2, 9)
    made = [kind(plan.next_program(waiting=False, steps=4)) for _ in range(10)]
    assert made == [
        (0, 0, 3, 4),
        (1, [0]),
        (1, 0, 8, 8),
        (1, [0]),
        (1, 8, 8, 8),
        (1, [0]),
        (1, 16, 3, 4),
        (1, [0, 1]),
        (2, 0, 8, 8),
        (1, [0, 1]),
    ]
    assert kind(following(plan)) == (2, 8, 1, 4)
    assert kind(following(plan)) == (4, [0, 1, 2])  # nobody waits any more: several at once
    assert kind(following(plan, waiting=True)) == (1, [0, 1, 2])


def test_nothing_is_made_that_nobody_asked_for() -> None:
    plan = schedule()
    row = admit(plan, 0, 3, tokens=3)
    assert plan.next_program(waiting=False, steps=1) is not None
    assert plan.most_steps() == 2
    following(plan, steps=2)
    assert row.made == 3
    assert plan.next_program(waiting=False, steps=1) is None
    assert not plan.has_work()


def test_law_7_who_has_left_is_put_out_with_the_next_program_that_could_move_them() -> None:
    plan = schedule()
    first, second = admit(plan, 0, 2), admit(plan, 1, 2)
    programs = [following(plan) for _ in range(4)]
    assert kind(programs[-1]) == (4, [0, 1])
    plan.leave(first)
    program = following(plan)
    assert program.evict is not None
    assert program.hold is not None
    assert program.evict.tolist() == [first.owner, 0, 0, 0]
    assert program.hold.tolist() == [True, False, True, True]
    following_one = following(plan)
    assert following_one.evict is not None
    assert not following_one.evict.any()
    assert second.busy == 4


def test_law_7_a_new_owners_first_piece_puts_the_old_one_out() -> None:
    plan = schedule()
    old = admit(plan, 0, 2)
    behind = following(plan)
    plan.leave(old)
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
    assert plan.statistics().wasted_seconds == 0.5


def test_law_7_a_token_for_another_owner_reaches_nobody() -> None:
    plan = schedule()
    row = admit(plan, 0, 2)
    program = following(plan)
    plan.receive(program, emitted(program, owner=row.owner + 1), 0.0)
    assert not row.unread


def test_a_prompt_that_is_left_half_way_needs_no_eviction() -> None:
    plan = schedule()
    row = admit(plan, 0, 20)
    run(plan, following(plan))
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
    there, not_yet = admit(plan, 0, 30), admit(plan, 1, 3)
    out = [following(plan), following(plan)]
    plan.lose(InternalError("gone"), everybody=False)
    plan.dropped(out)
    assert isinstance(there.error, InternalError)
    assert (there.busy, not_yet.error) == (0, None)
    assert kind(following(plan)) == (1, 0, 3, 4)


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
