"""PV-RNN: a variational RNN whose posterior is a vector per sequence and time step.

Layers of leaky units, d = tanh(h), from fast to slow, each with latents of its own:

    h_t = (1 - 1/tau) h_{t-1} + (W_d d_{t-1} + W_z z_t + b) / tau
    prior:     mean = tanh(W d_{t-1}),       std = exp(V d_{t-1})
    posterior: mean = tanh(W' d_{t-1} + A),  std = exp(V' d_{t-1} + A')
    loss = reconstruction + w sum_t KL(posterior || prior),   w the meta-prior

A is trained with the weights, and at test fitted to the last steps, with these frozen.

    net = PVRNN(outputs=2)
    out = net.apply(params, noise, adaptive)   # [B, T, net.width], [B, T, 2 net.width]
    loss, aux = pv_rnn_loss(out["output"], x, out["kl"], meta_prior=0.01)

    sizes = {"units": net.units, "latents": net.width, "window": 8}
    error, aux = error_regression(key, partial(net.apply, params), x_test, **sizes)

Without A, or past its end, the latents are the prior's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.stats import normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "pv_rnn",
    "title": "A Novel Predictive-Coding-Inspired Variational RNN Model for Online "
    "Prediction and Recognition",
    "arxiv": "1811.01339",
    "year": 2019,
    "authors": "Ahmadreza Ahmadi, Jun Tani",
    "where": "The model with layers of different time constants, its bound with the "
    "meta-prior, and error regression.",
    "differs": "No code of the authors was found, and the text could not be read here: "
    "the equations are the project's summary. That the posterior has weights of its "
    "own, and that layers hear their neighbours' last d, are assumptions; in a later "
    "implementation (h-idei/pvrnn_sa) the posterior is A alone. The loss is a sum over "
    "features and latents. Windows start when they are full. The experiment has "
    "16 sequences of 24 steps; its prior's sigma does not fall as w rises but "
    "rises from 1e-2 to 1e-1, for 300 steps of training and for 1,500, on other seeds; "
    "and for symbols the largest w, not the one between, had the least test error.",
}

__all__ = ["PVRNN", "error_regression", "pv_rnn_loss"]

LARGEST = 1e9  # of a difference: its square, summed, stays in float32


@typed
def pv_rnn_loss(
    output: Float[ArrayLike, "batch steps features"],
    x: Float[ArrayLike, "batch steps features"],
    kl: Float[ArrayLike, "batch steps"],
    *,
    meta_prior: float = 0.01,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Negative bound: squared error, and w times the divergence from the prior.

    mean_b sum_t [1/2 |x_t - output_t|^2 + w KL_t]

    Args:
        output: of the network, `[B, T, D]`.
        x: sequences, likewise.
        kl: KL(posterior || prior) by step, `[B, T]`, in nats.
        meta_prior: w, >= 0; s^2 for the ELBO of errors of variance s^2.

    Returns:
        `(loss, aux)`: float32 scalar; in aux "per_example", and its terms
        "reconstruction" and "kl" (before w), all `[B]`.

    Raises:
        ValueError: a number is out of range.

    >>> x, kl = jnp.ones((1, 2, 1)), jnp.array([[0.0, 3.0]])
    >>> float(pv_rnn_loss(jnp.zeros((1, 2, 1)), x, kl, meta_prior=0.1)[0])
    1.3
    """
    check_range("meta_prior", meta_prior, low=0.0)
    output, x, kl = (as_float32(a) for a in (output, x, kl))
    squares = jnp.square(jnp.clip(x - output, -LARGEST, LARGEST))
    reconstruction = 0.5 * jnp.sum(squares, axis=(1, 2))
    kl = jnp.sum(kl, axis=1)
    each = reconstruction + meta_prior * kl
    aux = {"per_example": each, "reconstruction": reconstruction, "kl": kl}
    return jnp.mean(each), lax.stop_gradient(aux)


