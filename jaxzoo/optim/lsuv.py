"""LSUV: layer after layer, weights scaled until the outputs have variance 1.

    1. every kernel of a dense or convolutional layer: orthonormal
    2. from the first such layer to the last, on one batch:
       while |Var(outputs) - 1| >= tolerance:  kernel <- kernel / sqrt(Var(outputs))

Variance is over all examples, places and units of a layer. It holds for any Flax module
whose layers have a parameter named "kernel" and are called one after another, with
skips or without:

    variables, variance = lsuv_init(key, model, (images,))
    variance = layer_variances(model, variables, (images,))     # of any start

Layers come in the order of their calls; a kernel that is used twice is scaled at its
first use. Layers inside `nn.scan` have no outputs that could be seen here.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, PyTree, Shaped

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "lsuv",
    "title": "All you need is a good init",
    "arxiv": "1511.06422",
    "year": 2016,
    "authors": "Dmytro Mishkin, Jiri Matas",
    "where": "Algorithm 1.",
    "differs": "One batch serves all iterations, so that without biases the first is "
    "exact. All kernels begin orthonormal at once, in the Keras code each before its "
    "own turn, which is the same. Unlike the Keras code, layers with fewer than 32 "
    "outputs are scaled too; unlike the PyTorch code, biases are left alone and it is "
    "the variance, not the deviation, that the tolerance holds for. One pass visits "
    "all layers. On digits the variances of 30 layers are within 0.04 of 1 on all "
    "1,500 images after LSUV saw 1,024 of them, and within 0.14 on other writers'; "
    "after it saw 256 they were within 0.12.",
}

__all__ = ["lsuv_init"]


@typed
def lsuv_init(
    key: Key[Array, ""],
    module: nn.Module,
    inputs: tuple[Any, ...],
    *,
    tolerance: float = 0.1,
    max_iter: int = 10,
) -> tuple[Any, dict[str, Array]]:
    """Variables of a module with outputs of variance 1 in every layer with a kernel.

    Args:
        key: a typed key.
        module: any Flax module; its other variables start as it says.
        inputs: what it is called with, such as `(images,)`: one batch of real data.
        tolerance: a layer is done at |variance - 1| < tolerance, > 0.
        max_iter: of each layer, >= 1. Without biases the first is exact.

    Returns:
        `(variables, variance)`: as of `module.init`, and the variance of the outputs
        of each layer by its path, in the order of the calls. A layer without variance
        stays orthonormal.

    Raises:
        ValueError: a number is out of range.

    >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(8)])
    >>> x = 7.0 * jax.random.normal(jax.random.key(1), (64, 16))
    >>> variables, variance = lsuv_init(jax.random.key(0), model, (x,))
    >>> {name: round(float(value), 3) for name, value in variance.items()}
    {'layers_0': 1.0, 'layers_2': 1.0}
    """
    check_range("tolerance", tolerance, above=0.0)
    check_range("max_iter", max_iter, low=1)
    init_key, key = jax.random.split(key)
    variables = dict(module.init(init_key, *inputs))
    variables["params"] = _orthonormal(key, variables["params"])
    scales: dict[tuple[str, ...], Array] = {}

    def rescale(path: tuple[str, ...], y: Array, bias: Array) -> Array:
        if path not in scales:
            scales[path] = _unit_scale(y - bias, bias, tolerance, max_iter)
        return ((y - bias) * scales[path] + bias).astype(y.dtype)

    variance = _visit(module, variables, inputs, rescale)

    def scaled(path: tuple[str, ...], kernel: Array) -> Array:
        # A layer that was not called has no outputs to go by.
        return (kernel * scales.get(path, 1.0)).astype(kernel.dtype)

    return {**variables, "params": _with_kernels(variables["params"], scaled)}, variance


@typed
def layer_variances(
    module: nn.Module,
    variables: PyTree[Shaped[ArrayLike, "..."]],
    inputs: tuple[Any, ...],
) -> dict[str, Array]:
    """The variance of the outputs of each layer with a kernel, before activations.

    Args:
        module: any Flax module.
        variables: its variables.
        inputs: what it is called with, such as `(images,)`.

    Returns:
        float32 scalars by the paths of the layers, in the order of the calls.

    >>> model = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(512)])
    >>> x = jax.random.normal(jax.random.key(1), (64, 512))
    >>> variables = model.init(jax.random.key(0), x)                # LeCun's
    >>> variances = layer_variances(model, variables, (x,))
    >>> {name: round(float(value), 1) for name, value in variances.items()}
    {'layers_0': 1.0, 'layers_2': 0.5}
    """
    return _visit(module, variables, inputs, lambda path, y, bias: y)


def _visit(
    module: nn.Module,
    variables: Any,
    inputs: tuple[Any, ...],
    change: Callable[[tuple[str, ...], Array, Array], Array],
) -> dict[str, Array]:
    """Calls a module with `change(path, y, bias)` in place of the outputs of layers."""
    variances: dict[str, Array] = {}

    def layer(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        y = call(*args, **kwargs)
        owner = context.module
        if context.method_name != "__call__" or not owner.has_variable(
            "params", "kernel"
        ):
            return y
        has_bias = owner.has_variable("params", "bias")
        bias = owner.get_variable("params", "bias") if has_bias else jnp.zeros(())
        y = change(owner.path, y, jnp.broadcast_to(bias, y.shape))
        variances.setdefault("/".join(owner.path), jnp.var(as_float32(y)))
        return y

    mutable = [name for name in variables if name != "params"]
    with nn.intercept_methods(layer):
        module.apply(variables, *inputs, mutable=mutable)
    return variances


def _unit_scale(z: Array, bias: Array, tolerance: float, max_iter: int) -> Array:
    """s for which s z + bias has a variance of 1, by repeated division."""
    z, bias = as_float32(z), as_float32(bias)

    def is_off(state: Any) -> Array:
        turn, _, variance = state
        off = jnp.abs(variance - 1.0) >= tolerance
        return off & (turn < max_iter) & (variance > 1e-14)

    def divide(state: Any) -> Any:
        turn, scale, variance = state
        scale = scale * lax.rsqrt(variance)
        return turn + 1, scale, jnp.var(scale * z + bias)

    one = jnp.ones((), z.dtype)
    return lax.while_loop(is_off, divide, (0, one, jnp.var(z + bias)))[1]


def _with_kernels(params: Any, new: Callable[[tuple[str, ...], Array], Array]) -> Any:
    """The parameters with `new(path of the layer, kernel)` for each kernel."""

    def one(path: Any, leaf: Array) -> Array:
        names = tuple(str(entry.key) for entry in path)
        return new(names[:-1], leaf) if names[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def _orthonormal(key: Array, params: Any) -> Any:
    """New kernels `[..., inputs, outputs]`: orthonormal rows or columns, the fewer.

    All kernels of a shape are drawn at once: one program however deep the module.
    """
    places: dict[Any, list[tuple[str, ...]]] = {}

    def place(path: tuple[str, ...], kernel: Array) -> Array:
        places.setdefault((kernel.shape, kernel.dtype), []).append(path)
        return kernel

    _with_kernels(params, place)
    drawn = {}
    for index, ((shape, dtype), paths) in enumerate(places.items()):
        keys = jax.random.split(jax.random.fold_in(key, index), len(paths))
        draw = functools.partial(nn.initializers.orthogonal(), shape=shape, dtype=dtype)
        drawn |= dict(zip(paths, jax.vmap(draw)(keys), strict=True))
    return _with_kernels(params, lambda path, kernel: drawn[path])


def _example() -> tuple[nn.Module, tuple[Array, ...]]:
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
    return model, (3.0 * jax.random.normal(jax.random.key(1), (8, 6)),)


EXAMPLES = {lsuv_init: lambda key: ((key, *_example()), {})}
