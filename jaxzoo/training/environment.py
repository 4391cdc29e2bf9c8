"""Where a number was measured."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions, device and commit: what a figure depends on beside its settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in packages}
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    kind = f"{cores or os.cpu_count()} cores" if device.platform == "cpu" else ""
    words = (str(jax.device_count()), device.platform, kind or device.device_kind)
    return {"versions": versions, "device": " x ".join(words), "commit": _commit()}


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it is not ours
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
