"""VCAS: backward passes through as few examples as the noise of SGD hides.

Claims: the mean of 10,000 sampled weight gradients is within 3 standard errors of the
exact one; after the controller has adapted, the variance that sampling adds is at most
2 tau of the variance of SGD; an MLP on digits with at most 80% of the backward FLOPs
ends within 5% of the training loss of exact back-propagation.

    python -m experiments.optim.vcas full       # digits, 3 seeds: 1 minute on 2 cores

Expected: a mean 1.5 standard errors off at most; 4.0% of added variance, where 5% are
accepted; 30% of the backward FLOPs, for a training loss 1.7% higher.

FLOPs are those of the matmuls' kept rows, with what the controller measures counted.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments._batches import SeedBatches
from experiments.optim._tasks import best, digits_mlp, start_grid
from experiments.optim._vcas_pictures import pictures
from jaxzoo.optim.vcas import VCASState, vcas_dense, vcas_update
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr

LAYERS = 3
TAU = 0.025  # the paper's, as all of the controller's numbers


@dataclasses.dataclass(frozen=True)
class Config:
    draws: int = 10_000  # of one layer
    seeds: int = 3
    rounds: int = 30  # each of `every` steps and one move of the controller
    every: int = 50  # F
    repeats: int = 2  # M batches, each with M sampled passes, for a move
    batch_size: int = 128
    hidden: int = 128
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # of Adam
    judged: int = 16  # batches, and draws of each, for the variance at the end


PRESETS = {
    "smoke": Config(
        draws=200, seeds=2, rounds=2, every=3, batch_size=20, hidden=16,
        learning_rates=(1e-3,), judged=3,
    ),
    "full": Config(),
}  # fmt: skip


def image_loss(params, key, example, rho, nu, probes=None):
    """Cross-entropy; the gradient at a probe is that at the layer's outputs."""
    dense = params["params"]["MLP_0"]
    image = example["image"].astype(jnp.float32) / 16.0
    x = image.reshape(image.shape[0], -1)
    for i in range(LAYERS):
        w, b = dense[f"Dense_{i}"]["kernel"], dense[f"Dense_{i}"]["bias"]
        x = vcas_dense(jax.random.fold_in(key, i), x, w, b, rho=rho[i], nu=nu[i])
        x = x if probes is None else x + probes[i]
        x = jax.nn.relu(x) if i + 1 < LAYERS else x
    each = optax.softmax_cross_entropy_with_integer_labels(x, example["label"])
    return jnp.mean(each)


def kernels(grads: Any) -> list[jax.Array]:
    return [grads["params"]["MLP_0"][f"Dense_{i}"]["kernel"] for i in range(LAYERS)]


