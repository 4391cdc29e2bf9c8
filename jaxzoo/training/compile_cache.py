"""JAX's compile cache, on by default: a second start compiles next to nothing."""

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax

__all__ = ["enable"]

MAX_BYTES = 2 * 2**30
MIN_SECONDS = 0.1  # what compiles faster than that is not worth a file


def enable(
    folder: Path | None = None, *, say: Callable[[str], None] = lambda text: None
) -> str | None:
    """Turns the persistent compile cache on, unless the user has decided.

    Call it before the first compilation: jax looks once whether there is a cache. What
    was set by JAX_COMPILATION_CACHE_DIR, by JAX_ENABLE_COMPILATION_CACHE or in
    `jax.config` stays as it is.

    Args:
        folder: where the cache lies; by default `jaxzoo/xla` in the user's cache folder
            ($XDG_CACHE_HOME or ~/.cache). There is one below it per kind of machine.
        say: called with one sentence where nothing can be written.

    Returns:
        The folder in use, or None where the cache is off.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if chosen := jax.config.jax_compilation_cache_dir:
        return chosen
    try:
        # Not by `Path.home`: without HOME and passwd entry it raises a RuntimeError.
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        place = (folder or home / "jaxzoo" / "xla") / machine_digest()
        # Entries are programs that will run: nobody else may put one there.
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        (place / f".probe-{os.getpid()}").touch()
        (place / f".probe-{os.getpid()}").unlink()
        drop_oldest(place, MAX_BYTES)
    except OSError as error:
        say(f"The compile cache is off: {error.filename}: {error.strerror}.")
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return str(place)


def machine_digest() -> str:
    """Short digest of what makes compiled CPU code unfit for another machine.

    jax's own cache key has the versions and the flags of the compiler, but the code
    uses whatever instructions the host has, and a home may be shared by several hosts.
    """
    facts = [sys.platform, platform.machine(), platform.processor()]
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line.partition(":") for line in file)
            flags = (v for k, _, v in lines if k.strip() in ("flags", "Features"))
            facts += sorted(next(flags, "").split())
    except OSError:  # no Linux: the three above have to do
        pass
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def drop_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the entries that were used longest ago until the rest fits.

    jax's own limit, jax_compilation_cache_max_size, needs the package filelock and
    takes a lock for every look-up.
    """
    entries = []
    for path in folder.glob("*-cache"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        entries.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size
