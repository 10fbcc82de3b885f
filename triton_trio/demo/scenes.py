"""One function for each way to leave."""

from __future__ import annotations

import time

import numpy as np
import trio

from .clients import Call, StreamCall, Victim
from .pictures import damage, damaged, write_png
from .stage import Stage

#: More than a scene ever waits for: tens of seconds of work.
ENDLESS = 1_000_000


async def an_answer(stage: Stage) -> None:
    """Real input, a real answer."""
    stage.headline("1. An answer")
    began = time.perf_counter()
    call = stage.call("restore", 2_000)
    restored = (await call.output("RESTORED"))[0]
    took = time.perf_counter() - began
    mask = damage()
    before = np.abs(damaged(stage.picture, mask) - stage.picture).mean()
    after = np.abs(restored - stage.picture).mean()
    stage.say(f"inpaint: 2,000 sweeps in {took * 1e3:.0f} ms; mean error {before:.4f} damaged, {after:.4f} restored")
    stage.claim("the restored picture is at least ten times closer to the original", after * 10 < before)
    image = {"IMAGE": restored[None]}
    sketch = await Call(stage.client, "sketch", image, request_id="sketch").output("SKETCH")
    noisy = stage.picture + np.random.default_rng(0).normal(0, 0.08, stage.picture.shape).astype(np.float32)
    soft = await Call(stage.client, "soften", {"IMAGE": noisy}, request_id="soften").output("SOFT")
    closer = np.abs(soft - stage.picture).mean() < 0.5 * np.abs(noisy - stage.picture).mean()
    stage.claim("the softened picture has less than half of the noise", bool(closer))
    write_png(stage.folder / "restored.png", stage.picture, damaged(stage.picture, mask), restored)
    write_png(stage.folder / "sketch-and-soften.png", np.repeat(sketch[0][..., None], 3, -1), noisy, soft)
    stage.say(f"written: {stage.folder}/restored.png, {stage.folder}/sketch-and-soften.png")


async def cancelled_while_queued(stage: Stage) -> None:
    """The instance is busy; the one who waits leaves the queue at once."""
    stage.headline("2. A cancel while queued")
    executions = stage.inpaint.instances[0].executions
    busy = stage.call("busy", ENDLESS)
    await stage.executing("busy")
    waiting = stage.call("waiting", 100)
    await stage.queued(1)
    await stage.show_tree("just before")
    cancelled = time.monotonic_ns()
    waiting.cancel()
    released = await stage.log.released("waiting")
    await stage.show_tree("just after")
    stage.report("while queued", cancelled, released)
    stage.claim(
        "it was cancelled in the queue, by the client", (released.stage, released.reason) == ("queued", "client_reset")
    )
    stage.claim("its place is free, and the instance is still busy", not stage.inpaint.scheduler.queue)
    busy.cancel()
    await stage.quiet()
    stage.claim("it never executed", stage.inpaint.instances[0].executions == executions + 1)


async def cancelled_while_executing(stage: Stage) -> None:
    """The program on the device stops; who waits behind it gets the instance."""
    stage.headline("3. A cancel while executing")
    running = stage.call("running", ENDLESS)
    await stage.executing("running")
    waiting = stage.call("next", 100)
    await stage.queued(1)
    await stage.show_tree("just before")
    bound = stage.two_chunks()
    cancelled = time.monotonic_ns()
    running.cancel()
    released = await stage.log.released("running")
    await stage.show_tree("just after")
    stage.report("while executing", cancelled, released)
    stage.claim("it was cancelled while executing", released.stage == "executing")
    stage.claim(
        f"no more than the running and the queued chunk ran on (at most {bound} steps)",
        released.steps_after_cancel <= bound,
    )
    await waiting.output("RESTORED")
    stage.claim("the request behind it has its answer", waiting.error is None)
    await stage.quiet()


