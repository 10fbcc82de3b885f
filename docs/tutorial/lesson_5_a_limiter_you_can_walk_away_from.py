import numpy as np
import trio
import trio.testing
from stage import MODELS, note, run, say

import triton_trio

Requests = dict[str, triton_trio.InferenceRequest]


async def ask(nursery: trio.Nursery, model: triton_trio.Model, *names: str) -> Requests:
    async def infer(request: triton_trio.InferenceRequest) -> None:
        try:
            await model.infer(request)
            note(f"   {request.request_id}: ok")
        except triton_trio.RequestCancelled as error:
            note(f"   {error}")

    requests = {name: model.request({"INPUT0": np.zeros((1, 1), np.float32)}, request_id=name) for name in names}
    for name, request in requests.items():
        nursery.start_soon(infer, request, name=name)
        await trio.testing.wait_all_tasks_blocked()  # so that they queue up in this order
    return requests


def look(server: triton_trio.InferenceServer) -> None:
    for name in ("painter", "printer"):
        model = server.model(name)
        batch = model.instances[0].batch
        executing = [member.request.request_id for member in batch.members] if batch else "nothing"
        say(f"   the {name} executes {executing}; waiting: {[r.request_id for r in model.scheduler.queued()]}")
    (easel,) = server.statistics().rate_limiter.resources
    say(f"   easels: {easel.capacity} = {easel.in_use} in use + {easel.free} free; in line for it: {easel.waiters}")


async def lesson() -> None:
    async with (
        triton_trio.open_server(MODELS / "limited", rate_limit="execution_count") as server,
        trio.open_nursery() as nursery,
    ):
        painter, printer = server.model("painter"), server.model("printer")

        say("1. Two models, one easel, and the painter has it. The printer's instance is free, and may not begin.")
        await ask(nursery, painter, "p1")
        requests = await ask(nursery, printer, "a", "b", "c")
        look(server)

        say("2. b walks away. (No await since the cancel: not a single task has run.)")
        await trio.sleep(0.5)
        requests["b"].cancel()
        look(server)

        say("3. d comes late, and then the easel is free. The batch is made at that moment, of who is here.")
        await ask(nursery, printer, "d")
        await trio.sleep(0.6)
        look(server)

        say("4. The painter's next client stands in line, and walks away. The line is as if he had never come.")
        requests = await ask(nursery, painter, "p2")
        look(server)
        requests["p2"].cancel()
        look(server)

        say("5. The one after him gets it when the printer has done.")
        await ask(nursery, painter, "p3")
        await trio.sleep(1)
        look(server)


if __name__ == "__main__":
    run(lesson)
