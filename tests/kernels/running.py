"""How the tests of kernels run a call: compiled in little time, or interpreted."""

import functools
from typing import Any

import jax
import pytest

# Each test runs once what it compiles, and compiling takes longer than that.
QUICKLY = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

# On a CPU, a kernel that is asked for by name: the argument, the error, what it says.
ELSEWHERE = (
    {"implementation": "pallas_tpu"}, NotImplementedError,
    "'pallas_tpu', but the TPU kernel does not run on 'cpu'",
)  # fmt: skip


def interpret(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    """Makes a module of TPU kernels, interpreted, the implementation that is chosen."""
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    for name in set(kernels.__all__) - {"unsupported"}:  # the others run kernels
        whole = functools.partial(getattr(kernels, name), interpret=True)
        monkeypatch.setattr(kernels, name, whole)