async def deadline(stage: Stage) -> None:
    """The client's time is up, on both sides."""
    stage.headline("4. A deadline")
    began = time.monotonic_ns()
    call = stage.call("hurried", ENDLESS, timeout=0.5)
    await stage.executing("hurried")
    await stage.show_tree("just before")
    released = await stage.log.released("hurried")
    await stage.show_tree("just after")
    stage.report("deadline passed", began + 500_000_000, released)
    await call.done.wait()
    stage.claim("the client reads DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED" in str(call.error and call.error.status()))
    # Two clocks run: the server's starts when the call arrives.  If the client's is first, its reset says so.
    stage.claim(
        "the server ended it at its own deadline, or at the client's", released.reason in ("deadline", "client_reset")
    )
    await stage.quiet()


async def killed_client(stage: Stage) -> None:
    """SIGKILL: the client says nothing, its socket closes."""
    stage.headline("5. A client killed with SIGKILL")
    async with trio.open_nursery() as nursery:
        victim = await Victim.start(nursery, stage.address, "inpaint", "victim", ENDLESS)
        await stage.executing("victim")
        await stage.show_tree("just before")
        cancelled = time.monotonic_ns()
        victim.kill()
        released = await stage.log.released("victim")
        await stage.show_tree("just after")
    stage.report("client killed", cancelled, released)
    stage.claim("the server saw the connection go", released.reason == "connection_lost")
    await stage.quiet()


async def batch_of_eight(stage: Stage) -> None:
    """Three of eight leave; the others get, bit for bit, what they would have got."""
    stage.headline("6. A batch of eight of which three leave")
    undisturbed = await _run_eight(stage, "calm", leaving=())
    survivors = await _run_eight(stage, "left", leaving=(1, 4, 6))
    same = all(np.array_equal(undisturbed[i], survivors[i]) for i in survivors)
    stage.claim(f"the {len(survivors)} results are bit for bit those of a run in which nobody left", same)
    await stage.quiet()


async def _run_eight(
    stage: Stage, name: str, leaving: tuple[int, ...]
) -> dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    # Eight wait behind one; when it leaves, they make one batch.
    blocker = stage.call(f"{name}-blocker", ENDLESS)
    await stage.executing(f"{name}-blocker")
    calls = {i: stage.call(f"{name}{i}", 1_500, seed=i) for i in range(8)}
    await stage.queued(8)
    blocker.cancel()
    await stage.executing(f"{name}0")
    batch = stage.inpaint.instances[0].batch
    stage.claim("eight requests share one execution", batch is not None and len(batch.members) == 8)
    if leaving:
        await stage.show_tree("just before")
        bound = stage.two_chunks()
        cancelled = {}
        for i in leaving:
            cancelled[i] = time.monotonic_ns()
            calls[i].cancel()
        for i in leaving:
            released = await stage.log.released(f"{name}{i}")
            stage.report(f"1 of 8 (row {i})", cancelled[i], released)
            stage.claim(
                f"its row was left out of the next chunk (at most {bound} steps)", released.steps_after_cancel <= bound
            )
        await stage.show_tree("just after")
    return {i: await call.output("RESTORED") for i, call in calls.items() if i not in leaving}


async def stream(stage: Stage) -> None:
    """A decoupled model shows its work until nobody watches."""
    stage.headline("7. A stream of previews, cancelled after five")
    model = stage.server.model("inpaint_preview")
    call = StreamCall(stage.address, "inpaint_preview", stage.inputs(ENDLESS), request_id="watched")
    previews = []
    for _ in range(5):
        response = await call.responses.receive()
        if isinstance(response, Exception):
            raise response
        previews.append(response.as_numpy("PREVIEW")[0])
    await stage.show_tree("just before", model="inpaint_preview")
    bound = stage.two_chunks(model)
    cancelled = time.monotonic_ns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.cancel, name="stop_stream")
        released = await stage.log.released("watched")
    await stage.show_tree("just after", model="inpaint_preview")
    stage.report("while streaming", cancelled, released)
    stage.claim(
        f"the model stopped within its running and its queued chunk (at most {bound} steps)",
        released.steps_after_cancel <= bound,
    )
    await stage.quiet()
    stage.claim("its instance is free", model.instances[0].batch is None)
    call.close()
    write_png(stage.folder / "previews.png", *previews[::2])
    stage.say(f"written: {stage.folder}/previews.png")


SCENES = (
    an_answer,
    cancelled_while_queued,
    cancelled_while_executing,
    deadline,
    killed_client,
    batch_of_eight,
    stream,
)
