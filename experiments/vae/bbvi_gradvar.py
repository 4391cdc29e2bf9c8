"""Gradient variance of black-box variational inference: bounds, and the dimension.

Claims: on quadratics E |g|^2, in closed form, lies between the lower and the upper
quadratic bound at 200 random parameters, for mean-field and Cholesky scales, linear and
softplus; draws of the gradient agree with the closed form; at equal distance from the
mode it grows with the dimension with an exponent of at most 0.6 for mean-field and at
least 0.9 for Cholesky; and on a logistic regression, which is no quadratic, the
variance falls like 1/M.

    python -m experiments.vae.bbvi_gradvar full        # 5 seeds: 1 minute on 2 cores

Expected: all within; exponents of -0.01 and 0.93 in the dimension, and of -1.00 in M.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.vae.bbvi_gradvar import (
    abc_fit,
    second_moment_bounds,
    second_moment_estimate,
    second_moment_quadratic,
)

FAMILIES = {"mean-field": False, "Cholesky": True}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    points: int = 200  # random parameters, and energies, of the bounds
    size: int = 20  # dimensions of these
    dims: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    conditions: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    condition: float = 10.0  # largest over smallest curvature, over `dims`
    samples: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # M
    draws: int = 2000
    examples: int = 100  # of the logistic regression
    features: int = 8

    def __post_init__(self):
        if self.seeds < 2 or len(self.dims) < 2 or len(self.samples) < 2:
            raise ValueError("at least two seeds, dims and samples, please")


PRESETS = {
    "smoke": Config(
        seeds=2, points=20, size=6, dims=(16, 64), conditions=(10.0,),
        samples=(1, 4), draws=200, examples=20, features=4,
    ),
    "full": Config(),
}  # fmt: skip


def energies(
    rng: np.random.Generator, count: int, size: int, condition: Any
) -> np.ndarray:
    """Random H with curvatures from 1/condition to 1, `[count, size, size]`."""
    basis = np.linalg.qr(rng.normal(size=(count, size, size)))[0]
    steps = np.sort(rng.uniform(size=(count, size)), axis=1)
    steps[:, 0], steps[:, -1] = 0.0, 1.0
    values = np.reshape(condition, (-1, 1)) ** -steps
    return (basis * values[:, None, :]) @ np.swapaxes(basis, 1, 2)


def parameters(rng: np.random.Generator, count: int, size: int) -> list[np.ndarray]:
    """Offsets, diagonals and the rest of scales, each of length 1."""
    offset, diagonal = rng.normal(size=(2, count, size))
    lower = np.tril(rng.normal(size=(count, size, size)), -1)
    return [offset, np.abs(diagonal), lower]


def exact(arrays: Any, full: bool, **knobs: Any) -> Any:
    """Closed form and bounds of a stack of energies and parameters."""

    def one(precision: Any, offset: Any, diagonal: Any, lower: Any) -> Any:
        args = (precision, offset, diagonal, lower if full else None)
        value, aux = second_moment_quadratic(*args, **knobs)
        return value, aux, second_moment_bounds(*args, **knobs)

    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    return jax.device_get(jax.jit(jax.vmap(one))(*arrays))


def within(config: Config) -> dict[str, Any]:
    """By family and conditioner: closed forms and both bounds at random parameters."""
    rng, results = np.random.default_rng(0), {}
    conditions = 10.0 ** rng.uniform(0.0, 3.0, size=config.points)
    precision = energies(rng, config.points, config.size, conditions)
    sizes = 10.0 ** rng.uniform(-1.0, 1.0, size=(2, config.points))
    offset, diagonal, lower = parameters(rng, config.points, config.size)
    offset *= sizes[0][:, None]
    lower *= sizes[1][:, None, None]
    for family, full in FAMILIES.items():
        for conditioner in ("linear", "softplus"):
            scale = sizes[1][:, None] if conditioner == "linear" else 1.0
            arrays = (precision, offset, scale * diagonal + 0.01, lower)
            found = exact(arrays, full, conditioner=conditioner)
            results[f"{family}, {conditioner}"] = (found, arrays)
    return results


def best_objective(precision: np.ndarray, full: bool) -> np.ndarray:
    """F at the optimum, up to the constant that F is up to."""
    if full:
        return 0.5 * (precision.shape[-1] + np.linalg.slogdet(precision)[1])
    diagonal = np.diagonal(precision, axis1=1, axis2=2)
    return 0.5 * np.sum(1.0 + np.log(diagonal), axis=1)


def over_dims(config: Config) -> dict[str, np.ndarray]:
    """E |g|^2 of the energy at a distance of 1, half of it in C, `[dims, seeds]`."""
    found = {family: [] for family in FAMILIES}
    for size in config.dims:
        rng = np.random.default_rng(size)
        precision = energies(rng, config.seeds, size, config.condition)
        offset, diagonal, lower = parameters(rng, config.seeds, size)
        offset /= np.sqrt(2 * np.sum(offset**2, axis=1, keepdims=True))
        for family, full in FAMILIES.items():
            length = np.sum(diagonal**2, axis=1)
            length = 2 * (length + np.sum(lower**2, axis=(1, 2)) * full)
            arrays = (
                precision, offset, diagonal / np.sqrt(length)[:, None],
                lower / np.sqrt(length)[:, None, None],
            )  # fmt: skip
            knobs: dict[str, Any] = {"conditioner": "linear", "with_entropy": False}
            found[family].append(exact(arrays, full, **knobs)[0])
    return {family: np.stack(values) for family, values in found.items()}


def over_conditions(config: Config) -> dict[str, np.ndarray]:
    """The upper bound's part of the distance over the variance, `[conditions]`."""
    found = {family: [] for family in FAMILIES}
    for condition in config.conditions:
        rng = np.random.default_rng(1)
        precision = energies(rng, config.points, config.size, condition)
        arrays = (precision, *parameters(rng, config.points, config.size))
        for family, full in FAMILIES.items():
            _, aux, bounds = exact(arrays, full, conditioner="linear")
            ratio = (bounds[1] - aux["gradient_squared"]) / aux["variance"]
            found[family].append(float(np.median(ratio)))
    return {family: np.array(values) for family, values in found.items()}


