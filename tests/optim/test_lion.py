"""Lion against the paper and Optax; programs against the rules that they spell."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.nn.program_evolution import _mutate, evolve
from jaxzoo.nn.update_programs import ADAMW, LION, Program, run_program, simplify
from jaxzoo.optim.lion import lion, scale_by_lion


def gradients(steps=5, shape=(3, 4)):
    return np.random.default_rng(0).normal(size=(steps, *shape))


def of_the_paper(p, grads, lr, b1, b2, decay):
    """Algorithm 2 in float64."""
    m, path = np.zeros_like(p), []
    for g in grads:
        c = b1 * m + (1 - b1) * g
        p = p - lr * (np.sign(c) + decay * p)
        m = b2 * m + (1 - b2) * g
        path.append(p)
    return np.stack(path)


def follow(optimizer, p, grads):
    state, path = optimizer.init(p), []
    for g in grads:
        updates, state = optimizer.update(g, state, p)
        p = optax.apply_updates(p, updates)
        path.append(p)
    return np.stack(path), state


def test_five_steps_are_the_papers():
    start, grads = np.random.default_rng(1).normal(size=(3, 4)), gradients()
    expected = of_the_paper(start, grads, 0.1, 0.8, 0.95, 0.3)
    # The momentum lags: with one beta for both, or c for m, some signs differ.
    assert np.any(expected != of_the_paper(start, grads, 0.1, 0.95, 0.95, 0.3))
    path, _ = follow(
        lion(0.1, b1=0.8, b2=0.95, weight_decay=0.3),
        jnp.asarray(start, jnp.float32),
        jnp.asarray(grads, jnp.float32),
    )
    assert_allclose(path, expected, rtol=1e-6, atol=1e-6)


def test_it_is_optax_lion_bit_for_bit():
    start, grads = jnp.ones((3, 4)), jnp.asarray(gradients(), jnp.float32)
    ours, _ = follow(lion(0.1, weight_decay=0.2), start, grads)
    theirs, _ = follow(optax.lion(0.1, weight_decay=0.2), start, grads)
    assert np.array_equal(ours, theirs)


def test_every_coordinate_moves_by_the_learning_rate_with_half_of_adams_state():
    optimizer, p = lion(0.01), jnp.zeros((64, 64))
    state = optimizer.init(p)
    for g in jnp.asarray(gradients(3, (64, 64)), jnp.float32):
        updates, state = optimizer.update(g, state, p)
        assert np.all(np.abs(updates) == np.float32(0.01))
    buffers = [x.size for x in jax.tree.leaves(state) if x.ndim]
    of_adam = [x.size for x in jax.tree.leaves(optax.adam(0.01).init(p)) if x.ndim]
    assert 2 * sum(buffers) == sum(of_adam)


def test_small_parameters_keep_a_float32_momentum():
    direction, g = scale_by_lion(), jnp.full(4, 0.1, jnp.bfloat16)
    state = direction.init(g)
    updates, state = direction.update(g, state)
    assert jnp.asarray(updates).dtype == jnp.bfloat16
    (momentum,) = (x for x in jax.tree.leaves(state) if x.ndim)
    assert momentum.dtype == jnp.float32
    assert_allclose(momentum, 0.01 * g.astype(jnp.float32), rtol=1e-6)


@pytest.mark.parametrize(
    "name, call",
    [
        ("learning_rate", lambda: lion(-1.0)),
        ("b1", lambda: lion(0.1, b1=1.0)),
        ("b2", lambda: scale_by_lion(b2=float("nan"))),
        ("weight_decay", lambda: lion(0.1, weight_decay=-0.1)),
        (
            "children",
            lambda: evolve(jax.random.key(0), len, **LION._asdict(), children=0),
        ),
    ],
)
def test_numbers_out_of_range_are_named(name, call):
    with pytest.raises(ValueError, match=f"'{name}'"):
        call()


def follow_program(program, w, grads, rate):
    m = v = jnp.zeros_like(w)
    path = []
    for g in grads:
        update, m, v = run_program(g, w, m, v, **program._asdict(), learning_rate=rate)
        w = w - update
        path.append(w)
    return np.stack(path)


def test_lion_as_a_program_is_lion():
    start, grads = jnp.ones((3, 4)), jnp.asarray(gradients(), jnp.float32)
    ours = follow_program(LION, start, grads, 0.1)
    assert_allclose(
        ours, follow(lion(0.1, weight_decay=0.1), start, grads)[0], rtol=1e-6
    )


def test_adamw_as_a_program_is_the_papers():
    w, grads = np.ones((3, 4)), gradients()
    ours = follow_program(ADAMW, jnp.ones((3, 4)), jnp.asarray(grads, jnp.float32), 0.1)
    m = v = np.zeros_like(w)
    for g, got in zip(grads, ours, strict=True):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.1 * (m / np.sqrt(v) + 0.01 * w)
        assert_allclose(got, w, atol=3e-5)  # 1 - 0.999 has few digits in float32


def same(first, second):
    one, other = (simplify(*program)[1]["hash"] for program in (first, second))
    return bool((one == other).all())


def test_programs_are_read_and_written():
    for program in (LION, ADAMW):
        again = Program.parse(str(program))
        assert np.array_equal(again.code[:, :3], program.code[:, :3])
        assert np.array_equal(again.constants, program.constants)
        assert same(again, program)


def test_redundant_statements_go_and_memories_stay_where_they_matter():
    text = """
        b = sin(w)
        m = interp(g, m, 0.5)
        v = add(v, b)
        c = copy(c)
        update = copy(w)
        update = add(m, g)
    """
    program, aux = simplify(*Program.parse(text))
    assert str(program) == "m = interp(g, m, 0.5)\nupdate = add(m, g)"
    assert aux["statements"] == 2
    # v reaches the update one step late, by way of m.
    late = Program.parse("update = copy(m)\nm = copy(v)\nv = square(g)")
    assert str(simplify(*late)[0]) == str(late)


def test_the_hash_is_that_of_the_meaning():
    lion_otherwise = Program.parse("""
        v = sin(g)
        c = multiply(w, 0.1)
        b = interp(g, m, 0.9)
        m = interp(g, m, 0.99)
        b = sign(b)
        update = add(c, b)
        update = multiply(lr, update)
    """)
    assert same(LION, lion_otherwise)
    # Order matters, so do constants, functions and what is remembered.
    text = str(LION)
    for old, new in [
        ("0.99", "0.98"), ("sign", "tanh"), ("interp(g, m, 0.9)", "interp(m, g, 0.9)"),
        ("m = interp(g, m, 0.99)\n", ""), ("a = multiply(w, 0.1)\n", ""),
    ]:  # fmt: skip
        assert old in text
        assert not same(LION, Program.parse(text.replace(old, new))), new
    early = "m = interp(g, m, 0.99)\n" + text.replace("m = interp(g, m, 0.99)\n", "")
    assert not same(LION, Program.parse(early))


def children(program, count):
    """Mutations of one program, as texts."""
    keys = jax.random.split(jax.random.key(0), count)
    born = jax.jit(jax.vmap(lambda key: _mutate(key, *map(jnp.asarray, program))))(keys)
    rows = zip(*map(np.asarray, born), strict=True)
    return [str(Program(*row)).splitlines() for row in rows]


def test_a_mutation_is_one_statement_more_or_less_or_another_one():
    lines, kinds = str(ADAMW).splitlines(), {-1: 0, 0: 0, 1: 0}
    for child in children(ADAMW, 300):
        more = len(child) - len(lines)
        kinds[more] += 1
        longer, shorter = (child, lines) if more > 0 else (lines, child)
        if more:
            assert any(longer[:i] + longer[i + 1 :] == shorter for i in range(9))
        else:
            assert sum(a != b for a, b in zip(child, lines, strict=True)) <= 1
    assert min(kinds.values()) > 60, kinds
    # A full program gets no more statements, an empty one gets one.
    full = Program(ADAMW.code[:8], ADAMW.constants[:8])
    assert {len(child) for child in children(full, 30)} == {7, 8}
    assert {len(child) for child in children(Program.parse("", 8), 30)} <= {0, 1}


def test_evolution_improves_and_does_not_evaluate_duplicates():
    target = jnp.array([1.0, -2.0])

    def fitness(program):
        """Of a quadratic after ten steps."""

        def step(state, _):
            w, m, v = state
            update, m, v = run_program(
                w - target, w, m, v, **program._asdict(), learning_rate=0.01
            )
            return (w - update, m, v), None

        zero = jnp.zeros(2)
        (w, _, _), _ = jax.lax.scan(step, (zero, zero, zero), length=10)
        return jnp.sum((w - target) ** 2)

    start = Program.parse("update = multiply(g, lr)", 8)

    @jax.jit
    def search(key):
        program, aux = evolve(key, fitness, **start._asdict(), children=400)
        hashes = jax.vmap(lambda *p: simplify(*p)[1]["hash"])
        return program, {**aux, "hashes": hashes(aux["code"], aux["constants"])}

    program, aux = search(jax.random.key(0))
    assert fitness(program) < 0.1 * fitness(start)
    assert_allclose(fitness(program), aux["best"][-1], rtol=1e-4)
    assert np.all(np.diff(aux["best"]) <= 0)
    assert 1 < len(np.unique(aux["hashes"], axis=0)) < int(aux["evaluated"]) < 400
