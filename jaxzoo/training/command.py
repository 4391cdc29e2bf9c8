"""The command line of an experiment: `python -m experiments.TOPIC.SLUG [preset]`."""

import dataclasses
import difflib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import tyro

from jaxzoo.training import compile_cache, launch
from jaxzoo.training.checkpoint import SaveError
from jaxzoo.training.lock import FolderInUseError
from jaxzoo.training.loop import Stopped
from jaxzoo.training.mesh import PlacementError, make_mesh
from jaxzoo.training.options import Options
from jaxzoo.training.record import Report, Run, RunFolderError
from jaxzoo.training.sinks import MissingExtraError

__all__ = ["Asked", "experiment", "parse"]

EXIT_FAILED, EXIT_USAGE, EXIT_SIGTERM, EXIT_SIGINT = 1, 2, 75, 130


class Asked(NamedTuple):
    """What the words of a command line ask for.

    Attributes:
        topic: the experiment's.
        slug: the experiment's.
        title: one line on what it is.
        preset: name of the preset that the settings began from.
        config: the settings.
        options: how the run is carried out.
        run_dir: where it writes.
        fresh: whether to begin again.
    """

    topic: str
    slug: str
    title: str
    preset: str
    config: Any
    options: Options
    run_dir: str
    fresh: bool


def parse(
    main: Callable[[Any, Run], Report], presets: Mapping[str, Any], words: list[str]
) -> Asked:
    """Reads a command line; a wrong one ends the process with status 2.

    Args:
        main: the experiment's.
        presets: settings by name; "full" is the default.
        words: what follows the module's name.
    """
    # By the file: run by its path a module has no dotted name.
    path = Path(main.__globals__["__file__"]).resolve()
    topic, slug = path.parent.name, path.stem
    named = bool(words) and not words[0].startswith("-")
    preset, words = (words[0], words[1:]) if named else ("full", words)
    if preset not in presets:
        near = difflib.get_close_matches(preset, presets, n=1)
        hint = f", did you mean {near[0]}" if near else ""
        _fail(f"no preset '{preset}': there are {', '.join(presets)}{hint}.")
    start = presets[preset]
    docstring = inspect.cleandoc(main.__globals__["__doc__"] or slug)

    @dataclasses.dataclass(frozen=True)
    class Words:
        config: tyro.conf.OmitArgPrefixes[type(start)]  # pyright: ignore
        options: tyro.conf.OmitArgPrefixes[Options]
        run_dir: str = str(Path("runs") / topic / slug)
        """Everything that the run writes lies here: a local path or gs://BUCKET/X."""
        fresh: bool = False
        """Begin again, also where an unfinished run could be continued."""

    read = tyro.cli(
        Words,
        default=Words(start, Options()),
        args=words,
        prog=f"python -m experiments.{topic}.{slug} [{' | '.join(presets)}]",
        description=docstring,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    title = docstring.splitlines()[0]
    head = (topic, slug, title, preset)
    return Asked(*head, read.config, read.options, read.run_dir, read.fresh)


def experiment(
    main: Callable[[Any, Run], Report],
    presets: Mapping[str, Any],
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line and exits.

    Exit status: 0 all claims hold, 1 one does not or a number was not finite, 2 the
    command is wrong, 75 SIGTERM and 130 Ctrl-C, each after a checkpoint from which the
    same command goes on.

    Args:
        main: the experiment's `main(config, run) -> Report`.
        presets: settings by name; "full" is the default.
        argv: words after the module's name; None takes them from the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    asked = parse(main, presets, words)
    options = asked.options
    try:
        compile_cache.enable(say=lambda text: print(text, file=sys.stderr))
        launch.initialize()
        launch.agree(_facts(main, asked))
        several = jax.device_count() > 1 or options.mesh != Options.mesh
        run = Run(
            asked.run_dir,
            topic=asked.topic,
            slug=asked.slug,
            title=asked.title,
            preset=asked.preset,
            config=asked.config,
            fresh=asked.fresh,
            options=options,
            mesh=make_mesh(options.mesh) if several else None,
        )
    except launch.LaunchError as error:
        _fail(str(error), error.code)
    except MissingExtraError as error:
        _fail(str(error), alone=True)
    except (RunFolderError, ValueError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot write to --run-dir {asked.run_dir}: {error.strerror}.")
    if run.resumed:
        run.say(f"Going on with the unfinished run in {run.folder}.")
    # Between the loops, which handle it themselves, SIGTERM ends as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, _terminate)
    # A smoke run computes for a second and would compile for half a minute.
    brief = asked.preset == "smoke" and jax.default_backend() == "cpu"
    unoptimized = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", unoptimized or brief)
    try:
        holds = run.finish(main(asked.config, run))
    except Stopped as stopped:
        run.say(f"{stopped} The same command goes on from there.")
        sys.exit(EXIT_SIGINT if stopped.signum == signal.SIGINT else EXIT_SIGTERM)
    except PlacementError as error:
        _fail(str(error))
    except jax.errors.JaxRuntimeError as error:
        sentence = launch.explain(error)
        if sentence is None:
            raise
        _fail(sentence, launch.EXIT_LOST, alone=True)
    except FloatingPointError as error:
        _fail(str(error), EXIT_FAILED)
    except FolderInUseError as error:  # another process took a folder in a bucket
        _fail(str(error), alone=True)
    except SaveError as error:
        sentence = f"{error} The same command goes on from the checkpoint before."
        _fail(sentence, alone=True)
    except _Terminated:
        run.say("Stopped. The same command goes on from the last checkpoint.")
        sys.exit(EXIT_SIGTERM)
    except KeyboardInterrupt:
        run.say("Stopped. The same command goes on from the last checkpoint.")
        sys.stdout.flush()
        os._exit(EXIT_SIGINT)  # at once: Python's own end waits for a save's threads
    finally:
        run.close()
        jax.config.update("jax_disable_most_optimizations", unoptimized)
        signal.signal(signal.SIGTERM, before)
    sys.exit(0 if holds else EXIT_FAILED)


class _Terminated(Exception):
    """SIGTERM came outside a loop."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _facts(main: Callable[[Any, Run], Report], asked: Asked) -> dict[str, Any]:
    """What has to be the same in all processes of a run."""
    settings = {**dataclasses.asdict(asked.config), **dataclasses.asdict(asked.options)}
    settings |= {"preset": asked.preset, "run_dir": asked.run_dir}
    code = launch.versions_and_code(Path(main.__globals__["__file__"]))
    return {**{name: str(value) for name, value in settings.items()}, **code}


def _fail(sentence: str, code: int = EXIT_USAGE, *, alone: bool = False) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    if alone:
        launch.abandon(code)  # the others would wait for this process
    sys.exit(code)