@typed
def error_regression(
    key: Key[Array, ""],
    model: Callable[..., Any],
    x: Float[ArrayLike, "batch steps features"],
    *,
    units: int,
    latents: int,
    window: int,
    iterations: int = 20,
    learning_rate: float = 0.1,
    meta_prior: float = 0.01,
) -> tuple[Float[Array, "batch predicted"], dict[str, Array]]:
    """One-step errors when A is fitted to the last steps, and the weights are frozen.

    A window of W steps slides over x. In each place A is fitted to it by Adam from
    where it was, 0 for the new step; the prior makes the next step; then the state
    after the window's first step is kept.

    Gradient: of x as what was to be predicted; the predictions are constants.

    Args:
        key: a typed key, consumed.
        model: `(noise [B, S, Z], A [B, W, 2 Z], h [B, H])` to a dict of "output"
            `[B, S, D]`, "kl" `[B, S]` and "h" `[B, S, H]`, as of `PVRNN`, for S = W
            and S = W + 1.
        x: sequences, `[B, T, D]`.
        units: H, of all layers.
        latents: Z, of all layers.
        window: W, in [1, T - 1].
        iterations: steps of Adam in each place.
        learning_rate: of Adam.
        meta_prior: w.

    Returns:
        `(error, aux)`: float32 `[B, T - W]`, squared and summed over D, from step W + 1
        on; `aux["prediction"]`, `[B, T - W, D]`.

    Raises:
        ValueError: a number is out of range.

    >>> def copy(noise, a, h):  # an output that is A, and 0 where there is none
    ...     output = jnp.pad(a, ((0, 0), (0, noise.shape[1] - a.shape[1]), (0, 0)))
    ...     return {"output": output[..., :1], "kl": 0 * a[..., 0], "h": a[..., :1]}
    >>> error, aux = error_regression(
    ...     jax.random.key(0), copy, jnp.full((1, 3, 1), 0.5), units=1, latents=1,
    ...     window=2, iterations=3,
    ... )
    >>> error.tolist(), aux["prediction"].tolist()
    ([[0.25]], [[[0.0]]])
    """
    x = as_float32(x)
    batch, steps, _ = x.shape
    check_range("units", units, low=1)
    check_range("latents", latents, low=1)
    check_range("iterations", iterations, low=1)
    check_range("window", window, low=1, high=steps - 1)
    check_range("learning_rate", learning_rate, above=0.0)
    check_range("meta_prior", meta_prior, low=0.0)
    optimizer = optax.adam(learning_rate)

    def place(carry: Any, inputs: Any) -> Any:
        h, a = carry
        key, seen = inputs
        shape = (iterations + 1, batch, window + 1, latents)
        noise = jax.random.normal(key, shape, x.dtype)

        def loss(a: Array, noise: Array) -> Array:
            out = model(noise[:, :-1], a, h)
            terms = (out["output"], seen, out["kl"])
            return batch * pv_rnn_loss(*terms, meta_prior=meta_prior)[0]

        def improve(carry: Any, noise: Array) -> Any:
            a, state = carry
            updates, state = optimizer.update(jax.grad(loss)(a, noise), state)
            return (optax.apply_updates(a, updates), state), None

        (a, _), _ = lax.scan(improve, (a, optimizer.init(a)), noise[1:])
        out = model(noise[0], a, h)
        a = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
        return (out["h"][:, 0], a), out["output"][:, -1]

    past = lax.stop_gradient(x)
    places = jnp.arange(steps - window)[:, None] + jnp.arange(window)[None]
    seen = jnp.moveaxis(past[:, places], 0, 1)
    keys = jax.random.split(key, steps - window)
    a = jnp.zeros((batch, window, 2 * latents), x.dtype)
    h = jnp.zeros((batch, units), x.dtype)
    prediction = jnp.moveaxis(lax.scan(place, (h, a), (keys, seen))[1], 0, 1)
    missed = jnp.clip(x[:, window:] - prediction, -LARGEST, LARGEST)
    return jnp.sum(jnp.square(missed), axis=2), {"prediction": prediction}


