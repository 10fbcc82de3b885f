"""Law 16 for device time, where one program works for the texts in several slots."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from triton_trio import Reason

from .served import Text, Watch, alone, asks, drawn, open_served, write_language_model
from .tiny import prompt


async def test_law_16_device_seconds_balance_however_texts_end(tmp_path: Path) -> None:
    """At their last token, at an end token or a stop string that nobody could foresee, by a cancel, by an error."""
    rng = random.Random(16)
    write_language_model(tmp_path)
    watch = Watch()
    stop = f"w{alone(2, 9)[0][4]}".encode()
    async with open_served(tmp_path, gate=watch) as served:
        at_load = served.device.device_seconds
        inputs = [drawn(number, tokens=12) for number in range(5)]
        inputs += [asks(prompt(1, 9), temperature=50.0, seed=seed) for seed in range(4)]
        inputs += [drawn(2, 9) | asks([], input_ids=prompt(2, 9), stop=[stop]) for _ in range(3)]
        requests = [served.model.request(each) for each in rng.sample(inputs, len(inputs))]
        async with trio.open_nursery() as readers:
            await served.start(readers, *((request, Text()) for request in requests))
            for leaver in (requests[1], requests[4], requests[7]):
                await served.run_until(lambda leaver=leaver: leaver.outcome or leaver.bound_at)
                programs = watch.ended + 5
                await served.run_until(lambda programs=programs: watch.ended == programs)
                leaver.cancel(Reason.CLIENT_RESET)
            watch.fail(watch.dispatched + 3, "INTERNAL: a bit has flipped")
            watch.open()
        await served.idle()
        counters, schedule = served.model.counters, served.engine.schedule
        assert served.engine.resets == 1
        assert min(counters.device_seconds_useful, counters.device_seconds_wasted, counters.device_seconds_saved) > 0
        assert counters.device_seconds_useful == pytest.approx(schedule.useful_seconds)
        assert counters.device_seconds_wasted == pytest.approx(schedule.wasted_seconds)
        assert counters.device_seconds_saved == pytest.approx(schedule.saved_seconds)
        assert schedule.useful_seconds + schedule.wasted_seconds + schedule.unpaid_seconds == pytest.approx(
            served.device.device_seconds - at_load
        )
