"""The command line: its words, its help, and errors that name the nearest option."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from experiments._terminal import fail, near
from jaxzoo.catalogue import STATUSES

Command = Callable[[argparse.Namespace], int]
EPILOG = """examples:
  python -m experiments list importance weighted
  python -m experiments show iwae
  python -m experiments run vae iwae --preset smoke
  python -m experiments run iwae -- --seeds 3
  python -m experiments run --all
  python -m experiments report
"""


class Parser(argparse.ArgumentParser):
    """Errors are one sentence that names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2."""
        if found := re.match(r"unrecognized arguments: (-\S+)", message):
            message = f"no option '{found[1]}'"
            message += near(found[1].split("=")[0], self._option_string_actions)
        fail(message)


def make_parser(commands: dict[str, tuple[Command, str]]) -> argparse.ArgumentParser:
    """The command line of `commands`, of which the first is the default."""
    shape = argparse.RawDescriptionHelpFormatter
    about = "Every paper of jaxzoo as a claim that runs. Without a command: list."
    parser = Parser(
        prog="python -m experiments",
        description=about,
        epilog=EPILOG,
        formatter_class=shape,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="command", parser_class=Parser)
    made = {}
    for name, (function, text) in commands.items():
        sub = made[name] = subparsers.add_parser(
            name, help=text, description=function.__doc__, allow_abbrev=False
        )
        sub.set_defaults(command=function, parser=sub)
    default = next(iter(commands.values()))[0]
    parser.set_defaults(command=default, parser=parser)
    add = made["list"].add_argument
    add("words", nargs="*", help="looked for in slug, topic, title, claim and authors")
    add("--topic", help="one topic, such as vae")
    add("--tier", type=_tier, help="1 pillar, 2 widely useful, 3 special, 4 miniature")
    add("--status", help=", ".join(STATUSES))
    add("--json", action="store_true", help="a JSON array instead of a table")
    add("--all", action="store_true", help="also papers that are planned")
    made["show"].add_argument("slug")
    add = made["run"].add_argument
    add("slugs", nargs="*", metavar="slug")
    add("--all", action="store_true", help="every paper that is built")
    add("--preset", default="full", help="smoke, full, ... (default: full)")
    add("--run-dir", type=Path, help="where to write (default: runs/TOPIC/SLUG)")
    made["run"].usage = "python -m experiments run SLUG... [options] [-- FLAGS]"
    made["run"].epilog = "FLAGS go to each experiment; `show SLUG` lists them."
    add = made["record"].add_argument
    add("slugs", nargs="*", metavar="slug", help="default: all that have a report")
    add("--run-dir", type=Path, default=Path("runs"), help="default: runs")
    add = made["report"].add_argument
    add("--runs", type=Path, default=Path("runs"), help="default: runs")
    add("--output", type=Path, default=None, help="default: RUNS/index.html")
    return parser


def _tier(text: str) -> int:
    if text not in {"1", "2", "3", "4"}:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1, 2, 3 or 4")
    return int(text)
