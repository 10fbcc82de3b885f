"""Steps that occupy the device for a given time, and the host not at all."""

import jax
import jax.numpy as jnp
import numpy as np

from bench.emulated import FILLER, OCCUPY, LoadContext


def load(context: LoadContext) -> jax.Array:
    global nanoseconds
    nanoseconds = round(float(context.config.parameters["step_ms"]) * 1e6)
    return jnp.asarray(FILLER)


def init(params: jax.Array, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"left": inputs["STEPS"], "filler": params}


def step(params: jax.Array, carry: dict[str, jax.Array]) -> dict[str, jax.Array]:
    left = carry["left"]
    call = jax.ffi.ffi_call(OCCUPY, jax.ShapeDtypeStruct(left.shape, left.dtype), vmap_method="broadcast_all")
    # The product is there because XLA:CPU runs a program of less than 1,000 operations in the thread that dispatches it.
    return {"left": call(left, nanoseconds=np.int64(nanoseconds)) - 1, "filler": carry["filler"] @ params}


def done(carry: dict[str, jax.Array]) -> jax.Array:
    return carry["left"][0] <= 0


def finish(params: jax.Array, carry: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"LEFT": carry["left"]}
