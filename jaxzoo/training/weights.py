"""Weights to and from safetensors, with a digest that the format itself lacks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxzoo.core.tree import describe, differences, leaf_sha256, named_leaves

__all__ = ["load_weights", "save_weights"]


def save_weights(path: str | Path, params: Any) -> str:
    """Writes a pytree of arrays to one safetensors file, whole or not at all.

    Args:
        path: the file.
        params: a pytree of arrays; the leaves are named by their paths.

    Returns:
        The digest that stands in the file: SHA-256 over names, dtypes, shapes, values.
    """
    path = Path(path)
    leaves = named_leaves(params)
    sha256 = _digest(leaves)
    temporary = path.with_name(path.name + ".tmp")
    save_file(leaves, temporary, metadata={"jaxzoo_sha256": sha256})
    temporary.replace(path)
    return sha256


def load_weights(path: str | Path, like: Any) -> Any:
    """Reads a file of `save_weights` into a tree like `like`.

    Args:
        path: the file; one that another program wrote has no digest and is refused.
        like: a pytree of arrays or `jax.ShapeDtypeStruct` that names what is wanted.

    Returns:
        The arrays, in the structure of `like`. A dtype is never cast.

    Raises:
        ValueError: the file is damaged or has no digest, or holds another tree: the
            message names the file, or the leaves that differ.
    """
    try:
        with safe_open(path, framework="flax") as file:
            leaves = {name: file.get_tensor(name) for name in file.keys()}
            told = (file.metadata() or {}).get("jaxzoo_sha256")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
    if told is None:
        raise ValueError(f"{path} has no digest: it was not written by save_weights.")
    if told != _digest(leaves):
        raise ValueError(f"{path} is damaged: its digest is not that of its weights.")
    if different := differences(describe(leaves), describe(like)):
        raise ValueError(f"{path} holds other weights: {different}.")
    names = named_leaves(like)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in names])


def _digest(leaves: dict[str, Any]) -> str:
    facts = describe(leaves)
    for name, leaf in leaves.items():
        facts[name]["sha256"] = leaf_sha256(leaf)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
