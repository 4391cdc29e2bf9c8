"""GBNN: one hidden layer, trained a few units at a time as gradient boosting would.

    F_0 = argmin_c sum_n L(y_n, c)
    r_t = -dL/dF at F_{t-1}                                   pseudo-residuals, [N, C]
    h_t = argmin_h sum_n |r_tn - h(x_n)|^2,  h(x) = sigmoid(x W + b) V + c, J units
    F_t = F_{t-1} + nu rho_t h_t,            rho_t a Newton step along h_t

A sum of networks with one hidden layer is such a network: `merge` writes the hidden
weights side by side and scales those of the output by nu rho_t. The units lie in the
order of their training, so the last ones can be left out when time is short: `truncate`
is the network that a shorter training would have given.

    L = (y - F)^2 / 2            F_0 the mean,                 rho = 1
    L = log(1 + exp(-2 y F))     F_0 = log((1 + m) / (1 - m)) / 2,  y = +-1, m the mean
    L = -F_y + log sum exp F     F_0 = log of the class frequencies

    binary:   rho = sum r h / sum h^2 r (2 y - r)         the exact second derivative
    classes:  rho = sum h (y - p) / sum h^2 p (1 - p)     without what couples classes

For the last layers of a deep network, `x` are the features that its body computes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key, Real

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "gbnn",
    "title": "Sequential Training of Neural Networks with Gradient Boosting",
    "arxiv": "1909.12098",
    "year": 2019,
    "authors": "Seyedsaman Emami, Gonzalo Martinez-Munoz",
    "where": "Algorithm 1, with its three losses, and the assembly of one network.",
    "differs": "F_0 minimises the loss for several classes too; the released code "
    "begins at 0. Parts begin with biases of 0 and have no weight decay, there 1e-4 "
    "over the rows. A class that no row has counts as half a row. The deep option is "
    "to give the features of a body as x; no convolution is run. In the experiment "
    "each part has 30 iterations of L-BFGS instead of 200. Shrinkages near 1, the "
    "released default, let F explode once all rows but a few are separated, as "
    "p (1 - p) vanishes there. Over five tables Adam is 0.8 +- 0.6 points better.",
}

__all__ = ["Boosted", "Network", "gbnn", "pseudo_residuals"]


class Network(NamedTuple):
    """One hidden layer of sigmoids.

    Attributes:
        kernel: of the hidden layer, `[D, M]`.
        bias: likewise, `[M]`.
        readout: of the output, `[M, C]`.
        shift: likewise, `[C]`.
    """

    kernel: Array
    bias: Array
    readout: Array
    shift: Array

    def __call__(self, x: ArrayLike) -> Array:
        """The outputs of rows `[..., D]`, `[..., C]`."""
        hidden = jax.nn.sigmoid(_affine(as_float32(x), self.kernel, self.bias))
        return _affine(hidden, self.readout, self.shift)


class Boosted(NamedTuple):
    """The additive expansion F_T.

    Attributes:
        constant: F_0, `[C]`.
        parts: the networks h_1, ..., h_T, stacked: kernel `[T, D, J]`, and so on.
        rate: nu rho_t, `[T]`.
    """

    constant: Array
    parts: Network
    rate: Array

    def __call__(self, x: ArrayLike) -> Array:
        """F_T of rows `[N, D]`, `[N, C]`: one part after the other."""
        each = jax.vmap(lambda part: part(x))(self.parts)
        total = jnp.tensordot(self.rate, each, 1, precision=lax.Precision.HIGHEST)
        return self.constant[None] + total

    def merge(self) -> Network:
        """The same function as one network of T J units."""
        kernel, bias, readout, shift = self.parts
        steps, inputs, units = kernel.shape
        kernel = jnp.moveaxis(kernel, 0, 1).reshape(inputs, steps * units)
        readout = (self.rate.reshape(steps, 1, 1) * readout).reshape(steps * units, -1)
        moved = jnp.sum(self.rate.reshape(steps, 1) * shift, axis=0)
        return Network(kernel, bias.reshape(-1), readout, self.constant + moved)

    def truncate(self, num_units: int) -> "Boosted":
        """Without the units that were trained last; whole parts go.

        Args:
            num_units: to keep, a multiple of J; 0 leaves F_0.

        Raises:
            ValueError: that is no multiple of J, or more than there are.
        """
        steps, _, units = self.parts.kernel.shape
        if num_units % units or not 0 <= num_units <= steps * units:
            raise ValueError(
                f"argument 'num_units' is {num_units}, expected a multiple of {units} "
                f"up to {steps * units}."
            )
        kept = num_units // units
        parts = Network(*(x[:kept] for x in self.parts))
        return Boosted(self.constant, parts, self.rate[:kept])


@typed
def pseudo_residuals(
    f: Float[ArrayLike, "n outputs"], y: Real[ArrayLike, " n"], *,
    num_classes: int | None = None,
) -> Float[Array, "n outputs"]:  # fmt: skip
    """The negative gradient of the loss, what the next part is fitted to.

    Args:
        f: F, `[N, 1]` for regression and two classes, `[N, C]` for more.
        y: targets, or with `num_classes` int labels in [0, C).
        num_classes: C; None for regression.

    Returns:
        y - F, or 2 y / (1 + exp(2 y F)) with y = +-1, or the one-hot label minus the
        softmax; float32, shaped like `f`.

    Raises:
        TypeError: the labels are no integers, or `f` has another number of columns.
        ValueError: `num_classes` is below 2.

    >>> f = jnp.array([[0.0], [2.0]])
    >>> pseudo_residuals(f, jnp.array([1, 1]), num_classes=2).squeeze().tolist()
    [1.0, 0.036]
    """
    _check(y, num_classes)
    f = as_float32(f)
    if f.shape[1] != _outputs(num_classes):
        raise TypeError(
            f"argument 'f' has {f.shape[1]} columns, expected {_outputs(num_classes)}."
        )
    target = _targets(y, num_classes)
    if num_classes is None:
        return target - f
    if num_classes == 2:
        return 2.0 * target * jax.nn.sigmoid(-2.0 * target * f)
    return target - jax.nn.softmax(f, axis=1)


@typed
def gbnn(
    key: Key[Array, ""], x: Float[ArrayLike, "n d"], y: Real[ArrayLike, " n"], *,
    num_steps: int, num_units: int, num_classes: int | None = None,
    shrinkage: float | Float[Array, ""] = 1.0, subsample: float = 0.5,
    num_iterations: int = 200,
) -> tuple[Boosted, dict[str, Array]]:  # fmt: skip
    """Trains a network by boosting.

    Each part is fitted by L-BFGS to the pseudo-residuals of rows that are drawn anew;
    its Newton step is taken on all rows. `jax.vmap` over keys and shrinkages trains
    several at once. No gradient goes through the line search of L-BFGS.

    Args:
        key: a typed key, consumed.
        x: inputs, or features of a deep network, `[N, D]`; standardise them.
        y: targets `[N]`, or with `num_classes` int labels in [0, C).
        num_steps: T, how many parts.
        num_units: J, hidden units per part; the merged network has T J.
        num_classes: C; None for regression.
        shrinkage: nu in [0, 1].
        subsample: share of the rows that a part is fitted to, in (0, 1].
        num_iterations: of L-BFGS per part.

    Returns:
        `(boosted, aux)`: the expansion, whose output is F: for two classes 2 F is the
        log-odds of label 1, for more the logits. aux holds "loss" `[T]`, the mean loss
        of all rows after each part, and "fit" `[T]`, each part's mean squared error of
        the pseudo-residuals of all rows.

    Raises:
        TypeError: the labels are no integers.
        ValueError: a number is out of range.

    >>> x = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> boosted, aux = gbnn(  # exclusive or
    ...     jax.random.key(0), x, jnp.array([0, 1, 1, 0]), num_steps=4, num_units=3,
    ...     num_classes=2, subsample=1.0)
    >>> (boosted(x) > 0).squeeze().astype(int).tolist()
    [0, 1, 1, 0]
    """
    sizes = {"num_steps": num_steps, "num_units": num_units}
    for name, size in {**sizes, "num_iterations": num_iterations}.items():
        check_range(name, size, low=1)
    check_range("shrinkage", shrinkage, low=0.0, high=1.0)
    check_range("subsample", subsample, above=0.0, high=1.0)
    _check(y, num_classes)
    x, target = as_float32(x), _targets(y, num_classes)
    rows = max(1, int(subsample * x.shape[0]))
    constant = _constant(target, num_classes)

    def step(f: Array, key: Array) -> Any:
        drawing, training = jax.random.split(key)
        r = pseudo_residuals(f, y, num_classes=num_classes)
        drawn = jax.random.permutation(drawing, x.shape[0])[:rows]
        part = _fit(training, x[drawn], r[drawn], num_units, num_iterations)
        h = part(x)
        rate = shrinkage * _newton(r, h, target, num_classes)
        f = f + rate * h
        loss = jnp.mean(_losses(f, target, num_classes))
        return f, (part, rate, loss, jnp.mean(jnp.square(r - h)))

    f = jnp.broadcast_to(constant, (x.shape[0], len(constant)))
    _, (parts, rate, loss, fit) = lax.scan(step, f, jax.random.split(key, num_steps))
    return Boosted(constant, parts, rate), {"loss": loss, "fit": fit}


def _fit(key: Array, x: Array, r: Array, num_units: int, steps: int) -> Network:
    """Fits J units by L-BFGS to the squared error, from where scikit-learn starts."""
    glorot = jax.nn.initializers.variance_scaling(1 / 3, "fan_avg", "uniform")
    first, second = jax.random.split(key)
    kernel = glorot(first, (x.shape[1], num_units), x.dtype)
    readout = glorot(second, (num_units, r.shape[1]), x.dtype)
    bias, shift = (jnp.zeros(size, x.dtype) for size in readout.shape)
    network = Network(kernel, bias, readout, shift)
    optimizer = optax.lbfgs()

    def loss(network: Network) -> Array:
        return 0.5 * jnp.mean(jnp.square(network(x) - r))

    def iterate(carry: Any, _: None) -> Any:
        network, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(network, state=state)
        updates, state = optimizer.update(
            gradient, state, network, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(network, updates), state), None

    return lax.scan(iterate, (network, optimizer.init(network)), None, steps)[0][0]


def _outputs(num_classes: int | None) -> int:
    return 1 if num_classes is None or num_classes == 2 else num_classes


def _check(y: ArrayLike, num_classes: int | None) -> None:
    if num_classes is None:
        return
    check_range("num_classes", num_classes, low=2)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"argument 'y' is {y.dtype}, expected integer labels.")


def _targets(y: ArrayLike, num_classes: int | None) -> Array:
    """`[N, C]`: targets, +-1, or one-hot labels."""
    if num_classes is None:
        return as_float32(y)[:, None]
    if num_classes == 2:
        return jnp.where(jnp.asarray(y)[:, None] == 1, 1.0, -1.0)
    return jax.nn.one_hot(y, num_classes)


def _constant(target: Array, num_classes: int | None) -> Array:
    mean = jnp.mean(target, axis=0)
    if num_classes is None:
        return mean
    half = 0.5 / target.shape[0]  # of a class that no row has, half a row is assumed
    if num_classes == 2:
        share = jnp.clip((1.0 + mean) / 2.0, half, 1.0 - half)
        return 0.5 * (jnp.log(share) - jnp.log1p(-share))
    return jnp.log(jnp.maximum(mean, half))


def _losses(f: Array, target: Array, num_classes: int | None) -> Array:
    if num_classes is None:
        return 0.5 * jnp.square(target - f)
    if num_classes == 2:
        return jax.nn.softplus(-2.0 * target * f)
    return optax.softmax_cross_entropy(f, target)


def _newton(r: Array, h: Array, target: Array, num_classes: int | None) -> Array:
    if num_classes is None:
        return jnp.ones((), r.dtype)  # h is already a least-squares fit of r
    p = target - r
    curvature = r * (2.0 * target - r) if num_classes == 2 else p * (1.0 - p)
    bottom = jnp.sum(jnp.square(h) * curvature)
    sure = bottom > jnp.finfo(r.dtype).tiny  # else all is learned, or h is 0
    return jnp.where(sure, jnp.sum(r * h) / jnp.where(sure, bottom, 1.0), 0.0)


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    # Float32 also on a TPU: boosting fits what is left of small residuals.
    product = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)
    return product + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))


def _table(key: Array):
    return jax.random.normal(key, (16, 3)), jnp.arange(16) % 3


EXAMPLES = {
    pseudo_residuals: lambda key: (_table(key), {"num_classes": 3}),
    # By name, as no gradient goes through the line search.
    gbnn: lambda key: (
        (key,),
        {"x": _table(key)[0], "y": _table(key)[1], "num_steps": 2, "num_units": 2,
         "num_classes": 3, "num_iterations": 3},
    ),
}  # fmt: skip
