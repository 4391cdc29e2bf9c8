"""MARS: variance reduction by yesterday's gradient in front of an adaptive step.

Claims: with gamma = 0 and no clipping MARS-AdamW is AdamW to 1e-6; on a noisy quadratic
the momentum of the exact form with gamma = 1 is closer to the true gradient, in mean
square, than an average of the gradients with the same b1.

    python -m experiments.optim.mars full    # quadratic, digits, Moby Dick: 2 minutes

Expected: relative difference 3e-7; error 0.90 of the average's over the whole descent,
0.57 in its second half.

All momenta are taken along the same descent. MARS-AdamW, -Lion and -Shampoo also train
an MLP on digits, and MARS-AdamW a small language model, beside AdamW with the same
betas, each at the best of the same number of learning rates: figures without a claim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.optim._tasks import best, byte_lm, digits_mlp, fit
from jaxzoo.core.transform import descend
from jaxzoo.optim.mars import mars, scale_by_mars
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

UNCLIPPED = float("inf")


@dataclasses.dataclass(frozen=True)
class Config:
    quadratic_seeds: int = 5
    dimension: int = 20
    quadratic_steps: int = 400
    b1: float = 0.95
    noise: float = 1.0  # of the gradient, beside that of the curvature
    rate: float = 0.01  # of the descent on the quadratic
    seeds: int = 3
    digits_steps: int = 300
    text_steps: int = 100
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)

    def __post_init__(self):
        if min(self.seeds, self.quadratic_seeds) < 2:
            raise ValueError("at least two seeds, please")


PRESETS = {
    "smoke": Config(
        quadratic_seeds=2, dimension=4, quadratic_steps=20, seeds=2, digits_steps=5,
        text_steps=0, rates=(1e-2,),
    ),
    "full": Config(),
}  # fmt: skip


def adamw_claim(config: Config) -> Claim:
    """The largest relative difference of parameters after 100 steps, over 3 seeds."""
    direction: Any = scale_by_mars(gamma=0.0, max_norm=UNCLIPPED)
    ours = descend(direction, 0.01, weight_decay=0.1)
    theirs = optax.adamw(0.01, 0.95, 0.99, weight_decay=0.1)

    def after(optimizer: Any, key: jax.Array) -> jax.Array:
        start = jax.random.normal(key, (64, 32))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            grads = params + jax.random.normal(key, params.shape)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (start, optimizer.init(start))
        return lax.scan(step, carry, jax.random.split(key, 100))[0][0]

    def gap(key: jax.Array) -> jax.Array:
        expected = after(theirs, key)
        distance = jnp.max(jnp.abs(after(ours, key) - expected))
        return distance / jnp.max(jnp.abs(expected))

    worst = float(jnp.max(lax.map(gap, jax.random.split(jax.random.key(0), 3))))
    return Claim(
        "MARS-AdamW with gamma = 0 and no clipping against AdamW, largest relative "
        "difference after 100 steps, worst of 3 seeds",
        worst, "<= 1e-6", worst <= 1e-6,
    )  # fmt: skip


FORMS = {
    "average of gradients": (0.0, True),
    "approximate, gamma = 0.025": (0.025, False),
    "exact, gamma = 0.025": (0.025, True),
    "exact, gamma = 1": (1.0, True),
}


def momentum_errors(config: Config) -> dict[str, np.ndarray]:
    """Mean square of momentum minus true gradient, `[steps, seeds]`, of each form.

    f(x; s) = (x - n_s)^T A_s (x - n_s) / 2: curvature and minimum depend on the batch.
    """
    d, b1 = config.dimension, config.b1
    scale = jnp.logspace(0.0, -2.0, d)

    def gradient(x: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        factor = jnp.exp(0.3 * jax.random.normal(keys[0], (d,)) - 0.045)  # mean 1
        return scale * factor * x + config.noise * jax.random.normal(keys[1], (d,))

    def of_seed(key: jax.Array) -> Any:
        forms: list[tuple[Any, bool]] = [
            (scale_by_mars(b1=b1, gamma=gamma, max_norm=UNCLIPPED), is_exact)
            for gamma, is_exact in FORMS.values()
        ]

        def step(carry: Any, key: jax.Array) -> Any:
            x, before, states = carry
            now, then = gradient(x, key), gradient(before, key)
            errors, new = [], []
            for (direction, is_exact), state in zip(forms, states, strict=True):
                extra = {"previous_updates": then} if is_exact else {}
                _, state = direction.update(now, state, x, **extra)
                errors.append(jnp.mean((state.inner.mu - scale * x) ** 2))
                new.append(state)
            # The descent itself is SGD with momentum: the same path for all forms.
            after = x - config.rate * new[0].inner.mu / (1 - b1)
            return (after, x, new), jnp.stack(errors)

        x = 10.0 * jax.random.normal(key, (d,))
        states = [direction.init(x) for direction, _ in forms]
        keys = jax.random.split(jax.random.fold_in(key, 1), config.quadratic_steps)
        return lax.scan(step, (x, x, states), keys)[1]

    keys = jax.random.split(jax.random.key(2), config.quadratic_seeds)
    errors = np.asarray(jax.jit(jax.vmap(of_seed))(keys))  # [seeds, steps, forms]
    return {name: errors[:, :, i].T for i, name in enumerate(FORMS)}


def optimizers(decay: float) -> dict[str, Any]:
    """AdamW with MARS's betas, and the three kinds of MARS."""

    def adamw(learning_rate: Any) -> Any:
        return optax.adamw(learning_rate, 0.95, 0.99, weight_decay=decay)

    def of_kind(learning_rate: Any, *, kind: Any) -> Any:
        return mars(learning_rate, variant=kind, weight_decay=decay)

    def named(kind: str) -> Any:
        # `inject_hyperparams` takes a function of the learning rate alone.
        return lambda learning_rate: of_kind(learning_rate, kind=kind)

    return {
        "AdamW": adamw,
        "MARS-AdamW": named("adamw"),
        "MARS-Lion": named("lion"),
        "MARS-Shampoo": named("shampoo"),
    }


