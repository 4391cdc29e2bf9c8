"""A pendulum with hidden frames: data, the recurrent network of `svae`, pictures."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.training.plots import curves, image_grid, panels
from jaxzoo.training.record import Figure, Run

NAMES = {"svae": "SVAE", "rnn": "mean-field RNN"}


def pendulum(config: Any, seed: int) -> dict[str, np.ndarray]:
    """Clean and noisy frames of swings from up to 2 radians, `[N, T, side^2]`.

    A small swing turns 0.6 radians of its phase per frame: a period of 10.5 frames. The
    pivot is in the middle. "seen" are the frames of the test that are not hidden.
    """
    rng = np.random.default_rng(seed)
    count = config.training + config.test
    angle, speed = rng.uniform(-2.0, 2.0, count), 0.5 * rng.normal(size=count)
    angles = []
    for _ in range(config.frames):
        angles.append(angle)
        for _ in range(10):
            speed = speed - 0.06 * np.sin(angle)
            angle = angle + 0.06 * speed
    angles = np.stack(angles, axis=1)[..., None]
    grid = np.linspace(-1.2, 1.2, config.side)
    y, x = (v.ravel() for v in np.meshgrid(grid, grid, indexing="ij"))
    end = np.sin(angles), np.cos(angles)  # y points down
    along = np.clip(x * end[0] + y * end[1], 0.0, 1.0)
    square = np.square(x - along * end[0]) + np.square(y - along * end[1])
    clean = np.exp(-square / 0.06)
    noisy = clean + config.noise_std * rng.normal(size=clean.shape)
    start = rng.integers(1, config.frames - config.window, (config.test, 1))
    place = np.arange(config.frames) - start
    arrays = {"train": noisy[: config.training], "noisy": noisy[config.training :]}
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
    arrays["clean"] = clean[config.training :].astype(np.float32)
    return arrays | {"seen": (place < 0) | (place >= config.window)}


class Recurrent(nn.Module):
    """All frames, and which are there, to mean and log std of each frame's latents."""

    latents: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        size = self.width
        x = nn.tanh(nn.Dense(size)(x))
        normal = nn.initializers.lecun_normal(batch_axis=(0,))
        inner = self.param("inner", normal, (2, size, 3 * size))
        bias = self.param("bias", nn.initializers.zeros_init(), (2, 1, size))
        both = jnp.stack([x, x[::-1]])
        gates = both @ self.param("outer", normal, (2, size, 3 * size))

        def step(h: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
            """A GRU forwards and one backwards, `[2, 1, size]`."""
            own = jnp.split(h @ inner, 3, axis=-1)
            new = jnp.split(gates[:, None], 3, axis=-1)
            reset, keep = nn.sigmoid(own[0] + new[0]), nn.sigmoid(own[1] + new[1] + 1)
            h = keep * h + (1 - keep) * nn.tanh(new[2] + bias + reset * own[2])
            return h, h

        _, h = lax.scan(step, jnp.zeros((2, 1, size)), gates.swapaxes(0, 1))
        h = jnp.concatenate([h[:, 0, 0], h[::-1, 1, 0]], axis=1)
        return jnp.split(nn.Dense(2 * self.latents)(h), 2, axis=-1)


def pictures(config: Any, run: Run, found: dict[str, Any]) -> list[Figure]:
    figure, (ax,) = panels(1, width=6.4)
    place = np.arange(1, config.window + 1)
    series = {**NAMES, "mean frame": "mean training frame"}
    errors = {label: (place, found[f"error_{k}"].T) for k, label in series.items()}
    curves(ax, errors, xlabel="place in the hidden window (frames)",
           ylabel="squared error per pixel (intensity²)", points=True)  # fmt: skip
    ax.set(xticks=place, ylim=(0, None))
    side = config.side
    seen = found["seen"][0, 0]
    shown = np.where(seen[:, None], found["noisy"][0], 0.0)
    rows = [found["clean"][0], shown, *(found[f"frames_{k}"][0] for k in NAMES)]
    grid = image_grid(
        [np.clip(row, 0, 1).reshape(-1, side, side) for row in rows],
        ["clean", "seen", "SVAE", "RNN"],
    )
    return [
        run.figure(
            "errors", figure, title="Error at hidden frames",
            caption=f"Means and standard errors over {config.seeds} seeds of "
            f"{config.test} test sequences.",
        ),
        run.figure(
            "frames", grid, title="A pendulum with hidden frames",
            caption="The first test sequence: clean, as the networks see it (hidden "
            "frames white), and means of decoded paths.",
        ),
    ]  # fmt: skip
