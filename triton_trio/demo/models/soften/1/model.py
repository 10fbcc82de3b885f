"""Total-variation denoising: noise goes, edges stay.  The third form, with explicit checkpoints.

`ctx.run` dispatches on the device's thread and returns at once; `ctx.checkpoint` waits until the device is no more than one
call behind, and is where a cancelled request lets go; `ctx.fetch` brings the result to the host.  In this form a request has its
batch dimension, here of size 1: shape [1, 128, 192, 3].
"""

import jax
import jax.numpy as jnp

WEIGHT = 0.08
ROUNDS, STEPS = 10, 20


def start(noisy):
    return jnp.zeros((2, *noisy.shape))


def divergence(flow):
    down, right = flow
    return down - jnp.roll(down, 1, 1).at[:, 0].set(0.0) + right - jnp.roll(right, 1, 2).at[:, :, 0].set(0.0)


def some_steps(noisy, flow):
    """Chambolle's projection: STEPS steps of gradient descent on the dual problem."""

    def step(flow, _):
        image = noisy - WEIGHT * divergence(flow)
        down = jnp.diff(image, axis=1, append=image[:, -1:])
        right = jnp.diff(image, axis=2, append=image[:, :, -1:])
        flow = flow - 0.25 / WEIGHT * jnp.stack([down, right])
        return flow / jnp.maximum(1.0, jnp.sqrt((flow**2).sum(0, keepdims=True))), None

    return jax.lax.scan(step, flow, length=STEPS)[0]


def result(noisy, flow):
    return {"SOFT": jnp.clip(noisy - WEIGHT * divergence(flow), 0.0, 1.0)}


async def run(ctx, params, inputs):
    noisy = inputs["IMAGE"]
    flow = await ctx.run(start, noisy)
    for _ in range(ROUNDS):
        flow = await ctx.run(some_steps, noisy, flow)
        await ctx.checkpoint(flow)
    return await ctx.fetch(result, noisy, flow)
