"""Lion: sign momentum in one buffer, and the evolution of update rules like it.

Claims: without decay every coordinate moves by exactly the learning rate, and the state
takes half of Adam's bytes; at a fifth of AdamW's learning rate and five times its decay
the loss of a small language model is within 3%; evolution from the program of SGD finds
a rule whose loss on the proxy task is at most that of SGD.

    python -m experiments.optim.lion full    # Moby Dick and 8x8 digits: 2 minutes

Expected: 1.3% behind AdamW with both tuned, and 14% at exactly a fifth of AdamW's best
learning rate; the rules found 0.05 nats below SGD, mean of three searches, one of which
ends above it.

The proxy task is a small MLP on digits for 60 steps. The best programs of each search
go through a funnel of two larger tasks; then all rules are compared on fresh seeds,
each at the best of the same learning rates.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments.optim._lion_pictures import pictures
from experiments.optim._tasks import Task, best, byte_lm, digits_mlp, fit
from jaxzoo.nn.program_evolution import evolve
from jaxzoo.nn.update_programs import ADAMW, LION, Program, run_program, simplify
from jaxzoo.optim.lion import lion
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr

SGD = Program.parse("update = multiply(g, lr)")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    steps: int = 300  # of the language model
    batch_size: int = 16
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # of AdamW; Lion has a fifth
    weight_decay: float = 0.1  # of AdamW; Lion has five times that
    searches: int = 3
    children: int = 3000
    population: int = 50
    tournament: int = 8
    proxy_steps: int = 60
    search_seeds: int = 4  # of initialisation and batches in a fitness
    funnel: tuple[tuple[int, int], ...] = ((32, 2), (64, 4))  # (width, times the steps)
    start_rate: float = 0.3  # what programs find in "lr" during the search
    rule_rates: tuple[float, ...] = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    fresh_seeds: int = 5

    def __post_init__(self):
        if min(self.seeds, self.searches, self.fresh_seeds) < 2:
            raise ValueError("at least two seeds of each kind, please")


PRESETS = {
    "smoke": Config(
        seeds=2, steps=5, batch_size=2, rates=(1e-2,), searches=2, children=8,
        population=4, tournament=2, proxy_steps=5, search_seeds=2, funnel=((16, 1),),
        rule_rates=(0.01, 0.1), fresh_seeds=2,
    ),
    "full": Config(),
}  # fmt: skip


def exact_claims(config: Config) -> list[Claim]:
    """How far coordinates move, and what the state takes, on dense random gradients."""
    rate, params = np.float32(3e-4), {"w": jnp.zeros((256, 256)), "b": jnp.zeros(256)}
    optimizer = lion(float(rate))

    def share(key: jax.Array) -> jax.Array:
        def step(state: Any, key: jax.Array) -> Any:
            keys = jax.random.split(key)
            grads = {
                "w": jax.random.normal(keys[0], (256, 256)),
                "b": jax.random.normal(keys[1], (256,)),
            }
            updates, state = optimizer.update(grads, state, params)
            flat = ravel_pytree(updates)[0]
            return state, jnp.mean((jnp.abs(flat) == rate).astype(jnp.float32))

        keys = jax.random.split(key, 20)
        return jnp.min(lax.scan(step, optimizer.init(params), keys)[1])

    least = float(jnp.min(lax.map(share, jax.random.split(jax.random.key(0), 3))))

    def size(one: optax.GradientTransformation) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(one.init(params)))

    ratio = size(optimizer) / size(optax.adam(1e-3))
    return [
        Claim(
            "share of the coordinates that move by exactly the learning rate, least of "
            "20 steps and 3 seeds",
            least, ">= 1", least >= 1,
        ),
        Claim(
            "bytes of the state over Adam's, step counters of 4 bytes included",
            ratio, "<= 0.5001", ratio <= 0.5001,
        ),
    ]  # fmt: skip


def language_model(config: Config, run: Run) -> tuple[Claim, dict[str, Any]]:
    """AdamW, and Lion at a fifth of its learning rates and five times its decay."""
    task, decay = byte_lm(), config.weight_decay
    knobs: Any = {
        "steps": config.steps, "batch_size": config.batch_size, "seeds": config.seeds,
    }  # fmt: skip

    def adamw(learning_rate: Any) -> Any:
        return optax.adamw(learning_rate, weight_decay=decay)

    def ours(learning_rate: Any) -> Any:
        return lion(learning_rate, weight_decay=5 * decay)

    of_adamw, _, _ = fit(run, "lm_adamw", task, adamw, config.rates, **knobs)
    fifths = [rate / 5 for rate in config.rates]
    of_lion, _, _ = fit(run, "lm_lion", task, ours, fifths, **knobs)
    at, ours_at = best(of_adamw), best(of_lion)
    ratio = of_lion["loss"][ours_at] / of_adamw["loss"][at]
    mean = float(ratio.mean())
    claim = Claim(
        "language model: Lion's held-out loss over AdamW's, with 5 times its decay and "
        "at the best of a fifth of its learning rates",
        mean, "<= 1.03", mean <= 1.03, stderr(ratio),
    )  # fmt: skip
    return claim, {
        "AdamW": of_adamw["loss"], "Lion": of_lion["loss"], "at": (at, ours_at),
    }  # fmt: skip


def held_out_loss(
    task: Task, steps: int, program: Program, rate: Any, seed: Any, *, final: bool
) -> jax.Array:
    """Loss of the network that a program trained: on validation rows, or on test."""
    data = {k: jnp.asarray(v) for k, v in task.source.arrays.items()}
    fitted, rest = ({k: v[part] for k, v in data.items()} for part in _SPLITS)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    w, unravel = ravel_pytree(task.init(init_key))

    def step(carry: Any, key: jax.Array) -> Any:
        w, m, v = carry
        rows = jax.random.randint(key, (32,), 0, len(fitted["label"]))
        some = {k: x[rows] for k, x in fitted.items()}
        g = jax.grad(lambda w: task.loss(unravel(w), key, some)[0])(w)
        update, m, v = run_program(g, w, m, v, **program._asdict(), learning_rate=rate)
        return (w - update, m, v), None

    start = (w, jnp.zeros_like(w), jnp.zeros_like(w))
    (w, _, _), _ = lax.scan(step, start, jax.random.split(run_key, steps))
    if final:
        loss = task.evaluate(unravel(w))["loss"]
    else:
        loss = task.loss(unravel(w), run_key, rest)[0]
    # Evolution finds that logits of 1e20, all alike, have a loss of 0 in float32.
    return jnp.where(jnp.max(jnp.abs(w)) < 100.0, loss, jnp.inf)


_SPLITS = (slice(0, 1000), slice(1000, None))  # of the training images


def mean_loss(config: Config, hidden: int, steps: int, program: Program) -> jax.Array:
    """Validation loss of a program, mean over seeds: a fitness."""
    task = digits_mlp(hidden=(hidden,))
    one = functools.partial(held_out_loss, task, steps, program, config.start_rate)
    seeds = jnp.arange(config.search_seeds)
    return jnp.mean(jax.vmap(functools.partial(one, final=False))(seeds))


def search(config: Config) -> tuple[list[Program], dict[str, np.ndarray]]:
    """Evolves rules from SGD's, one search per seed; the survivor of each funnel."""
    steps = config.proxy_steps
    tasks = [
        functools.partial(mean_loss, config, hidden, steps * more)
        for hidden, more in ((16, 1), *config.funnel)
    ]

    def one(key: jax.Array) -> Any:
        winner, aux = evolve(
            key, tasks[0], **SGD._asdict(), children=config.children,
            population=config.population, tournament=config.tournament,
        )  # fmt: skip
        last = Program(aux["code"], aux["constants"])
        alive = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), winner, last)
        fitness = jnp.append(aux["best"][-1], aux["fitness"])
        plain, facts = jax.vmap(simplify)(*alive)
        # The best sixteen that differ; a hash that came before goes to the end.
        same = jnp.all(facts["hash"][:, None] == facts["hash"][None], axis=-1)
        first = jnp.argmax(same, axis=1) == jnp.arange(len(same))
        order = jnp.argsort(jnp.where(first, fitness, jnp.inf))[:16]
        for task in tasks[1:]:
            few = jax.tree.map(lambda x, order=order: x[order], plain)
            passed = jnp.argsort(lax.map(task, few))[: math.ceil(len(order) / 4)]
            order = order[passed]
        return jax.tree.map(lambda x: x[order[0]], plain), aux

    keys = jax.random.split(jax.random.key(1), config.searches)
    found, aux = jax.device_get(jax.jit(lambda keys: lax.map(one, keys))(keys))
    rules = [Program(*(x[i] for x in found)) for i in range(config.searches)]
    return rules, aux


