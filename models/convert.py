"""Exports a model to a package: folds the memory, quantises, and writes the graph, the ROM and the manifest.

The model is a checkpoint (a Hugging Face folder, a GGUF file, or Megatron-LM's), or random weights of a known size to
measure speed with.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meki.chat import parse_template
from meki.cli.arguments import Parser, path, text_file
from meki.cli.errors import report, run_command
from meki.cli.output import quality_text
from meki.evaluation.perplexity import read_text
from meki.package import bundled_models, store, stored_model
from meki.package.files import MANIFEST, check_target
from meki.package.store import name_of_source, plain_name

from .arguments import (
    Opened,
    UsageError,
    add_source_options,
    named_tokenizer,
    open_source,
    reported_warnings,
    setting,
    source_errors,
)
from .blocks import BLOCK_TYPES
from .config import ConfigError
from .progress import ProgressBars
from .quantize import ROW_TYPES, SOURCE, WEIGHT_TYPES
from .sizes import GEMMA_SIZES, SIZES
from .tokenizer import parse_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# PyTorch takes seconds to load: what needs it is imported where it is used.
PROGRAM = "meki-convert"


def open_random(args: argparse.Namespace) -> Opened:
    """Random weights of the size and with the settings that the command line names."""
    from .architectures import ARCHITECTURES
    from .source import random_source

    kind, sizes = ("llama", SIZES) if args.random in SIZES else ("gemma4", GEMMA_SIZES)
    try:
        config = ARCHITECTURES[kind].from_settings({**sizes[args.random], **dict(map(setting, args.set))})
    except ConfigError as error:
        raise UsageError(f"--set: {error}") from error
    tokenizer = named_tokenizer(args) or read_tokenizer(bundled_models()["meki-tiny"] / "tokenizer.json")
    return Opened(random_source(config), tokenizer, {"weights": "random", "configuration": args.random})


def read_template(file: Path) -> str:
    """The chat template that the user names. UsageError if it is none."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        parse_template(text)
    except ValueError as error:
        raise UsageError(f"{file}: not a chat template: {error}; give one that works") from error
    return text


def calibration(args: argparse.Namespace, opened: Opened, text: str) -> tuple[Tensor | None, dict[str, str]]:
    """What int4 weights are rounded with, and what the provenance says of it; None: nothing. text: of `--calibrate`."""
    from .calibration import TEXT, calibration_windows

    if args.weights != "int4" or args.random:  # of random weights no text is more likely than another
        return None, {}
    if opened.source.folded:
        message = "the memory is folded, so that layers cannot be seen at work: int4 weights are rounded without a text"
        if args.calibrate:
            raise UsageError(f"--calibrate: {message}; give the training form, or omit it")
        warnings.warn(f"{args.source}: {message}; the training form would lose less", stacklevel=2)
        return None, {}
    text, name = (text, args.calibrate.name) if args.calibrate else (TEXT.read_text(encoding="utf-8"), TEXT.name)
    windows = calibration_windows(text, parse_tokenizer(opened.tokenizer.json), opened.source.config.context, name)
    return windows, {"calibration": f"{name}, {windows.numel()} tokens"}


def stored_output(args: argparse.Namespace) -> Path:
    """Where the package goes without `-o`. UsageError without a plain name that is free."""
    name = args.name or (f"random-{args.random}" if args.random else name_of_source(str(args.source)))
    plain = plain_name(name)
    if name != plain or not name:
        such = f", such as {plain}" if plain else ""
        raise UsageError(
            f"the name in the store is {name!r}, expected small letters, digits, '.', '_' and '-'{such}: give one with "
            "--name, or a directory with -o"
        )
    if stored_model(name) is not None and not args.overwrite:
        raise UsageError(
            f"{name}: is in the store already ({store()}); choose another name (--name), or overwrite it (--overwrite)"
        )
    return store() / name


def convert(args: argparse.Namespace, text: str = "") -> tuple[Opened, dict[str, Any]]:
    """Exports as the command line says; returns the model and the package's manifest. text: of `--calibrate`."""
    from .package import export_package

    check_target(args.output, MANIFEST, args.overwrite)
    name = args.name or args.output.resolve().name
    if not name.isprintable():  # which names in other encodings than UTF-8 are not
        raise UsageError(f"the model's name is {name!r}; give one of printable characters with --name")
    if args.card and not args.card.is_file():
        raise FileNotFoundError(f"{args.card}: no such model card")
    template = None if args.chat_template is None else read_template(args.chat_template)
    opened = open_random(args) if args.random else open_source(args.source, args)
    source, tokenizer = opened.source, opened.tokenizer
    if template is not None:
        tokenizer = replace(tokenizer, chat_template=template)
    if args.rows and not source.config.memory:
        raise UsageError(f"--rows {args.rows}: the model has no memory and so no rows; omit it")
    windows, calibrated = calibration(args, opened, text)
    with contextlib.closing(ProgressBars(unit_scale=True)) as bars:
        manifest = export_package(
            source,
            tokenizer,
            args.output,
            name=name,
            weights=args.weights or (SOURCE if source.blocks else "int8"),
            rows=args.rows or (SOURCE if source.rows else "float16"),
            calibration=windows,
            provenance={**opened.provenance, **calibrated},
            card=args.card.read_text(encoding="utf-8") if args.card else None,
            overwrite=args.overwrite,
            progress=bars.update,
        )
    return opened, manifest


