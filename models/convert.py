"""Exports a model to a package: folds the memory, quantises, and writes the graph, the ROM and the manifest.

The model is a checkpoint (a Hugging Face folder, a GGUF file, or Megatron-LM's), or random weights of a known size to
measure speed with.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meki.chat import parse_template
from meki.cli.arguments import Parser, path, text_file
from meki.cli.errors import report, run_command
from meki.package import bundled_models
from meki.package.files import MANIFEST, check_target

from .arguments import UsageError, reported_warnings, setting
from .config import ConfigError
from .progress import ProgressBars
from .quantize import ROW_TYPES, SOURCE, WEIGHT_TYPES
from .sizes import SIZES
from .tokenizer import TokenizerSpec, read_tokenizer, without_unknown_ends

if TYPE_CHECKING:
    from .source import Source

# PyTorch takes seconds to load: what needs it is imported where it is used.
PROGRAM = "meki-convert"


def open_source(args: argparse.Namespace) -> tuple[Source, TokenizerSpec, dict[str, str]]:
    """The model that the command line names, its tokenizer and its provenance."""
    from .architectures.llama import LlamaConfig
    from .checkpoints import open_checkpoint
    from .checkpoints.checkpoint import checkpoint_source
    from .source import random_source

    overrides = dict(map(setting, args.set))
    tokenizer = None
    if args.tokenizer:  # or the folder that has it
        tokenizer = read_tokenizer(args.tokenizer / "tokenizer.json" if args.tokenizer.is_dir() else args.tokenizer)
    if args.random:
        try:
            config = LlamaConfig.from_settings({**SIZES[args.random], **overrides})
        except ConfigError as error:
            raise UsageError(f"--set: {error}") from error
        provenance = {"weights": "random", "configuration": args.random}
        tokenizer = tokenizer or read_tokenizer(bundled_models()["meki-tiny"] / "tokenizer.json")
        return random_source(config), tokenizer, provenance
    checkpoint = open_checkpoint(args.source, overrides)
    tokenizer = tokenizer or checkpoint.read_tokenizer()
    if tokenizer is None:
        raise FileNotFoundError(f"{args.source}: has no tokenizer.json; name the model's with --tokenizer")
    ends = without_unknown_ends(tokenizer, checkpoint.config.vocab_size)
    return checkpoint_source(checkpoint), ends, checkpoint.provenance


def read_template(file: Path) -> str:
    """The chat template that the user names. UsageError if it is none."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        parse_template(text)
    except ValueError as error:
        raise UsageError(f"{file}: not a chat template: {error}; give one that works") from error
    return text


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Exports as the command line says and returns the manifest."""
    from .package import export_package

    check_target(args.output, MANIFEST, args.overwrite)
    name = args.name or args.output.resolve().name
    if not name.isprintable():  # which names in other encodings than UTF-8 are not
        raise UsageError(f"the model's name is {name!r}; give one of printable characters with --name")
    if args.card and not args.card.is_file():
        raise FileNotFoundError(f"{args.card}: no such model card")
    template = None if args.chat_template is None else read_template(args.chat_template)
    source, tokenizer, provenance = open_source(args)
    if template is not None:
        tokenizer = replace(tokenizer, chat_template=template)
    if args.rows and not source.config.memory:
        raise UsageError(f"--rows {args.rows}: the model has no memory and so no rows; omit it")
    with contextlib.closing(ProgressBars(unit_scale=True)) as bars:
        return export_package(
            source,
            tokenizer,
            args.output,
            name=name,
            weights=args.weights or (SOURCE if source.blocks else "int8"),
            rows=args.rows or "float16",
            provenance=provenance,
            card=args.card.read_text(encoding="utf-8") if args.card else None,
            overwrite=args.overwrite,
            progress=bars.update,
        )


def summary(path: Path, manifest: dict[str, Any]) -> str:
    """The sizes and quantisation errors of a package, for people."""
    lines = [f"{path}: {manifest['name']}, weights {manifest['weights']['type']}"]
    lines += [f"  {name:<16} {entry['bytes'] / 1e6:12,.3f} MB" for name, entry in manifest["files"].items()]
    errors = manifest["quantization_error"]
    if manifest["weights"]["block"]:
        weights = errors["weights"]
        worst = f"worst {weights['worst']:.5f} in {weights['worst_tensor']}"
        lines.append(f"  relative error of the weights: {weights['overall']:.5f} overall, {worst}")
    if manifest["memory"]:
        lines.append(f"  relative error of the {manifest['memory']['row_type']} memory rows: {errors['rows']:.6f}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Exports as the command line says and prints the summary."""
    try:
        with reported_warnings(PROGRAM):
            manifest = convert(args)
    except KeyboardInterrupt:
        report(PROGRAM, "note", "interrupted, nothing written")
        raise
    except (FileNotFoundError, FileExistsError) as error:  # of the arguments
        raise UsageError(error) from error
    except UsageError:
        raise
    except ValueError as error:  # of the files that the arguments name
        raise RuntimeError(error) from error
    print(summary(args.output, manifest))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = Parser(PROGRAM, description=__doc__, epilog="Reference: docs/cli.md")
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("source", type=path, nargs="?", help="Hugging Face folder, GGUF file or Megatron-LM checkpoint")
    models.add_argument(
        "--random", choices=SIZES, help="random weights of this size instead of a checkpoint, to measure speed with"
    )
    parser.add_argument("-o", "--output", type=path, required=True, help="package directory to write")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the configuration, in place of what the source says, as in context=8192; may be repeated",
    )
    parser.add_argument("--name", help="the model's name (default: the name of the directory)")
    parser.add_argument(
        "--weights",
        choices=WEIGHT_TYPES,
        help="dense weights; source: as a quantised checkpoint has them (default: source if it is one, else int8)",
    )
    parser.add_argument(
        "--rows", choices=tuple(ROW_TYPES), help="memory rows (default: float16); not for a model without a memory"
    )
    parser.add_argument(
        "--tokenizer",
        type=path,
        help="tokenizer.json, or the folder that has it (default: the checkpoint's own; with --random, meki-tiny's)",
    )
    parser.add_argument(
        "--chat-template", type=text_file, metavar="FILE", help="chat template (Jinja), in place of the model's own"
    )
    parser.add_argument("--card", type=path, help="model card, becomes the package's README.md")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing package")
    return run_command(PROGRAM, lambda: run(parser.parse_args(argv)), extras="[models]")
