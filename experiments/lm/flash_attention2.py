"""FlashAttention-2: equal numbers, linear memory, fewer tiles, fewer other operations.

Claims: outputs and gradients equal the definition's to 1e-4 for every tile size, causal
or not; what is kept for the backward pass grows linearly with length, where the
definition's grows quadratically; causal attention visits at most 0.6 of the tiles; and
one pass makes fewer operations outside of products than FlashAttention's first version.

    python -m experiments.lm.flash_attention2 full    # 20 s on 2 cores
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from pallas_kernels.attention import ref, xla
from pallas_kernels.attention.pattern import Extras, Pattern, needed

Attend = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    length: int = 500  # odd against every tile
    tiles: tuple[tuple[int, int], ...] = ((16, 64), (64, 16), (100, 130), (500, 500))
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    tile: int = 128  # queries, and keys, where tiles and operations are counted
    heads: int = 4
    width: int = 64

    def __post_init__(self):
        if self.seeds < 2 or len(self.lengths) < 2:
            raise ValueError("seeds >= 2 and two lengths at least, please")


PRESETS = {
    "smoke": Config(
        seeds=2, length=50, tiles=((8, 16),), lengths=(64, 128), tile=16, heads=2,
        width=8,
    ),
    "full": Config(),
}  # fmt: skip


def pattern(config: Config, causal: bool, tile: tuple[int, int]) -> Pattern:
    scale = config.width**-0.5
    return Pattern(scale=scale, right=0 if causal else None, tile=tile)


def first_version(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """FlashAttention (2205.14135), algorithm 1: the output is divided at every step.

    The weights of a tile are relative to the maximum of that tile, and are moved to the
    running one afterwards. Not causal; lengths are multiples of the tile.
    """
    del extras
    rows, columns = pattern.tile or (128, 128)
    tiles = [jnp.stack(jnp.split(x, x.shape[2] // columns, axis=2)) for x in (k, v)]

    def of_queries(q: jax.Array) -> Any:
        def step(carry: Any, tile: Any) -> Any:
            top, total, out = carry
            k, v = tile
            scaled = q * pattern.scale
            logits = jnp.einsum("bkgth,bksh->bkgts", scaled, k, precision="highest")
            own_top = jnp.max(logits, axis=-1)
            weights = jnp.exp(logits - own_top[..., None])
            own_total = jnp.sum(weights, axis=-1)
            higher = jnp.maximum(top, own_top)
            before, now = jnp.exp(top - higher), jnp.exp(own_top - higher)
            new_total = before * total + now * own_total
            seen = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision="highest")
            seen *= now[..., None]
            out = (total * before)[..., None] * out + seen
            return (higher, new_total, out / new_total[..., None]), None

        shape = q.shape[:-1]
        start = (jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros(q.shape))
        (top, total, out), _ = lax.scan(step, start, tuple(tiles))
        return out, top + jnp.log(total)

    blocks = jnp.split(q, q.shape[3] // rows, axis=3)
    out, lse = zip(*(of_queries(block) for block in blocks), strict=True)
    return jnp.concatenate(out, axis=3), jnp.concatenate(lse, axis=3)


def arrays(config: Config, length: int, seed: int) -> list[jax.Array]:
    """Queries, two heads for each of the keys and values, and weights of an output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads, width = config.heads // 2, config.width
    shapes = [(1, heads, 2, length, width), *[(1, heads, length, width)] * 2]
    shapes.append(shapes[0])
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape) for key, shape in pairs]


def value_and_gradients(attend: Attend, pattern: Pattern, inputs: Any) -> Any:
    *qkv, weights = inputs

    def total(*qkv: jax.Array) -> Any:
        out, lse = attend(pattern, *qkv, Extras())
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse)), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*qkv)
    return out, *gradients


def errors(config: Config) -> dict[str, np.ndarray]:
    """Largest relative error of output and gradients: `{tile and mask: [seeds]}`."""
    found = {}
    for causal in (False, True):
        for tile in config.tiles:
            which = pattern(config, causal, tile)

            @jax.jit
            def compare(inputs: Any, which: Pattern = which) -> jax.Array:
                got = value_and_gradients(xla.attend, which, inputs)
                wanted = value_and_gradients(ref.attend, which, inputs)
                return jnp.stack([
                    jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))
                    for a, b in zip(got, wanted, strict=True)
                ])  # fmt: skip

            each = [
                compare(arrays(config, config.length, seed)).max()
                for seed in range(config.seeds)
            ]
            name = f"{tile[0]} x {tile[1]}{', causal' if causal else ''}"
            found[name] = np.asarray(each, np.float64)
    return found


def kept_bytes(config: Config, attend: Attend, length: int) -> int:
    """Bytes that the backward pass holds on to, beside the inputs."""
    *qkv, _ = arrays(config, length, 0)
    which = pattern(config, True, (config.tile, config.tile))

    def residuals(*qkv: jax.Array) -> Any:
        return jax.vjp(lambda *qkv: attend(which, *qkv, Extras())[0], *qkv)[1]

    shapes = jax.tree.leaves(jax.eval_shape(residuals, *qkv))
    return sum(x.size * x.dtype.itemsize for x in shapes) - sum(x.nbytes for x in qkv)