def compare(config: Config, rules: dict[str, Program]) -> dict[str, np.ndarray]:
    """Test losses of each rule over fresh seeds, at its best learning rate."""
    task = digits_mlp(hidden=(16,))
    stacked = jax.tree.map(lambda *x: np.stack(x), *rules.values())
    seeds = 100 + jnp.arange(config.fresh_seeds)
    rates = jnp.array(config.rule_rates)

    def of_rule(program: Program) -> Any:
        def of_rate(rate: jax.Array) -> Any:
            return [
                jax.vmap(
                    functools.partial(
                        held_out_loss, task, config.proxy_steps, program, rate,
                        final=final,
                    )
                )(seeds)
                for final in (False, True)
            ]  # fmt: skip

        return lax.map(of_rate, rates)

    chosen, final = jax.device_get(jax.jit(lambda p: lax.map(of_rule, p))(stacked))
    chosen = np.where(np.isfinite(chosen), chosen, np.inf).mean(axis=2)
    at = chosen.argmin(axis=1)
    return {name: final[i, at[i]] for i, name in enumerate(rules)}


def main(config: Config, run: Run) -> Report:
    claims = exact_claims(config)
    claim, lm = language_model(config, run)
    claims.append(claim)
    evolved, aux = search(config)
    rules = {"SGD": SGD, "AdamW": ADAMW, "Lion": LION}
    rules |= {f"found {i + 1}": rule for i, rule in enumerate(evolved)}
    losses = compare(config, rules)
    for i, rule in enumerate(evolved):
        run.say(f"found {i + 1}:\n{rule}")
    gaps = np.stack([losses[f"found {i + 1}"] for i in range(config.searches)])
    gaps = (gaps - losses["SGD"][None]).mean(axis=1)
    gap = float(gaps.mean())
    claims.append(
        Claim(
            "proxy task: test loss of the rule found by evolution minus SGD's, mean "
            "over searches, nats",
            gap, "<= 0", gap <= 0, stderr(gaps),
        )
    )  # fmt: skip
    metrics: dict[str, Any] = {
        f"proxy/{k}/test_loss": float(v.mean()) for k, v in losses.items()
    }
    for name in ("AdamW", "Lion"):
        for rate, values in zip(config.rates, lm[name], strict=True):
            shown = rate if name == "AdamW" else rate / 5
            metrics[f"lm/{name}/{shown:g}/loss"] = float(values.mean())
    at = lm["at"][0]
    fifth = lm["Lion"][at].mean() / lm["AdamW"][at].mean()
    metrics["lm/ratio_at_a_fifth_of_the_best"] = float(fifth)
    born = config.children
    metrics["search/evaluated_share"] = float(aux["evaluated"].mean() / (born + 1))
    for i, rule in enumerate(evolved):
        metrics[f"search/found_{i + 1}"] = "; ".join(str(rule).splitlines())
    run.table(
        f"Proxy task, {config.fresh_seeds} fresh seeds",
        ("rule", "test loss (nats)", "statements"),
        [
            (k, f"{v.mean():.3f} ± {stderr(v):.3f}", str(len(str(p).splitlines())))
            for (k, v), p in zip(losses.items(), rules.values(), strict=True)
        ],
    )
    return Report(claims, metrics, pictures(config, run, lm, aux, losses))


if __name__ == "__main__":
    experiment(main, PRESETS)
