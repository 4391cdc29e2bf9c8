"""Signs as bits, and when the warm-up of 1-bit Adam is long enough."""

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from jaxzoo.distributed.one_bit_adam import pack_signs, unpack_signs, warmup_steps


def test_signs_survive_packing():
    x = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    x[0, :3] = 0.0, -0.0, np.nan
    packed = pack_signs(x)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 3)
    assert_array_equal(unpack_signs(packed), np.where(x >= 0, 1.0, -1.0))
    assert pack_signs(jnp.ones(9)).tolist() == [255, 128]


def test_the_warm_up_ends_where_v_has_settled():
    t = np.arange(1, 400)
    norms = (1 - 0.98**t).astype(np.float32)  # v of a constant gradient, b2 = 0.98
    first = next(
        i for i in t if i > 50 and 1 - 0.98 ** (i - 50) >= 0.96 * (1 - 0.98**i)
    )
    assert int(warmup_steps(norms, b2=0.98)) == first
    falling = norms[::-1].copy()
    assert int(warmup_steps(falling, b2=0.98)) == 51
    assert int(warmup_steps(2.0 ** t[:100].astype(np.float32), b2=0.98)) == 100
    assert int(warmup_steps(norms[:7], b2=0.98)) == 7
