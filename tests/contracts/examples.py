"""Every public function with its example, found in the code; nothing is listed here."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxzoo.catalogue import ROOT, read_papers

MODULES = sorted(
    {paper.module for paper in read_papers() if paper.path.startswith("jaxzoo/")}
    | {
        f"jaxzoo.{path.parent.name}.{path.stem}"
        for path in (ROOT / "jaxzoo").glob("*/*.py")
        if "\nEXAMPLES = " in path.read_text("utf-8")
    }
)


class Case(NamedTuple):
    """A public function and what builds its example."""

    module: str
    function: Callable[..., Any]
    build: Callable[[jax.Array], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def example(
        self, seed: int | jax.Array = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.build(jax.random.key(seed) if isinstance(seed, int) else seed)

    def on_floats(self, seed: int | jax.Array = 0):
        """The function of its floating point arrays alone, and those arrays."""
        args, kwargs = self.example(seed)
        where = [i for i, arg in enumerate(args) if is_float(arg)]

        def of_floats(*floats: Any) -> Any:
            filled = list(args)
            for index, value in zip(where, floats, strict=True):
                filled[index] = value
            return self.function(*filled, **kwargs)

        return of_floats, [args[i] for i in where]

    def objective(self, seed: int = 0):
        """A scalar that every entry of the value enters with a weight of its own.

        Of a pair (value, aux) it is the value: aux reports, nobody descends on it.
        """
        of_floats, floats = self.on_floats(seed)

        def scalar(*floats: Any) -> jax.Array:
            total = jnp.zeros(())
            output = of_floats(*floats)
            if type(output) is tuple and isinstance(output[-1], dict):
                output = output[0]
            for leaf in jax.tree.leaves(output):
                if is_float(leaf):
                    weight = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + 1)
                    total += jnp.sum(leaf * weight.reshape(leaf.shape))
            return total

        return scalar, floats


def is_float(leaf: Any) -> bool:
    """Whether this is an array of floats."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _cases() -> list[Case]:
    cases = []
    for name in MODULES:
        module = importlib.import_module(name)
        examples = getattr(module, "EXAMPLES", None)
        if examples is None:
            (function,) = public_functions(module)
            examples = {function: module.example}
        cases += [Case(name, *pair) for pair in examples.items()]
    return cases


def makes_an_optimizer(function: Callable[..., Any]) -> bool:
    """Whether it returns a transformation: `test_optimizers.py` holds its promises."""
    returned = inspect.signature(function).return_annotation
    return inspect.isclass(returned) and issubclass(
        returned, optax.GradientTransformation
    )


def public_functions(module: Any) -> list[Callable[..., Any]]:
    """The functions in `__all__`; NamedTuples and modules of parameters are not."""
    names = [getattr(module, name) for name in module.__all__]
    return [value for value in names if inspect.isfunction(value)]


def _floats(case: Case) -> tuple[int, bool]:
    """How many float arrays it takes, and whether it maps them to floats."""
    found = []

    def look(key: jax.Array) -> None:
        of_floats, floats = case.on_floats(key)
        found.append((len(floats), floats and of_floats(*floats)))

    # Traced, not run: every process that collects tests comes by here.
    jax.eval_shape(look, jax.random.key(0))
    ((count, values),) = found
    return count, any(is_float(leaf) for leaf in jax.tree.leaves(values))


_ALL = _cases()
CASES = [case for case in _ALL if not makes_an_optimizer(case.function)]
OPTIMIZERS = [case for case in _ALL if makes_an_optimizer(case.function)]
_FLOATS = [_floats(case) for case in CASES]
DIFFERENTIABLE = [case for case, (_, yes) in zip(CASES, _FLOATS, strict=True) if yes]
# Whose arrays could be broadcast against each other.
SEVERAL = [case for case, (count, _) in zip(CASES, _FLOATS, strict=True) if count > 1]


def name(case: Case) -> str:
    """The id of a parametrized test."""
    return f"{case.module.removeprefix('jaxzoo.')}.{case.function.__name__}"


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Leaf by leaf, relative to the largest entry of the leaf."""
    jax.tree.map(lambda a, b: _assert_leaf(a, b, rtol), actual, expected)


def _assert_leaf(actual: Any, expected: Any, rtol: float) -> None:
    actual, expected = (np.asarray(jnp.asarray(x)) for x in (actual, expected))
    if not is_float(expected):
        np.testing.assert_array_equal(actual, expected)
        return
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def assert_named(kind: Any, parameter: str, call: Callable[[], Any]) -> None:
    """The call raises, and says in one short line which parameter is to blame."""
    with pytest.raises(kind) as info:
        call()
    message = str(info.value)
    assert parameter in message and len(message) <= 400 and "\n" not in message, message
