"""The files that travel in the wheel, checked byte for byte on every load."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
from pathlib import Path

import numpy as np

__all__ = ["load_npz", "read_shipped"]

_FOLDER = Path(str(importlib.resources.files("jaxzoo.data"))) / "files"

# name -> (bytes, SHA-256)
_KNOWN = {
    "emoji32.npz": (
        1_496_264,
        "e58d171039ff7d8f3761d456d75668b6e94489bb7725733d5d923c1e6d179300",
    ),
    "fashion_mnist_12k.npz": (
        5_278_827,
        "76d227fe11dd10e4978cc53069dcf1b3c271b0247c411b7290fc0b7b0386a4a2",
    ),
    "moby_dick.txt": (
        1_204_997,
        "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
    ),
    "state_of_the_union.txt": (
        2_143_140,
        "0fb0b823fcbc9d74bdb9e611985e763bcd0d6d275ed3b2b59e00282356dc5bbb",
    ),
}


def read_shipped(name: str) -> bytes:
    """The bytes of a shipped file, after its length and SHA-256 were checked.

    The bytes that were hashed are the bytes returned, so no later read can differ.
    Hashing the largest file takes a few milliseconds, less than decoding it.

    Args:
      name: file name under `jaxzoo/data/files`, one of the four known.

    Returns:
      The whole content.

    Raises:
      ValueError: the name is unknown, or the file is not what was shipped.
      FileNotFoundError: the file is missing.

    >>> read_shipped("moby_dick.txt")[:20]
    b'CHAPTER 1. Loomings.'
    """
    if name not in _KNOWN:
        raise ValueError(
            f"name={name!r} is not a shipped file, expected one of {sorted(_KNOWN)}."
        )
    path = _FOLDER / name
    remedy = (
        "reinstall it with 'pip install --force-reinstall --no-deps jaxzoo-papers', or "
        f"in a checkout run 'git checkout -- jaxzoo/data/files/{name}'."
    )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {remedy}") from None
    length, digest = _KNOWN[name]
    if len(content) != length:
        raise ValueError(
            f"{path} has {len(content)} bytes where {length} were shipped; {remedy}"
        )
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{path} is damaged (its SHA-256 is not that of the shipped file); {remedy}"
        )
    return content


def load_npz(name: str) -> dict[str, np.ndarray]:
    """The arrays of a shipped `.npz` file; raises as `read_shipped` does.

    Args:
      name: file name under `jaxzoo/data/files`.

    Returns:
      name -> array; no pickled object is ever read.

    >>> load_npz("emoji32.npz")["image"].shape
    (1911, 32, 32, 3)
    """
    with np.load(io.BytesIO(read_shipped(name)), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
