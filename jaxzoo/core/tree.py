"""Pytrees by the names of their leaves: what a checkpoint is compared by."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["describe", "differences", "leaf_sha256", "named_leaves"]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as `params/decoder/kernel`.

    >>> named_leaves({"params": {"w": 1.0}, "steps": [2, 3]})
    {'params/w': 1.0, 'steps/0': 2, 'steps/1': 3}
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in pairs
    }


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Dtype and shape of each leaf by name, in types that JSON has.

    >>> describe({"w": np.zeros((2, 3), np.float32)})
    {'w': {'dtype': 'float32', 'shape': [2, 3]}}
    """
    return {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for name, leaf in named_leaves(tree).items()
    }


def differences(
    stored: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]
) -> str:
    """What two descriptions disagree on, at most ten leaves; empty if nothing.

    >>> one, other = ({"w": np.zeros(2, t)} for t in (np.float32, np.int32))
    >>> differences(describe(one), describe(other))
    'w: stored float32[2], expected int32[2]'
    """

    def told(leaves: Mapping[str, Mapping[str, Any]], name: str) -> str:
        if name not in leaves:
            return "nothing"
        shape = ",".join(map(str, leaves[name]["shape"]))
        return f"{leaves[name]['dtype']}[{shape}]"

    pairs = [
        (n, told(stored, n), told(wanted, n)) for n in sorted({**stored, **wanted})
    ]
    different = [f"{n}: stored {a}, expected {b}" for n, a, b in pairs if a != b]
    more = [f"and {len(different) - 10} more"] if len(different) > 10 else []
    return "; ".join(different[:10] + more)


def leaf_sha256(leaf: Any) -> str:
    """SHA-256 of the bytes of one array, row-major.

    >>> leaf_sha256(np.zeros(2, np.uint8))[:8]
    '96a296d2'
    """
    return hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