def draws_apart(config: Config) -> float:
    """Standard errors between draws and the closed form, the most of all seeds."""
    rng = np.random.default_rng(2)
    size, worst = config.features, 0.0
    precision = energies(rng, config.seeds, size, config.condition)
    arrays = [precision, *parameters(rng, config.seeds, size)]
    stacked = [jnp.asarray(x, jnp.float32) for x in arrays]

    def one(full: bool, key: Any, precision: Any, *params: Any) -> Any:
        def energy(z: jax.Array) -> jax.Array:
            return 0.5 * z @ precision @ z

        args = params if full else params[:2]
        return second_moment_estimate(key, energy, *args, num_draws=config.draws)

    keys = jax.random.split(jax.random.key(0), config.seeds)
    for full in FAMILIES.values():
        value, aux = jax.jit(jax.vmap(functools.partial(one, full)))(keys, *stacked)
        gap = np.abs(value - exact(arrays, full)[0]) / aux["stderr"]
        worst = max(worst, float(np.max(gap)))
    return worst


def logistic(config: Config) -> np.ndarray:
    """Variance of the gradient on random logistic regressions, `[M, seeds]`."""

    def one(key: jax.Array, count: int) -> jax.Array:
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (config.examples, config.features))
        truth = jax.random.normal(keys[1], (config.features,))
        y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(x @ truth)).astype(x.dtype)

        def energy(z: jax.Array) -> jax.Array:
            logits = x @ z
            fit = jnp.sum(jax.nn.softplus(logits) - y * logits)
            return fit + 0.5 * jnp.sum(jnp.square(z))

        start = jnp.zeros(config.features)
        _, aux = second_moment_estimate(
            keys[3], energy, start, start, jnp.zeros((len(start), len(start))),
            num_draws=config.draws, num_samples=count,
        )  # fmt: skip
        return aux["variance"]

    keys = jax.random.split(jax.random.key(1), config.seeds)
    found = [
        jax.jit(jax.vmap(functools.partial(one, count=count)))(keys)
        for count in config.samples
    ]
    return np.stack(jax.device_get(found))


def slopes(x: Any, y: np.ndarray) -> np.ndarray:
    """Of log y `[x, seeds]` on log x, by seed."""
    return np.polyfit(np.log(np.array(x, float)), np.log(y), 1)[0]


