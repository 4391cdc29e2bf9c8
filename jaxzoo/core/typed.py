"""Argument checks for public functions: one sentence that a person can act on.

`@typed` reads the jaxtyping annotations of a function and checks shapes and dtypes
when it is called from Python. Under `jax.jit` the checks run while tracing, so the
compiled program does not carry them.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jax.core import Tracer
from jaxtyping import TypeCheckError, jaxtyped

__all__ = [
    "ArrayLike",
    "as_float32",
    "check_axis",
    "check_range",
    "check_trailing",
    "typed",
]

ArrayLike = jax.Array | np.ndarray

F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """Checks every call of `function` against its annotations.

    Args:
        function: a function whose arguments carry jaxtyping or plain annotations.

    Returns:
        The function, which now raises TypeError (ValueError where the annotation is a
        `Literal`) that names the argument, what came and what was expected.

    >>> from jaxtyping import Float
    >>> @typed
    ... def mean_square(x: Float[ArrayLike, "n"], y: Float[ArrayLike, "n"]):
    ...     return ((x - y) ** 2).mean()
    >>> mean_square(np.zeros(8), np.zeros((8, 1)))
    Traceback (most recent call last):
        ...
    TypeError: mean_square: argument 'y' is float64[8,1], expected Float "n" with n=8.
    """
    checked = jaxtyped(typechecker=beartype)(function)
    signature = inspect.signature(function)
    name = function.__name__

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return checked(*args, **kwargs)
        except TypeCheckError as error:
            found = re.search(r"typechecking parameter '(\w+)'", str(error))
            if found is None:
                raise
            argument = found.group(1)
            came = signature.bind(*args, **kwargs).arguments[argument]
            annotation = signature.parameters[argument].annotation
            kind = ValueError if _literals(annotation) else TypeError
            sentence = (
                f"{name}: argument '{argument}' is {_describe(came)}, "
                f"expected {_expected(annotation)}{_bound_axes(str(error))}."
            )
        raise kind(sentence)

    return typing.cast(F, wrapper)


def as_float32(x: ArrayLike | float) -> jax.Array:
    """`x` in the dtype that densities and losses are computed in.

    Args:
        x: numbers of any real dtype.

    Returns:
        float32, or float64 where `x` came as float64.

    >>> as_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_range(
    argument: str,
    value: Any,
    *,
    low: float = -float("inf"),
    high: float = float("inf"),
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ValueError unless low <= value <= high; NaN never passes.

    `above` and `below` are limits that the value has to stay away from.

    A traced value cannot be looked at and is let through: the promise is for numbers
    that a person wrote.

    >>> check_range("beta", -1.0, low=0)
    Traceback (most recent call last):
        ...
    ValueError: argument 'beta' is -1.0, expected a number >= 0.
    >>> check_range("b1", 1.0, low=0, below=1)
    Traceback (most recent call last):
        ...
    ValueError: argument 'b1' is 1.0, expected a number >= 0 and < 1.
    """
    if isinstance(value, Tracer):
        return
    if isinstance(value, jax.Array):
        value = np.asarray(value)  # under jit a comparison of jax's would be traced
    is_inside = above is None or value > above
    is_inside = is_inside and (below is None or value < below)
    if is_inside and low <= value <= high:
        return
    limits = [f">= {low:g}"] if low > -float("inf") else []
    limits += [f"> {above:g}"] if above is not None else []
    limits += [f"<= {high:g}"] if high < float("inf") else []
    limits += [f"< {below:g}"] if below is not None else []
    expected = " and ".join(limits) or "that is not NaN"
    raise ValueError(f"argument '{argument}' is {value}, expected a number {expected}.")


def check_axis(argument: str, axis: int, ndim: int) -> int:
    """Returns `axis` counted from the front, or raises ValueError naming it.

    >>> check_axis("axis", -1, 3)
    2
    """
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"argument '{argument}' is {axis}, expected an axis of an array with "
            f"{ndim} dimensions."
        )
    return axis % ndim


def check_trailing(**arrays: Any) -> tuple[int, ...]:
    """Returns the common shape of arrays that differ by leading axes alone.

    Leading axes are samples: `z [K, B, D]` goes with `mean [B, D]`. An axis of size one
    is never stretched, so that `(n,)` against `(n, 1)` cannot become `(n, n)`.

    Raises:
        TypeError: names the first array whose shape does not fit the first one's.

    >>> check_trailing(x=np.zeros((5, 8, 2)), mean=np.zeros((8, 2)), log_std=0.0)
    (5, 8, 2)
    >>> check_trailing(x=np.zeros(8), mean=np.zeros((8, 1)))
    Traceback (most recent call last):
        ...
    TypeError: argument 'mean' has shape (8, 1), expected the shape of 'x', (8,), up \
to leading axes.
    """
    items = [(name, np.shape(value)) for name, value in arrays.items()]
    longest_name, longest = items[0]
    for name, shape in items[1:]:
        short, long = sorted((shape, longest), key=len)
        if long[len(long) - len(short) :] != short:
            raise TypeError(
                f"argument '{name}' has shape {shape}, expected the shape of "
                f"'{longest_name}', {longest}, up to leading axes."
            )
        if len(shape) > len(longest):
            longest_name, longest = name, shape
    return longest


def _describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    text = " ".join(repr(value).split())  # arrays are printed in rows
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _literals(annotation: Any) -> list[Any]:
    return [
        choice
        for member in _members(annotation)
        if typing.get_origin(member) is typing.Literal
        for choice in typing.get_args(member)
    ]


def _expected(annotation: Any) -> str:
    # A union over array types repeats one dtype and shape: say it once.
    words = dict.fromkeys(_member_text(member) for member in _members(annotation))
    return " or ".join(words)


def _member_text(member: Any) -> str:
    if typing.get_origin(member) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(member)))
    if hasattr(member, "dim_str"):
        return f'{member.__name__.split("[")[0]} "{member.dim_str}"'
    if member is type(None):
        return "None"
    return getattr(member, "__name__", str(member))


def _bound_axes(message: str) -> str:
    """What jaxtyping says that the axis names stand for, in the call that failed."""
    _, _, tail = message.partition("axis annotation are as follows.\n")
    return f" with {', '.join(tail.split())}" if tail.strip() else ""
