from textwrap import dedent

import numpy as np
import trio
import trio.testing
from backends import Fails
from stage import MODELS, note, note_cancelled, run, say

import triton_trio
from triton_trio.observe import tree

STEPS = ("prepare", "draw", "describe", "spell", "bind")


async def lesson() -> None:
    note_cancelled()
    async with triton_trio.open_server(MODELS / "ensemble", backends={"fails": Fails}) as server:
        draw = server.model("draw")

        def request(name: str) -> triton_trio.InferenceRequest:
            return server.model(name).request({"TOPIC": np.zeros(1, np.float32)}, request_id=name)

        async def ask(request: triton_trio.InferenceRequest) -> None:
            try:
                await server.model(request.request_id).infer(request)
            except triton_trio.TritonError as error:
                note(f"   {error}")

        def say_what_began() -> None:
            say("   requests so far: " + ", ".join(f"{name} {server.model(name).counters.started}" for name in STEPS))

        say("1. A page: prepare, then draw and describe at the same time. We leave while these two execute.")
        with trio.move_on_after(1.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, request("page"), name="client")
                await trio.sleep(1.4)
                say(dedent(tree().partition("frontends\n")[2]))
        say_what_began()

        say("2. Somebody else keeps draw busy, and our step waits in its queue.")
        async with trio.open_nursery() as nursery:
            page = request("page")
            nursery.start_soon(ask, page, name="client")
            await trio.sleep(0.9)
            nursery.start_soon(draw.infer, {"INPUT0": np.ones(1, np.float32)}, name="somebody else")
            await trio.sleep(0.2)
            say(f"   draw's queue: {[r.request_id for r in draw.scheduler.queued()]}; {draw.instances[0].batch}")
            page.cancel()
            # No await since the cancel: not a single task has run.
            say(f"   draw's queue: {[r.request_id for r in draw.scheduler.queued()]}; {draw.instances[0].batch}")
        say(f"   somebody else has an answer. In flight: {server.statistics().in_flight}")

        say("3. One of two steps fails. The other has nobody left to work for.")
        await ask(request("bad_page"))

        say("4. A book is a page and then bind. The page is an ensemble, too; we leave while its steps execute.")
        with trio.move_on_after(1.5):
            await ask(request("book"))
        say_what_began()


if __name__ == "__main__":
    run(lesson)