def distances(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Squared distance of each layer's weight gradients, `[LAYERS]`."""
    pairs = zip(a, b, strict=True)
    return jnp.stack([jnp.sum(jnp.square(x - y)) for x, y in pairs])


def measure(config: Config, params, key, state: VCASState, examples, draws: int):
    """Variances of SGD, of examples, of tokens, and of both together, per layer.

    `examples` has a leading axis of batches, and each batch is sampled `draws` times.
    """
    one = jnp.ones(LAYERS)
    widths = (config.hidden, config.hidden, 10)

    def of_batch(key, example):
        size = example["label"].shape[0]
        probes = [jnp.zeros((size, width)) for width in widths]
        grads, at_outputs = jax.grad(image_loss, (0, 5))(
            params, key, example, one, one, probes
        )
        norms = jnp.stack([jnp.linalg.norm(g, axis=1) for g in at_outputs])
        exact = kernels(grads)

        def draw(key):
            acts = jax.grad(image_loss)(params, key, example, state.rho, one)
            both, added = jax.grad(image_loss, (0, 4))(
                params, key, example, state.rho, state.nu
            )
            act = distances(kernels(acts), exact)
            return act, added, distances(kernels(both), exact)

        drawn = jax.vmap(draw)(jax.random.split(key, draws))
        return exact, norms, [jnp.mean(a, axis=0) for a in drawn]

    keys = jax.random.split(key, examples["label"].shape[0])
    exact, norms, drawn = jax.vmap(of_batch)(keys, examples)
    sgd = jnp.stack([jnp.sum(jnp.var(g, axis=0, ddof=1)) for g in exact])
    act, weight, total = (jnp.mean(a, axis=0) for a in drawn)
    return sgd, act, weight, total, jnp.swapaxes(norms, 0, 1)


def backward_flops(config: Config, state: VCASState, *, sampled: bool) -> jax.Array:
    """FLOPs of the backward matmuls of a round over those of exact passes."""
    sizes = jnp.array([64 * config.hidden, config.hidden**2, config.hidden * 10])
    sizes = sizes.astype(jnp.float32)
    below = sizes.at[0].set(0.0)  # nobody asks for the gradient of the pixels
    whole = jnp.sum(sizes + below)
    if not sampled:
        return jnp.ones(())
    step = jnp.sum(state.rho * (state.nu * sizes + below))
    act = jnp.sum(state.rho * (sizes + below))
    measured = config.repeats * whole + config.repeats**2 * act
    return (config.every * step + measured) / (config.every * whole)


def train_digits(config: Config, run: Run, *, sampled: bool) -> dict[str, np.ndarray]:
    """Losses, FLOPs and variances, each `[rates, seeds]`, by VCAS or exactly."""
    task = digits_mlp(hidden=(config.hidden, config.hidden))
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)

    def step(carry, example):
        params, opt_state, key, control = carry
        key, now = jax.random.split(key)
        value, grads = jax.value_and_grad(image_loss)(
            params, now, example, control.rho, control.nu
        )
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state, key, control), value

    def one_round(state, examples):
        key = jax.random.fold_in(state["key"], state["step"])
        first = jax.tree.map(lambda a: a[: config.every], examples)
        last = jax.tree.map(lambda a: a[config.every :], examples)
        keys = jax.random.split(key)
        control = state["control"]
        start = (state["params"], state["opt_state"], keys[0], control)
        (params, opt_state, _, _), losses = lax.scan(step, start, first)
        metrics = {"loss": jnp.mean(losses)}
        metrics["flops"] = backward_flops(config, control, sampled=sampled)
        if sampled:
            found = measure(config, params, keys[1], control, last, config.repeats)
            sgd, act, weight, _, norms = found
            control = vcas_update(control, sgd, act, weight, norms, tau=TAU)
            metrics |= {"s": control.s, "act": control.act_excess}
            metrics["weight"] = jnp.sum(weight) / jnp.sum(sgd)
            metrics |= {f"rho_{i}": control.rho[i] for i in range(LAYERS)}
            metrics |= {f"nu_{i}": control.nu[i] for i in range(LAYERS)}
        return {
            "params": params, "opt_state": opt_state, "control": control,
            "key": state["key"], "step": state["step"] + 1,
        }, metrics  # fmt: skip

    def start():
        return start_grid(
            task, optax.adam, config.learning_rates, config.seeds,
            control=VCASState.exact(LAYERS),
        )  # fmt: skip

    def batches(t: int) -> dict[str, np.ndarray]:
        """The steps' batches, then those of the controller: `[seeds, F + M, B]`."""
        shape = config.seeds, config.every + config.repeats, config.batch_size
        rows = SeedBatches(task.source, config.seeds, shape[1] * shape[2]).at(t)
        return {name: x.reshape(*shape, *x.shape[2:]) for name, x in rows.items()}

    def every(state, examples):
        state, metrics = jax.vmap(jax.vmap(one_round), (0, None))(state, examples)
        return state, jax.tree.map(lambda a: a.reshape(-1), metrics)

    name = "vcas" if sampled else "exact"
    state = local(train(
        run, name, every, start, batches, num_steps=config.rounds, show="loss",
        batch_axis=2, log_every=1,
    ))  # fmt: skip
    records = {k: jnp.asarray(v) for k, v in task.source.arrays.items()}

    def judge(one):
        params, control = one
        key, ones = jax.random.key(1), jnp.ones(LAYERS)
        held_out = task.evaluate(params)
        scores = {
            "loss": image_loss(params, key, records, ones, ones),
            "held_out_loss": held_out["loss"], "accuracy": held_out["accuracy"],
        }  # fmt: skip
        if sampled:
            shape = (config.judged, config.batch_size)
            ids = jax.random.randint(key, shape, 0, len(task.source))
            examples = jax.tree.map(lambda a: a[ids], records)
            found = measure(config, params, key, control, examples, config.judged)
            scores["added"] = jnp.sum(found[3]) / jnp.sum(found[0])
        return scores

    def flat(a):
        return a.reshape(-1, *a.shape[2:])

    fitted = jax.tree.map(flat, (state["params"], state["control"]))
    scores = jax.jit(lambda fitted: lax.map(judge, fitted))(fitted)
    shape = (len(config.learning_rates), config.seeds)
    scores = {k: np.asarray(v).reshape(shape) for k, v in scores.items()}
    flops = np.asarray(run.history(name)["flops"])
    return {**scores, "flops": flops.mean(axis=0).reshape(shape)}


