"""AutoGen: a latent that both generates x and returns it through encode and decode.

    log p(x) + m log p(x' = x | x),   p(x' | x) = E_q(z|x) p(x'|z)
      >= (1 + m) E_q log p(x|z) - KL(q(z|x) || p(z))

A VAE asks for the first term. The second is the likelihood that an autoencoder of the
same decoder gives x back, m times; its bound is the reconstruction term, m times. So
the usual weight of the KL is 1 / (1 + m), for a reason.

    mean, log_std = TextEncoder(27, latents=8).apply(params[0], x)       # x [B, T]
    z = mean + jnp.exp(log_std) * jax.random.normal(keys[0], mean.shape)
    seen = word_dropout(keys[1], x, 27, rate=0.3)
    logits = TextDecoder(27).apply(params[1], z, seen)                   # [B, T, 27]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)
    loss, aux = autogen_loss(log_p.sum((1, 2)), normal_kl(mean, log_std), m=1.0)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxzoo.core.stats import log_mean_exp, mean_where
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "autogen",
    "title": "Improving latent variable descriptiveness with AutoGen",
    "arxiv": "1806.04480",
    "year": 2018,
    "authors": "Alex Mansbridge, Roberto Fierimonte, Ilya Feige, David Barber",
    "where": "The objective, its bound with the factor 1 + m, and the VAE whose KL "
    "weight is annealed, with which it is compared.",
    "differs": "No released code was found, and of the text only the first pages could "
    "be read: networks, word dropout and linear annealing are assumptions. Functions "
    "take log-likelihoods and divergences, for any decoder. The experiment has 16 "
    "letters where the paper has sentences. There the VAE does not use its latent "
    "(0.02 nats), so the ratio of divergences says little; m = 1 reconstructs 1.2 nats "
    "better, and log p(x) is 0.3 nats lower.",
}

__all__ = [
    "TextDecoder",
    "TextEncoder",
    "autogen_loss",
    "autogen_objective",
    "kl_annealing",
    "word_dropout",
]


@typed
def autogen_loss(
    log_likelihood: Float[ArrayLike, " batch"],
    kl: Float[ArrayLike, " batch"],
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    m: float | Float[ArrayLike, ""] = 1.0,
    kl_weight: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Minus AutoGen's bound, averaged over examples.

    -mean_b [(1 + m) log p(x_b|z_b) - w KL(q(z|x_b) || p(z))],   z_b ~ q(z|x_b)

    It is 1 + m times the loss of a beta-VAE with beta = w / (1 + m). For optimizers
    that divide by the size of gradients, as Adam does, the two are the same.

    Args:
        log_likelihood: log p(x|z) in nats, `[B]`, of a draw or a mean of several.
        kl: divergence from the prior in nats, `[B]`.
        where: examples that count, `[B]`; masked ones may hold anything.
        m: how many times reconstruction counts beside generation, >= 0; 0 is a VAE.
        kl_weight: w, >= 0; 1 is the bound. The annealed VAE has m = 0 and a w from
            `kl_annealing`.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example", and "elbo", the
        bound of log p(x) alone, log p(x|z) - KL, `[B]` each.

    Raises:
        ValueError: a number is out of range.

    >>> loss, aux = autogen_loss(jnp.array([-80.0]), jnp.array([20.0]), m=1.0)
    >>> float(loss), aux["elbo"].tolist()
    (180.0, [-100.0])
    """
    check_range("m", m, low=0.0, below=float("inf"))
    check_range("kl_weight", kl_weight, low=0.0, below=float("inf"))
    log_likelihood, kl = as_float32(log_likelihood), as_float32(kl)
    if where is not None:
        # First, so that masked rows reach neither value nor gradient.
        mask = jnp.asarray(where)
        log_likelihood, kl = (jnp.where(mask, a, 0.0) for a in (log_likelihood, kl))
    each = as_float32(kl_weight) * kl - (1.0 + as_float32(m)) * log_likelihood
    aux = {"per_example": each, "elbo": log_likelihood - kl}
    return mean_where(each, where), lax.stop_gradient(aux)


@typed
def autogen_objective(
    log_likelihood: Float[ArrayLike, " samples *batch"],
    log_prior: Float[ArrayLike, " samples *batch"],
    log_posterior: Float[ArrayLike, " samples *batch"],
    *,
    m: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, "*batch"], dict[str, Array]]:
    """What the bound is a bound of, from K draws z_k ~ q(z|x).

    log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)  +  m log 1/K sum_k p(x|z_k)

    The first term is the importance-sampled log p(x). Each lies below what it estimates
    by about half its squared standard error, and above the mean of its logarithms.

    Args:
        log_likelihood: log p(x|z_k) in nats, `[K, ...]`, K >= 2.
        log_prior: log p(z_k), likewise.
        log_posterior: log q(z_k|x), likewise.
        m: as in `autogen_loss`.

    Returns:
        `(estimate, aux)`: float32 `[...]`, in nats. aux has its terms "log_marginal"
        and "log_reconstruction" (before m), the sampled "bound", and "stderr" of the
        estimate over draws, to first order.

    Raises:
        ValueError: `m` is out of range, or K is 1.

    >>> log_p, one = jnp.log(jnp.array([[0.5], [0.1]])), jnp.zeros((2, 1))
    >>> estimate, aux = autogen_objective(log_p, one, one, m=1.0)
    >>> estimate.tolist(), aux["bound"].tolist()  # 2 log 0.3, and log 0.05
    ([-2.4079], [-2.9957])
    """
    check_range("m", m, low=0.0, below=float("inf"))
    count = len(log_likelihood)
    check_range("len(log_likelihood)", count, low=2)
    m, log_likelihood = as_float32(m), as_float32(log_likelihood)
    log_w = log_likelihood + as_float32(log_prior) - as_float32(log_posterior)
    marginal, reconstruction = log_mean_exp(log_w), log_mean_exp(log_likelihood)
    # The share of each draw in the two means, 1 on average.
    share = jax.nn.softmax(log_w, axis=0) + m * jax.nn.softmax(log_likelihood, axis=0)
    aux = {
        "log_marginal": marginal,
        "log_reconstruction": reconstruction,
        "bound": jnp.mean(log_w + m * log_likelihood, axis=0),
        "stderr": count**0.5 * jnp.std(share, axis=0, ddof=1),
    }
    return marginal + m * reconstruction, lax.stop_gradient(aux)


