"""The benchmark's soak, for a few seconds: readers who come and walk away, and books that stay flat and balance."""

from __future__ import annotations

from bench.soak import soak, verdicts


async def test_law_16_law_4_hundreds_of_texts_with_random_cancels_leave_nothing() -> None:
    books = await soak(400, books=4)
    assert books[-1].generations >= 400
    assert books[-1].cancelled > 100
    assert [said for holds, said in verdicts(books) if not holds] == []