class PVRNN(nn.Module):
    """The network: layers from fast to slow, each joined to its neighbours.

    The vectors of all layers lie side by side. The fastest layer makes the output. The
    prior has no bias: at t = 1, where d is 0, it is N(0, I).

    Attributes:
        outputs: D.
        hidden: units of the layers; H is their sum, `units`.
        latents: of the layers; Z is their sum, `width`.
        taus: time constants of the layers, in steps, >= 1.
    """

    outputs: int
    hidden: tuple[Any, ...] = (12, 4)
    latents: tuple[Any, ...] = (2, 1)
    taus: tuple[Any, ...] = (2.0, 8.0)

    @property
    def units(self) -> int:
        return sum(self.hidden)

    @property
    def width(self) -> int:
        return sum(self.latents)

    @nn.compact
    def __call__(
        self, noise: Float[Array, "b steps z"],
        adaptive: Float[Array, "b fitted both"] | None = None,
        h: Float[Array, "b units"] | None = None,
    ) -> dict[str, Array]:  # fmt: skip
        """Noise `[B, T, Z]`, A `[B, S, 2 Z]` with S <= T, and h before, `[B, H]`.

        "output" `[B, T, D]`, "kl" `[B, T]` in nats (0 from S on, where the prior is
        drawn from), "h" `[B, T, H]`; "mean", "log_std", and those of the prior.
        """
        if not len(self.hidden) == len(self.latents) == len(self.taus):
            raise ValueError("'hidden', 'latents' and 'taus' are not of one length.")
        batch, steps, _ = noise.shape
        if adaptive is None:
            adaptive = jnp.zeros((batch, 0, 2 * self.width), noise.dtype)
        fitted = adaptive.shape[1]
        if h is None:
            h = jnp.zeros((batch, self.units), noise.dtype)
        # The columns of of_d: h, then mean and log_std of the prior and the posterior.
        targets = [(self.hidden, 1), *4 * [(self.latents, 0)]]
        of_d = self._matrix("of_d", self.hidden, targets)
        w_z = self._matrix("of_z", self.latents, [(self.hidden, 0)])
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        tau = jnp.asarray(np.repeat(self.taus, self.hidden), noise.dtype)[None]

        def step(h: Array, inputs: Any) -> Any:
            noise, a, is_fitted = inputs
            ends = np.cumsum([self.units, 2 * self.width])
            drive, p, q = jnp.split(jnp.tanh(h) @ of_d, ends, axis=1)
            p, q = _moments(p), _moments(q + a)
            mean, log_std = jax.tree.map(partial(jnp.where, is_fitted), q, p)
            z = mean + jnp.exp(log_std) * noise
            h = (1 - 1 / tau) * h + (drive + z @ w_z + bias[None]) / tau
            return h, (h, mean, log_std, *p)

        a = jnp.pad(adaptive, ((0, 0), (0, steps - fitted), (0, 0)))
        a, noise = (jnp.moveaxis(x, 1, 0) for x in (a, noise))
        _, found = lax.scan(step, h, (noise, a, jnp.arange(steps) < fitted))
        h, *moments = (jnp.moveaxis(x, 0, 1) for x in found)
        kl = normal_kl(*moments)
        fast = jnp.tanh(h[..., : self.hidden[0]])
        output = nn.Dense(self.outputs, name="output")(fast)
        out = {"output": output, "kl": kl, "h": h}
        names = ("mean", "log_std", "prior_mean", "prior_log_std")
        return out | dict(zip(names, moments, strict=True))

    @nn.nowrap
    def _matrix(self, name: str, rows: Any, targets: list[Any]) -> Array:
        """Weights to several targets, from layers at most `reach` apart."""
        start, masks = np.repeat(np.arange(len(rows)), rows)[:, None], []
        for columns, reach in targets:
            end = np.repeat(np.arange(len(columns)), columns)[None]
            masks.append(np.abs(start - end) <= reach)
        mask = np.concatenate(masks, axis=1)
        weights = self.param(name, nn.initializers.lecun_normal(), mask.shape)
        return weights * jnp.asarray(mask, weights.dtype)


def _moments(drive: Array) -> tuple[Array, Array]:
    mean, log_std = jnp.split(drive, 2, axis=-1)
    return jnp.tanh(mean), jnp.clip(log_std, -20, 20)


def _regression_example(key: Array):
    net = PVRNN(outputs=2, hidden=(3, 2), latents=(1, 1))
    params = net.init(jax.random.key(1), jnp.zeros((1, 1, 2)))

    def model(noise: Array, a: Array, h: Array) -> Any:
        return net.apply(params, noise, a, h)

    x = 0.5 * jax.random.normal(key, (8, 5, 2))
    knobs = {"units": 5, "latents": 2, "window": 3, "iterations": 2}
    return (key, model, x), knobs


def _loss_example(key: Array):
    output, x = jax.random.normal(key, (2, 8, 3, 2))
    return (output, x, jnp.square(x[..., 0])), {"meta_prior": 0.1}


EXAMPLES = {pv_rnn_loss: _loss_example, error_regression: _regression_example}
