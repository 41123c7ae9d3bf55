"""Decode of several packages, each in turns with the dense backbone of one: what the kinds of memory, and mixtures of
experts, cost.

    python -m benchmarks.side_by_side BASE PACKAGE... [--depths 0,10240] [--rom cold]

BASE runs with its memory off. A pair takes turns as `meki-bench --compare dense` has them, in one process; the ratio
is the median of the groups, with the interval of meki.bench.stats. Depths are synthetic (`Session.fill_synthetic`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from meki import _core
from meki.bench.beside import measure_beside
from meki.bench.contender import Package
from meki.bench.markdown import head, row
from meki.cli.arguments import integer, number, path, token_counts
from meki.cli.errors import run_command
from meki.package import reads_per_token

COLUMNS = (
    *("package", "memory", "depth", "tokens/s", "dense", "ratio (95% interval)", "wait p50, us", "p99"),
    *("reads a token", "their bytes", "hits", "MB of weights a token"),
)
BANDWIDTH_BYTES = 1 << 28
"""Read to measure the bandwidth, each time."""


def measure(base: Package, other: Package, arguments: argparse.Namespace, progress: tqdm) -> Iterator[list[str]]:
    """A line of the table for each depth, and the bandwidth of the run."""
    plan = _core.Plan(
        depths=arguments.depths,
        prefill=0,
        tokens=arguments.tokens,
        repetitions=arguments.repetitions,
        synthetic_depth=True,
        compare=True,
        cold=arguments.rom == "cold",
    )

    def advance(text: str) -> None:
        progress.set_description_str(f"{other.path.name}: {text}")
        progress.update()

    report = measure_beside(base, other, plan, advance, BANDWIDTH_BYTES, rom=arguments.rom)
    ours, dense = report["results"][::2], report["results"][1::2]
    for its, theirs, compared in zip(ours, dense, report["compare"], strict=True):
        interval, stall = compared["ci95"], its["stall_us"]
        yield [
            other.manifest["name"],
            its["memory"],
            f"{its['depth']:,}",
            f"{its['median']:.1f}",
            f"{theirs['median']:.1f}",
            f"{compared['ratio']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""),
            *((f"{stall['p50']:.0f}", f"{stall['p99']:.0f}") if stall else ("-", "-")),
            str(reads_per_token(other.manifest)),
            f"{its['row_bytes']:,}",
            "-" if its["row_hit_rate"] is None else f"{its['row_hit_rate']:.0%}",
            f"{its['weight_bytes'] / 1e6:.1f}",
        ]
    (bandwidth,) = report["read_bandwidth"]
    for label in [f"read bandwidth {bandwidth['gb_s']:.1f} GB/s", *report["labels"]]:
        progress.write(f"{other.path.name}: {label}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> None:
    options = {
        "threads": arguments.threads,
        "rom_access": arguments.rom_access,
        "rom_delay_ms": arguments.rom_delay_ms,
        "row_cache": arguments.row_cache,
    }
    base, *others = [Package.open(package, options) for package in (arguments.base, *arguments.packages)]
    print("\n".join(head(COLUMNS, "ll")), flush=True)
    with tqdm(unit="run", leave=False, disable=None) as progress:
        for other in others:
            for line in measure(base, other, arguments, progress):
                print(row(line), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="side_by_side", description="Decode of packages beside a dense backbone.")
    add = parser.add_argument
    add("base", type=path, metavar="BASE", help="the package whose dense backbone the others are measured beside")
    add("packages", type=path, nargs="+", metavar="PACKAGE", help="with its memory, or experts")
    add("--depths", type=token_counts, default=(0, 10_240), metavar="N,...", help="tokens in the KV cache")
    add("--tokens", type=integer(1), default=32, metavar="N", help="decode steps of each in a round (default: 32)")
    add("--repetitions", type=integer(1), default=5, metavar="N", help="rounds (default: 5)")
    add("--rom", choices=("warm", "cold"), default="warm", help="cold: dropped from the page cache before every step")
    add("--rom-access", choices=("pread", "mmap", "direct"), default="pread", help="how memory rows are read")
    add("--rom-delay-ms", type=number("ms", 10_000), default=0.0, metavar="MS", help="added to every read of the ROM")
    add("--row-cache", type=integer(0), default=16, metavar="MIB", help="memory for rows that were read (default: 16)")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: one per available core)")
    return run_command(parser.prog, lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
