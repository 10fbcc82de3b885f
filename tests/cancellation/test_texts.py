"""Blocking place: a text that is being made, in a program that works for several."""

from __future__ import annotations

import gc
import logging
import weakref
from itertools import combinations
from pathlib import Path

import jax
import pytest
import trio
import trio.testing

from tests.backends.generation.served import (
    SLOTS,
    Served,
    Text,
    Watch,
    alone,
    drawn,
    open_served,
    write_language_model,
)
from tests.backends.world import until
from triton_trio import Outcome, Reason, RequestCancelled, Unavailable
from triton_trio.backends.jax.device import WINDOW
from triton_trio.instance import InstanceState
from triton_trio.testing import assert_quiescent, orders

#: Prompts of three pieces, of two and of one; whoever is fourth waits for a slot.
LENGTHS = {1: 40, 2: 20, 3: 9, 4: 20}
TOKENS = 8


def steps_after_cancel(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Of the requests that have left since the last call, the steps that the device still made for each."""
    records = [record for record in caplog.records if record.name == "triton_trio.cancel"]
    found = [record.__dict__["device_steps_after_cancel"] for record in records]
    caplog.clear()
    return found


class Scene:
    """Texts side by side, and one that waits for a slot."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.requests = {n: served.model.request(drawn(n, length, TOKENS)) for n, length in LENGTHS.items()}
        self.texts = {n: Text() for n in LENGTHS}

    async def start(self, readers: trio.Nursery) -> None:
        for number, request in self.requests.items():
            await self.served.start(readers, (request, self.texts[number]))

    def check(self, cancelled: tuple[int, ...]) -> None:
        """Whoever stayed has what they would have had; whoever left, the beginning of it."""
        for number, text in self.texts.items():
            ids, logs = alone(number, LENGTHS[number], TOKENS)
            if number in cancelled and text.error is not None:
                assert isinstance(text.error, RequestCancelled)
                assert text.bits == (ids[: len(text.ids)], logs[: len(text.ids)])
            else:
                assert text.bits == (ids, logs)


@pytest.mark.parametrize("count", range(1, SLOTS + 2))
async def test_B9_survivors_are_bit_equal_whoever_leaves_between_any_two_programs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """Pieces of prompts and tokens alternate, so every phase comes by; each time others leave, ``count`` in one tick."""
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    write_language_model(tmp_path)
    watch = Watch()
    leavers = list(combinations(LENGTHS, count))
    for number, length in LENGTHS.items():
        alone(number, length, TOKENS)  # has arrays of its own, and takes its time
    arrays: set[int] = set()

    async def scene(programs: int, *cancelled: int) -> None:
        before, scene = watch.ended, Scene(served)
        async with trio.open_nursery() as readers:
            await scene.start(readers)
            await watch.wait_dispatched(before + WINDOW)
            await served.run_until(lambda: watch.ended == before + programs)
            unheard = programs % 2
            watch.let_end(unheard)  # one more, and it is not heard of before the cancel
            watch.block_until_waiting_for(watch.ended + 1 + unheard)
            owners = {watch.owner_in(served.slot_of(scene.requests[number])) for number in cancelled}
            dispatched = watch.dispatched
            for number in cancelled:
                scene.requests[number].cancel(Reason.CLIENT_RESET)
            await served.run_until(lambda: not served.model._live and not served.device.jobs)
        scene.check(cancelled)
        assert not owners & {owner for program in watch.owners[dispatched:] for owner in program}
        # On the device were two, and one whose end had not been heard of.
        assert all(steps <= WINDOW + unheard for steps in steps_after_cancel(caplog))

    async with open_served(tmp_path, gate=watch) as served:
        for programs in range(20):
            await scene(programs, *leavers[programs % len(leavers)])
            await served.idle()
            await trio.testing.wait_all_tasks_blocked()
            assert_quiescent(served.server)
            assert served.engine.schedule.slots_in_use == 0
            arrays.add(len(jax.live_arrays()))
        assert served.engine.schedule.stale_tokens > 0
    assert len(arrays) == 1


async def test_law_3_a_cancel_is_seen_though_no_task_has_run_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The event loop stands still after the abort function, and the device thread goes on by itself."""
    caplog.set_level(logging.INFO, "triton_trio.cancel")
    write_language_model(tmp_path)
    watch = Watch()
    async with open_served(tmp_path, gate=watch) as served:
        requests = [served.model.request(drawn(number, 9)) for number in (1, 2)]
        texts = [Text(), Text()]
        async with trio.open_nursery() as readers:
            await served.start(readers, *zip(requests, texts, strict=True))
            await served.run_until(lambda: all(text.ids for text in texts))
            ended = watch.ended
            watch.block_until_waiting_for(ended + 1)
            leaver, stayer = (watch.owner_in(served.slot_of(request)) for request in requests)
            assert {leaver, stayer} == set(watch.owners[-1])

            requests[0].cancel(Reason.CLIENT_RESET)
            watch.let_end(2)
            watch.block_until_waiting_for(ended + 3)

            # The one turn that was in line; there are no more until the event loop goes on.
            assert watch.owners[ended + WINDOW :] == [(stayer,)]
            watch.open()
        assert isinstance(texts[0].error, RequestCancelled)
        assert texts[1].bits == alone(2, 9)
        assert steps_after_cancel(caplog) == [WINDOW]


async def test_B1_a_cancel_in_the_tick_of_the_last_token(tmp_path: Path) -> None:
    """What the device thread says of the last token and the cancel come in one tick, in both orders."""
    write_language_model(tmp_path)
    watch = Watch()
    token = trio.lowlevel.current_trio_token()
    async with open_served(tmp_path, gate=watch) as served:

        async def scene(*order: str) -> tuple[Text, Text]:
            requests = [served.model.request(drawn(number, 9, tokens)) for number, tokens in ((1, 4), (2, 12))]
            texts = [Text(), Text()]
            acted = trio.Event()

            def complete() -> None:
                ended = watch.ended
                watch.let_end()
                watch.block_until_waiting_for(ended + 2)

            acts = {
                "complete": complete,
                "cancel": lambda: requests[0].cancel(Reason.CLIENT_RESET),
                "neighbour": lambda: requests[1].cancel(Reason.CLIENT_RESET),
            }

            def act(*rest: str) -> None:
                acts[rest[0]]()
                # Behind what the device thread has said meanwhile.
                token.run_sync_soon(*((act, *rest[1:]) if rest[1:] else (acted.set,)))

            async with trio.open_nursery() as readers:
                await served.start(readers, *zip(requests, texts, strict=True))
                await served.run_until(lambda: len(texts[0].ids) == 3)
                act(*order)
                await acted.wait()
                await served.run_until(lambda: not served.model._live and not served.device.jobs)
            await served.idle()
            await trio.testing.wait_all_tasks_blocked()
            assert_quiescent(served.server)
            return texts[0], texts[1]

        for order in orders(("complete", "cancel", "neighbour")):
            victim, neighbour = await scene(*order)
            expected = alone(1, 9, 4)
            if victim.error is None:
                assert victim.bits == expected
            else:
                assert isinstance(victim.error, RequestCancelled) and "cancel" in order
                assert victim.ids == expected[0][: len(victim.ids)]
            if "neighbour" in order:
                assert isinstance(neighbour.error, RequestCancelled)
            else:
                assert neighbour.bits == alone(2, 9, 12)
            if order[0] == "cancel":
                assert victim.error is not None


async def test_D6_a_parked_text_is_left(tmp_path: Path) -> None:
    """Its reader is behind, nothing of it is on the device: the cancel waits for nothing, and the slot has a next owner."""
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:
        async with served.model.open_responses(served.model.request(drawn(2, 10, 80))) as responses:
            await anext(responses)
            await until(lambda: served.engine.schedule.held)
            await served.stands_still()
            programs = served.engine.decodes
        await served.idle()
        assert served.engine.decodes == programs
        texts = {number: Text() for number in range(3, 3 + SLOTS)}
        async with trio.open_nursery() as readers:
            await served.start(readers, *((served.model.request(drawn(n)), text) for n, text in texts.items()))
        assert {number: text.bits for number, text in texts.items()} == {number: alone(number) for number in texts}
        assert served.engine.schedule.evictions == 1


async def test_C7_nothing_of_a_cancelled_request_is_kept(tmp_path: Path) -> None:
    """While others go on in the same programs, and without a look at garbage."""
    write_language_model(tmp_path)
    watch = Watch()
    gc.collect()
    gc.disable()
    try:
        async with open_served(tmp_path, gate=watch) as served:
            neighbour = Text()
            async with trio.open_nursery() as readers:
                await served.start(readers, (served.model.request(drawn(2, 20, 60)), neighbour))
                for programs in range(8):
                    request = served.model.request(drawn(1, 40, 20))
                    kept = weakref.ref(request.inputs["input_ids"])
                    await served.start(readers, (request, Text()))
                    cancel_at = watch.ended + programs
                    await served.run_until(lambda: watch.ended == cancel_at)  # noqa: B023
                    request.cancel(Reason.CLIENT_RESET)
                    del request
                    await served.run_until(lambda: watch.ended == cancel_at + WINDOW + 1)  # noqa: B023
                    assert kept() is None, programs
                watch.open()
            assert neighbour.bits == alone(2, 20, 60)
    finally:
        gc.enable()


async def test_B5_a_device_that_hangs_ends_every_text_there(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    """The gate never opens.  The watchdog needs no new traffic."""
    write_language_model(tmp_path)
    watch = Watch()
    async with open_served(tmp_path, gate=watch, release_limit=5) as served:
        scene, model = Scene(served), served.model
        async with trio.open_nursery() as readers:
            await scene.start(readers)
            await watch.wait_dispatched(WINDOW)
            await trio.testing.wait_all_tasks_blocked()
            # Whoever is on the device; the first of the others may have had to wait for it.
            (on_device,) = watch.owners[0]
            leaver = next(
                n for n, request in scene.requests.items() if watch.owner_in(served.slot_of(request)) == on_device
            )
            scene.requests[leaver].cancel(Reason.CLIENT_RESET)
            await trio.testing.wait_all_tasks_blocked()
            assert isinstance(scene.texts[leaver].error, RequestCancelled)  # at once
            assert model.ready
            mock_clock.autojump_threshold = 0.0
        mock_clock.autojump_threshold = float("inf")
        assert trio.current_time() == scene.requests[leaver].ended_at + 5
        for number in {1, 2, 3, 4} - {leaver}:
            error = scene.texts[number].error
            assert isinstance(error, Unavailable)
            assert "reload the model" in error.message
        assert scene.requests[4].outcome is Outcome.REJECTED  # it had no slot yet
        assert not model.ready and not served.server.ready
        assert all(instance.state is InstanceState.QUARANTINED for instance in model.instances)
        with pytest.raises(Unavailable, match="no instance left: device cpu:0 was given up"):
            async with model.open_responses(model.request(drawn(1))):
                pass
        assert watch.dispatched == WINDOW