def check(args: argparse.Namespace, opened: Opened, text: str) -> dict[str, Any]:
    """Measures the package that was written over the text of `--check`; its manifest with what was found."""
    from .quality import add_quality

    try:
        with contextlib.closing(ProgressBars(unit_scale=True)) as bars:
            return add_quality(args.output, opened, args.check, text, bars.update)
    except BaseException:
        again = ["meki-check", args.output, "--against", args.source, "--text", args.check]
        again += [part for setting in args.set for part in ("--set", setting)]
        again += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        command = shlex.join(map(str, again))
        report(PROGRAM, "note", f"{args.output} is complete, its quality is not measured; to do it: {command}")
        raise


def summary(path: Path, manifest: dict[str, Any]) -> str:
    """The sizes and quantisation errors of a package, for people."""
    types, bits = manifest["weights"]["types"], {name: its.bits_per_weight for name, its in BLOCK_TYPES.items()}
    average = sum(bits.get(name, 32) * count for name, count in types.items()) / sum(types.values())
    lines = [f"{path}: {manifest['name']}, weights {manifest['weights']['type']}, {average:.2f} bits a weight"]
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
    if args.check and args.random:
        raise UsageError("--check: random weights have no quality; omit it with --random")
    if args.calibrate and (args.random or args.weights != "int4"):
        raise UsageError("--calibrate: only int4 weights of a checkpoint are rounded with a text; omit it")
    stored = args.output is None
    if stored:
        args.output = stored_output(args)
    calibrated, text = (read_text(file) if file else "" for file in (args.calibrate, args.check))
    with reported_warnings(PROGRAM), source_errors():
        try:
            opened, manifest = convert(args, calibrated)
        except KeyboardInterrupt:
            report(PROGRAM, "note", "interrupted, nothing written")
            raise
        print(summary(args.output, manifest), flush=True)
        if stored:
            how = "--chat" if manifest["tokenizer"]["chat_template"] else '"Once upon a time"'
            print(f"  to run it: meki-run --model {args.output.name} {how}", flush=True)
        if args.check:
            print(f"  quality: {quality_text(check(args, opened, text))}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = Parser(PROGRAM, description=__doc__, epilog="Reference: docs/cli.md")
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument(
        "source",
        type=path,
        nargs="?",
        help="Hugging Face folder, GGUF file or Megatron-LM checkpoint; hf:ORG/NAME or hf:ORG/NAME/FILE.gguf: from the "
        "Hugging Face Hub, hf:ORG/NAME@REVISION of a branch, tag or commit",
    )
    models.add_argument(
        "--random",
        choices=(*SIZES, *GEMMA_SIZES),
        help="random weights of this size instead of a checkpoint, to measure speed with",
    )
    parser.add_argument(
        "-o", "--output", type=path, help="package directory to write (default: one in the store of models, by name)"
    )
    add_source_options(parser)
    parser.add_argument("--name", help="the model's name (default: the directory's, in the store the source's)")
    parser.add_argument(
        "--weights",
        choices=WEIGHT_TYPES,
        help="dense weights; int4: those that are felt most in int8; source: as a quantised checkpoint has them "
        "(default: source if it is one, else int8)",
    )
    parser.add_argument(
        "--calibrate",
        type=path,
        metavar="FILE",
        help="a UTF-8 text, which may be .xz or .gz, of the kind that the model is for: int4 weights are rounded for "
        "it (default: a mixed one of ours)",
    )
    parser.add_argument(
        "--rows",
        choices=(*ROW_TYPES, SOURCE),
        help="memory rows; source: as a quantised checkpoint has them (default: source if it has any, else float16); "
        "not for a model without a memory",
    )
    parser.add_argument(
        "--chat-template", type=text_file, metavar="FILE", help="chat template (Jinja), in place of the model's own"
    )
    parser.add_argument("--card", type=path, help="model card, becomes the package's README.md")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing package")
    parser.add_argument(
        "--check",
        type=path,
        metavar="FILE",
        help="a UTF-8 text, which may be .xz or .gz: measure the package over it beside the source in float32, as "
        "meki-check does",
    )
    return run_command(PROGRAM, lambda: run(parser.parse_args(argv)), extras="[models]")
