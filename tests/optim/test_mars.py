"""The correction, the clipping and the three steps against the paper, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.core.transform import descend
from jaxzoo.optim import mars as module

mars: Any = module.mars
scale_by_mars: Any = module.scale_by_mars
SHAPES = {"matrix": (3, 4), "vector": (5,)}


def gradients(steps=5, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def newton_schulz(m):
    """Five steps of the authors' quintic iteration, in the layout [in, out]."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (np.linalg.norm(m) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if m.shape[0] > m.shape[1] else x
    return x * max(1.0, m.shape[1] / m.shape[0]) ** 0.5


def of_the_paper(p, grads, before, *, variant, convention, lr, gamma, decay):
    """Algorithms 2 to 4 with b1 = 0.9, b2 = 0.95; `before` is None or exact."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    m, v, last = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(3))
    for t, g in enumerate(grads, start=1):
        if before is not None:
            last = before[t - 1]
        elif t == 1 and convention == "paper":
            last = g
        c = {k: g[k] + gamma * b1 / (1 - b1) * (g[k] - last[k]) for k in g}
        whole = np.sqrt(sum((x**2).sum() for x in c.values()))
        for k in p:
            norm = whole if convention == "paper" else np.linalg.norm(c[k])
            c[k] = c[k] / norm if norm > 1 else c[k]
            m[k] = b1 * m[k] + (1 - b1) * c[k]
            v[k] = b2 * v[k] + (1 - b2) * c[k] ** 2
            u = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            if variant == "lion":
                u = np.sign(m[k])
            elif variant == "shampoo" and m[k].ndim == 2:
                left, _, right = np.linalg.svd(m[k], full_matrices=False)
                exact = convention == "paper"
                u = left @ right if exact else newton_schulz(m[k])
            p = {**p, k: p[k] - lr * (u + decay * p[k])}
        last = g
    return p


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def follow(optimizer: Any, p, grads, before=None) -> tuple[Any, Any]:
    p, update = float32(p), jax.jit(optimizer.update)
    state = optimizer.init(p)
    for t, g in enumerate(grads):
        extra = {} if before is None else {"previous_updates": float32(before[t])}
        updates, state = update(float32(g), state, p, **extra)
        p = optax.apply_updates(p, updates)
    return p, state


@pytest.mark.parametrize("convention", ["authors", "paper"])
@pytest.mark.parametrize(
    "variant, scale, is_exact",
    [
        ("adamw", 1.0, False),  # clipped at each step
        ("adamw", 0.02, False),  # never clipped
        ("adamw", 1.0, True),
        ("lion", 0.02, True),
        ("lion", 0.2, False),
        ("shampoo", 0.2, False),
    ],
)
def test_five_steps_are_the_papers(variant, convention, scale, is_exact):
    start, grads = gradients(1, seed=1)[0], gradients(scale=scale)
    before = gradients(scale=scale, seed=2) if is_exact else None
    knobs = {"variant": variant, "convention": convention}
    expected = of_the_paper(start, grads, before, lr=0.1, gamma=0.3, decay=0.2, **knobs)
    optimizer = mars(0.1, b1=0.9, b2=0.95, gamma=0.3, weight_decay=0.2, **knobs)
    got, _ = follow(optimizer, start, grads, before)
    for name in SHAPES:
        assert_allclose(got[name], expected[name], rtol=2e-6, atol=2e-6)
    # None of it is idle: without the correction another path is taken.
    plain = of_the_paper(start, grads, before, lr=0.1, gamma=0.0, decay=0.2, **knobs)
    assert max(np.abs(plain[k] - expected[k]).max() for k in SHAPES) > 1e-3


def test_without_correction_and_clipping_it_is_adamw():
    start, grads = gradients(1, seed=1)[0], gradients(10, scale=3.0)
    direction = scale_by_mars(gamma=0.0, max_norm=float("inf"))
    ours, _ = follow(descend(direction, 0.1, weight_decay=0.2), start, grads)
    theirs, _ = follow(optax.adamw(0.1, 0.95, 0.99, weight_decay=0.2), start, grads)
    for name in SHAPES:
        assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_storm_has_no_lag():
    """f = |x|^2 without noise, gamma = 1, exact: the momentum is the gradient."""
    direction = scale_by_mars(b1=0.9, gamma=1.0, max_norm=float("inf"))
    x = jnp.array([1.0, -2.0])
    state = direction.init(x)
    # One step at rest first, so that m = (1 - b1) g; then its error only decays.
    _, state = direction.update(2 * x, state, previous_updates=2 * x)
    error = state.inner.mu - 2 * x
    for _ in range(10):
        before, x = x, 0.9 * x
        _, state = direction.update(2 * x, state, previous_updates=2 * before)
        error = 0.9 * error
        assert_allclose(state.inner.mu - 2 * x, error, atol=1e-6)


def test_the_exact_form_of_the_gradient_before_is_the_approximate_one():
    start, grads = gradients(1, seed=1)[0], gradients()
    zeros = jax.tree.map(np.zeros_like, start)
    approximate, _ = follow(mars(0.1, gamma=0.5), start, grads)
    exact, _ = follow(mars(0.1, gamma=0.5), start, grads, [zeros, *grads[:-1]])
    for name in SHAPES:
        assert_allclose(exact[name], approximate[name], rtol=1e-6)


def test_extra_arguments_pass_through_the_wrappers_of_optax():
    start, grads = float32(gradients(1, seed=1)[0]), float32(gradients()[0])
    chained = optax.chain(optax.clip_by_global_norm(1e6), mars(0.1, gamma=0.5))
    guarded = optax.apply_if_finite(mars(0.1, gamma=0.5), 3)
    wrapped: Any = (chained, guarded)
    for optimizer in wrapped:
        state = optimizer.init(start)
        some = optimizer.update(grads, state, start, previous_updates=grads)[0]
        other = mars(0.1, gamma=0.0).update(grads, mars(0.1).init(start), start)[0]
        for name in SHAPES:
            assert_allclose(some[name], other[name], rtol=1e-6)


def test_one_large_array_does_not_shrink_the_others_unless_all_share_a_norm():
    grads = float32({"matrix": np.full((3, 4), 100.0), "vector": np.full(5, 0.1)})
    for convention, norm in (("authors", 0.1 * 5**0.5), ("paper", 6.5e-4)):
        direction = scale_by_mars(b1=0.5, gamma=0.0, convention=convention)
        _, state = direction.update(grads, direction.init(grads))
        assert_allclose(2 * optax.tree.norm(state.inner.mu["vector"]), norm, rtol=0.01)


def test_bfloat16_gradients_keep_float32_state():
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), gradients()[0])
    for variant in ("adamw", "lion", "shampoo"):
        optimizer = mars(0.1, variant=variant)
        updates, state = optimizer.update(grads, optimizer.init(grads))
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))
        floats = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
        assert floats and all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize(
    "name, value",
    [("b1", 1.0), ("b2", -0.1), ("eps", -1.0), ("gamma", -0.1), ("gamma", np.nan)],
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"'{name}'"):
        mars(0.1, **{name: value})


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match="'max_norm'"):
        scale_by_mars(max_norm=0.0)
    with pytest.raises(ValueError, match="'variant'.*'adamw' or 'lion' or 'shampoo'"):
        mars(0.1, variant="muon")
    with pytest.raises(ValueError, match="'convention'"):
        mars(0.1, convention="mine")
