"""`reproducible`: the same bits on any number of devices (C3)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.training.loop import train
from jaxzoo.training.record import Run
from jaxzoo.training.step import init_state, update_step
from tests.training import mesh_fit
from tests.training.mesh_fit import (
    MESHES,
    OPTIMIZER,
    Config,
    assert_same,
    batch_at,
    fit,
    loss,
    mesh_of,
    plain,
    start,
)

open_on = pytest.fixture(mesh_fit.open_on)
REPRODUCIBLE = [m for m in MESHES if MESHES[m] > 1 and m[0] != "t" and "=1" not in m]


@pytest.fixture(scope="module")
def reproducible(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproducible") / "run"
    run = Run(
        folder, topic="toy", slug="mesh", title="", preset="full", config=Config(),
        mesh=mesh_of("data=2"),
    )  # fmt: skip
    return jax.device_get(plain(fit(run, reproducible=True)))


@pytest.mark.parametrize("text", REPRODUCIBLE)
def test_reproducible_is_bit_identical_on_2_4_and_8(text, open_on, reproducible):
    assert_same(plain(fit(open_on(text), reproducible=True)), reproducible)


def test_reproducible_holds_for_several_seeds_at_once(open_on):
    """`jax.vmap` over the step, as the experiments do."""

    def starts():
        return jax.vmap(lambda k: {**start(), "key": k})(
            jax.random.split(jax.random.key(5), 2)
        )

    def batches(t):
        return {"x": np.stack([batch_at(t)["x"], batch_at(t + 1)["x"]])}

    step = jax.vmap(update_step(loss, OPTIMIZER, reproducible=True))
    ends = []
    for text in ("data=2", "fsdp=4", "data=8", "fsdp=4,tensor=2"):
        run = open_on(text, text)
        knobs: Any = {"num_steps": 10, "log_every": 5, "batch_axis": 1}
        ends.append(plain(train(run, "fit", step, starts, batches, **knobs)))
    for end in ends[1:]:
        assert_same(end, ends[0])


def test_plain_data_parallel_is_not(open_on, reproducible):
    """What `reproducible` is for: without it the bits depend on the mesh."""
    ends = [plain(fit(open_on(f"data={n}", f"run{n}"))) for n in (2, 8)]
    pairs = zip(*map(jax.tree.leaves, ends), strict=True)
    assert any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


def test_reproducible_averages_over_all_examples(open_on):
    """One step of SGD with the keys of the virtual shards, by hand."""
    optimizer = optax.sgd(0.5)
    step = update_step(loss, optimizer, reproducible=True)
    state = init_state(jax.random.key(3), start()["params"], optimizer)
    batch = batch_at(0)
    new, metrics = jax.jit(step)(state, batch)
    key = jax.random.fold_in(state["key"], 0)

    def one(shard):
        part = {"x": batch["x"][2 * shard : 2 * shard + 2]}
        shard_key = jax.random.fold_in(key, shard)
        return jax.value_and_grad(lambda p: loss(p, shard_key, part)[0])(
            state["params"]
        )

    values, grads = zip(*map(one, range(8)), strict=True)
    assert_allclose(metrics["loss"], np.mean(values), rtol=1e-6)
    for name, old in state["params"].items():
        mean = np.mean([grad[name] for grad in grads], axis=0)
        assert_allclose(new["params"][name], old - 0.5 * mean, rtol=1e-5, atol=1e-7)


def test_reproducible_refuses_what_it_cannot_cut(open_on):
    step = update_step(loss, OPTIMIZER, reproducible=True)
    with pytest.raises(ValueError, match="8 virtual shards: a leaf of shape"):
        jax.eval_shape(step, start(), {"x": jnp.zeros((12, 32))})
