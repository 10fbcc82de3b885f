import numpy as np
import trio
import trio.testing
from backends import RunningTotal
from stage import MODELS, note, run, say

import triton_trio

Model, Request = triton_trio.Model, triton_trio.InferenceRequest


def value(model: Model, name: str, number: float, **options: object) -> Request:
    """A request named like its sequence: a1 is the first of sequence a."""
    return model.request(
        {"VALUE": np.full((1, 1), number, np.float32)}, request_id=name, sequence_id=name[0], **options
    )


async def ask(model: Model, request: Request) -> None:
    try:
        response = await model.infer(request)
        note(f"   {request.request_id}: total {response.outputs['TOTAL'].item():g}")
    except triton_trio.TritonError as error:
        note(f"   {error}")


async def start_all(nursery: trio.Nursery, model: Model, *requests: Request) -> None:
    for request in requests:
        nursery.start_soon(ask, model, request, name=request.request_id)
        await trio.testing.wait_all_tasks_blocked()  # so that they queue up in this order


async def lesson() -> None:
    async with triton_trio.open_server(MODELS / "sequence", backends={"running_total": RunningTotal}) as server:
        model = server.model("total")

        say("1. A sequence: the model adds up, and what it has so far is kept from one request to the next.")
        await ask(model, value(model, "a1", 5, sequence_start=True))
        await ask(model, value(model, "a2", 7, sequence_end=True))

        say("2. One of three is cancelled, in the queue. Sequence b waits for the slot that a has.")
        a = [value(model, f"a{i}", 10, sequence_start=i == 1) for i in (1, 2, 3)]
        async with trio.open_nursery() as nursery:
            await start_all(nursery, model, *a, value(model, "b1", 1, sequence_start=True))
            await trio.sleep(0.5)
            a[1].cancel()
            # No await since the cancel: not a single task has run.
            say(f"   {[f'{r.request_id} {r.outcome} while {r.stage}' for r in a]}")
            say(f"   waiting: {[r.request_id for r in model.scheduler.queued()]}")

        say(
            "3. Who goes on is told; who starts anew, starts anew, and has nothing to fear from the old one's requests."
        )
        await ask(model, value(model, "a4", 10))
        async with trio.open_nursery() as nursery:
            b2, new = value(model, "b2", 1, sequence_end=True), value(model, "a1", 2, sequence_start=True)
            await start_all(nursery, model, b2, new)
            a[2].cancel()  # a late cancel; the new sequence has the same name and waits

        await slots(server.model("totals"))


async def slots(model: Model) -> None:
    def look() -> None:
        say(f"   rows: {[m.request.request_id if m.ready else 'not ready' for m in model.instances[0].batch.members]}")

    say("4. Two sequences in one execution. A slot is a row, in every batch. c leaves, and d's row stays where it is.")
    c1, d1 = value(model, "c1", 1, sequence_start=True), value(model, "d1", 1, sequence_start=True)
    c2, d2, d3 = value(model, "c2", 1), value(model, "d2", 1), value(model, "d3", 1)
    async with trio.open_nursery() as nursery:
        await start_all(nursery, model, c1, d1, c2, d2, d3)
        await trio.sleep(1.5)
        look()
        c2.cancel()
        await trio.sleep(1)
        look()


if __name__ == "__main__":
    run(lesson)
