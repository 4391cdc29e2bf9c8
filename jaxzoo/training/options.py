"""How a run is carried out: what every experiment takes beside its own settings."""

import dataclasses
from pathlib import Path

from jaxzoo.training.folder import in_bucket
from jaxzoo.training.nonfinite import Injection, Policy
from jaxzoo.training.profiler import profile_steps

__all__ = ["Options", "refuse_local_files"]


@dataclasses.dataclass(frozen=True)
class Options:
    mesh: str = "data=-1"
    """Sizes of the axes data, fsdp and tensor; -1 takes the devices that are left."""
    reproducible: bool = False
    """The same bits on every mesh that splits the batch over 2, 4 or 8 devices."""
    non_finite: Policy = "abort"
    """What to do when a number is NaN or infinite."""
    inject_nan: str = ""
    """Puts a NaN into params, batch, loss or gradient at a step: loss:37. A test."""
    profile: str = ""
    """Traces steps for TensorBoard or xprof, such as 100:110, into profile/."""
    tensorboard: bool = False
    """Writes the metrics as TensorBoard files too, into tensorboard/."""
    wandb: bool = False
    """Writes them as an offline run of wandb too, into wandb/; wandb sync sends it."""

    def __post_init__(self):
        self.injection()
        self.profiled()

    def profiled(self) -> tuple[int, int] | None:
        """First and last of the steps that `profile` names.

        Raises:
            ValueError: it is not FIRST:LAST.
        """
        return profile_steps(self.profile) if self.profile else None

    def injection(self) -> Injection | None:
        """What `inject_nan` asks for.

        Raises:
            ValueError: it is not WHERE:STEP.
        """
        return Injection.parse(self.inject_nan) if self.inject_nan else None


def refuse_local_files(folder: Path, options: Options) -> None:
    """Refuses what is written to local folders alone, for a run in a bucket."""
    wanted = [n for n in ("tensorboard", "wandb", "profile") if getattr(options, n)]
    if wanted and in_bucket(folder):
        raise ValueError(
            f"--{wanted[0]} writes to a local folder, and {folder} is in a bucket: "
            "leave it out, or name a local --run-dir."
        )