def share_of_tiles(config: Config, length: int) -> float:
    """Causal tiles that are visited, of all."""
    which = pattern(config, True, (config.tile, config.tile))
    count = -(-length // config.tile)
    first = jnp.arange(count) * config.tile
    last = first + config.tile - 1
    visited = needed(
        which, *(x[:, None] for x in (first, last)), *(x[None] for x in (first, last))
    )
    return float(jnp.mean(jnp.broadcast_to(visited, (count, count))))


def other_operations(config: Config, attend: Attend, length: int) -> float:
    """Arithmetic outside of products in one forward pass over all keys, per logit."""
    *qkv, _ = arrays(config, length, 0)
    which = pattern(config, False, (config.tile, config.tile))
    traced = jax.make_jaxpr(lambda *qkv: attend(which, *qkv, Extras()))(*qkv)
    return count_operations(traced.jaxpr) / (config.heads * length**2)


MOVES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice",
    "iota", "pad", "reshape", "slice", "split", "squeeze", "stop_gradient", "transpose",
    "dot_general",
}  # fmt: skip


def count_operations(jaxpr: Any) -> float:
    """Elements that arithmetic makes, and those that reductions read."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [
            getattr(p, "jaxpr", p)
            for value in eqn.params.values()
            for p in (value if isinstance(value, tuple | list) else [value])
            if hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ]
        if inner:
            costs = [count_operations(x) for x in inner]
            repeats = eqn.params.get("length", 1)
            # The branches of a condition: the one that works.
            total += repeats * (
                max(costs) if eqn.primitive.name == "cond" else costs[0]
            )
        elif eqn.primitive.name.startswith("reduce_"):
            total += math.prod(eqn.invars[0].aval.shape)
        elif eqn.primitive.name not in MOVES:
            total += sum(math.prod(v.aval.shape) for v in eqn.outvars)
    return total


def slope(x: Any, y: Any) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def pictures(config: Config, run: Run, kept, shares, operations) -> list[Figure]:
    figure, (left, middle, right) = panels(3, width=4.4)
    x = np.asarray(config.lengths)
    series = {name: (x, np.array(y)[:, None] / 2**20) for name, y in kept.items()}
    curves(
        left, series, points=True, xlabel="length (tokens)",
        ylabel=f"kept for the backward pass\n({config.heads} heads, MiB)",
    )  # fmt: skip
    left.set(xscale="log", yscale="log")
    left.set_xticks(x, [str(n) for n in x])
    left.minorticks_off()
    left.legend(frameon=False)
    middle.plot(x / config.tile, shares, color=COLORS[0], marker="o")
    middle.axhline(0.6, color="0.5", ls=":", lw=1)
    middle.set(
        xscale="log", ylim=(0, 1.05), xlabel="length (tiles)",
        ylabel="share of tiles that\ncausal attention visits (1)",
    )  # fmt: skip
    middle.set_xticks(x / config.tile, [f"{n:g}" for n in x / config.tile])
    middle.minorticks_off()
    right.bar(list(operations), list(operations.values()), 0.6, color=COLORS[:2])
    right.set(ylabel="operations outside of products\n(per logit)")
    return [
        run.figure(
            "flash_attention2", figure, title="Memory, tiles and operations",
            caption="Left: bytes kept beside the inputs, definition and blocks. "
            "Middle: tiles that are not skipped. Right: arithmetic outside of products "
            f"in one forward pass, tiles of {config.tile} x {config.tile}, width "
            f"{config.width}. All three are counts.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    found = errors(config)
    worst = max(found, key=lambda name: found[name].max())
    kept = {
        "definition": [kept_bytes(config, ref.attend, n) for n in config.lengths],
        "FlashAttention-2": [kept_bytes(config, xla.attend, n) for n in config.lengths],
    }
    slopes = {name: slope(config.lengths, y) for name, y in kept.items()}
    shares = [share_of_tiles(config, n) for n in config.lengths]
    length = config.lengths[-1]
    versions = {"version 1": first_version, "version 2": xla.attend}
    operations = {
        name: other_operations(config, attend, length)
        for name, attend in versions.items()
    }
    which = pattern(config, False, (config.tile, config.tile))
    inputs = arrays(config, config.lengths[0], 0)
    first, whole = (
        jax.jit(functools.partial(attend, which))(*inputs[:3], Extras())[0]
        for attend in (first_version, ref.attend)
    )
    run.table(
        "Largest relative error of output and gradients",
        ("tile", *(f"seed {seed}" for seed in range(config.seeds))),
        [(name, *(f"{e:.1e}" for e in each)) for name, each in found.items()],
    )
    largest, rows = float(found[worst].max()), (config.lengths[0], length)
    linear, quadratic = slopes["FlashAttention-2"], slopes["definition"]
    fewer = operations["version 2"] / operations["version 1"]
    claims = [
        Claim(
            f"largest relative error of outputs and gradients over {len(found)} tile "
            "sizes and masks",
            largest, "<= 1e-4", largest <= 1e-4,
        ),
        Claim(
            f"bytes kept for the backward pass, {rows[0]} to {rows[1]} tokens: "
            "log-log slope",
            linear, "<= 1.1", linear <= 1.1,
        ),
        Claim(
            "the definition's slope", quadratic, ">= 1.8", quadratic >= 1.8
        ),
        Claim(
            f"share of tiles visited by causal attention at {length} tokens",
            shares[-1], "<= 0.6", shares[-1] <= 0.6,
        ),
        Claim(
            "operations outside of products, version 2 over version 1",
            fewer, "< 1", fewer < 1,
        ),
    ]  # fmt: skip
    metrics = {
        "first_version_error": float(jnp.max(jnp.abs(first - whole))),
        **{f"operations/{name}": count for name, count in operations.items()},
        **{f"tiles/{n}": s for n, s in zip(config.lengths, shares, strict=True)},
    }
    return Report(claims, metrics, pictures(config, run, kept, shares, operations))


if __name__ == "__main__":
    experiment(main, PRESETS)
