"""What the command lines parse alike: types of numbers, options of the engine, and one line for a wrong option."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..options import DEFAULT_ROW_CACHE
from .errors import USAGE, report

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and of an unknown option that it is unknown, whatever else is wrong too."""

    def __init__(self, prog: str, *, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The parsed arguments. Exits with 2 if they are wrong."""
        args = sys.argv[1:] if args is None else args
        known = self._option_string_actions
        for text in itertools.takewhile(lambda text: text != "--", args):
            option = text.partition("=")[0]
            if option.startswith("--") and " " not in option and option not in known:
                near = get_close_matches(option, known, n=1, cutoff=0.7)
                self.error(f"unknown option {option}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        return super().parse_args(args)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse says nothing of what cannot be written

    def error(self, message: str) -> NoReturn:
        report(self.prog, "error", message)
        sys.exit(USAGE)


def _argument(parse: Callable[[str], T], good: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """The type of an argument: what `parse` makes of the text, if that is `good`. expected: how the message begins."""

    def read(text: str) -> T:
        with contextlib.suppress(ValueError, RecursionError):
            value = parse(text)
            if good(value):
                return value
        raise argparse.ArgumentTypeError(f"{expected} {text!r}")

    return read


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer from `minimum` to `maximum`."""
    return _argument(int, lambda value: minimum <= value <= maximum, f"expected an integer of at least {minimum}, got")


def number(unit: str, maximum: float) -> Callable[[str], float]:
    """The type of an argument that is a number of `unit` (for messages) from 0 to `maximum`."""
    return _argument(float, lambda value: 0 <= value <= maximum, f"expected {unit} from 0 to {maximum:g}, got")


def path(text: str) -> Path:
    """The type of an argument that is a path; a shell leaves the `~` of --option=~/file alone."""
    return Path(os.path.expanduser(text))


text_file = _argument(path, lambda file: file.exists() and not file.is_dir(), "expected a file, got")
"""The type of an argument that is a file to read, or a pipe."""

json_object = _argument(json.loads, lambda value: isinstance(value, dict), "expected a JSON object, got")
"""The type of an argument that is the text of a JSON object."""

token_counts = _argument(
    lambda text: tuple(int(part) for part in text.split(",")),
    lambda counts: min(counts) >= 0 and len(set(counts)) == len(counts),
    "expected different numbers of tokens with commas between them, as in 0,1024,10240; got",
)
"""The type of an argument that is different numbers of tokens, as in 0,1024."""

thread_counts = _argument(
    lambda text: tuple(int(part) for part in text.split(",")),
    lambda counts: len(set(counts)) == len(counts),
    "expected different numbers of threads with commas between them, as in 1,2; got",
)
"""The type of an argument that is different numbers of threads, as in 1,2."""

token_ids = _argument(
    lambda text: [int(part) for part in text.split(",")],
    lambda ids: True,
    "expected token ids with commas between them, as in 1,15043; got",
)
"""The type of an argument that is token ids, as in 1,15043."""


def text_of(name: str, data: bytes) -> str:
    """A text as it was typed: without the line break at its end and the byte-order mark before it, which editors put
    there. ValueError, naming it, if it is not UTF-8."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def add_engine_options(
    parser: argparse.ArgumentParser, row_cache: int = DEFAULT_ROW_CACHE, several_threads: bool = False
) -> Callable[..., argparse.Action]:
    """Adds the options of every command that opens an engine; returns what adds further ones to their group.
    row_cache: the default of --row-cache. several_threads: --threads is a list."""
    add = parser.add_argument_group("engine").add_argument
    add(
        "--threads",
        type=thread_counts if several_threads else int,
        default=(0,) if several_threads else 0,
        metavar="N,..." if several_threads else "N",
        help="compute threads (default: one per available core)",
    )
    add(
        "--kv-type",
        choices=("float32", "float16", "int8", "int4"),
        help="how keys and values are stored (default: int8; on an NPU float16, and no other)",
    )
    add(
        "--rom-access",
        choices=("pread", "mmap", "direct"),
        default="pread",
        help="how memory rows are read (default: %(default)s)",
    )
    add(
        "--row-cache",
        type=int,
        default=row_cache,
        metavar="MIB",
        help="memory at most that keeps rows which were read; 0: none (default: %(default)s)",
    )
    return add


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Engine`: what was parsed of `add_engine_options`."""
    return {name: getattr(arguments, name) for name in ("threads", "kv_type", "rom_access", "row_cache")}
