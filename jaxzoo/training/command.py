"""The command line of an experiment: `python -m experiments.TOPIC.SLUG [preset]`."""

import dataclasses
import difflib
import inspect
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxzoo.training.checkpoint import SaveError
from jaxzoo.training.loop import Stopped
from jaxzoo.training.record import Report, Run, RunFolderError

__all__ = ["experiment"]

EXIT_FAILED, EXIT_USAGE, EXIT_SIGTERM, EXIT_SIGINT = 1, 2, 75, 130


def experiment(
    main: Callable[[Any, Run], Report],
    presets: Mapping[str, Any],
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line and exits.

    Exit status: 0 all claims hold, 1 one does not, 2 the command is wrong, 75 SIGTERM
    and 130 Ctrl-C, each after a checkpoint from which the same command goes on.

    Args:
        main: the experiment's `main(config, run) -> Report`.
        presets: settings by name; "full" is the default.
        argv: words after the module's name; None takes them from the process.
    """
    # By the file: run by its path a module has no dotted name.
    path = Path(main.__globals__["__file__"]).resolve()
    topic, slug = path.parent.name, path.stem
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and not words[0].startswith("-")
    preset = words.pop(0) if named else "full"
    if preset not in presets:
        near = difflib.get_close_matches(preset, presets, n=1)
        hint = f", did you mean {near[0]}" if near else ""
        _fail(f"no preset '{preset}': there are {', '.join(presets)}{hint}.")
    start = presets[preset]
    docstring = inspect.cleandoc(main.__globals__["__doc__"] or slug)

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: tyro.conf.OmitArgPrefixes[type(start)]  # pyright: ignore
        run_dir: Path = Path("runs") / topic / slug
        """Everything that the run writes lies here."""
        fresh: bool = False
        """Begin again, also where an unfinished run could be continued."""

    options = tyro.cli(
        Options,
        default=Options(start),
        args=words,
        prog=f"python -m experiments.{topic}.{slug} [{' | '.join(presets)}]",
        description=docstring,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        run = Run(
            options.run_dir,
            topic=topic,
            slug=slug,
            title=docstring.splitlines()[0],
            preset=preset,
            config=options.config,
            fresh=options.fresh,
        )
    except RunFolderError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot write to --run-dir {options.run_dir}: {error.strerror}.")
    if run.resumed:
        run.say(f"Going on with the unfinished run in {run.folder}.")
    # Between the loops, which handle it themselves, SIGTERM ends as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        holds = run.finish(main(options.config, run))
    except Stopped as stopped:
        run.say(f"{stopped} The same command goes on from there.")
        sys.exit(EXIT_SIGINT if stopped.signum == signal.SIGINT else EXIT_SIGTERM)
    except SaveError as error:
        _fail(f"{error} The same command goes on from the checkpoint before.")
    except (KeyboardInterrupt, _Terminated) as error:
        run.say("Stopped. The same command goes on from the last checkpoint.")
        sys.exit(EXIT_SIGTERM if isinstance(error, _Terminated) else EXIT_SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(0 if holds else EXIT_FAILED)


class _Terminated(Exception):
    """SIGTERM came outside a loop."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(EXIT_USAGE)
