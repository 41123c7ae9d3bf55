"""meki-rm: removes models from the store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..package import ModelNotFoundError, bundled_models, remove_model, store, stored_model
from .arguments import Parser
from .errors import note, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = Parser("meki-rm", description="Remove models from the store.", epilog="Reference: docs/cli.md")
    parser.add_argument("names", metavar="NAME", nargs="+", help="of a model in the store, as meki-list shows it")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    return run_command(parser.prog, lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    names = list(dict.fromkeys(arguments.names))
    for name in names:
        _check(name)
    if not arguments.yes and not _confirmed(names):
        note("nothing removed")
        return
    for name in names:
        remove_model(name)
        print(f"{name}: removed", flush=True)


def _check(name: str) -> None:
    """ModelNotFoundError unless the store has a model of this name."""
    if stored_model(name) is None:
        why = "a bundled model, which stays" if name in bundled_models() else "no model in the store"
        raise ModelNotFoundError(
            f"{name!r} is {why}; expected the name of one in {store()}, meki-list shows them; nothing was removed"
        )


def _confirmed(names: list[str]) -> bool:
    """Asks on a terminal; ValueError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ValueError("standard input is no terminal on which to ask before models are removed; give -y")
    try:
        return input(f"remove {', '.join(names)} from {store()}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
