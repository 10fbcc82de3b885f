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
    # Each missing pixel becomes a mean of its neighbourhood, weighted 1 2 1 downwards and 1 2 1 across.
    padded = jnp.pad(carry["image"], ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    flowed = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 16
    return {**carry, "image": jnp.where(carry["hole"], flowed, carry["image"]), "sweep": carry["sweep"] + 1}


def done(carry):
    return carry["sweep"] >= carry["sweeps"]


def finish(params, carry):
    return {"RESTORED": jnp.moveaxis(carry["image"], 0, -1)}
