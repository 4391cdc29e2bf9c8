"""A linear map that is given by its transpose, for every mode of JAX."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["transpose_of"]

linear_p = Primitive("transpose_of")
linear_p.multiple_results = True


def transpose_of(gradient: Callable, saved: Any, outputs: Any, inputs: Any) -> Any:
    """L x, for the linear map L whose transpose is `gradient`.

    L itself is made by JAX, by transposing. But where JAX transposes L in turn it takes
    `gradient` as it was written, not what comes of transposing it twice, which is
    slower. `jax.custom_derivatives.linear_call` does this too, without vmap.

    Args:
        gradient: `gradient(saved, y, differentiable)`, linear in y, a tree like
            `outputs`; gives a tree like `inputs`. Where JAX transposes or
            differentiates it, `differentiable` is True.
        saved: what the map depends on; a tree of arrays.
        outputs: a tree of arrays of the shapes of what L gives.
        inputs: x; a tree of floats.

    Returns:
        A tree of arrays like `outputs`.
    """
    saved, of_saved = jax.tree.flatten(saved)
    inputs = jax.tree.leaves(inputs)
    outputs, of_outputs = jax.tree.flatten(outputs)

    def flat(saved: Any, y: Any, differentiable: bool) -> list[jax.Array]:
        saved, y = of_saved.unflatten(saved), of_outputs.unflatten(y)
        return jax.tree.leaves(gradient(saved, y, differentiable))

    types = tuple(tuple(map(jax.typeof, side)) for side in (outputs, inputs))
    return of_outputs.unflatten(
        linear_p.bind(
            *saved, *inputs, gradient=flat, types=types, count=len(saved), back=False
        )
    )


def run(
    *arrays: Any,
    gradient: Callable,
    types: Any,
    count: int,
    back: bool,
    differentiable: bool = False,
) -> list[jax.Array]:
    """The map or, with `back`, the gradient; `types` are of outputs and of inputs."""
    saved, x = arrays[:count], list(arrays[count:])
    if back:
        return gradient(saved, x, differentiable)
    shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types[0]]
    return jax.linear_transpose(lambda y: gradient(saved, y, True), shapes)(x)[0]


linear_p.def_impl(run)
mlir.register_lowering(linear_p, mlir.lower_fun(run, multiple_results=True))


@linear_p.def_abstract_eval
def types_of(*_: Any, types: Any, back: bool, **__: Any) -> list[Any]:
    return list(types[1 if back else 0])


def jvp(primals: Any, tangents: Any, *, count: int, **words: Any) -> Any:
    words["count"] = count
    out = linear_p.bind(*primals, **words)
    changes = [jnp.zeros_like(x) for x in out]
    if any(type(t) is not ad.Zero for t in tangents[count:]):
        x = map(ad.instantiate_zeros, tangents[count:])
        changes = linear_p.bind(*primals[:count], *x, **words)
    moving = [i for i, t in enumerate(tangents[:count]) if type(t) is not ad.Zero]
    if moving:

        def of_saved(*some: jax.Array) -> list[jax.Array]:
            arrays = list(primals)
            for i, x in zip(moving, some, strict=True):
                arrays[i] = x
            return run(*arrays, **words, differentiable=True)

        point, direction = ([x[i] for i in moving] for x in (primals, tangents))
        more = jax.jvp(of_saved, point, direction)[1]
        changes = [a + b for a, b in zip(changes, more, strict=True)]
    return out, changes


def transpose(cotangents: Any, *arrays: Any, count: int, back: bool, **words: Any):
    y = map(ad.instantiate_zeros, cotangents)
    got = linear_p.bind(*arrays[:count], *y, count=count, back=not back, **words)
    linear = map(ad.is_undefined_primal, arrays[count:])
    pairs = zip(linear, got, strict=True)
    return [None] * count + [x if wanted else None for wanted, x in pairs]


def batch(arrays: Any, axes: Any, *, gradient: Callable, types: Any, **words: Any):
    """The batch comes first on both sides of the map; `saved` stays as it is."""
    count = words["count"]
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
    x = [
        batching.bdim_at_front(array, axis, size)
        for array, axis in zip(arrays[count:], axes[count:], strict=True)
    ]

    def batched(saved: Any, y: Any, differentiable: bool) -> list[jax.Array]:
        one = functools.partial(gradient, differentiable=differentiable)
        return jax.vmap(one, (list(axes[:count]), 0))(list(saved), list(y))

    longer = [tuple(t.update(shape=(size, *t.shape)) for t in side) for side in types]
    got = linear_p.bind(
        *arrays[:count], *x, gradient=batched, types=tuple(longer), **words
    )
    return got, [0] * len(got)


ad.primitive_jvps[linear_p] = jvp
ad.primitive_transposes[linear_p] = transpose
batching.primitive_batchers[linear_p] = batch
