"""Eight pretend CPU devices, strict shapes and exact matrix products for every test."""

import os

# Before jax is imported. NPROC: with two real cores, older jax deadlocks on collectives
# between pretend devices unless its thread pool is larger.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "agg")
# Little shapes run for microseconds and compile for seconds: a quarter of the suite's
# time. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` tests what is optimized, as experiments are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