def picture(config: Config, run: Run, results: dict[str, Any]) -> Figure:
    figure, axes = panels(3, width=4.4)
    for (name, (found, _)), color in zip(
        results["within"].items(), COLORS, strict=False
    ):
        value, _, (low, high) = found
        order = np.argsort(value)
        place = np.arange(len(order))
        axes[0].plot(place, value[order], color=color, label=name, lw=1.5)
        for side in (low, high):
            axes[0].plot(place, side[order], ".", color=color, ms=2, alpha=0.5)
    axes[0].set(
        xlabel="random parameters, by E |g|^2", ylabel="E |g|^2 and its bounds",
        yscale="log",
    )  # fmt: skip
    axes[0].legend(frameon=False, fontsize=7)
    series = {k: (config.dims, v) for k, v in results["dims"].items()}
    curves(
        axes[1], series, xlabel="dimensions", ylabel="E |g|^2 at distance 1",
        points=True,
    )  # fmt: skip
    axes[1].set_xscale("log", base=2)
    axes[1].set_yscale("log")
    curves(
        axes[2], {"logistic": (config.samples, results["logistic"])},
        xlabel="samples M in a gradient", ylabel="variance of the gradient",
        points=True,
    )  # fmt: skip
    axes[2].set_xscale("log", base=2)
    axes[2].set_yscale("log")
    return run.figure(
        "bbvi_gradvar", figure, title="How large gradients are",
        caption="Left: closed forms (lines) and bounds (dots) at random quadratics in "
        f"{config.size} dimensions. Middle: the energy's gradient, at equal distance "
        f"of the parameters, condition {config.condition:g}. Right: Cholesky on "
        "logistic regressions. Means and standard errors over "
        f"{config.seeds} seeds.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    results: dict[str, Any] = {
        "within": within(config), "dims": over_dims(config),
        "logistic": logistic(config),
    }  # fmt: skip
    claims, metrics, rows = [], {}, []
    for name, (found, arrays) in results["within"].items():
        value, aux, (low, high) = found
        # Both sides are exact but for rounding in float32.
        inside = (low <= value * (1 + 1e-5)) & (value <= high * (1 + 1e-5))
        share = 100 * float(np.mean(inside))
        claims.append(
            Claim(
                f"{name}: random parameters at which E |g|^2 is within its bounds, %",
                share, ">= 100", share >= 100,
            )
        )  # fmt: skip
        full = FAMILIES[name.split(",")[0]]
        gap = np.maximum(aux["objective"] - best_objective(arrays[0], full), 0.0)
        squared = aux["gradient_squared"]
        fitted, fit = abc_fit(
            *(jnp.asarray(x, jnp.float32) for x in (value, gap, squared))
        )
        metrics |= {f"{name}/{k}": float(v) for k, v in zip("ABC", fitted, strict=True)}
        metrics[f"{name}/ABC low over high"] = float(fit["low"])
        rows.append((name, *(f"{float(v):.3g}" for v in (*fitted, fit["low"]))))
    run.table(
        "E |g|^2 <= 2 A (F - F*) + B |grad F|^2 + C at the random parameters",
        ("family", "A", "B", "C", "lower / upper"), rows,
    )  # fmt: skip
    apart = draws_apart(config)
    claims.append(
        Claim(
            f"draws against the closed form, standard errors apart, largest of "
            f"{2 * config.seeds}", apart, "<= 5", apart <= 5,
        )
    )  # fmt: skip
    for family, bound in (("mean-field", 0.6), ("Cholesky", 0.9)):
        slope = slopes(config.dims, results["dims"][family])
        mean = float(slope.mean())
        holds = mean <= bound if family == "mean-field" else mean >= bound
        sign = "<=" if family == "mean-field" else ">="
        claims.append(
            Claim(
                f"{family}: exponent of E |g|^2 in the dimension at equal distance",
                mean, f"{sign} {bound}", bool(holds), stderr(slope),
            )
        )  # fmt: skip
    slope = slopes(config.samples, results["logistic"])
    claims.append(
        Claim(
            "logistic regression: exponent of the variance in M, away from -1",
            float(abs(slope.mean() + 1)), "<= 0.1", bool(abs(slope.mean() + 1) <= 0.1),
            stderr(slope),
        )
    )  # fmt: skip
    for family, ratios in over_conditions(config).items():
        for condition, ratio in zip(config.conditions, ratios, strict=True):
            key = f"{family}/condition {condition:g}/upper bound over variance"
            metrics[key] = float(ratio)
    for family, values in results["dims"].items():
        for size, value in zip(config.dims, values, strict=True):
            metrics[f"{family}/d={size}"] = float(value.mean())
    return Report(claims, metrics, [picture(config, run, results)])


if __name__ == "__main__":
    experiment(main, PRESETS)
