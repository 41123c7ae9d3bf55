"""Compiles a package for the NPU of a Snapdragon, ahead of time; PACKAGE/qnn/CHIP/ is what `--provider qnn` runs."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meki.cli.arguments import Parser
from meki.cli.errors import report, run_command
from meki.package import find_model, read_manifest, target_directory

from ..progress import ProgressBars
from ..quantize import PRECISIONS
from .check import Difference, compare
from .chips import CHIPS
from .compiler import Compiled

if TYPE_CHECKING:
    from ..architectures.base import Architecture
    from .stages import Options
    from .weights import PackageWeights

# PyTorch takes seconds to load: what needs it is imported where it is used.
PROGRAM = "meki-compile"
DEFAULT_CONTEXT, DEFAULT_CHUNK, DEFAULT_CHECK = 10_240, 128, 16
SMALL_MODEL = 50_000_000
"""Parameters up to which the result is checked by default: the simulator takes seconds a token for a larger one."""


def read_options(args: argparse.Namespace, weights: PackageWeights) -> tuple[Options, int]:
    """What to compile, and how many tokens to check it with."""
    from .stages import Options, precisions

    context = min(DEFAULT_CONTEXT, weights.config.context) if args.context is None else args.context
    options = Options(
        context=context,
        chunk=min(DEFAULT_CHUNK, context) if args.chunk is None else args.chunk,
        precision=args.precision or precisions(weights)[0],
        dense=args.dense,
    )
    options.check(weights)
    check = args.check
    if check is None:
        check = min(DEFAULT_CHECK, context) if weights.parameters <= SMALL_MODEL else 0
    if not 0 <= check <= context:
        raise ValueError(f"--check is {check}, expected 0 to the context of {context} tokens")
    return options, check


def summary(entry: dict[str, Any], compiled: dict[str, Compiled], config: Architecture, directory: Path) -> str:
    """What was compiled, for people."""
    lines = [
        f"{directory}: {entry['chip']}, {entry['precision']} weights, context {entry['context']:,}, prefill in chunks "
        f"of {entry['chunk']}; all {entry['nodes']:,} nodes on the NPU"
    ]
    for name, stage in compiled.items():
        lines.append(
            f"  {name:<16} {stage.nodes:6,} nodes {stage.binary_bytes / 1e6:10,.1f} MB"
            f" {stage.seconds:8,.1f} s {stage.peak_bytes / 1e9:6.2f} GB of memory"
        )
    size = sum(file["bytes"] for file in entry["files"].values())
    lines.append(f"  {'in all':<16} {size / 1e6:23,.1f} MB {sum(c.seconds for c in compiled.values()):8,.1f} s")
    loaded = sum(stage.binary_bytes for name, stage in compiled.items() if not name.startswith("dense_"))
    lines.append(
        f"  loaded together: {loaded / 1e6:,.1f} MB, decode and prefill having the weights each; the KV cache takes "
        f"{cache_line(config, entry['context'])}"
    )
    return "\n".join(lines)


def cache_line(config: Architecture, context: int) -> str:
    """What the KV cache takes, by what its layers see."""
    alike = {"kv_heads": config.kv_heads, "head_dim": config.head_dim, "window": 0}
    kinds = dict[int, list[int]]()
    for cache in config.kv_caches() or [alike] * config.layers:
        if "shared" not in cache:  # keys and values, float16
            kinds.setdefault(cache["window"], []).append(2 * 2 * cache["kv_heads"] * cache["head_dim"] * context)
    line = f"{sum(map(sum, kinds.values())) / 1e6:,.1f} MB more"
    if not any(kinds):
        return line
    parts = [
        f"layers that see {f'the last {window:,} tokens' if window else 'all'}: {len(its)}, {sum(its) / 1e6:,.1f} MB"
        for window, its in sorted(kinds.items())
    ]
    return f"{line} ({'; '.join(parts)})"


def difference_line(name: str, difference: Difference) -> str:
    return (
        f"  {name}, HTP simulator against the CPU over {difference.tokens} tokens: logits differ by "
        f"{difference.rms:.4f} (RMS; the logits themselves {difference.rms_logits:.2f}), at most "
        f"{difference.largest:.3f}; the most probable token is the same {difference.same_choice} times"
    )


def run(args: argparse.Namespace) -> None:
    """Compiles as the command line says, compares, and prints both."""
    import onnxruntime_qnn  # noqa: F401 (which the compiler's process imports later)

    from .package import compile_package
    from .weights import PackageWeights

    package = find_model(args.package)
    weights = PackageWeights(package, read_manifest(package))
    options, check = read_options(args, weights)
    try:
        with contextlib.closing(ProgressBars(unit="stage")) as bars:
            entry, compiled = compile_package(package, args.soc, options, overwrite=args.overwrite, report=bars.update)
    except KeyboardInterrupt:
        report(PROGRAM, "note", "interrupted, the package is unchanged")
        raise
    except FileExistsError as error:
        raise ValueError(error) from error
    print(summary(entry, compiled, weights.config, target_directory(package, args.soc)), flush=True)
    if not check:
        print("  logits not compared with the CPU's: --check N does it, in the HTP simulator")
        return
    print(difference_line(package.name, compare(package, args.soc, check)), flush=True)
    if options.dense:
        print(difference_line("without its memory", compare(package, args.soc, check, memory=False)), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    chips = ", ".join(f"{soc} ({chip.name})" for soc, chip in CHIPS.items())
    parser = Parser(PROGRAM, description=__doc__, epilog="Reference: docs/qnn.md")
    parser.add_argument("package", metavar="PACKAGE", help="name or directory of a package")
    parser.add_argument("--soc", choices=CHIPS, required=True, metavar="CHIP", help=chips)
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"capacity of the KV cache in tokens (default: {DEFAULT_CONTEXT:,}, or the model's if that is less)",
    )
    parser.add_argument("--chunk", type=int, metavar="N", help=f"tokens of a prefill step (default: {DEFAULT_CHUNK})")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the weights: float16, or the package's own int8 or int4 (default: its own; float32 becomes float16)",
    )
    parser.add_argument("--dense", action="store_true", help="the backbone without its memory too, to compare with")
    parser.add_argument(
        "--check",
        type=int,
        metavar="N",
        help=f"tokens to compare logits with the CPU's over (default: {DEFAULT_CHECK} for models of up to "
        f"{SMALL_MODEL // 10**6} million parameters, else 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is compiled for this chip")
    return run_command(PROGRAM, lambda: run(parser.parse_args(argv)), extras="[models,qnn]")
