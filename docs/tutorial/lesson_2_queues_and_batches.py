import numpy as np
import trio
from stage import MODELS, run, say

import triton_trio


async def lesson() -> None:
    async with triton_trio.open_server(MODELS / "batching") as server:
        await leaving_a_queue(server.model("one_at_a_time"))
        await owners_of_a_batch(server.model("batched"))


async def start_all(
    nursery: trio.Nursery, model: triton_trio.Model, requests: list[triton_trio.InferenceRequest]
) -> None:
    async def ask(request: triton_trio.InferenceRequest) -> None:
        try:
            await model.infer(request)
        except triton_trio.RequestCancelled as error:
            say(f"   {error}")

    for request in requests:
        nursery.start_soon(ask, request, name=request.request_id)
        await trio.testing.wait_all_tasks_blocked()  # so that they queue up in this order


async def leaving_a_queue(model: triton_trio.Model) -> None:
    say("1. One request executes, three wait behind it.")
    requests = [model.request({"INPUT0": np.zeros(2, np.float32)}, request_id=f"r{i}") for i in range(4)]
    async with trio.open_nursery() as nursery:
        await start_all(nursery, model, requests)
        await trio.sleep(0.5)
        say(f"   waiting: {[r.request_id for r in model.scheduler.queued()]}")
        requests[2].cancel()
        # No await since the cancel: not a single task has run, and the place is free.
        say(f"   waiting: {[r.request_id for r in model.scheduler.queued()]}, r2 is {requests[2].outcome}")
    for request in requests:
        say(f"   {request.request_id}: {request.outcome}, after {request.ended_at - request.received_at:.2f} s")
    say("   r3 began when r1 ended: the cancelled r2 cost nobody anything.")


async def owners_of_a_batch(model: triton_trio.Model) -> None:
    instance = model.instances[0]

    def four(name: str) -> list[triton_trio.InferenceRequest]:
        rows = [np.full((1, 2), i, np.float32) for i in range(4)]
        return [model.request({"INPUT0": row}, request_id=f"{name}{i}") for i, row in enumerate(rows)]

    say("2. Four requests share one execution. Two leave; the others do not notice.")
    requests = four("b")
    async with trio.open_nursery() as nursery:
        await start_all(nursery, model, requests)
        await trio.sleep(0.5)
        for request in requests[:2]:
            request.cancel()
            await trio.testing.wait_all_tasks_blocked()
            say(f"   {instance.batch}")
    for request in requests:
        say(f"   {request.request_id}: {request.outcome}, after {request.ended_at - request.received_at:.2f} s")

    say("3. Four share one execution, and all four leave. With the last, the execution is cancelled.")
    requests = four("c")
    async with trio.open_nursery() as nursery:
        await start_all(nursery, model, requests)
        await trio.sleep(0.5)
        batch = instance.batch
        for request in requests:
            request.cancel()
            say(f"   {request.request_id} leaves: {batch}")
            say(f"   the execution is {'cancelled' if batch.scope.cancel_scope.cancel_called else 'running'}")
            await trio.testing.wait_all_tasks_blocked()
    say(f"   the instance is {instance.state.value}: it stopped half way, at its next checkpoint")


if __name__ == "__main__":
    run(lesson)
