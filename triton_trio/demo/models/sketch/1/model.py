"""A pencil sketch: dark lines where the picture changes.  The simplest form, `apply`: one program for each execution."""

import jax
import jax.numpy as jnp


def load(context):
    # Sobel's kernels, as [height, width, in, out].
    across = jnp.array([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    return jnp.stack([across, across.T], axis=-1)[:, :, None, :]


def apply(params, inputs):
    grey = inputs["IMAGE"] @ jnp.array([0.299, 0.587, 0.114])
    grey = jnp.pad(grey, 1, mode="edge")[None, :, :, None]
    edges = jax.lax.conv_general_dilated(grey, params, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    strength = jnp.sqrt((edges[0] ** 2).sum(-1))
    return {"SKETCH": jnp.exp(-3.0 * strength)}
