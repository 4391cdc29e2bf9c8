"""Row D1: which examples a step has, and how each is augmented, does not depend on how
many processes load them, on how many devices they lie, or on where a run went on.

The recipe: an example's randomness is keyed by the step and its id, never by its row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.data.source import Source, batch, grain_batches
from jaxzoo.training.mesh import make_mesh, put_batch

SEED, N, SIZE = 5, 37, 16  # every third batch runs over the edge of an epoch
STEPS = (0, 1, 2, 7, 2**33)
SOURCE = Source(
    {
        "id": np.arange(N, dtype=np.int32),
        "x": np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32),
    }
)


@jax.jit
def augmented(key, step, rows):
    """Shifts each example by its own number of places and adds its own noise."""

    def one(example, x):
        own = jax.random.fold_in(jax.random.fold_in(key, step), example)
        shift, noise = jax.random.split(own)
        places = jax.random.randint(shift, (), 0, x.size)
        return jnp.roll(x, places) + 0.1 * jax.random.normal(noise, x.shape)

    return jax.vmap(one)(rows["id"], rows["x"])


def seen(step, rows):
    """The (id, augmentation) pairs of some rows, in an order of their own."""
    images = np.asarray(augmented(jax.random.key(SEED), jnp.uint32(step % 2**32), rows))
    ids = rows["id"].tolist()
    return sorted((i, image.tobytes()) for i, image in zip(ids, images, strict=True))


def shards(step, count):
    """What each of `count` processes loads for a step."""
    for index in range(count):
        yield batch(SOURCE, SEED, step, batch_size=SIZE, shard=(index, count))


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_examples_and_augmentations_are_those_of_one_process(count):
    for step in STEPS:
        whole = seen(step, batch(SOURCE, SEED, step, batch_size=SIZE))
        parts = [pair for part in shards(step, count) for pair in seen(step, part)]
        assert sorted(parts) == whole


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_augmentations_are_the_same_bits_on_every_mesh(count):
    mesh = make_mesh(f"data={count}", jax.devices()[:count])
    for step in STEPS:
        rows = batch(SOURCE, SEED, step, batch_size=SIZE)
        assert seen(step, put_batch(mesh, rows, 0)) == seen(step, rows)


def test_an_example_is_augmented_anew_at_each_step():
    rows = {name: array[:8] for name, array in SOURCE.arrays.items()}
    first, second = seen(0, rows), seen(1, rows)
    assert not set(first) & set(second)
    assert len({image for _, image in first}) == 8


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 8), (8, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after):
    """D6 too: neither the order nor the place in the epoch is lost or repeated."""

    def ids(count, first, end):
        loaders = [
            iter(grain_batches(SOURCE, seed=SEED, batch_size=SIZE, shard=(i, count)))
            for i in range(count)
        ]
        rows = [[next(loader) for loader in loaders] for _ in range(end)][first:]
        return [sorted(np.concatenate([part["id"] for part in row])) for row in rows]

    whole = ids(1, 0, 9)
    assert ids(before, 0, 4) + ids(after, 4, 9) == whole
