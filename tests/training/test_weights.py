"""safetensors files: bit for bit, no cast, no silent damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from jaxzoo.training.weights import load_weights, save_weights

PARAMS = {
    "encoder": {"kernel": jnp.linspace(0, 1, 12).reshape(3, 4), "bias": jnp.zeros(4)},
    "half": jnp.arange(5, dtype=jnp.bfloat16),
    "layers": [jnp.int32(3), jnp.array([jnp.nan, -0.0])],
}


def test_round_trip_is_bit_for_bit(tmp_path):
    file = tmp_path / "w.safetensors"
    digest = save_weights(file, PARAMS)
    like = jax.eval_shape(lambda: PARAMS)
    loaded = load_weights(file, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(PARAMS), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert save_weights(file, loaded) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_another_tree_is_refused_by_leaf(tmp_path):
    file = tmp_path / "w.safetensors"
    save_weights(file, PARAMS)
    for changed, words in [
        ({"half": jnp.zeros(5)}, r"half: stored bfloat16\[5\], expected float32\[5\]"),
        ({"half": jnp.zeros(6, jnp.bfloat16)}, r"half: .* expected bfloat16\[6\]"),
        ({"extra": jnp.zeros(1)}, r"extra: stored nothing, expected float32\[1\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_weights(file, {**PARAMS, **changed})
    fewer = {name: PARAMS[name] for name in ("encoder", "layers")}
    with pytest.raises(
        ValueError, match=r"half: stored bfloat16\[5\], expected nothing"
    ):
        load_weights(file, fewer)


def test_no_flipped_bit_passes(tmp_path):
    file = tmp_path / "w.safetensors"
    save_weights(file, PARAMS)
    whole = file.read_bytes()
    like = jax.eval_shape(lambda: PARAMS)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 8 * len(whole), 200):
        spoilt = bytearray(whole)
        spoilt[position // 8] ^= 1 << (position % 8)
        file.write_bytes(spoilt)
        try:
            loaded = load_weights(file, like)
        except ValueError as error:
            assert "w.safetensors" in str(error)
            continue
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(PARAMS), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(file, like)


def test_a_file_without_digest_is_refused(tmp_path):
    save_file({"half": PARAMS["half"]}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has no digest"):
        load_weights(tmp_path / "w.safetensors", {"half": PARAMS["half"]})
