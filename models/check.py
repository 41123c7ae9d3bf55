"""Measures a package over a text, beside its source's own weights in float32: the perplexity of both and how far the
package's predictions are from theirs. What is found is written into the package's manifest, and meki-info shows it.
"""

from __future__ import annotations

import argparse
import contextlib

from meki.cli.arguments import Parser, path
from meki.cli.errors import report, run_command
from meki.cli.output import quality_text
from meki.evaluation.perplexity import read_text
from meki.package import find_model

from .arguments import add_source_options, open_source, reported_warnings, source_errors
from .progress import ProgressBars

# PyTorch takes seconds to load: what needs it is imported where it is used.
PROGRAM = "meki-check"


def run(args: argparse.Namespace) -> None:
    """Measures as the command line says and prints what was found."""
    package, text = find_model(args.package), read_text(args.text)
    try:
        with reported_warnings(PROGRAM), source_errors(), contextlib.closing(ProgressBars(unit_scale=True)) as bars:
            from .quality import add_quality

            manifest = add_quality(package, open_source(args.against, args), args.text, text, bars.update)
    except KeyboardInterrupt:
        report(PROGRAM, "note", "interrupted, the package is unchanged")
        raise
    print(f"{package}: {quality_text(manifest)}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = Parser(PROGRAM, description=__doc__, epilog="Reference: docs/cli.md")
    parser.add_argument("package", metavar="PACKAGE", help="name or directory of a package")
    parser.add_argument(
        "--against",
        type=path,
        required=True,
        metavar="SOURCE",
        help="what the package was made of: Hugging Face folder, GGUF file, Megatron-LM checkpoint or hf:ORG/NAME",
    )
    parser.add_argument(
        "--text", type=path, required=True, metavar="FILE", help="a UTF-8 text, which may be .xz or .gz"
    )
    add_source_options(parser)
    return run_command(PROGRAM, lambda: run(parser.parse_args(argv)), extras="[models]")
