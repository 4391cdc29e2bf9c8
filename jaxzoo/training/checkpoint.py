"""Checkpoints of one fit: Orbax moves the bytes.

A step that was not committed whole does not exist for `latest`, so that a kill in the
middle of a save costs the steps since the last commit and nothing else.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints below one folder; a context manager.

    Args:
        folder: absolute path, made if missing.
        keep: how many of the newest steps stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        # Waits for a save under way: what was announced as saved is on the disk.
        self._manager.close()

    def latest(self) -> int | None:
        """The newest step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays in the background, unless the step is there."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """Reads a step into arrays with the shapes, dtypes and shardings of `like`.

        Raises:
            ValueError: the stored tree or a shape differs from `like`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
