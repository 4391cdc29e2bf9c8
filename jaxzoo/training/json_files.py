"""JSON of a run's folder, on a disk or in a bucket."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxzoo.training import folder as folders

__all__ = ["differing", "json_text", "plain", "read_object", "write_json"]


def plain(value: Any) -> Any:
    """`value` in types that JSON has; NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # damaged, or not even text
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Puts a value in the place of the file, whole or not at all."""
    folders.replace(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as the text of a file."""
    return json.dumps(value, indent=1) + "\n"


def differing(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In words, where two settings differ."""
    flat = [{**settings, **settings.get("config", {})} for settings in (known, wanted)]
    names = [n for n in {**flat[1], **flat[0]} if n not in {"config", "title"}]
    pairs = [(name, *(f.get(name, "nothing") for f in flat)) for name in names]
    return ", ".join(f"{n}: {a} there, {b} here" for n, a, b in pairs if a != b)
