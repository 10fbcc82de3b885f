"""Inpainting by diffusion: what is missing flows in from the edges of the hole.

A step model.  Every function sees one request's tensors, without a batch dimension: the backend batches the rows, runs
many steps as one program, and looks for cancels between two programs.
"""

import jax.numpy as jnp


def init(params, inputs):
    return {
        # Colours first: XLA vectorises over the last dimension, and 192 columns make better vectors than 3 colours.
        "image": jnp.moveaxis(inputs["IMAGE"], -1, 0),
        "hole": inputs["MASK"] > 0.5,
        "sweep": jnp.int32(0),
        "sweeps": inputs["SWEEPS"][0],
    }


def step(params, carry):
    image = carry["image"]
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    # Each missing pixel becomes the mean of its neighbours, the diagonal ones counting less.
    sides = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    corners = padded[:, :-2, :-2] + padded[:, :-2, 2:] + padded[:, 2:, :-2] + padded[:, 2:, 2:]
    flowed = 0.2 * sides + 0.05 * corners
    return {**carry, "image": jnp.where(carry["hole"], flowed, image), "sweep": carry["sweep"] + 1}


def done(carry):
    return carry["sweep"] >= carry["sweeps"]


def finish(params, carry):
    return {"RESTORED": jnp.moveaxis(carry["image"], 0, -1)}