def trained(config: Config, run: Run) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Held-out losses `[seeds]` at the best learning rate, and all figures."""
    losses, metrics = {}, {}
    knobs: Any = {"seeds": config.seeds}
    todo = [("digits", digits_mlp(), config.digits_steps, 64, list(optimizers(0.01)))]
    if config.text_steps:
        todo.append(("text", byte_lm(), config.text_steps, 16, ["AdamW", "MARS-AdamW"]))
    for name, task, steps, size, kinds in todo:
        for kind in kinds:
            factor = 0.2 if kind == "MARS-Lion" else 1.0
            rates = [factor * rate for rate in config.rates]
            scores, _, _ = fit(
                run, f"{name}_{kind}", task, optimizers(0.01)[kind], rates,
                steps=steps, batch_size=size, log_every=steps, **knobs,
            )  # fmt: skip
            at = best(scores)
            losses[f"{name}: {kind}"] = scores["loss"][at]
            metrics[f"{name}/{kind}/loss"] = float(scores["loss"][at].mean())
            metrics[f"{name}/{kind}/accuracy"] = float(scores["accuracy"][at].mean())
            metrics[f"{name}/{kind}/learning_rate"] = rates[at]
    return losses, metrics


def pictures(
    config: Config, run: Run, errors: dict[str, np.ndarray], losses: dict[str, Any]
) -> list[Figure]:
    figure, axes = panels(2, width=5.6)
    steps = np.arange(1, config.quadratic_steps + 1)
    series = {name: (steps, values) for name, values in errors.items()}
    curves(
        axes[0], series, xlabel="step",
        ylabel="mean square of momentum - true gradient",
    )  # fmt: skip
    axes[0].set_yscale("log")
    names = list(losses)
    axes[1].barh(
        names, [v.mean() for v in losses.values()],
        xerr=[stderr(v) for v in losses.values()], capsize=3,
        color=[COLORS[0 if "MARS" in name else 1] for name in names],
    )  # fmt: skip
    axes[1].invert_yaxis()
    axes[1].set(xlabel="held-out loss (nats)", ylabel="task and optimizer")
    return [
        run.figure(
            "mars", figure, title="Momentum that does not lag",
            caption="Left: along one descent of a noisy quadratic, mean and standard "
            f"error of {config.quadratic_seeds} seeds. Right: each optimizer at its "
            f"best learning rate, mean and standard error of {config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims = [adamw_claim(config)]
    errors = momentum_errors(config)
    totals = {name: values.mean(axis=0) for name, values in errors.items()}
    ratio = totals["exact, gamma = 1"] / totals["average of gradients"]
    mean = float(ratio.mean())
    claims.append(
        Claim(
            "noisy quadratic: mean square error of the exact form's momentum, gamma = "
            "1, over that of an average with the same b1",
            mean, "< 1", mean < 1, stderr(ratio),
        )
    )  # fmt: skip
    losses, metrics = trained(config, run)
    half = config.quadratic_steps // 2
    for name, values in errors.items():
        metrics[f"momentum_error/{name}"] = float(values.mean())
        metrics[f"momentum_error_late/{name}"] = float(values[half:].mean())
    run.table(
        f"Held-out losses, {config.seeds} seeds",
        ("task and optimizer", "loss (nats)"),
        [(k, f"{v.mean():.4f} ± {stderr(v):.4f}") for k, v in losses.items()],
    )
    return Report(claims, metrics, pictures(config, run, errors, losses))


if __name__ == "__main__":
    experiment(main, PRESETS)
