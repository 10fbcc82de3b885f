"""Law 16 for device time, where one program works for the texts in several slots."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from triton_trio import Reason
from triton_trio.testing.device import DeviceGate

from ..world import until
from .served import SLOTS, Text, drawn, open_served, write_language_model


async def test_law_16_device_seconds_balance_when_texts_are_left(tmp_path: Path) -> None:
    rng = random.Random(16)
    write_language_model(tmp_path)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        at_load = served.device.device_seconds
        assert gate.dispatched == 0
        requests = [served.model.request(drawn(number, tokens=12)) for number in range(SLOTS + 2)]
        async with trio.open_nursery() as readers:
            await served.start(readers, *((request, Text()) for request in requests[:SLOTS]))
            for request in requests[SLOTS:]:
                readers.start_soon(served.read, request)
            for request in rng.sample(requests[:SLOTS], 2):
                await served.advance(3)
                request.cancel(Reason.CLIENT_RESET)
            gate.open()
        await until(lambda: served.model.counters.execution_count == len(requests))
        await served.stands_still()
        counters = served.model.counters
        assert counters.device_seconds_wasted > 0
        assert counters.device_seconds_useful > 0
        assert counters.device_seconds_useful + counters.device_seconds_wasted == pytest.approx(
            served.device.device_seconds - at_load
        )
