"""A pencil sketch: dark lines where the picture changes.  The simplest form, `apply`: one program for each execution."""

import jax.numpy as jnp


def load(context):
    """Runs once, when the model is loaded; what it returns is `params`, on the device."""
    return {"grey": jnp.array([0.299, 0.587, 0.114]), "darkness": jnp.float32(3.0)}


def apply(params, inputs):
    grey = jnp.pad(inputs["IMAGE"] @ params["grey"], 1, mode="edge")
    # Sobel: how much brightness changes from left to right, and from top to bottom.
    down = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    right = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    across, along = down[:, 2:] - down[:, :-2], right[2:] - right[:-2]
    return {"SKETCH": jnp.exp(-params["darkness"] * jnp.hypot(across, along))}
