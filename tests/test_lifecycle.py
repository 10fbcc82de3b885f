"""The table of a request's life, and what everybody may rely on because of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_trio.lifecycle import TRANSITIONS, Event, LifecycleError, Outcome, Stage, advance


def test_every_stage_is_in_the_table_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(Stage)
    reached = {Stage.RECEIVED, *(after for row in TRANSITIONS.values() for after in row.values())}
    assert reached == {*Stage, *Outcome}


@pytest.mark.parametrize("stage", Stage)
def test_law_1_a_cancel_and_a_deadline_are_possible_everywhere(stage: Stage) -> None:
    assert advance(stage, Event.CANCEL) is Outcome.CANCELLED
    assert advance(stage, Event.EXPIRE) is Outcome.DEADLINE
    assert advance(stage, Event.FAIL) is Outcome.ERROR


def test_law_8_only_a_request_that_has_responded_can_be_ok() -> None:
    ways = {(stage, event) for stage, row in TRANSITIONS.items() for event, after in row.items() if after is Outcome.OK}
    assert ways == {(Stage.RESPONDING, Event.COMPLETE)}


@pytest.mark.parametrize("stage", Stage)
def test_a_queue_policy_can_reject_a_request_wherever_it_is_for_an_ensemble_has_queues_behind_it(stage: Stage) -> None:
    assert advance(stage, Event.REJECT) is Outcome.REJECTED


@pytest.mark.parametrize(
    ("stage", "event"), [(stage, event) for stage in Stage for event in Event if event not in TRANSITIONS[stage]]
)
def test_what_is_not_in_the_table_is_a_bug_in_the_server(stage: Stage, event: Event) -> None:
    with pytest.raises(LifecycleError, match=f"'{event.value}' in stage '{stage.value}'"):
        advance(stage, event)


@given(st.lists(st.sampled_from(Event)))
def test_law_5_every_life_is_a_path_through_the_stages_and_ends_once(events: list[Event]) -> None:
    order = list(Stage)
    now: Stage | Outcome = Stage.RECEIVED
    for event in events:
        assert isinstance(now, Stage)
        if event not in TRANSITIONS[now]:
            continue
        after = advance(now, event)
        if isinstance(after, Outcome):
            return
        if event is Event.RESCHEDULE:
            assert after is Stage.QUEUED  # the only way back
        else:
            assert order.index(after) - order.index(now) in (0, 1)  # never over a stage
        now = after
