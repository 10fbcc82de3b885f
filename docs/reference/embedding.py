"""The demo's models in a Trio program: an answer, a deadline, a stream, a cancel by somebody else, and the books."""

from pathlib import Path

import numpy as np
import trio

import triton_trio
from triton_trio.grpc.frontend import serve_grpc

MODELS = Path(triton_trio.__file__).parent / "demo" / "models"


def picture(sweeps: int) -> dict[str, np.ndarray]:
    """One request's tensors.  Their first dimension is the batch, for these models say max_batch_size."""
    image = np.random.default_rng(0).random((128, 192, 3), np.float32)
    mask = np.zeros((128, 192), np.float32)
    mask[40:80, 60:120] = 1
    return {"IMAGE": image[None], "MASK": mask[None], "SWEEPS": np.array([[sweeps]], np.int32)}


async def cancel_soon(request: triton_trio.InferenceRequest) -> None:
    await trio.sleep(0.3)
    request.cancel()


async def main() -> None:
    names = ["inpaint", "inpaint_preview"]
    async with triton_trio.open_server(MODELS, explicit=True, load_models=names) as server:
        await serve_grpc(server, host="127.0.0.1", port=0)  # for clients of other processes; returns its addresses
        model = server.model("inpaint")

        response = await model.infer(picture(sweeps=200))
        print("restored:", response.outputs["RESTORED"].shape)

        try:
            with trio.fail_after(0.3):
                await model.infer(picture(sweeps=10**9))
        except trio.TooSlowError:
            print("too slow; in flight:", server.statistics().in_flight)

        async with server.model("inpaint_preview").open_responses(picture(sweeps=10**9)) as responses:
            previews = []
            async for response in responses:
                previews.append(response.outputs["PREVIEW"])
                if len(previews) == 3:
                    break  # out of the block: nobody wants the rest
        print("previews:", len(previews))

        request = model.request(picture(sweeps=10**9), request_id="mine")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_soon, request)
            try:
                await model.infer(request)
            except triton_trio.RequestCancelled as error:
                print(f"{error.reason}: {error}")

        for name in names:
            counters = server.model(name).counters
            print(name, {str(outcome): n for outcome, n in counters.outcomes.items()}, dict(counters.reasons))
        await server.drain(5)  # ends the block, too


if __name__ == "__main__":
    trio.run(main)