@functools.partial(jax.jit, static_argnames="config")
def bias_of_one_layer(config: Config, seed: jax.Array) -> jax.Array:
    """|mean of the drawn dw - exact dw| in standard errors; 4 tokens each."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (16, 4, 8))
    dy = jax.random.normal(keys[1], (16, 4, 6))
    dy *= jnp.exp(jax.random.normal(keys[2], (16, 4, 1)))

    def one(key):
        def of(w):
            return vcas_dense(key, x, w, jnp.zeros(6), rho=0.5, nu=0.5)

        return jax.vjp(of, jnp.ones((8, 6)))[1](dy)[0]

    drawn = jax.vmap(one)(jax.random.split(keys[3], config.draws))
    error = drawn - jnp.einsum("nti,nto->io", x, dy)[None]
    squares = jnp.mean(jnp.sum(jnp.square(error), axis=(1, 2)))
    return jnp.linalg.norm(jnp.mean(error, axis=0)) / jnp.sqrt(squares / config.draws)


def main(config: Config, run: Run) -> Report:
    bias = max(
        float(bias_of_one_layer(config, jnp.int32(s))) for s in range(config.seeds)
    )
    exact = train_digits(config, run, sampled=False)
    vcas = train_digits(config, run, sampled=True)
    i, j = best(exact), best(vcas)  # by the training loss, as the claim is
    added, flops = vcas["added"][j], vcas["flops"][j]
    losses = exact["loss"][i], vcas["loss"][j]
    change = float(losses[1].mean() / losses[0].mean() - 1)
    claims = [
        Claim(
            f"|mean of {config.draws:,} sampled dw - x^T dy| in standard errors, "
            "largest over seeds",
            bias, "<= 3", bias <= 3,
        ),
        Claim(
            "digits, at the end: variance that sampling adds, share of SGD's",
            float(added.mean()), f"<= {2 * TAU:g}", bool(added.mean() <= 2 * TAU),
            stderr(added),
        ),
        Claim(
            "digits: backward FLOPs over those of exact passes, whole training",
            float(flops.mean()), "<= 0.8", bool(flops.mean() <= 0.8), stderr(flops),
        ),
        Claim(
            "digits: training loss at the end over that of exact passes, less 1",
            change, "within 0.05", abs(change) <= 0.05,
            stderr(losses[1] / losses[0]),
        ),
    ]  # fmt: skip
    rows, metrics = [], {}
    for name, scores, at in (("exact", exact, i), ("VCAS", vcas, j)):
        means = {k: float(v[at].mean()) for k, v in scores.items()}
        names = ("loss", "held_out_loss", "accuracy", "flops")
        rate = f"{config.learning_rates[at]:g}"
        rows.append((name, rate, *(f"{means[n]:.4f}" for n in names)))
        metrics |= {f"{name}/{k}": v for k, v in means.items()}
    run.table(
        f"Digits, {config.seeds} seeds, {config.rounds * config.every} steps",
        ("", "rate", "training loss", "held-out loss", "accuracy (%)", "FLOPs"), rows,
    )  # fmt: skip
    figures = pictures(run, config, j, layers=LAYERS, tau=TAU)
    return Report(claims, metrics, figures)


if __name__ == "__main__":
    experiment(main, PRESETS)
