"""Scenes of requests that share more than a batch: a sequence, an ensemble's parent, a resource."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from .clients import Call, StreamCall
from .pictures import write_png
from .stage import ENDLESS, Stage, say


async def sequence(stage: Stage) -> None:
    stage.headline("8. A sequence: one of its requests is cancelled, all leave, and the next sequence gets their slot")
    model = stage.model("exposures")
    slots = model.instances[0]

    def expose(request_id: str, frames: int, *, sequence_id: int = 1, start: bool = False) -> Call:
        inputs = {"IMAGE": stage.picture[None], "FRAMES": np.array([[frames]], np.int32)}
        return Call(
            stage.client,
            "exposures",
            inputs,
            request_id=request_id,
            sequence_id=sequence_id,
            sequence_start=start,
        )

    one = (await expose("one", 1, start=True).output("AVERAGE"))[0]
    more = expose("more", 63)
    average = (await more.output("AVERAGE"))[0]
    noise, less = (np.abs(picture - stage.picture).mean() for picture in (one, average))
    taken = int((await more.output("TAKEN"))[0, 0])
    stage.claim(f"the second answer has the first one's exposure in it: {taken} in all", taken == 64)
    stage.claim(f"and an eighth of its noise: {noise:.3f} after 1, {less:.3f} after 64", less < noise / 7)
    exposing = expose("exposing", ENDLESS)
    await stage.device.worked_for("exposing")
    mates = {}
    for number, name in enumerate(("second", "third"), 1):
        mates[name] = expose(name, 1)
        await stage.queued(number, model="exposures")
    other = expose("other", 1, sequence_id=2, start=True)
    await stage.queued(3, model="exposures")
    await stage.show_tree("just before", "exposures")
    cancelled = monotonic_ns()
    mates["second"].cancel()
    for name in ("exposing", "second", "third"):
        await stage.cancels.released(name, model="exposures")
        await stage.gone(name)
    fresh = (await other.output("AVERAGE"))[0]
    await stage.show_tree("just after", "exposures")
    stage.claim_cancelled("a cancel in a sequence", ("second", cancelled), reasons=["client_reset"], model="exposures")
    stage.claim_cancelled(
        "that cancel, for its mate,", ("exposing", cancelled), reasons=["sequence_cancelled"], model="exposures"
    )
    await exposing.done.wait()
    say(f"the client of 'exposing' reads: {exposing.error}")
    stage.claim("it names the sequence", "sequence 1" in str(exposing.error))
    stage.claim(
        "the sequence that waited has its slot, and begins with a state of its own: the bits of the first one's first answer",
        np.array_equal(fresh, one),
    )
    late = expose("late", 1)
    await late.done.wait()
    stage.claim("who comes late to the sequence that was cancelled needs a START", "START flag" in str(late.error))
    write_png(stage.folder / "exposures.png", one, average)
    say(f"written: {stage.folder}/exposures.png")
    await stage.quiet()
    stage.claim("the instance is free", slots.batch is None)


async def ensemble(stage: Stage) -> None:
    stage.headline(
        "9. An ensemble: its steps are requests inside of its own, in the queues and on the devices of others"
    )
    started = await _draw(stage)
    busy = stage.call("other-client", ENDLESS)
    await stage.device.worked_for("other-client")
    waiting = Call(stage.client, "studio", stage.inputs(100), request_id="studio-waits")
    await stage.queued(1)
    await stage.show_tree("just before, behind another client's work")
    cancelled = monotonic_ns()
    waiting.cancel()
    await stage.cancels.released("studio-waits")
    in_queue, batch = len(stage.inpaint.scheduler), stage.inpaint.instances[0].batch
    await stage.gone("studio-waits")
    await stage.show_tree("just after")
    stage.claim_cancelled("an ensemble's step queued", ("studio-waits", cancelled), reasons=["client_reset"])
    stage.claim(
        "its place in the queue was free, and the other client still served", in_queue == 0 and batch is not None
    )
    busy.cancel()
    await stage.cancels.released("other-client")
    running = Call(stage.client, "studio", stage.inputs(ENDLESS), request_id="studio-runs")
    await stage.device.worked_for("studio-runs")
    await stage.show_tree("just before, while its first step executes")
    cancelled = monotonic_ns()
    running.cancel()
    await stage.cancels.released("studio-runs")
    await stage.gone("studio-runs")
    await stage.show_tree("just after")
    stage.claim_cancelled("an ensemble's step executing", ("studio-runs", cancelled), reasons=["client_reset"])
    await stage.quiet()
    stage.claim("in both cases no later step was started", _started(stage) == started)


async def _draw(stage: Stage) -> dict[str, int]:
    drawn = Call(stage.client, "studio", stage.inputs(500), request_id="studio")
    pencil, ink = [(await drawn.output(name))[0] for name in ("PENCIL", "INK")]
    restored = await stage.call("by-hand", 500).output("RESTORED")
    by_hand = await Call(stage.client, "sketch", {"IMAGE": restored}, request_id="by-hand").output("SKETCH")
    stage.claim("its drawing has the bits that the steps make one by one", np.array_equal(pencil, by_hand[0]))
    write_png(stage.folder / "studio.png", restored[0], pencil, ink)
    say(f"written: {stage.folder}/studio.png")
    return _started(stage)


def _started(stage: Stage) -> dict[str, int]:
    return {name: stage.server.model(name).counters.started for name in ("sketch", "soften")}


async def rate_limiter(stage: Stage) -> None:
    stage.headline("10. A rate limiter: two models need the easel, and one has it")
    instance = stage.inpaint.instances[0]
    executions = instance.executions

    def in_line() -> bool:
        return instance.seat.permit is not None and instance.seat.permit.waiting

    painter = StreamCall(stage.address, "inpaint_preview", stage.inputs(ENDLESS), request_id="painter")
    await painter.response()
    first = stage.call("walks-away", 100)
    await stage.queued(1)
    second = stage.call("stays", 100)
    await stage.queued(2)
    await stage.until("inpaint's instance stands in line", in_line)
    stage.claim("inpaint's instance is free, and two wait for it", instance.batch is None)
    await stage.show_tree("just before", "inpaint", "inpaint_preview")
    cancelled = monotonic_ns()
    first.cancel()
    await stage.cancels.released("walks-away")
    await stage.gone("walks-away")
    await stage.until("inpaint's instance stands in line for the other one", in_line)
    await stage.show_tree("just after", "inpaint", "inpaint_preview")
    stage.claim_cancelled("a cancel in line for the easel", ("walks-away", cancelled), reasons=["client_reset"])
    await painter.cancel()
    restored: npt.NDArray[Any] = await second.output("RESTORED")
    painter.close()
    await stage.quiet()
    only_one = instance.executions == executions + 1
    stage.claim("the easel went to the one who stayed, and to nobody else", only_one and restored.size)
    limiter = stage.server.statistics().rate_limiter
    free = [(pool.name, pool.free) for pool in limiter.resources] if limiter is not None else []
    stage.claim("and is free again", free == [("easel", 1)])


SHARED_SCENES = (sequence, ensemble, rate_limiter)
