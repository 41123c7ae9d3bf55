"""Decode and prefill on an Android phone: dense against MeKi, warm and cold ROM, at 10,240 tokens in the cache.

    python -m benchmarks.android.measure PACKAGE --bench PATH/meki_bench --onnxruntime LIBONNXRUNTIME.so --qnn DIR

docs/android.md tells how to get there. Needs adb and a phone with USB debugging. Pushes what a run needs to
/data/local/tmp/meki, where it stays for the next time (`adb shell rm -r /data/local/tmp/meki` removes it): a file that
is there with the same SHA-256 is not sent again, and one that was interrupted goes on where it was.

Each round runs every variant twice, in the order A B C C B A, a process each; every other round the other way round.
Before a round the phone may cool down. While meki_bench runs, a loop on the phone samples the battery once a second.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tqdm import tqdm

from meki.bench.output import check_writable, to_json
from meki.cli.arguments import integer, number
from meki.package import check_sha256, read_manifest
from meki.package.files import write_file

from .bench import REPETITIONS, Bench, Run, Variant, order
from .device import AndroidError, Device, Phone, find_device
from .files import (
    BIN,
    ONNXRUNTIME,
    PROGRAM,
    REMOTE,
    Item,
    Target,
    check_elf,
    find_target,
    local_item,
    package_items,
    progress,
    push_items,
    qnn_libraries,
)
from .report import make_report, to_markdown

POLL_SECONDS = 10.0
FAILURE, USAGE, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Job:
    """What is to be measured, and where."""

    phone: Phone
    target: Target | None
    """None: the CPU provider."""
    items: list[Item]
    bench: Bench
    variants: list[Variant]


def find_variants(manifest: dict[str, Any], target: Target | None) -> list[Variant]:
    dense, memory = Variant("dense", None), manifest["memory"]
    if memory is None:
        return [dense]
    variants = [Variant(memory["kind"], "warm"), Variant(memory["kind"], "cold")]
    return variants if target and target.members["dense_decode"] is None else [dense, *variants]


def check_lengths(args: argparse.Namespace, context: int) -> None:
    """ValueError if what is asked for does not fit the package's context."""
    longest = 1 + max(args.prefill or 0, (args.depth or 0) + args.tokens)  # one token is pending
    if longest > context:
        raise ValueError(
            f"{longest:,} tokens, but {args.package} has a context of {context:,}: lower --depth, --tokens or --prefill"
        )


def check_paths(args: argparse.Namespace) -> None:
    """ValueError for an option whose file or directory is not there."""
    named = [("--bench", args.bench, "1, builds it"), ("--onnxruntime", args.onnxruntime, "2, says where to get it")]
    for option, path, step in named:
        if not path.is_file():
            raise ValueError(f"{option} {path}: no such file; docs/android.md, step {step}")
    if args.qnn and not args.qnn.is_dir():
        raise ValueError(f"--qnn {args.qnn}: no such directory; docs/android.md, step 2, fills one")


def prepare(args: argparse.Namespace) -> Job:
    """Checks the phone, the package and all files, before anything is pushed."""
    check_paths(args)
    manifest = read_manifest(args.package)
    check_elf(args.bench)
    check_elf(args.onnxruntime)
    device = find_device(args.adb, args.serial)
    phone = device.phone()
    qnn = args.provider == "qnn"
    target = find_target(manifest, args.package, phone, args.soc) if qnn else None
    check_lengths(args, (target.members if target else manifest["architecture"])["context"])

    directory = f"{REMOTE}/packages/{args.package.resolve().name}"
    items = package_items(args.package, manifest, target, directory)
    with progress("checking", items) as bar:
        for item in items:
            check_sha256(item.local, item.sha256, bar.update)
    libraries = {PROGRAM: args.bench, ONNXRUNTIME: args.onnxruntime}
    if target:
        libraries |= {path.name: path for path in qnn_libraries(args.qnn, target.members["htp_arch"])}
    items = [*(local_item(path, f"{BIN}/{name}") for name, path in libraries.items()), *items]
    soc = target.soc if target else None
    bench = Bench(device, directory, args.provider, soc, args.depth, args.tokens, args.prefill)
    return Job(phone, target, items, bench, find_variants(manifest, target))


def cool_down(device: Device, minutes: float) -> None:
    """Waits while the phone is hot, `minutes` at most."""
    end = monotonic() + 60 * minutes
    while (state := device.state()).hot:
        left = end - monotonic()
        if left <= 0:
            tqdm.write(f"still hot ({state}): going on, the figures will say so", file=sys.stderr)
            return
        tqdm.write(f"hot ({state}): waiting, {left:.0f} s at most", file=sys.stderr)
        sleep(min(POLL_SECONDS, left))


