"""TrAct: a first layer whose update moves its outputs as if they were what is trained.

A layer z = x w + b with inputs x `[B, D]` and g = dL/dz has the weight gradient x^T g:
an image of twice the contrast moves the weights twice as far, and its outputs four
times. TrAct asks instead for the weights that take a gradient step on z itself,

    min over u of  |x u + eta g|^2 / B + lam |u|^2

up to the scale of eta, and gives in place of the weight gradient

    (x^T x / B + lam I)^-1 x^T g  =  x^T (x x^T / B + lam I)^-1 g

Everything else is as before, so it goes with any optimizer:

    h = tract_dense(x, w, b, lam=0.1)                # the first layer; then as usual

With lam to infinity it is the plain gradient over lam; with lam to 0 and independent
rows one step of SGD at rate eta moves z by exactly -eta B g.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "tract",
    "title": "TrAct: Making First-layer Pre-Activations Trainable",
    "arxiv": "2410.23970",
    "year": 2024,
    "authors": "Felix Petersen, Christian Borgelt, Stefano Ermon",
    "where": "Section 3 (the closed form, both ways of inverting, convolutions by "
    "unfolded patches).",
    "differs": "With fewer rows than columns the inverse is of x x^T / B + lam I, "
    "equal to the released code's expansion of it; lam is at least the resolution of "
    "the floats. The experiment trains small networks on 8x8 digits of jittered "
    "contrast, not ResNets and vision transformers on CIFAR and ImageNet: 0.64 of the "
    "steps to 90% held out, with SGD and with Adam alike.",
}

__all__ = ["tract_conv", "tract_dense"]

NHWC = ("NHWC", "HWIO", "NHWC")


@typed
def tract_dense(
    x: Float[ArrayLike, "*batch inputs"],
    w: Float[ArrayLike, "inputs outputs"],
    b: Float[ArrayLike, " outputs"],
    *,
    lam: float = 0.1,
) -> Float[Array, "*batch outputs"]:
    """A dense layer with the TrAct update.

    z = x w + b

    Gradient: that of `w` is (x^T x / B + lam I)^-1 x^T g, no derivative; those of `x`
    and `b` are exact. Reverse mode only.

    Args:
        x: inputs, `[..., D]`, best of mean 0 and deviation 1. All leading axes together
            are the B rows, such as the patches of a vision transformer.
        w: weights, `[D, K]`.
        b: bias, `[K]`.
        lam: > 0, in units of x^2. Below the resolution of the floats it counts as that.

    Returns:
        z `[..., K]`, float32.

    Raises:
        ValueError: `lam` is out of range.

    >>> x, w, b = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.eye(2), jnp.zeros(2)
    >>> jax.grad(lambda w: tract_dense(x, w, b, lam=0.5).sum())(w).tolist()
    [[0.6, 0.6], [1.0, 1.0]]
    """
    check_range("lam", lam, above=0.0)
    x, w, b = as_float32(x), as_float32(w), as_float32(b)
    z = _dense(lam, x.reshape(-1, x.shape[-1]), w) + b.reshape(1, -1)
    return z.reshape(*x.shape[:-1], w.shape[1])


@typed
def tract_conv(
    x: Float[ArrayLike, "batch height width inputs"],
    w: Float[ArrayLike, "rows columns inputs outputs"],
    b: Float[ArrayLike, " outputs"],
    *,
    stride: int = 1,
    padding: Literal["SAME", "VALID"] = "SAME",
    lam: float = 0.1,
) -> Float[Array, "batch out_height out_width outputs"]:
    """A convolution with the TrAct update: a dense layer of all patches of the batch.

    Gradient: that of `w` as in `tract_dense`, B the number of patches; those of `x` and
    `b` are exact. Reverse mode only.

    Args:
        x: images, `[N, H, W, C]`, best of mean 0 and deviation 1.
        w: kernels, `[rows, columns, C, K]`.
        b: bias, `[K]`.
        stride: in both directions, at least 1.
        padding: "SAME" or "VALID".
        lam: > 0, in units of x^2.

    Returns:
        z `[N, H', W', K]`, float32.

    Raises:
        ValueError: a hyperparameter is out of range.

    >>> x, w = jnp.ones((1, 4, 4, 1)), jnp.zeros((2, 2, 1, 1))
    >>> f = lambda w: tract_conv(x, w, jnp.zeros(1), stride=2, lam=1.0).sum()
    >>> jax.grad(f)(w).ravel().tolist()
    [0.8, 0.8, 0.8, 0.8]
    """
    check_range("stride", stride, low=1)
    check_range("lam", lam, above=0.0)
    x, w, b = as_float32(x), as_float32(w), as_float32(b)
    return _conv(stride, padding, lam, x, w) + b.reshape(1, 1, 1, -1)


def _direction(x: Array, g: Array, lam: float) -> Array:
    """(x^T x / B + lam I)^-1 x^T g, by the smaller of the two inverses."""
    rows, width = x.shape
    # Squares of large inputs would overflow; small ones are left, for lam is theirs.
    scale = jnp.maximum(jnp.max(jnp.abs(x)), 1.0)
    x = x / scale
    few = rows < width
    gram = _matmul(x, x.T) if few else _matmul(x.T, x)
    gram = gram / rows
    least = 2.0 * jnp.finfo(x.dtype).eps * jnp.trace(gram)
    ridge = jnp.maximum(lam / scale / scale, least)
    one = jnp.eye(len(gram), dtype=gram.dtype)
    # Solved for I, not for the right-hand sides: a layer has many more outputs.
    factor = jax.scipy.linalg.cho_factor(gram + ridge * one)
    inverse = jax.scipy.linalg.cho_solve(factor, one)
    u = _matmul(x.T, _matmul(inverse, g)) if few else _matmul(inverse, _matmul(x.T, g))
    return u / scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(lam: float, x: Array, w: Array) -> Array:
    return jnp.matmul(x, w)


def _dense_forward(lam: float, x: Array, w: Array):
    return jnp.matmul(x, w), (x, w)


def _dense_backward(lam: float, stored: tuple[Array, Array], g: Array):
    x, w = stored
    return jnp.matmul(g, w.T), _direction(x, g, lam)


_dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv(stride: int, padding: str, lam: float, x: Array, w: Array) -> Array:
    return _plain_conv(stride, padding, x, w)


def _conv_forward(stride: int, padding: str, lam: float, x: Array, w: Array):
    return _plain_conv(stride, padding, x, w), (x, w)


def _conv_backward(
    stride: int, padding: str, lam: float, stored: tuple[Array, Array], g: Array
):
    x, w = stored
    (dx,) = jax.vjp(lambda x: _plain_conv(stride, padding, x, w), x)[1](g)
    size, inputs, outputs = w.shape[:2], w.shape[2], w.shape[3]
    patches = lax.conv_general_dilated_patches(
        x, size, (stride, stride), padding, dimension_numbers=NHWC,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    # A patch lists channel by channel, and a kernel has its channels last.
    rows = patches.reshape(-1, inputs * size[0] * size[1])
    u = _direction(rows, g.reshape(-1, outputs), lam)
    return dx, u.reshape(inputs, *size, outputs).transpose(1, 2, 0, 3)


_conv.defvjp(_conv_forward, _conv_backward)


def _plain_conv(stride: int, padding: str, x: Array, w: Array) -> Array:
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=NHWC
    )


def _matmul(x: Array, y: Array) -> Array:
    # Float32 also on a TPU: the inverse makes errors of bfloat16 larger.
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _layer(key: Array, images: tuple[int, ...], kernel: tuple[int, ...]):
    keys = jax.random.split(key, 3)
    x, w = jax.random.normal(keys[0], images), jax.random.normal(keys[1], kernel)
    return x, w, jax.random.normal(keys[2], kernel[-1:])


EXAMPLES = {
    tract_dense: lambda key: (_layer(key, (8, 4), (4, 3)), {}),
    tract_conv: lambda key: (_layer(key, (8, 4, 4, 2), (2, 2, 2, 3)), {"stride": 2}),
}
