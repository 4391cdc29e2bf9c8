"""Eight pretend CPU devices, strict shapes and exact matrix products for every test."""

import gc
import os
from pathlib import Path

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

from jaxzoo.training import compile_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Nine tenths of a contract's time is compilation, of programs that hardly change from
# run to run: what is compiled once is kept, however little it is.
# JAX_ENABLE_COMPILATION_CACHE=0 compiles everything anew.
_HOME = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
compile_cache.enable(_HOME / "jaxzoo" / "tests")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Traces are millions of objects and hardly any cycles: looking for cycles as often as
# Python does takes a tenth of what is left of the time.
gc.set_threshold(200_000, 20, 100)


def pytest_configure(config: pytest.Config) -> None:
    # An entry that another process is just writing: it is compiled instead.
    harmless = "ignore:Error (reading|writing) persistent compilation cache:UserWarning"
    config.addinivalue_line("filterwarnings", harmless)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
