"""Batches of all seeds at once, each seed with its own order of the examples.

They stand here since `jaxzoo.training` knows no data, and `jaxzoo.data` no seeds.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxzoo.data.source import RandomAccess, batch, batch_indices

__all__ = ["SeedBatches"]


class SeedBatches(NamedTuple):
    """What `train` asks for, with `batch_axis=1`: seed s has the batches (s, t).

    Attributes:
        source: the training records.
        seeds: how many there are, from 0.
        size: examples in a batch of one seed.
    """

    source: RandomAccess
    seeds: int
    size: int

    def at(self, t: int) -> dict[str, Any]:
        """Batch t: name -> array `[seeds, size, ...]`."""
        each = range(self.seeds)
        rows = [batch(self.source, s, t, batch_size=self.size) for s in each]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def ids(self, t: int) -> list[np.ndarray]:
        """The rows of `source` that make batch t, `[size]` for each seed."""
        return [
            batch_indices(s, t, num_examples=len(self.source), batch_size=self.size)
            for s in range(self.seeds)
        ]
