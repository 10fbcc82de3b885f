"""Inpainting that shows its work: `emit` is called after every step, and each call is a response.

So a step here is fifty sweeps: about as much as one can see.  A reader who is slow parks the model; one who leaves stops it.
"""

import jax
import jax.numpy as jnp

SWEEPS_A_STEP = 50


def init(params, inputs):
    image, hole = inputs["IMAGE"], inputs["MASK"][..., None] > 0.5
    known = jnp.where(hole, 0.0, image)
    # Start from the picture's mean colour.
    mean = known.sum((0, 1)) / jnp.maximum(1, (~hole).sum())
    return {
        "image": jnp.where(hole, mean, image),
        "hole": hole,
        "sweep": jnp.int32(0),
        "sweeps": inputs["SWEEPS"][0],
    }


def sweep(carry):
    image = carry["image"]
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    # Each missing pixel becomes the mean of its neighbours, the diagonal ones counting less.
    sides = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    corners = padded[:-2, :-2] + padded[:-2, 2:] + padded[2:, :-2] + padded[2:, 2:]
    flowed = 0.2 * sides + 0.05 * corners
    return {**carry, "image": jnp.where(carry["hole"], flowed, image), "sweep": carry["sweep"] + 1}


def step(params, carry):
    return jax.lax.fori_loop(0, SWEEPS_A_STEP, lambda _, carry: sweep(carry), carry)


def emit(params, carry):
    return {"PREVIEW": carry["image"]}


def done(carry):
    return carry["sweep"] >= carry["sweeps"]
