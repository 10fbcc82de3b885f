"""(c) The chunk curve: throughput lost to checkpoints, and cancel latency, against the time of a chunk.

Real compute on this machine's JAX device, in process (no network).  The yardstick is one program that runs all steps without a
checkpoint; each chunk target is measured in alternating rounds against it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import trio

from triton_trio import open_server
from triton_trio.model import Model

from .harness import BENCH, RESULTS, machine, percentile, save, table

TARGETS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)


def write_models(root: Path) -> None:
    source = BENCH / "models" / "slow"
    for target in TARGETS:
        model = root / f"chunk_{target:g}"
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text((source / "1" / "model.py").read_text())
        (model / "config.pbtxt").write_text(
            (source / "config.pbtxt").read_text().replace("KIND_CPU", "KIND_AUTO")
            + f'parameters {{ key: "target_chunk_ms" value {{ string_value: "{target}" }} }}\n'
        )


def unchunked(steps: int) -> float:
    """Seconds for all steps as one program: the same step function, no checkpoint."""
    namespace: dict[str, object] = {}
    exec((BENCH / "models/slow/1/model.py").read_text(), namespace)
    params = namespace["load"](None)  # type: ignore[operator]
    init, step = namespace["init"], namespace["step"]

    @jax.jit
    def run(params: jax.Array, x: jax.Array) -> jax.Array:
        carry = jax.vmap(lambda row: init(params, {"INPUT0": row}))(x)  # type: ignore[operator]
        body = jax.vmap(lambda c: step(params, c))  # type: ignore[operator]
        carry, _ = jax.lax.scan(lambda c, _: (body(c), None), carry, length=steps)
        return carry["x"].sum()

    x = jnp.full((1, 1), steps, jnp.float32)
    run(params, x).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(params, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


async def one(model: Model, steps: int) -> float:
    began = time.perf_counter()
    await model.infer({"INPUT0": np.full((1, 1), steps, np.float32)})
    return time.perf_counter() - began


async def cancelled(model: Model, after: float) -> float:
    """Milliseconds from the cancel until the device has let go and the instance is free."""
    instance = model.instances[0]
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.infer, {"INPUT0": np.full((1, 1), 1e6, np.float32)})
            await trio.sleep(after)
            began = time.perf_counter()
            scope.cancel()
    # The client is free at once; what we wait for is the device.  A following request starts when it is.
    while instance.batch is not None:  # noqa: ASYNC110 - measured from outside, without a hook in the server
        await trio.lowlevel.checkpoint()
    return (time.perf_counter() - began) * 1e3


async def curve(steps: int, rounds: int, cancels: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        async with open_server(folder) as server:
            models = {target: server.model(f"chunk_{target:g}") for target in TARGETS}
            took: dict[float, list[float]] = {target: [] for target in TARGETS}
            yardstick = []
            for model in models.values():
                await one(model, steps)
            for _ in range(rounds):
                yardstick.append(await trio.to_thread.run_sync(unchunked, steps))
                for target, model in models.items():
                    took[target].append(await one(model, steps))
            rng = np.random.default_rng(0)
            latency = {
                target: [await cancelled(model, 0.05 + 0.02 * rng.random()) for _ in range(cancels)]
                for target, model in models.items()
            }
    best = min(yardstick)
    return [
        {
            "target_ms": target,
            "throughput_lost_percent": round((min(took[target]) / best - 1) * 100, 1),
            "cancel_p50_ms": round(percentile(latency[target], 50), 2),
            "cancel_p99_ms": round(percentile(latency[target], 99), 2),
        }
        for target in TARGETS
    ]


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    targets = [row["target_ms"] for row in rows]
    left.plot(
        targets, [row["throughput_lost_percent"] for row in rows], "o-", color="tab:blue", label="throughput lost"
    )
    left.set(xscale="log", xlabel="target time of a chunk, ms", ylabel="throughput lost, %")
    left.set_xticks(targets, [f"{target:g}" for target in targets])
    left.yaxis.label.set_color("tab:blue")
    right = left.twinx()
    right.plot(targets, [row["cancel_p50_ms"] for row in rows], "s-", color="tab:red", label="p50")
    right.plot(targets, [row["cancel_p99_ms"] for row in rows], "s--", color="tab:red", label="p99")
    right.set(yscale="log", ylabel="cancel → device free, ms (p50 solid, p99 dashed)")
    right.yaxis.label.set_color("tab:red")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cancels", type=int, default=50)
    args = parser.parse_args()
    before = machine() | {"device": str(jax.devices()[0])}
    rows = trio.run(curve, args.steps, args.rounds, args.cancels)
    RESULTS.mkdir(exist_ok=True)
    plot(rows, RESULTS / "curve.png")
    text = (
        "Throughput lost against one program without checkpoints (best of alternating rounds), and time from a cancel until "
        f"the device is free ({args.cancels} cancels each).\n\n"
        + table(["chunk target ms", "lost %", "cancel p50 ms", "cancel p99 ms"], [list(row.values()) for row in rows])
        + "\n\n![chunk curve](curve.png)"
    )
    save("curve", "python -m bench curve", {"rows": rows}, text, before)


if __name__ == "__main__":
    main()
