"""One function for each way to leave."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from ..observe import tree
from .clients import Call, StreamCall, Victim
from .pictures import damage, damaged, write_png
from .shared_scenes import SHARED_SCENES
from .stage import ENDLESS, Stage, say


async def an_answer(stage: Stage) -> None:
    stage.headline("1. An answer")
    began = monotonic_ns()
    call = stage.call("restore", 2_000)
    await stage.device.worked_for("restore")
    whole = tree()
    restored = (await call.output("RESTORED"))[0]
    took = (monotonic_ns() - began) / 1e6
    say("the whole tree while the request executes (below: what moves in it):")
    say(whole, indent=6)
    mask = damage()
    bad = damaged(stage.picture, mask)
    before, after = (np.abs(picture - stage.picture).mean() for picture in (bad, restored))
    say(f"inpaint: 2,000 sweeps in {took:.0f} ms; mean error {before:.4f} damaged, {after:.4f} restored")
    stage.claim("the restored picture is at least ten times closer to the original", after * 10 < before)
    sketch = await Call(stage.client, "sketch", {"IMAGE": restored[None]}, request_id="sketch").output("SKETCH")
    noisy = stage.picture + np.random.default_rng(0).normal(0, 0.08, stage.picture.shape).astype(np.float32)
    soft = await Call(stage.client, "soften", {"IMAGE": noisy[None]}, request_id="soften").output("SOFT")
    closer = np.abs(soft[0] - stage.picture).mean() < 0.5 * np.abs(noisy - stage.picture).mean()
    stage.claim("the softened picture has less than half of the noise", closer)
    write_png(stage.folder / "restored.png", stage.picture, bad, restored)
    write_png(stage.folder / "sketch-and-soften.png", sketch[0], noisy, soft[0])
    say(f"written: {stage.folder}/restored.png, {stage.folder}/sketch-and-soften.png")
    await stage.quiet()


async def cancelled_while_queued(stage: Stage) -> None:
    stage.headline("2. A cancel while queued: the instance is busy, and the one who waits leaves at once")
    executions = stage.inpaint.instances[0].executions
    busy = stage.call("busy", ENDLESS)
    await stage.device.worked_for("busy")
    waiting = stage.call("waiting", 100)
    await stage.queued(1)
    await stage.show_tree("just before")
    cancelled = monotonic_ns()
    waiting.cancel()
    await stage.cancels.released("waiting")
    in_queue, batch = len(stage.inpaint.scheduler), stage.inpaint.instances[0].batch
    await stage.gone("waiting")
    await stage.show_tree("just after")
    stage.claim_cancelled("a cancel while queued", ("waiting", cancelled), reasons=["client_reset"])
    stage.claim("at that moment its place was free, and the instance still busy", in_queue == 0 and batch is not None)
    busy.cancel()
    await stage.quiet()
    stage.claim("it never executed", stage.inpaint.instances[0].executions == executions + 1)


async def cancelled_while_executing(stage: Stage) -> None:
    stage.headline("3. A cancel while executing: the device lets go at its next checkpoint, and the next one runs")
    running = stage.call("running", ENDLESS)
    await stage.device.worked_for("running")
    waiting = stage.call("next", 100)
    await stage.queued(1)
    await stage.show_tree("just before")
    cancelled = monotonic_ns()
    running.cancel()
    await stage.cancels.released("running")
    await stage.gone("running")
    await stage.show_tree("just after")
    stage.claim_cancelled("a cancel while executing", ("running", cancelled), reasons=["client_reset"])
    await waiting.output("RESTORED")
    stage.claim("the request behind it has its answer", waiting.error is None)
    await stage.quiet()


async def deadline(stage: Stage) -> None:
    stage.headline("4. A deadline: the client gave it one second (client_timeout=1.0)")
    began = monotonic_ns()
    call = stage.call("hurried", ENDLESS, timeout=1.0)
    await stage.device.worked_for("hurried")
    await stage.show_tree("just before")
    await stage.cancels.released("hurried")
    await stage.gone("hurried")
    await stage.show_tree("just after")
    # Both sides have a clock, and the server's starts when the call arrives.  Where the client's is first, its reset says so.
    at = began + 1_000_000_000
    stage.claim_cancelled("the deadline", ("hurried", at), reasons=["deadline", "client_reset"])
    await call.done.wait()
    stage.claim("the client reads DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED" in str(call.error and call.error.status()))
    await stage.quiet()


async def killed_client(stage: Stage) -> None:
    stage.headline("5. A client killed with SIGKILL: it says nothing, the kernel closes its socket")
    connections = stage.connections()
    async with trio.open_nursery() as nursery:
        victim = await Victim.start(nursery, stage.address, "inpaint", "victim", ENDLESS)
        await stage.device.worked_for("victim")
        await stage.show_tree("just before")
        cancelled = monotonic_ns()
        victim.kill()
        await stage.cancels.released("victim")
        await stage.until("the connection is gone", lambda: stage.connections() == connections)
        await stage.show_tree("just after")
    stage.claim_cancelled("SIGKILL", ("victim", cancelled), reasons=["connection_lost"])
    await stage.quiet()
    stage.claim("its connection is gone, and so is all that was below it", stage.connections() == connections)


async def three_of_eight(stage: Stage) -> None:
    stage.headline("6. A batch of eight of which three leave: the others do not notice")
    undisturbed = await _run_eight(stage, "calm", leaving=())
    survivors = await _run_eight(stage, "row", leaving=(1, 4, 6))
    same = all(np.array_equal(undisturbed[i], survivors[i]) for i in survivors)
    stage.claim(
        f"the other {len(survivors)} results are bit for bit those of a run in which nobody left",
        same and len(survivors) == 5,
    )
    await stage.quiet()


async def _run_eight(stage: Stage, name: str, leaving: tuple[int, ...]) -> dict[int, npt.NDArray[Any]]:
    # Eight wait behind one; when it leaves, they make one batch.
    blocker = stage.call(f"{name}-blocker", ENDLESS)
    await stage.device.worked_for(f"{name}-blocker")
    calls = {}
    for i in range(8):
        calls[i] = stage.call(f"{name}{i}", 2_000, seed=i)
        await stage.queued(i + 1)  # so that the rows have the same order each time
    blocker.cancel()
    await stage.device.worked_for(f"{name}0")
    if leaving:
        batch = stage.inpaint.instances[0].batch
        stage.claim("eight requests share one execution", batch is not None and len(batch.members) == 8)
        await stage.show_tree("just before")
        cancelled = []
        for i in leaving:
            cancelled.append((f"{name}{i}", monotonic_ns()))
            calls[i].cancel()
        for i in leaving:
            await stage.cancels.released(f"{name}{i}")
            await stage.gone(f"{name}{i}")
        await stage.show_tree("just after")
        stage.claim_cancelled("each of three cancels", *cancelled, reasons=["client_reset"])
        stage.claim("the execution goes on for five", stage.inpaint.instances[0].batch is batch)
    return {i: await call.output("RESTORED") for i, call in calls.items() if i not in leaving}


async def stream(stage: Stage) -> None:
    stage.headline("7. A stream of previews, cancelled after twelve: a model works while somebody watches")
    model = stage.model("inpaint_preview")
    call = StreamCall(stage.address, "inpaint_preview", stage.inputs(ENDLESS), request_id="watched")
    previews = [(await call.response()).as_numpy("PREVIEW")[0] for _ in range(12)]
    await stage.show_tree("just before", "inpaint_preview")
    cancelled = await call.cancel()
    await stage.cancels.released("watched", model="inpaint_preview")
    await stage.gone("watched")
    await stage.show_tree("just after", "inpaint_preview")
    stage.claim_cancelled(
        "a cancel while streaming", ("watched", cancelled), reasons=["client_reset"], model="inpaint_preview"
    )
    await stage.quiet()
    stage.claim("its instance is free", model.instances[0].batch is None)
    call.close()
    write_png(stage.folder / "previews.png", *(previews[i] for i in (0, 1, 4, 11)))
    say(f"written: {stage.folder}/previews.png")


SCENES = (
    an_answer,
    cancelled_while_queued,
    cancelled_while_executing,
    deadline,
    killed_client,
    three_of_eight,
    stream,
    *SHARED_SCENES,
)