@typed
def kl_annealing(
    step: Integer[ArrayLike, "..."], *, warmup: int
) -> Float[Array, "..."]:
    """The weight of the KL in the annealed VAE: a line from 0 to 1.

    min(step / warmup, 1)

    Args:
        step: the number of the step, >= 0, of any shape.
        warmup: the step from which the weight is 1, >= 1.

    Returns:
        float32 in [0, 1], shaped like `step`.

    Raises:
        ValueError: `warmup` is below 1.

    >>> kl_annealing(jnp.array([0, 5, 20]), warmup=10).tolist()
    [0.0, 0.5, 1.0]
    """
    check_range("warmup", warmup, low=1)
    return jnp.clip(jnp.asarray(step).astype(jnp.float32) / warmup, 0.0, 1.0)


@typed
def word_dropout(
    key: Key[Array, ""],
    tokens: Int[ArrayLike, "*shape"],
    unknown: int,
    *,
    rate: float | Float[ArrayLike, ""] = 0.3,
) -> Int[Array, "*shape"]:
    """Hides what a decoder reads of its own past, so that it needs the latent.

    Args:
        key: a typed key, consumed.
        tokens: of any shape.
        unknown: the token that hides others.
        rate: probability that a token is hidden, in [0, 1]; 1 leaves it no history.

    Returns:
        int32, shaped like `tokens`. Only the decoder reads it: the encoder and the
        likelihood have the tokens as they are.

    Raises:
        ValueError: `rate` is outside [0, 1].

    >>> word_dropout(jax.random.key(0), jnp.array([3, 1]), 27, rate=1.0).tolist()
    [27, 27]
    """
    check_range("rate", rate, low=0.0, high=1.0)
    tokens = jnp.asarray(tokens).astype(jnp.int32)
    hidden = jax.random.uniform(key, tokens.shape) < as_float32(rate)
    return jnp.where(hidden, unknown, tokens)


class TextEncoder(nn.Module):
    """An LSTM that reads a text of tokens in [0, vocabulary), and q(z|x) at its end."""

    vocabulary: int
    latents: int
    hidden: int = 64
    width: int = 32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> tuple[Array, Array]:
        """Tokens `[B, T]` to mean and log_std, `[B, D]` each."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        h = _LSTM(self.hidden)(x)[:, -1]
        mean, log_std = jnp.split(nn.Dense(2 * self.latents)(h), 2, axis=-1)
        return mean, jnp.clip(log_std, -20.0, 20.0)


class TextDecoder(nn.Module):
    """An LSTM that writes a text, with the latent in its inputs at every step.

    Attributes:
        vocabulary: V; token V is what stands before the text, and what hides others.
        hidden: units of the LSTM.
        width: of the embeddings.
    """

    vocabulary: int
    hidden: int = 64
    width: int = 32

    @nn.compact
    def __call__(
        self, z: Float[Array, "b d"], tokens: Int[Array, "b t"]
    ) -> Float[Array, "b t v"]:
        """Logits `[B, T, V]` of each token, given z and those before it."""
        before = jnp.pad(
            tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.vocabulary
        )
        x = nn.Embed(self.vocabulary + 1, self.width)(before)
        repeated = jnp.repeat(z[:, None], tokens.shape[1], axis=1)
        h = _LSTM(self.hidden)(jnp.concatenate([x, repeated], axis=-1))
        return nn.Dense(self.vocabulary)(h)


class _LSTM(nn.Module):
    """States `[B, T, hidden]` of inputs `[B, T, D]`, from 0."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t hidden"]:
        drive = nn.Dense(4 * self.hidden)(x)  # of all steps in one product
        shape = (self.hidden, 4 * self.hidden)
        weights = self.param("recurrent", nn.initializers.lecun_normal(), shape)

        def step(carry: Any, drive: Array) -> Any:
            h, c = carry
            i, f, g, o = jnp.split(drive + h @ weights, 4, axis=-1)
            # The forget gate begins open.
            c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        _, h = lax.scan(step, (start, start), jnp.moveaxis(drive, 1, 0))
        return jnp.moveaxis(h, 0, 1)


def _loss_example(key: Array):
    log_likelihood, kl = jax.random.normal(key, (2, 8))
    knobs = {"where": jnp.arange(8) < 6, "m": 0.5}
    return (-10.0 * jnp.square(log_likelihood), jnp.square(kl)), knobs


def _objective_example(key: Array):
    draws = jax.random.normal(key, (3, 5, 8))
    return tuple(-jnp.square(draws)), {"m": 0.5}


EXAMPLES = {
    autogen_loss: _loss_example,
    autogen_objective: _objective_example,
    kl_annealing: lambda key: (
        (jax.random.randint(key, (8,), 0, 20),), {"warmup": 10},
    ),
    word_dropout: lambda key: (
        (key, jax.random.randint(key, (8, 4), 0, 5), 5), {"rate": 0.4},
    ),
}  # fmt: skip
