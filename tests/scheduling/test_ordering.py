"""preserve_ordering, by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.scheduling.requests import make
from triton_trio.request import InferenceRequest
from triton_trio.scheduling.ordering import ResponseOrder


class Line:
    def __init__(self, labels: str) -> None:
        self.order = ResponseOrder()
        self.sent = ""
        self.requests = {label: make(label) for label in labels}
        for request in self.requests.values():
            self.order.expect(request)

    def answer(self, label: str) -> None:
        self.order.hand_over(self.requests[label], lambda: self._send(label))

    def leave(self, label: str) -> None:
        self.order.forget(self.requests[label])

    def _send(self, label: str) -> None:
        self.sent += label


def test_an_answer_waits_for_those_before_it() -> None:
    line = Line("abc")
    line.answer("c")
    line.answer("b")
    assert line.sent == ""
    line.answer("a")
    assert line.sent == "abc"
    assert len(line.order) == 0


def test_who_leaves_holds_nobody_back() -> None:
    line = Line("abc")
    line.answer("b")
    line.answer("c")
    line.leave("a")
    assert line.sent == "bc"


def test_who_leaves_with_an_answer_waiting_does_not_get_it() -> None:
    line = Line("abc")
    line.answer("b")
    line.leave("b")
    line.answer("a")
    assert line.sent == "a"
    line.answer("b")  # too late: nobody expects it
    assert line.sent == "a"
    assert len(line.order) == 1


def test_an_answer_may_make_its_request_leave() -> None:
    order = ResponseOrder()
    sent: list[str] = []
    requests = [make(label) for label in "abc"]

    def answer(request: InferenceRequest) -> None:
        sent.append(request.request_id)
        order.forget(request)  # as settling it does

    for request in requests:
        order.expect(request)
    for request in reversed(requests):
        order.hand_over(request, lambda request=request: answer(request))
    assert sent == ["a", "b", "c"]


@given(st.permutations("abcdef"), st.lists(st.booleans(), min_size=6, max_size=6))
def test_answers_go_out_in_order_whatever_ends_when(ends: list[str], answered: list[bool]) -> None:
    line = Line("abcdef")
    for label, has_answer in zip(ends, answered, strict=True):
        (line.answer if has_answer else line.leave)(label)
        assert list(line.sent) == sorted(line.sent)
    assert set(line.sent) == {label for label, has_answer in zip(ends, answered, strict=True) if has_answer}
    assert len(line.order) == 0
