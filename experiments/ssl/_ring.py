"""The ring against the whole batch on pretend devices: used by siglip and the bench.

A process of its own: how many devices there are is settled when jax starts.
"""

import functools
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxzoo.core.collectives import all_gather, axis_index, psum
from jaxzoo.ssl.siglip import siglip_loss

DEVICES = (1, 2, 4, 8)
ROWS, WIDTH = 256, 64  # of one device, where memory is looked at
BATCHES = (8192, 32768, 131072)  # over 8 devices, where its growth is


def measure(what: str = "compare") -> dict[str, Any]:
    """What `compare` or `shards` finds, in a process with eight pretend devices."""
    flags = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment.setdefault("NPROC", "16")
    command = [sys.executable, "-m", "experiments.ssl._ring", what]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def ring(image, text, log_scale, bias, chunk=None):
    """The loss on its ring; the texts of a hop in tiles of `chunk`."""
    knobs = {"log_scale": log_scale, "bias": bias, "axis_name": "data"}
    return siglip_loss(image, text, **knobs, chunk=chunk)[0]


def gathered(image, text, log_scale, bias):
    """The same with all texts on each device."""
    texts = all_gather(text, "data")
    logits = jnp.exp(log_scale) * image @ texts.T + bias
    rows = jnp.arange(len(image)) + axis_index("data") * len(image)
    labels = 2.0 * jax.nn.one_hot(rows, len(texts)) - 1.0
    return -psum(jnp.sum(jax.nn.log_sigmoid(labels * logits)), "data") / len(texts)


def over(devices: int, loss: Any) -> Any:
    """Value and gradients of a loss, its rows split over devices."""
    types, some = (AxisType.Auto,), jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=types, devices=some)
    specs = (P("data"), P("data"), P(), P())
    gradient = jax.value_and_grad(loss, (0, 1, 2, 3))
    knobs: Any = {"mesh": mesh, "in_specs": specs, "out_specs": (P(), specs)}
    return jax.jit(jax.shard_map(gradient, **knobs))


def temporary(devices: int, loss: Any, rows: int, width: int) -> int:
    """Bytes of temporary memory of one device, compiled and not run."""
    x = jax.ShapeDtypeStruct((devices * rows, width), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    analysis = over(devices, loss).lower(x, x, scalar, scalar).compile()
    return analysis.memory_analysis().temp_size_in_bytes


def compare() -> dict[str, Any]:
    """Largest relative error by devices, and temporary bytes of ring and all-gather."""
    image, text = jax.random.normal(jax.random.key(0), (2, 64, 32))
    args = (image, text, jnp.float32(0.5), jnp.float32(-2.0))

    def whole(image, text, log_scale, bias):
        return siglip_loss(image, text, log_scale=log_scale, bias=bias)[0]

    gradient = jax.jit(jax.value_and_grad(whole, (0, 1, 2, 3)))
    expected = jax.tree.leaves(gradient(*args))
    error = []
    for devices in DEVICES:
        got = jax.tree.leaves(jax.block_until_ready(over(devices, ring)(*args)))
        pairs = zip(got, expected, strict=True)
        worst = max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs)
        error.append(float(worst))
    return {
        "error": error,
        "ring": [temporary(devices, ring, ROWS, WIDTH) for devices in DEVICES],
        "gathered": [temporary(devices, gathered, ROWS, WIDTH) for devices in DEVICES],
    }


def shards() -> dict[str, Any]:
    """Temporary memory on 8 devices, in feature shards of width 512, by batch."""
    tiled = functools.partial(ring, chunk=256)

    def of(loss: Any, batch: int) -> float:
        rows = batch // 8
        return temporary(8, loss, rows, 512) / (4 * 512 * rows)

    return {
        "shards": {batch: of(tiled, batch) for batch in BATCHES},
        "gathered_shards": {batch: of(gathered, batch) for batch in BATCHES},
    }


if __name__ == "__main__":
    print(json.dumps({"compare": compare, "shards": shards}[sys.argv[1]]()))
