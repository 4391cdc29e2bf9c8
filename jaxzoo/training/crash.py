"""Named points at which a test can end the process as a kill would."""

import collections
import os

__all__ = ["crash_point"]

_passed: collections.Counter[str] = collections.Counter()


def crash_point(name: str) -> None:
    """Ends the process the n-th time it passes, if JAXZOO_CRASH_AT is `name:n`."""
    wanted = os.environ.get("JAXZOO_CRASH_AT")
    if wanted is None:
        return
    _passed[name] += 1
    if wanted == f"{name}:{_passed[name]}":
        os._exit(137)