def measure(args: argparse.Namespace, job: Job) -> tuple[list[Run], str | None, int]:
    """All runs that were made, why there are not more, and the exit code."""
    runs: list[Run] = []
    failure, code = None, 0
    with tqdm(desc="runs", total=2 * len(job.variants) * args.rounds, disable=None) as bar:
        try:
            job.bench.clean()  # what an unplugged phone may still be running
            for number in range(1, args.rounds + 1):
                cool_down(job.bench.device, args.cool_down)
                for variant in order(job.variants, number):
                    run = job.bench.run(variant, number)
                    if runs and run.report["depth"] != runs[0].report["depth"]:
                        depths = f"{runs[0].report['depth']} and {run.report['depth']}"
                        raise AndroidError(
                            f"{PROGRAM}: runs at depths {depths} cannot be compared: choose one with --depth"
                        )
                    runs.append(run)
                    bar.set_postfix_str(str(variant))
                    bar.update()
        except KeyboardInterrupt:
            failure, code = "interrupted", INTERRUPTED
        except AndroidError as error:
            failure, code = str(error), FAILURE
        with contextlib.suppress(AndroidError):  # a lost phone has been reported
            job.bench.clean()
    return runs, failure, code


def notes(job: Job) -> list[str]:
    labels = []
    if job.target and job.target.soc != job.phone.chip.lower():
        labels.append(f"compiled for {job.target.soc}, run on {job.phone.chip or 'an unnamed chip'}")
    if Variant("dense", None) not in job.variants and job.target:
        labels.append(
            f"MeKi alone: the package has no dense graphs for {job.target.soc} (meki-compile --dense makes them)"
        )
    return labels


def run(args: argparse.Namespace) -> int:
    if args.json:
        check_writable(args.json)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    job = prepare(args)
    push_items(job.bench.device, job.items)
    runs, failure, code = measure(args, job)
    if runs:  # nothing does not replace the figures of an earlier call
        report = make_report(
            runs,
            job.variants,
            phone=job.phone,
            environment={"started": started, "context": job.target.members["context"] if job.target else None},
            protocol={
                "rounds": args.rounds,
                "repetitions": REPETITIONS,
                "tokens": args.tokens,
                "prefill": args.prefill,
                "depth": args.depth,
                "cool_down_minutes": args.cool_down,
            },
            notes=notes(job),
            failure=failure,
        )
        if args.json:
            write_file(args.json, to_json(report))
        print(to_markdown(report))
    if failure:
        print(f"android: error: {failure}", file=sys.stderr)
        if runs and args.json:
            print(f"android: {len(runs)} runs before that are in {args.json}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.android.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("package", type=Path, help="a directory made by meki-convert; for the NPU compiled by meki-compile")
    add("--bench", type=Path, required=True, metavar="FILE", help="meki_bench, built for Android")
    add("--onnxruntime", type=Path, required=True, metavar="FILE", help="libonnxruntime.so for arm64-v8a")
    add("--qnn", type=Path, metavar="DIR", help="where the QNN libraries for Android are; --provider qnn")
    add("--provider", choices=["qnn", "cpu"], default="qnn", help="what computes: NPU or CPU cores")
    add("--serial", help="the phone, as `adb devices` names it (default: ANDROID_SERIAL, or the only one)")
    add("--soc", metavar="NAME", help="compiled target (default: the phone's chip, such as sm8750)")
    add("--depth", type=integer(0), help="tokens in the cache (default: 10,240, or what fits)")
    add("--tokens", type=integer(1), default=32, help="decode steps of a repetition (default: %(default)s)")
    add("--prefill", type=integer(0), help="tokens to prefill; 0: none (default: 512, or what fits)")
    add("--rounds", type=integer(1), default=6, help="below 6 there is no interval (default: %(default)s)")
    add(
        "--cool-down",
        type=number("minutes", 24 * 60),
        default=5.0,
        metavar="MINUTES",
        help="before each round, wait so long at most while the phone is hot (default: %(default)g)",
    )
    add("--adb", default="adb", help="the adb client (default: the one on PATH)")
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    args = parser.parse_args(argv)
    if args.provider == "qnn" and args.qnn is None:
        parser.error("--provider qnn needs --qnn DIR (or take --provider cpu)")
    if args.provider == "cpu" and (args.qnn or args.soc):
        parser.error("--qnn and --soc belong to --provider qnn")
    try:
        return run(args)
    except KeyboardInterrupt:
        print("android: interrupted; what has arrived on the phone is not sent again", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"android: error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ValueError) else FAILURE


if __name__ == "__main__":
    sys.exit(main())
