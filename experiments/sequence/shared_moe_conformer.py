"""Shared experts: a conformer of one block's weights, applied again and again.

Claims: on transcribing tones, an encoder whose blocks share all but routers and norms,
with experts and distilled from the unshared one, has at most 0.4 times its parameters,
at most 1.05 times its FLOPs and a token error within 3 points of it; and it makes fewer
errors than sharing without experts.

    python -m experiments.sequence.shared_moe_conformer full    # 4 minutes on 2 cores

Expected: token errors of 2.2% unshared, 1.5% shared and 1.4% shared with experts, with
0.35 times the parameters and 1.03 times the FLOPs. The last difference is one token in
1,024, less than its standard error.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.sequence._shared_moe_conformer_pictures import pictures
from jaxzoo.data.source import batch_indices
from jaxzoo.sequence.shared_moe_conformer import SharedConformer, distillation_loss
from jaxzoo.training.command import experiment
from jaxzoo.training.cost import count
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr

BINS = 12  # of the spectrum
QUICK = {"xla_backend_optimization_level": 0}
FULL, SHARED, SPARSE, ALONE = (
    "unshared", "shared", "shared experts", "shared experts, no teacher",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    steps: int = 1600
    batch_size: int = 24
    learning_rate: float = 6e-3
    width: int = 16
    hidden: int = 32
    blocks: int = 6  # of which all are one, where they share
    experts: int = 4
    capacity: float = 1.1
    balance: float = 0.01
    distill: float = 0.5
    tones: int = 8
    instruments: int = 2  # each with its own names for the tones
    notes: int = 4  # of an utterance
    frames: int = 6  # of a note, with the silence around it
    noise: float = 0.15
    examples: int = 4096  # of training
    test_examples: int = 256
    optimize: bool = True  # False compiles faster, and runs slower

    def __post_init__(self):
        if self.seeds < 2 or self.tones > BINS - 2 or self.experts < 2:
            raise ValueError(
                f"seeds >= 2, tones <= {BINS - 2} and experts >= 2, please"
            )


PRESETS = {
    "smoke": Config(
        seeds=2, steps=4, batch_size=4, width=8, hidden=8, blocks=2, experts=2,
        notes=2, frames=4, examples=16, test_examples=16, optimize=False,
    ),
    "full": Config(),
}  # fmt: skip


def names(config: Config) -> np.ndarray:
    """Which token a tone is, by instrument: `[instruments, tones]`, from 1 on."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(config.tones) for _ in range(config.instruments)]
    return np.stack(rows) + 1


def utterances(config: Config, key: jax.Array, size: int) -> tuple[Any, Any]:
    """Spectra `[size, T, bins + instruments]` of notes and hum, and their tokens.

    The hum tells the instrument, but a frame of it is mostly noise.
    """
    keys = jax.random.split(key, 6)
    notes, frames = (size, config.notes), config.frames
    tone = jax.random.randint(keys[0], notes, 0, config.tones)
    instrument = jax.random.randint(keys[1], (size,), 0, config.instruments)
    tokens = jnp.asarray(names(config))[instrument[:, None], tone]
    start = jax.random.randint(keys[2], notes, 0, 2)
    stop = jax.random.randint(keys[3], notes, frames - 3, frames)
    place = jnp.arange(frames).reshape(1, 1, -1)
    on = (place >= start[..., None]) & (place < stop[..., None])
    detune = 0.15 * jax.random.normal(keys[4], (size, 1))
    away = jnp.arange(BINS).reshape(1, 1, -1) - (tone + 1.5 + detune)[..., None]
    bump = jnp.exp(-0.5 * away**2)[:, :, None] * on[..., None]
    bump = bump.reshape(size, -1, BINS)
    hum = jax.nn.one_hot(instrument, config.instruments)[:, None]
    hum = jnp.broadcast_to(hum, (size, bump.shape[1], config.instruments))
    x = jnp.concatenate([bump, hum], axis=-1)
    return x + config.noise * jax.random.normal(keys[5], x.shape), tokens


