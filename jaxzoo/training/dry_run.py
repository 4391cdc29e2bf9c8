"""What an experiment would need on machines that are not there.

    python -m jaxzoo.training.dry_run experiments.vae.iwae --topology v5e:4x4
    python -m jaxzoo.training.dry_run experiments.vae.iwae --topology h100:2x8 \
        --mesh data=2,fsdp=8 -- demo --batch-size 256

Compiles the very program that training runs, with the compiler of a TPU slice or of
H100 nodes, on this machine's CPU. Nothing is trained, no large array is made. Exit
status: 0 it fits, 1 it does not, 2 the command is wrong.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxzoo.training import topology as topologies
from jaxzoo.training.chips import Chip, chip

if TYPE_CHECKING:  # imports jax, before which the environment has to be set
    from jaxzoo.training.forecast import Forecast

__all__ = ["DryRunError", "dry_run"]

EXIT_DOES_NOT_FIT, EXIT_USAGE = 1, 2


class DryRunError(Exception):
    """The command cannot be done; the message says why."""


class _Found(Exception):
    """Ends the experiment where it begins to train the fit."""

    def __init__(self, program: Any):
        super().__init__(program.name)
        self.program = program


def dry_run(
    module: str,
    argv: Sequence[str],
    topology: str,
    mesh_text: str = "data=-1",
    fit: str | None = None,
    say: Callable[[str], None] = print,
) -> "tuple[Forecast, Chip]":
    """Compiles an experiment's training step for a topology and reads the figures.

    Args:
        module: the experiment, as `experiments.vae.iwae`.
        argv: its own words: preset and flags.
        topology: such as "v5e:4x4" or "h100:8".
        mesh_text: the mesh over the topology's devices.
        fit: which fit of the experiment; None takes the first.
        say: gets a line before each longer wait.

    Returns:
        The forecast, and the chip that it is for.

    Raises:
        DryRunError: no such module, topology, mesh or fit.
        MissingWheelError: the compiler is not installed; the message says how to get
            it.
    """
    from jaxzoo.training.forecast import forecast
    from jaxzoo.training.mesh import make_mesh

    try:
        devices = topologies.devices(topology)
        mesh = make_mesh(mesh_text, devices)
    except ValueError as error:
        raise DryRunError(str(error)) from None
    kind = chip(devices[0].device_kind)
    if kind is None:
        raise DryRunError(f"--topology {topology}: no figures are known for its chips.")
    program = _program(_module(module), argv, mesh, fit)
    say(f"Compiling {program.name} for {len(devices)} devices of {topology} ...")
    platform = "cuda" if kind.links == 0 else "tpu"
    return forecast(program, kind, platform), kind


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise DryRunError(
            f"no module '{name}': name an experiment as experiments.TOPIC.SLUG, "
            "in the folder that has experiments/."
        ) from None
    if not hasattr(module, "main") or not hasattr(module, "PRESETS"):
        raise DryRunError(f"{name} is no experiment: it has no main and PRESETS.")
    return module


def _program(module: Any, argv: Sequence[str], mesh: Any, fit: str | None) -> Any:
    """Runs the experiment up to the fit; its program is all that is wanted."""
    from jaxzoo.training import command, record

    asked = command.parse(module.main, module.PRESETS, list(argv))
    names: list[str] = []

    def stop(program: Any) -> None:
        names.append(program.name)
        if fit in (None, program.name):
            raise _Found(program)

    with tempfile.TemporaryDirectory() as folder:
        # What the experiment says is no part of the report.
        with contextlib.redirect_stdout(sys.stderr):
            run = record.Run(
                Path(folder),
                topic=asked.topic,
                slug=asked.slug,
                title=asked.title,
                preset=asked.preset,
                config=asked.config,
                options=asked.options,
                mesh=mesh,
                dry_run=stop,
            )
            try:
                module.main(asked.config, run)
            except _Found as found:
                return found.program
            except ValueError as error:  # a batch that the mesh cannot split, say
                raise DryRunError(str(error)) from error
    if not names:
        raise DryRunError(f"{module.__name__} trains nothing by jaxzoo's `train`.")
    raise DryRunError(f"no fit '{fit}': the experiment has {', '.join(names)}.")


@dataclasses.dataclass(frozen=True)
class Options:
    module: tyro.conf.Positional[str]
    """The experiment, as experiments.vae.iwae; its own words follow after --."""
    topology: str
    """Machines to compile for: v5e:4x4, v5p:2x2x2, v6e:2x4, tpu7x:2x2x1, h100:8."""
    mesh: str = "data=-1"
    """How their devices are used: data, fsdp and tensor, such as data=4,fsdp=-1."""
    fit: str | None = None
    """Which fit of the experiment; the first if not given."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the figures as JSON."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = tyro.cli(
        Options,
        args=words[:cut],
        prog="python -m jaxzoo.training.dry_run",
        description=(__doc__ or "").strip(),
    )
    topologies.prepare()
    try:
        figures, kind = dry_run(
            options.module,
            words[cut + 1 :],
            options.topology,
            options.mesh,
            options.fit,
            say=lambda text: print(text, file=sys.stderr),
        )
    except (DryRunError, topologies.MissingWheelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    from jaxzoo.training.forecast_page import advice, as_json, show

    head = {"experiment": options.module, "topology": options.topology}
    head["versions"] = topologies.versions(options.topology)
    if options.as_json:
        print(json.dumps({**head, **as_json(figures, kind)}, indent=1))
    else:
        show(figures, kind, head)
    if not figures.memory.fits:
        print(f"error: {advice(figures, options.topology)}", file=sys.stderr)
        sys.exit(EXIT_DOES_NOT_FIT)


if __name__ == "__main__":
    main()
