"""Photographing in the dark: the mean of many noisy exposures.  A step is one exposure, and the sum is kept in the sequence.

The states SUM and TAKEN are ordinary tensors here: in the inputs as they were left by the sequence's last request, zeros for
the first, and in the outputs as the next one is to find them.
"""

import jax
import jax.numpy as jnp

GRAIN = 0.4  # the same in all colours, as in a dim picture


def init(params, inputs):
    return {
        "image": inputs["IMAGE"],
        "sum": inputs["SUM_BEFORE"],
        "taken": inputs["TAKEN_BEFORE"],
        "left": inputs["FRAMES"][0],
    }


def step(params, carry):
    grain = jax.random.normal(jax.random.fold_in(jax.random.key(0), carry["taken"][0]), (128, 192, 1))
    return {
        **carry,
        "sum": carry["sum"] + carry["image"] + GRAIN * grain,
        "taken": carry["taken"] + 1,
        "left": carry["left"] - 1,
    }


def done(carry):
    return carry["left"] <= 0


def finish(params, carry):
    return {"AVERAGE": carry["sum"] / jnp.maximum(carry["taken"], 1), "SUM": carry["sum"], "TAKEN": carry["taken"]}
