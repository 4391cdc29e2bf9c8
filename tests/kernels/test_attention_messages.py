"""What a call of attention says: which implementation ran, and what is wrong."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import attention, shifted_groups

QKV = jax.random.normal(jax.random.key(0), (3, 2, 21, 4, 8))


def test_it_says_which_implementation_ran(monkeypatch, capsys):
    attention(*QKV)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    attention(*QKV)
    attention(*QKV, implementation="ref")
    attention(QKV[0], *QKV[1:, :, :0])
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    jax.eval_shape(attention, *QKV)
    jax.eval_shape(functools.partial(attention, bias=jnp.zeros((1, 1, 1, 1))), *QKV)
    said = capsys.readouterr().err.splitlines()
    starts = [
        "xla (there is no kernel for 'cpu'); q float32[2, 21, 4, 8], k [2, 21",
        "ref (asked for)",
        "ref (an axis has length 0",
        "pallas_tpu (the fastest here)",
        "xla (the TPU kernel takes no bias)",
    ]
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(f"attention: {start}")


BAD = {
    "q 3": (lambda q, k, v: attention(q[0], k, v), TypeError, r"'q' is .*\[21, 4, 8\]"),
    "ints": (lambda q, k, v: attention(q.astype(int), k, v), TypeError, "'q' is int32"),
    "mixed": (
        lambda q, k, v: attention(q, k.astype(jnp.bfloat16), v), TypeError,
        "'k' is bfloat16.*expected float32",
    ),
    "heads": (
        lambda q, k, v: attention(q, k[:, :, :3], v[:, :, :3]), TypeError,
        "'k' .* divides the 4",
    ),
    "v": (lambda q, k, v: attention(q, k, v[:, :9]), TypeError, "'v' is .*as 'k' has"),
    "mask": (
        lambda q, k, v: attention(q, k, v, mask=jnp.ones((2, 21), bool)), TypeError,
        r"'mask' is bool\[2, 21\], expected \[B, N, T, S\] = \[2, 4, 21, 21\]",
    ),
    "mask floats": (
        lambda q, k, v: attention(q, k, v, mask=jnp.ones((1, 1, 21, 21))), TypeError,
        "'mask' is float32.*expected bool",
    ),
    "bias": (
        lambda q, k, v: attention(q, k, v, bias=jnp.ones((2, 4, 21, 20))), TypeError,
        "'bias' is float32",
    ),
    "ids": (
        lambda q, k, v: attention(q, k, v, segment_ids=jnp.ones((2, 20), int)),
        TypeError, "'segment_ids' is int32",
    ),
    "float ids": (
        lambda q, k, v: attention(q, k, v, segment_ids=jnp.ones((2, 21))), TypeError,
        "'segment_ids' is float32",
    ),
    "sinks": (
        lambda q, k, v: attention(q, k, v, sinks=jnp.ones(3)), TypeError, "'sinks'",
    ),
    "window": (
        lambda q, k, v: attention(q, k, v, window=0), ValueError, "'window' is 0",
    ),
    "window pair": (
        lambda q, k, v: attention(q, k, v, window=(-1, 2)), ValueError, "'window' is",
    ),
    "softcap": (
        lambda q, k, v: attention(q, k, v, logit_softcap=0.0), ValueError,
        "'logit_softcap' is 0.0",
    ),
    "scale": (
        lambda q, k, v: attention(q, k, v, scale=float("nan")), ValueError, "'scale'",
    ),
    "rate": (
        lambda q, k, v: attention(q, k, v, dropout=(1.0, jax.random.key(0))),
        ValueError, "'dropout' has rate 1.0",
    ),
    "raw key": (
        lambda q, k, v: attention(q, k, v, dropout=(0.1, jax.random.PRNGKey(0))),
        TypeError, "'dropout' is uint32",
    ),
    "name": (
        lambda q, k, v: attention(q, k, v, implementation=cast(Any, "cudnn")),
        ValueError,
        "'implementation' is 'cudnn', expected one of 'ref', 'xla'",
    ),
    "platform": (
        lambda q, k, v: attention(q, k, v, implementation="pallas_tpu"),
        NotImplementedError, "'pallas_tpu', but the TPU kernel does not run on 'cpu'",
    ),
    "group": (lambda *_: shifted_groups(8, 2, 3), ValueError, "'group' is 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(*QKV)
