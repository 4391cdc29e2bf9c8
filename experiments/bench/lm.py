"""What a language model costs: its loss, DPO, a training step, and decoding.

Claims: with 32,000 tokens the chunked loss takes at most a tenth of the temporary
memory of whole logits; DPO on logits 8 x 256 x 8192 takes at most 0.45 of PyTorch's
time and 1 MiB of temporary memory; a training step makes as many tokens per second as
that of an equal PyTorch model; the step of 24 layers compiles in 2 seconds; and
decoding with a draft takes less time than without.

    pip install torch
    python -m experiments.bench.lm full     # 5 minutes on 2 quiet cores

Measured on 2 cores with AVX-512, jax 0.12: 0.048 of the memory at 1.19 of the time of
whole logits; DPO 0.47 of PyTorch's time (FAILED) in 24 KB; a step 2.2 of PyTorch's time
(FAILED); 24 layers in 3.0 s (FAILED); drafts of bigrams take 0.90 of the time.

The step alone in its process takes 95 ms, beside PyTorch's threads 142; forward 15.
Products of this size run at 110 GFLOP/s in XLA, and the backward pass of a block, which
reads and writes what PyTorch's fused attention keeps to itself, is what is slow:
attention is a third of it. `remat=True` gains 8 %, attention without blocks nothing.
"""

import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench import _timing as timing
from experiments.bench._lm_losses import (
    CHUNKED,
    DENSE,
    DPO,
    TORCH_DPO,
    Call,
    imported,
    losses,
    preferences,
    waiting,
)
from experiments.lm.pretrain import token_losses
from jaxzoo.data.text import moby_dick
from jaxzoo.lm.speculative_decoding import speculative_decode
from jaxzoo.nn.generate import adjusted_log_probs, generate
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.ngrams import ngram_log_probs
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Claim, Report, Run

STEP, TORCH_STEP = "training step", "torch training step"
PLAIN, DRAFTED = "generate", "speculative_decode"


