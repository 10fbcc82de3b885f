import numpy as np
import trio
from stage import MODELS, run, say

import triton_trio
from triton_trio.observe import tree

NUMBERS = np.array([1, 2, 3], np.float32)


async def lesson() -> None:
    async with triton_trio.open_server(MODELS / "batching") as server:
        model = server.model("one_at_a_time")  # its execution takes one second

        say("1. An ordinary call.")
        response = await model.infer({"INPUT0": NUMBERS})
        say(f"   answer: {response.outputs['OUTPUT0']}")

        say("2. We walk away. Leaving the Trio scope is the cancel; there is no other API to call.")
        with trio.move_on_after(0.25):
            await model.infer({"INPUT0": NUMBERS})
        await trio.lowlevel.checkpoint()  # one step of the scheduler: the instance sees its execution cancelled
        say(f"   gone, and so is the work: the instance is {model.instances[0].state.value}")

        say("3. Somebody else cancels our request. We are still here, so we are told, and why.")
        request = model.request({"INPUT0": NUMBERS}, request_id="mine")
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                try:
                    await model.infer(request)
                except triton_trio.RequestCancelled as error:
                    say(f"   {error}")

            nursery.start_soon(ask, name="ask")
            await trio.sleep(0.5)
            request.cancel(triton_trio.Reason.ADMIN)

        say("4. Scopes nest: one cancel reaches everything below, whether it executes or waits in the queue.")
        with trio.move_on_after(0.5):
            async with trio.open_nursery() as nursery:
                for i in range(3):
                    nursery.start_soon(model.infer, {"INPUT0": NUMBERS}, name=f"client {i}")
                    await trio.sleep(0.1)
                say(tree())
        say(f"   in flight now: {server.statistics().in_flight}")

        counters = model.counters
        say(f"5. The books balance: {counters.started} started,")
        for outcome, count in counters.outcomes.items():
            say(f"   {count} {outcome.value}")
        for (reason, stage), count in sorted(counters.reasons.items()):
            say(f"   {count} of the cancelled: {reason} while {stage}")


if __name__ == "__main__":
    run(lesson)
