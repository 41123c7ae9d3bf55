"""What the command lines of this package have in common."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meki.cli.arguments import path
from meki.cli.errors import report

from .config import ConfigError, check, frozen
from .tokenizer import TokenizerSpec, read_tokenizer, with_visible_marks, without_unknown_tokens

if TYPE_CHECKING:  # importing it loads PyTorch
    from .source import Source


class UsageError(ValueError):
    """The command line asks for what cannot be."""


@dataclass(frozen=True)
class Opened:
    """A model that is there to be exported."""

    source: Source
    tokenizer: TokenizerSpec
    provenance: dict[str, str]


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what a source does not, or otherwise."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the configuration, in place of what the source says, as in context=8192; may be repeated",
    )
    parser.add_argument(
        "--tokenizer",
        type=path,
        help="tokenizer.json, or the folder that has it (default: the checkpoint's own)",
    )


def open_source(path: Path, args: argparse.Namespace) -> Opened:
    """The checkpoint at `path`, or what it names on the Hugging Face Hub, by the options of `add_source_options`.
    FileNotFoundError, UsageError, CheckpointError, and as `read_tokenizer`."""
    from .checkpoints import open_checkpoint
    from .checkpoints.checkpoint import checkpoint_source
    from .download import download, is_remote

    overrides, tokenizer = dict(map(setting, args.set)), named_tokenizer(args)
    local, origin = download(path) if is_remote(path) else (path, {})
    checkpoint = open_checkpoint(local, overrides)
    tokenizer = tokenizer or checkpoint.read_tokenizer()
    if tokenizer is None:
        raise FileNotFoundError(f"{path}: has no tokenizer.json; name the model's with --tokenizer")
    tokenizer = with_visible_marks(without_unknown_tokens(tokenizer, checkpoint.config.vocab_size))
    return Opened(checkpoint_source(checkpoint), tokenizer, {**checkpoint.provenance, **origin})


def named_tokenizer(args: argparse.Namespace) -> TokenizerSpec | None:
    """What `--tokenizer` names: a file, or the folder that has it. As `read_tokenizer`."""
    if args.tokenizer is None:
        return None
    return read_tokenizer(args.tokenizer / "tokenizer.json" if args.tokenizer.is_dir() else args.tokenizer)


@contextlib.contextmanager
def source_errors() -> Iterator[None]:
    """Makes UsageErrors of errors of the arguments, and RuntimeErrors of those of the files that they name."""
    try:
        yield
    except (FileNotFoundError, FileExistsError) as error:
        raise UsageError(error) from error
    except UsageError:
        raise
    except ValueError as error:
        raise RuntimeError(error) from error


@contextlib.contextmanager
def reported_warnings(program: str) -> Iterator[None]:
    """Shows a warning to the user as `program` shows an error."""
    with warnings.catch_warnings(action="always", category=UserWarning):
        warnings.showwarning = lambda message, *_: report(program, "warning", message)
        yield


def setting(text: str) -> tuple[str, Any]:
    """FIELD=VALUE: a setting and a JSON value."""
    from .architectures import SETTINGS

    name, equals, value = text.partition("=")
    if name not in SETTINGS or not equals:
        raise UsageError(
            f"argument --set: expected FIELD=VALUE with a FIELD out of {', '.join(SETTINGS)}; got {text!r}"
        )
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    parsed = frozen(parsed)
    try:
        check(SETTINGS, {name: parsed})
    except ConfigError as error:
        raise UsageError(f"argument --set: {error}") from error
    return name, parsed