def encoder(config: Config, name: str) -> Any:
    """All four apply as many blocks."""
    block: dict[str, Any] = {"heads": 4, "hidden": config.hidden, "experts": 1}
    if name == FULL:
        return SharedConformer(config.width, config.blocks, 1, block)
    if name != SHARED:
        block |= {"experts": config.experts, "capacity": config.capacity}
    return SharedConformer(config.width, 1, config.blocks, block)


def logits(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"].reshape(1, 1, -1)


def start(config: Config, name: str) -> Any:
    """Parameters of all seeds."""

    def one(seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), 2)
        x, _ = utterances(config, keys[0], 1)
        shape = (config.width, config.tones + 1)
        return {
            "encoder": encoder(config, name).init(keys[0], x),
            "head": {
                "kernel": 0.1 * jax.random.normal(keys[1], shape),
                "bias": jnp.zeros(shape[1]),
            },
        }

    # Many small draws: optimised, they would take long to compile.
    return jax.jit(jax.vmap(one), compiler_options=QUICK)(jnp.arange(config.seeds))


def trainer(config: Config, name: str) -> Any:
    """A program that trains all seeds of an encoder.

    It takes parameters, features, tokens, what a teacher makes of the features, the
    weight of distillation and rows `[seeds, steps, batch]`; it returns parameters and
    CTC losses `[seeds, steps]`.
    """
    net = encoder(config, name)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def objective(params: Any, x: Any, tokens: Any, told: Any, weight: Any, key: Any):
        hidden, aux = net.apply(params["encoder"], x, key=key)
        out = logits(params["head"], hidden)
        padding = jnp.zeros(out.shape[:2])
        ctc = jnp.mean(optax.ctc_loss(out, padding, tokens, jnp.zeros(tokens.shape)))
        distilled, _ = distillation_loss(hidden, told[0], out, told[1])
        balance = config.balance * jnp.mean(aux["balance"])
        return ctc + balance + weight * distilled, ctc

    def one(params: Any, x: Any, tokens: Any, told: Any, weight: Any, rows: Any) -> Any:
        def step(state: Any, ids: jax.Array) -> Any:
            params, opt_state, key = state
            key, own = jax.random.split(key)
            taught = jax.tree.map(lambda each: each[ids], told)
            gradient = jax.grad(objective, has_aux=True)
            grads, ctc = gradient(params, x[ids], tokens[ids], taught, weight, own)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, key), ctc

        state = params, optimizer.init(params), jax.random.key(rows[0, 0])
        (params, _, _), losses = lax.scan(step, state, rows)
        return params, losses

    options = None if config.optimize else QUICK
    mapped = jax.vmap(one, in_axes=(0, None, None, 0, None, 0))
    return jax.jit(mapped, compiler_options=options)


def runner(config: Config, name: str) -> Any:
    """Frames, logits and the experts' shares of all seeds' encoders."""
    net = encoder(config, name)

    def one(params: Any, x: Any) -> Any:
        hidden, aux = net.apply(params["encoder"], x)
        return (hidden, logits(params["head"], hidden)), aux["share"]

    options = None if config.optimize else QUICK
    return jax.jit(jax.vmap(one, in_axes=(0, None)), compiler_options=options)


def distance(one: Any, other: Any) -> int:
    """Insertions, deletions and substitutions from one sequence to the other."""
    row = np.arange(len(other) + 1)
    for i, a in enumerate(one):
        change = np.concatenate([[i + 1], row[:-1] + (np.asarray(other) != a)])
        row = np.minimum(change, np.concatenate([[i + 1], row[1:] + 1]))
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])


