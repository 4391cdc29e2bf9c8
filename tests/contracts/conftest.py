"""Contracts ask for thousands of programs of little shapes."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    """Little shapes run for microseconds and compile for seconds.

    Compiled programs with all optimizations are in the tests of each paper.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
