"""Errors are one sentence: the argument, what came, what was expected."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, check_axis, check_range, check_trailing, typed


@typed
def function(
    key: Key[Array, ""],
    x: Float[ArrayLike, "batch d"],
    y: Float[ArrayLike, " batch"] | None = None,
    *,
    mode: Literal["sum", "mean"] = "sum",
    count: int = 1,
) -> Float[Array, ""]:
    return jnp.sum(jnp.asarray(x)) + count


KEY, X = jax.random.key(0), jnp.ones((3, 2))


@pytest.mark.parametrize(
    "kind, words, args, kwargs",
    [
        (TypeError, "'x' is float32[3], expected Float \"batch d\"", (KEY, X[:, 0]),
         {}),
        (TypeError, "'x' is int32[3,2]", (KEY, jnp.ones((3, 2), int)), {}),
        (TypeError, "'x' is complex64[3,2]", (KEY, X + 1j), {}),
        (TypeError, "'x' is 'text' (str)", (KEY, "text"), {}),
        (TypeError, "'x' is [1.0, 2.0] (list)", (KEY, [1.0, 2.0]), {}),
        (TypeError, "'y' is float32[2], expected Float \" batch\" or None with batch=3",
         (KEY, X, X[0]), {}),
        (TypeError, "'key' is uint32[2]", (jax.random.PRNGKey(0), X), {}),
        (TypeError, "'count' is 1.5 (float), expected int", (KEY, X), {"count": 1.5}),
        (ValueError, "'mode' is 'max' (str), expected 'sum' or 'mean'", (KEY, X),
         {"mode": "max"}),
        (TypeError, "'x'", (KEY,), {}),
        (TypeError, "'mod'", (KEY, X), {"mod": "sum"}),
    ],
)  # fmt: skip
def test_a_bad_call_is_named_in_a_sentence(kind, words, args, kwargs):
    with pytest.raises(kind) as info:
        function(*args, **kwargs)
    message = str(info.value)
    assert words.replace('" batch"', '"batch"') in message.replace(
        '" batch"', '"batch"'
    )
    assert len(message) <= 400 and "\n" not in message


def test_good_calls_pass_from_jax_numpy_and_under_transformations():
    assert function(KEY, X, X[:, 0]) == 7
    assert function(KEY, np.ones((3, 2), np.float32)) == 7
    assert jax.jit(function)(KEY, X.astype(jnp.bfloat16)) == 7
    assert jax.vmap(function, (None, 0))(KEY, jnp.ones((4, 3, 2))).shape == (4,)
    assert function.__name__ == "function"


def test_checks_under_jit_are_made_while_tracing_and_leave_no_trace():
    with pytest.raises(TypeError, match="argument 'x'"):
        jax.jit(function)(KEY, X[0])

    def plain(key, x):
        return jnp.sum(x) + 1

    assert str(jax.make_jaxpr(function)(KEY, X)) == str(jax.make_jaxpr(plain)(KEY, X))


def test_ranges_axes_and_shapes():
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="argument 'beta' is .*expected a number"):
            check_range("beta", value, low=0, high=1)
    check_range("beta", 1, low=0, high=1)
    jax.jit(lambda b: check_range("beta", b, low=0))(-1.0)  # cannot be looked at
    fixed = jnp.float32(-1.0)  # can, also while something else is traced
    with pytest.raises(ValueError, match="argument 'beta' is -1.0"):
        jax.jit(lambda x: check_range("beta", fixed, low=0) or x)(1.0)
    with pytest.raises(ValueError, match="argument 'axis' is 2"):
        check_axis("axis", 2, 2)
    assert check_axis("axis", -2, 2) == 0
    assert check_trailing(a=X, b=1.0, c=jnp.ones((5, 3, 2))) == (5, 3, 2)
    with pytest.raises(TypeError, match="argument 'c' has shape"):
        check_trailing(a=X, b=jnp.ones((5, 3, 2)), c=jnp.ones((4, 3, 2)))
