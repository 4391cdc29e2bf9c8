"""One sitting of a run of `kill`, in a process of its own: what is killed."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tests.training.kill import BEGIN, FAMILIES, LOG_EVERY, NUM_STEPS


def sit(folder: Path, family: str, num_steps: int) -> None:
    """One sitting of a run, in this process."""
    import dataclasses

    from jaxzoo.training import record
    from jaxzoo.training.loop import train

    step, start, batch_at = {
        "vae": _vae,
        "classifier": _classifier,
        "contrastive": _contrastive,
    }[family]()

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int = num_steps

    print(BEGIN, flush=True)
    begun = False

    def batches(t: int) -> Any:
        nonlocal begun
        if not begun:
            with open(folder.with_suffix(".begun"), "a") as file:
                file.write(f"{t}\n")
            begun = True
        return batch_at(t)

    try:
        run = record.Run(
            folder,
            topic="kill",
            slug=family,
            title=f"A {family} that is killed",
            preset="full",
            config=Config(),
        )
    except record.RunFolderError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    train(
        run,
        "fit",
        step,
        start,
        batches,
        num_steps=num_steps,
        log_every=LOG_EVERY,
        save_every=0.0,
    )
    loss = float(run.history("fit")["loss"][-1])
    claim = record.Claim("the loss is finite", loss, "finite", True)
    run.finish(record.Report([claim], {"loss": loss}))


def _vae() -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxzoo.core.stats import bernoulli_log_prob, normal_kl
    from jaxzoo.nn.mlp import MLP, GaussianMLP
    from jaxzoo.training.step import init_state, update_step
    from jaxzoo.vae.vae import elbo, reparameterize

    encoder, decoder = GaussianMLP(latents=4, hidden=(32,)), MLP((32, 64))

    def loss(params, key, x):
        mean, log_std = encoder.apply(params["encoder"], x)  # pyright: ignore
        assert isinstance(mean, jax.Array) and isinstance(log_std, jax.Array)
        z = reparameterize(key, mean, log_std)
        logits = decoder.apply(params["decoder"], z)[0]  # pyright: ignore
        log_likelihood = bernoulli_log_prob(x, logits)
        value = -elbo(log_likelihood, normal_kl(mean, log_std)).mean()
        return value, {"loss": value}

    def batch_at(t):
        rng = np.random.default_rng((1, t))
        prototype = np.random.default_rng(0).random((4, 64)) < 0.5
        flips = rng.random((16, 64)) < 0.1
        return (prototype[rng.integers(4, size=16)] ^ flips).astype(np.float32)

    optimizer = optax.adam(1e-3)

    def start():
        keys = jax.random.split(jax.random.key(0), 3)
        params = {
            "encoder": encoder.init(keys[0], jnp.zeros((1, 64))),
            "decoder": decoder.init(keys[1], jnp.zeros((1, 4))),
        }
        return init_state(keys[2], params, optimizer)

    return update_step(loss, optimizer), start, batch_at


def _classifier() -> tuple[Any, Any, Any]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxzoo.training.step import init_state

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(32)(x))
            keep = jax.random.bernoulli(key, 0.8, x.shape)
            return nn.Dense(3)(jnp.where(keep, nn.relu(x), 0.0) / 0.8)

    net, optimizer = Net(), optax.chain(optax.clip(1.0), optax.sgd(0.05, momentum=0.9))

    def step(state, batch):
        key = jax.random.fold_in(state["key"], state["step"])

        def loss(params):
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, new = net.apply(variables, batch["x"], key, mutable=["batch_stats"])
            terms = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
            return terms.mean(), new["batch_stats"]

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, batch_stats), gradient = value_and_grad(state["params"])
        updates, opt_state = optimizer.update(
            gradient, state["opt_state"], state["params"]
        )
        new_state = {
            **state,
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "batch_stats": batch_stats,
            "step": state["step"] + 1,
        }
        return new_state, {"loss": value}

    def batch_at(t):
        rng = np.random.default_rng((2, t))
        centres = np.random.default_rng(0).normal(size=(3, 16))
        y = rng.integers(3, size=16).astype(np.int32)
        x = centres[y] + rng.normal(size=(16, 16))
        return {"x": x.astype(np.float32), "y": y}

    def start():
        variables = net.init(jax.random.key(0), jnp.zeros((2, 16)), jax.random.key(1))
        state = init_state(jax.random.key(2), variables["params"], optimizer)
        return {**state, "batch_stats": variables["batch_stats"]}

    return step, start, batch_at


def _contrastive() -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxzoo.nn.mlp import MLP
    from jaxzoo.training.step import init_state

    net, optimizer = MLP((32, 8)), optax.adamw(1e-3)

    def embed(params, x):
        z = net.apply(params, x)
        assert isinstance(z, jax.Array)
        return z / (1e-6 + jnp.linalg.norm(z, axis=-1, keepdims=True))

    def step(state, batch):
        key = jax.random.fold_in(state["key"], state["step"])
        views = batch + 0.3 * jax.random.normal(key, (2, *batch.shape))
        target = embed(state["ema"], views[1])

        def loss(params):
            query = embed(params, views[0])
            positive = jnp.sum(query * target, -1, keepdims=True)
            logits = jnp.concatenate([positive, query @ state["queue"].T], 1)
            return -jax.nn.log_softmax(logits / 0.2)[:, 0].mean()

        value, gradient = jax.value_and_grad(loss)(state["params"])
        updates, opt_state = optimizer.update(
            gradient, state["opt_state"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda e, p: 0.99 * e + 0.01 * p, state["ema"], params)
        new_state = {
            **state,
            "params": params,
            "opt_state": opt_state,
            "ema": ema,
            "queue": jnp.concatenate([target, state["queue"][:-16]]),
            "step": state["step"] + 1,
        }
        return new_state, {"loss": value}

    def batch_at(t):
        return np.random.default_rng((3, t)).normal(size=(16, 16)).astype(np.float32)

    def start():
        params = net.init(jax.random.key(0), jnp.zeros((1, 16)))
        queue = jax.random.normal(jax.random.key(1), (64, 8)) / np.sqrt(8)
        state = init_state(jax.random.key(2), params, optimizer)
        return {**state, "ema": params, "queue": queue}

    return step, start, batch_at


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    sit(options.folder, options.family, options.steps)


if __name__ == "__main__":
    main()
