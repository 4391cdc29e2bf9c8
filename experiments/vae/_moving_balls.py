"""Moving balls in noisy clips: the data of `sgpbae`, errors on them, and pictures."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, image_grid, panels
from jaxzoo.training.record import Run
from jaxzoo.training.seeds import stderr

__all__ = ["aligned", "moving_balls", "pictures", "rmse"]


def moving_balls(config: Any, seed: int) -> dict[str, np.ndarray]:
    """Clips of a ball, 1.8 pixels wide, on paths of a Gaussian process.

    Each coordinate has a standard deviation of a sixth of the frame and a lengthscale
    of 4 frames. `[V, S]` frames are seen, `[V, W]` hidden, in a window.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(config.frames)
    kernel = np.exp(-0.5 * np.square((time[:, None] - time[None]) / 4.0))
    root = np.linalg.cholesky(kernel + 1e-6 * np.eye(config.frames))
    paths = root @ rng.normal(size=(config.clips, config.frames, 2))
    paths = (config.side - 1) / 2 + config.side / 6 * paths
    y, x = np.mgrid[: config.side, : config.side].reshape(2, -1)
    square = np.square(x - paths[..., :1]) + np.square(y - paths[..., 1:])
    clean = np.exp(-0.5 * square / 1.8**2)
    noisy = clean + config.noise_std * rng.normal(size=clean.shape)
    start = rng.integers(1, config.frames - config.window, (config.clips, 1))
    place = time - start
    order = np.argsort((place >= 0) & (place < config.window), axis=1, kind="stable")
    seen, gone = np.split(order, [config.frames - config.window], axis=1)

    def pick(values: Any, rows: Any) -> Any:
        return np.take_along_axis(values, rows[..., None], axis=1).astype(np.float32)

    return {
        "x": pick(noisy, seen), "path": pick(paths, seen), "clean": pick(clean, gone),
        "t": ((time - time.mean()) / time.std()).astype(np.float32),
        "seen": seen, "gone": gone,
    }  # fmt: skip


def aligned(z: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Latents `[R, C, V, S, D]` by the affine map, one for all clips, that is best."""
    rows = np.concatenate([z, np.ones_like(z[..., :1])], axis=-1)
    rows = rows.reshape(*z.shape[:2], -1, z.shape[-1] + 1)
    fitted = rows @ (np.linalg.pinv(rows) @ path.reshape(len(path), 1, -1, 2))
    return fitted.reshape(*z.shape[:-1], 2)


def rmse(values: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Per seed; the mean over its chains, `[R, C, ...]` against `[R, ...]`."""
    square = np.square(values - true[:, None]).reshape(*values.shape[:2], -1)
    return np.sqrt(square.mean(axis=2)).mean(axis=1)


def pictures(config: Any, run: Run, errors: Any, paths: Any, frames: Any) -> Any:
    figure, axes = panels(3, width=4.2)
    units = {"path": "positions (pixels)", "image": "hidden frames (grey)"}
    for ax, (kind, unit) in zip(axes, units.items(), strict=False):
        bars = {k.split("/")[1]: v for k, v in errors.items() if k.startswith(kind)}
        for i, values in enumerate(bars.values()):
            ax.bar(i, values.mean(), yerr=stderr(values), color=COLORS[i], capsize=4)
            ax.plot([i] * len(values), values, "k.", ms=4)
        ax.set(xticks=range(len(bars)), xticklabels=bars, ylabel=f"RMSE of {unit}")
    for (name, clips), look, i in zip(paths.items(), "os^", (6, 0, 1), strict=True):
        for label, path in zip((name, None), clips[0, 0], strict=False):
            x, y = path.T
            axes[2].plot(x, y, f"{look}-", ms=3, lw=1, color=COLORS[i], label=label)
    axes[2].set(xlabel="x (pixels)", ylabel="y (pixels)", aspect="equal")
    axes[2].legend(frameon=False, fontsize=8)
    rows = [np.clip(v[0, 0, :3], 0, 1) for v in frames.values()]
    rows = [v.reshape(-1, config.side, config.side) for v in rows]
    return [
        run.figure(
            "errors", figure, title="Positions and hidden frames",
            caption=f"Left: means and standard errors over {config.seeds} seeds, dots "
            "the seeds. Right: seen frames of two clips, by the affine maps.",
        ),
        run.figure(
            "frames", image_grid(rows, list(frames)), title="Hidden frames",
            caption="Windows of three clips: without noise, and means of predictions.",
        ),
    ]  # fmt: skip
