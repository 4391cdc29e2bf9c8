"""A training program as `train` hands it to a dry run, small enough for any machine."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

WIDTH, ROWS, STEPS = 64, 16, 3


class Program(NamedTuple):
    """As `train` hands it to `run.dry_run`."""

    name: str
    call: Any
    arguments: tuple
    step: Any
    batch: Any
    steps: int
    examples: int
    mesh: Mesh


def program(devices, fsdp, *, width=WIDTH, layers=2, rows=ROWS, name="fit"):
    """An MLP under Adam; each matrix split over fsdp, the batch over everything."""
    shape = (len(devices) // fsdp, fsdp)
    types = (AxisType.Auto,) * 2
    mesh = Mesh(np.array(devices).reshape(shape), ("data", "fsdp"), axis_types=types)
    optimizer = optax.adam(1e-3)

    def init():
        params = {"w": jnp.zeros((layers, width, width))}
        key = jax.random.key(0)
        return {"params": params, "opt_state": optimizer.init(params), "key": key}

    def step(state, batch):
        def loss(params):
            def layer(h, w):
                return jnp.tanh(h @ w), None

            return jnp.mean(jax.lax.scan(layer, batch, params["w"])[0] ** 2)

        value, gradient = jax.value_and_grad(loss)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"])
        params = optax.apply_updates(state["params"], updates)
        return {**state, "params": params, "opt_state": opt_state}, {"loss": value}

    def place(leaf):
        spec = P(None, "fsdp") if leaf.ndim == 3 else P()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(place, jax.eval_shape(init))
    batch = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    sharding = NamedSharding(mesh, P(None, ("data", "fsdp")))
    stacked = jax.ShapeDtypeStruct(
        (STEPS, *batch.shape), batch.dtype, sharding=sharding
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    call = jax.jit(
        lambda state, batch: jax.lax.scan(step, state, batch),
        donate_argnums=0,
        out_shardings=(places, NamedSharding(mesh, P())),
    )
    return Program(name, call, (state, stacked), step, batch, STEPS, rows, mesh)
