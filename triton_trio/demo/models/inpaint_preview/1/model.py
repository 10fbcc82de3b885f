"""Inpainting that shows its work: `emit` is called after every step, and each call is a response.

So a step here is several sweeps, as much as one can see.  A reader who is slow holds the model back; one who leaves stops it.
"""

import jax
import jax.numpy as jnp

SWEEPS_A_STEP = 5


def init(params, inputs):
    return {
        "image": jnp.moveaxis(inputs["IMAGE"], -1, 0),  # colours first, as in inpaint
        "hole": inputs["MASK"] > 0.5,
        "sweep": jnp.int32(0),
        "sweeps": inputs["SWEEPS"][0],
    }


def sweep(image, hole):
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    flowed = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 16
    return jnp.where(hole, flowed, image)


def step(params, carry):
    image = jax.lax.fori_loop(0, SWEEPS_A_STEP, lambda _, image: sweep(image, carry["hole"]), carry["image"])
    return {**carry, "image": image, "sweep": carry["sweep"] + SWEEPS_A_STEP}


def done(carry):
    return carry["sweep"] >= carry["sweeps"]


def emit(params, carry):
    return {"PREVIEW": jnp.moveaxis(carry["image"], 0, -1)}