@dataclasses.dataclass(frozen=True)
class Config:
    tokens: int = 1024
    features: int = 256
    vocabulary: int = 32_000
    """Of token_logprobs."""
    dpo: tuple[int, int, int] = (8, 256, 8192)
    """Rows, half of them chosen, tokens and vocabulary of DPO."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    rows: int = 8
    length: int = 128
    """Of the model that is trained and decoded from."""
    layers: int = 24
    """Of the step whose compilation is timed."""
    pretraining: int = 300
    """Steps of training before it is decoded from."""
    written: int = 128
    drafted: int = 3
    """By bigrams of the text, which cost nothing."""
    samples: int = 7
    """Quiet ones of each contestant."""
    seconds: float = 0.15
    """Of one sample."""
    patience: float = 100.0
    """Seconds to wait for quiet."""
    noise: float = 0.12
    """Of a core, used by others."""
    record: bool = True
    """Also writes experiments/results/bench/lm_cpu.json."""


PRESETS = {
    "smoke": Config(
        tokens=16, features=8, vocabulary=512, dpo=(4, 8, 64), width=16, depth=1,
        heads=2, rows=2, length=16, layers=2, pretraining=2, written=8,
        samples=2, seconds=0.01, patience=0.5, record=False,
    ),
    "full": Config(),
}  # fmt: skip


def model_of(config: Config, depth: int) -> LanguageModel:
    body = Transformer(config.width, depth, config.heads)
    return LanguageModel(256, config.width, body)


def step_of(model: LanguageModel) -> Any:
    optimizer = optax.adamw(1e-3)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return token_losses(model, params, tokens)[0]

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer.init, jax.jit(step, donate_argnums=(0, 1))


def windows(config: Config, seed: int) -> np.ndarray:
    text = moby_dick(window=1).split("train").arrays["token"].ravel()
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(text) - config.length, (config.rows, 1))
    return text[first + np.arange(config.length + 1)[None]].astype(np.int32)


def steps(config: Config) -> tuple[dict[str, Call], Any]:
    """A training step that goes on from the last one, and trained parameters."""
    model = model_of(config, config.depth)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    init, step = step_of(model)
    held = [params, init(params)]
    for t in range(config.pretraining):
        *held[:], _ = step(*held, windows(config, t))
    trained = jax.tree.map(jnp.copy, held[0])
    tokens = jnp.asarray(windows(config, 0))

    def call() -> Any:
        *held[:], value = jax.block_until_ready(step(*held, tokens))
        return value

    calls = {STEP: call}
    if imported():
        from experiments.bench import _torch_lm

        calls[TORCH_STEP] = _torch_lm.training_step(
            np.asarray(tokens), width=config.width, depth=config.depth,
            heads=config.heads, hidden=-(-config.width * 8 // 3 // 8) * 8,
        )  # fmt: skip
    return calls, trained


def seconds_to_compile(config: Config) -> float:
    """Of the training step of a deep model: tracing, lowering and compiling."""
    model = model_of(config, config.layers)
    init, step = step_of(model)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    shapes = params, jax.eval_shape(init, params), windows(config, 0)
    began = time.perf_counter()
    step.lower(*shapes).compile()
    return time.perf_counter() - began


def decoders(config: Config, params: Any) -> tuple[dict[str, Call], float]:
    """Greedy text of one row, with and without drafts; tokens per call of the model."""
    model = model_of(config, config.depth)
    text = moby_dick(window=1)
    train, test = (text.split(k).arrays["token"].ravel() for k in ("train", "test"))
    table = ngram_log_probs(train.astype(np.int32), vocabulary=256)
    prompt = test[None, :64].astype(np.int32)
    cache = model.body.empty_cache(1, 64 + config.written + config.drafted + 1)

    def target(params: Any, cache: Any, tokens: jax.Array) -> Any:
        return model.apply(params, tokens, cache)

    def draft(state: Any, tokens: jax.Array) -> Any:
        return table[tokens], state

    @jax.jit
    def plain(params: Any, prompt: jax.Array) -> jax.Array:
        return generate(
            jax.random.key(0), functools.partial(target, params), prompt, state=cache,
            num_tokens=config.written, temperature=0.0,
        )[0]  # fmt: skip

    @jax.jit
    def drafted(params: Any, prompt: jax.Array) -> Any:
        return speculative_decode(
            jax.random.key(0), functools.partial(target, params), draft, prompt,
            target_state=cache, draft_state=(), num_tokens=config.written,
            num_drafted=config.drafted,
            adjust=functools.partial(adjusted_log_probs, temperature=0.0),
        )  # fmt: skip

    written, aux = drafted(params, prompt)
    # Products of one token and of four round differently, so that a tie may break.
    if np.mean(written == plain(params, prompt)) < 0.5:
        raise ArithmeticError("the text with drafts is another one.")
    calls = {
        PLAIN: waiting(plain, params, prompt),
        DRAFTED: waiting(drafted, params, prompt),
    }
    return calls, float(aux["tokens_per_call"][0])


def main(config: Config, run: Run) -> Report:
    compiling = seconds_to_compile(config)
    calls, bytes_of = losses(config)
    of_dpo, dpo_bytes = preferences(config)
    of_step, params = steps(config)
    of_text, per_call = decoders(config, params)
    calls |= of_dpo | of_step | of_text
    measured = timing.measure(
        calls, samples=config.samples, seconds=config.seconds,
        patience=config.patience, noise=config.noise,
    )  # fmt: skip
    quiet, times = measured["quiet"], {k: measured[k]["median"] for k in calls}
    claims = []
    pairs = [
        ("DPO and its gradient: our time over PyTorch's", DPO, TORCH_DPO, 0.45),
        ("training step: our time over PyTorch's", STEP, TORCH_STEP, 1.0),
        ("decoding: time with drafts over that without", DRAFTED, PLAIN, 1.0),
    ]
    for text, ours, other, bound in pairs:
        if other in times and quiet >= timing.QUIET:
            ratio = times[ours] / times[other]
            claims.append(Claim(text, ratio, f"<= {bound:g}", ratio <= bound))
    share, mib = bytes_of[CHUNKED] / bytes_of[DENSE], dpo_bytes / 2**20
    name = f"temporary memory of {CHUNKED} over that of {DENSE}"
    claims += [
        Claim(name, share, "<= 0.1", share <= 0.1),
        Claim("DPO: MiB of temporary memory", mib, "<= 1", mib <= 1),
        Claim(
            f"{config.layers} layers: seconds to compile a training step",
            compiling, "<= 2", compiling <= 2,
        ),
    ]  # fmt: skip
    tokens = {STEP: config.rows * config.length, DRAFTED: config.written}
    tokens |= {TORCH_STEP: tokens[STEP], PLAIN: config.written}
    metrics = {"quiet": quiet, "load_before": os.getloadavg()[0]}
    metrics |= {f"{k}/temporary_bytes": v for k, v in bytes_of.items()}
    metrics |= {f"{DPO}/temporary_bytes": dpo_bytes, "compile_seconds": compiling}
    metrics["tokens_per_call"] = per_call
    rows = []
    for name, median in times.items():
        metrics |= {
            f"{name}/median_ms": median,
            f"{name}/min_ms": measured[name]["min"],
        }
        rate = 1e3 * tokens[name] / median if name in tokens else None
        metrics |= {f"{name}/tokens_per_second": rate} if rate else {}
        rows.append((name, f"{median:.2f}", f"{rate:.0f}" if rate else ""))
    run.table(f"{quiet} quiet samples", ("", "median (ms)", "tokens per second"), rows)
    if config.record:
        path = timing.RESULTS / "lm_cpu.json"
        timing.write_record(path, dataclasses.asdict(config), claims, metrics)
    return Report(claims, metrics, [])


if __name__ == "__main__":
    experiment(main, PRESETS)