def errors(out: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Token errors in % by greedy decoding, `[seeds]`."""
    rates = []
    for each in np.argmax(out, -1):
        wrong = 0
        for path, wanted in zip(each, tokens, strict=True):
            kept = path[np.r_[True, path[1:] != path[:-1]]]
            wrong += distance(kept[kept > 0], wanted)
        rates.append(100 * wrong / tokens.size)
    return np.array(rates)


def flops(config: Config, name: str) -> float:
    """Of the products in a forward pass of the encoder over a training batch."""
    net = encoder(config, name)
    size = config.batch_size
    x = jnp.zeros((size, config.notes * config.frames, BINS + config.instruments))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    program = jax.make_jaxpr(lambda params, x: net.apply(params, x)[0])(shapes, x)
    return count(program).matmul_flops


def main(config: Config, run: Run) -> Report:
    params, losses, rates, shares = {}, {}, {}, {}
    whole = config.examples + config.test_examples
    make = jax.jit(utterances, static_argnums=(0, 2), compiler_options=QUICK)
    x, tokens = make(config, jax.random.key(0), whole)
    test = slice(config.examples, None)
    rows = [
        [
            batch_indices(
                seed, t, num_examples=config.examples, batch_size=config.batch_size
            )
            for t in range(config.steps)
        ]
        for seed in range(config.seeds)
    ]
    rows = jnp.asarray(rows, jnp.int32)
    sizes = (config.seeds, whole, x.shape[1])
    told = jnp.zeros((*sizes, config.width)), jnp.zeros((*sizes, config.tones + 1))
    weight, alike = 0.0, {}
    for name in (FULL, SHARED, SPARSE, ALONE):
        if name != ALONE:  # whose programs are those of the one before
            alike = {"train": trainer(config, name), "run": runner(config, name)}
        begun = start(config, name)
        taught = 0.0 if name == ALONE else weight
        params[name], curve = alike["train"](begun, x, tokens, told, taught, rows)
        losses[name] = np.asarray(curve).T
        if name == FULL:
            told, share = alike["run"](params[FULL], x)
            out, weight = told[1][:, test], config.distill
        else:
            (_, out), share = alike["run"](params[name], x[test])
        rates[name] = errors(np.asarray(out), np.asarray(tokens)[test])
        shares[name] = np.asarray(share)
        for step in range(9, config.steps, 10):
            run.log(name, step + 1, {"ctc": losses[name][step].mean()})
        run.say(f"{name}: token errors {np.round(rates[name], 2)} %")
    sizes = {
        name: sum(p.size for p in jax.tree.leaves(each["encoder"])) // config.seeds
        for name, each in params.items()
    }
    dense, sparse = flops(config, FULL), flops(config, SPARSE)
    products = {FULL: dense, SHARED: dense, SPARSE: sparse, ALONE: sparse}
    run.table(
        f"{config.test_examples} utterances of {config.notes} tokens, {config.seeds} "
        "seeds",
        ("encoder", "parameters", "FLOPs", "token error (%)"),
        [
            (
                name, f"{sizes[name]}", f"{products[name] / products[FULL]:.3f}",
                f"{each.mean():.2f} ± {stderr(each):.2f}",
            )
            for name, each in rates.items()
        ],
    )  # fmt: skip
    part = sizes[SPARSE] / sizes[FULL]
    work = products[SPARSE] / products[FULL]
    behind, ahead = rates[SPARSE] - rates[FULL], rates[SPARSE] - rates[SHARED]
    claims = [
        Claim(
            "parameters of the shared encoder with experts over the unshared one's",
            part, "<= 0.4", part <= 0.4,
        ),
        Claim(
            "FLOPs of products in a forward pass, over those of the unshared one",
            work, "<= 1.05", work <= 1.05,
        ),
        Claim(
            "token error of shared experts, distilled, less that of the unshared "
            "encoder, points",
            float(behind.mean()), "<= 3", bool(behind.mean() <= 3), stderr(behind),
        ),
        Claim(
            "the same less that of sharing without experts, distilled too, points",
            float(ahead.mean()), "< 0", bool(ahead.mean() < 0), stderr(ahead),
        ),
    ]  # fmt: skip
    metrics = {
        f"token_error/{name}": float(each.mean()) for name, each in rates.items()
    }
    metrics |= {f"parameters/{name}": each for name, each in sizes.items()}
    drawn = pictures(config, run, losses, rates, sizes, shares[SPARSE])
    return Report(claims, metrics, [drawn])


if __name__ == "__main__":
    experiment(main, PRESETS)
