"""Times of a compiled package's graphs on a real chip: profiles them on a device in Qualcomm's AI Hub.

    python -m benchmarks.aihub.profile PACKAGE --device "Snapdragon 8 Elite QRD" [--graphs decode,head] [--json FILE]
    python -m benchmarks.aihub.profile --list-devices

Needs `pip install 'meki[hub]'` and an API token. PACKAGE was compiled by meki-compile. Its binaries are profiled as
they are; with --compile (needs meki[models] too) AI Hub first compiles the graphs that they were made of, with its own
tools.

Every stage is profiled on its own, with random inputs: what comes out is time on the NPU, an estimate, not the engine's
tokens/s. What was uploaded and submitted is remembered in --ledger: run the same command again to collect what was
not finished.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.bench.output import check_writable, to_json
from meki.cli.errors import report, run_command
from meki.package import has_random_weights
from meki.package.files import write_file

from .client import (
    COMPILE_OPTIONS,
    PROFILE_OPTIONS,
    Hub,
    HubError,
    Jobs,
    Ledger,
    QuotaError,
    attributes,
    connect,
    find_device,
    list_devices,
)
from .package import GRAPHS, Stage, Target, check_files, read_target, written_stage

PROGRAM = "aihub"


def submit(
    hub: Hub, target: Target, stages: Sequence[Stage], compiling: bool
) -> tuple[dict[str, Jobs], dict[str, str]]:
    """The jobs of each stage, and of the others why there are none."""
    submitted: dict[str, Jobs] = {}
    failures: dict[str, str] = {}
    quota: QuotaError | None = None
    with tqdm(stages, desc="uploads", unit="stage", disable=None) as progress:
        for stage in progress:
            progress.set_postfix_str(stage.name)
            if quota is not None:
                failures[stage.name] = f"not submitted: {quota}"
                continue
            try:
                submitted[stage.name] = hub.submit(
                    f"{target.manifest['name']} {target.soc} {stage.name}",
                    f"graph of {stage.sha256}" if compiling else stage.sha256,
                    written_stage(target, stage.name) if compiling else nullcontext(stage.binary),
                    compiling,
                )
            except HubError as error:
                quota = error if isinstance(error, QuotaError) else None
                failures[stage.name] = str(error)
    return submitted, failures


def collect(hub: Hub, submitted: dict[str, Jobs]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Waits for all jobs. The figures of each stage, and why there are none for a stage."""
    figures: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    with tqdm(submitted.items(), desc="jobs", unit="stage", disable=None) as progress:
        for name, jobs in progress:
            progress.set_postfix_str(name)
            try:
                figures[name] = hub.profile(jobs)
            except HubError as error:
                failures[name] = str(error)
    return figures, failures


def make_report(
    target: Target,
    device: str,
    graphs: Sequence[str],
    compiling: bool,
    submitted: dict[str, Jobs],
    figures: dict[str, dict[str, Any]],
    failures: dict[str, str],
) -> dict[str, Any]:
    """The fields are described in docs/hub.md. Times are microseconds, memory is bytes."""
    manifest, entry = target.manifest, target.entry
    jobs = {name: [job for _, job in submitted[name]] for name in figures}
    stages = [
        {
            "stage": stage.name,
            "graph": stage.graph,
            "binary_bytes": stage.bytes,
            **figures[stage.name],
            "jobs": [{"type": job.job_type, "id": job.job_id, "url": job.url} for job in jobs[stage.name]],
        }
        for stage in target.stages(graphs)
        if stage.name in figures
    ]
    return {
        "results": [result(target, graph, figures) for graph in graphs if graph != "head"],
        "stages": stages,
        "failures": [{"stage": name, "message": message} for name, message in failures.items()],
        "environment": {
            "model": manifest["name"],
            "random_weights": has_random_weights(manifest),
            "soc": target.soc,
            **{name: entry[name] for name in ("chip", "precision", "context", "chunk")},
            "device": device,
            "device_os": sorted({its[-1].device.os for its in jobs.values()}),
            "tools": entry.get("tools"),
            "qai_hub": metadata.version("qai-hub"),
            "meki": metadata.version("meki"),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "collected": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "protocol": {
            "graphs": list(graphs),
            "compiled_by": "AI Hub" if compiling else "meki-compile",
            "compile_options": COMPILE_OPTIONS if compiling else None,
            "profile_options": PROFILE_OPTIONS,
            "inputs": "random, made by AI Hub",
        },
        "labels": labels(manifest, compiling, stages),
    }


def result(target: Target, graph: str, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The time of one step: the sum of its stages' medians, or null if one of them is missing."""
    dense, test = graph.startswith("dense_") or target.manifest["memory"] is None, graph.removeprefix("dense_")
    parts = [*target.graphs[graph], *(target.graphs["head"] if test == "decode" else [])]
    names = [stage.name for stage in parts]
    return {
        "test": test,
        "memory": "dense" if dense else target.manifest["memory"]["kind"],
        "depth": target.entry["context"],
        "tokens": 1 if test == "decode" else target.entry["chunk"],
        "stages": names,
        "npu_us": sum(figures[name]["median_us"] for name in names) if figures.keys() >= set(names) else None,
    }


def labels(manifest: dict[str, Any], compiling: bool, stages: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that belong to every figure."""
    texts = [
        "an estimate of the time on the NPU, not the engine's speed: every stage was profiled on its own, without "
        "embedding, sampling, reading memory rows, copying keys and values, and what passes between stages",
        "random inputs, made by AI Hub; the graphs are static: at any depth a step computes with the whole cache",
    ]
    if has_random_weights(manifest):
        texts.append("random weights: speed can be measured, the text means nothing")
    if compiling:
        texts.append("compiled by AI Hub, not by meki-compile")
    for stage in stages:
        elsewhere = {unit: count for unit, count in stage["layers"].items() if unit != "NPU"}
        if elsewhere:
            counts = ", ".join(f"{count} on {unit}" for unit, count in elsewhere.items())
            texts.append(
                f"{stage['stage']}: not all of {sum(stage['layers'].values())} layers ran on the NPU: {counts}"
            )
        elif not stage["layers"]:
            texts.append(f"{stage['stage']}: AI Hub does not say where its layers ran")
    return texts


def to_markdown(outcome: dict[str, Any]) -> str:
    it = outcome["environment"]
    lines = [
        f"## {it['model']} on {', '.join([it['device'], *it['device_os']])}",
        "",
        f"- {it['chip']}, {it['precision']}, {it['context']:,} tokens of context, prefill in chunks of {it['chunk']}",
        f"- compiled by {outcome['protocol']['compiled_by']}; qai-hub {it['qai_hub']}, {it['collected']}",
        *(f"- **{label}**" for label in outcome["labels"]),
        "",
        *head(["test", "memory", "NPU time, ms", "of"], "llrl"),
    ]
    for entry in outcome["results"]:
        npu_us = entry["npu_us"]
        time_ms = "a stage is missing" if npu_us is None else milliseconds(npu_us)
        lines.append(row([f"{entry['test']} {entry['tokens']}", entry["memory"], time_ms, " + ".join(entry["stages"])]))
    columns = ["median, ms", "p10", "p90", "runs", "peak memory, MB", "first load, ms", "layers"]
    lines += ["", *head(["stage", *columns], "l")]
    for stage in outcome["stages"]:
        times = [milliseconds(stage[key]) for key in ("median_us", "p10_us", "p90_us")]
        memory = stage["memory_peak_range_bytes"]
        shown = "-" if memory is None else " to ".join(f"{bound / 1e6:,.0f}" for bound in memory)
        layers = ", ".join(f"{unit} {count}" for unit, count in stage["layers"].items())
        load = milliseconds(stage["first_load_us"])
        lines.append(row([stage["stage"], *times, str(len(stage["samples_us"])), shown, load, layers or "-"]))
    return "\n".join(lines)


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:,.2f}"


def print_devices() -> None:
    print("\n".join(head(["device", "system", "chip", "Hexagon"], "llll")))
    for device in list_devices(connect()):
        chips, versions = (", ".join(attributes(device, kind)) for kind in ("chipset", "hexagon"))
        print(row([device.name, device.os, chips, versions]))


def run(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_writable(args.json)
    target = read_target(args.package, args.soc)
    graphs = args.graphs or list(target.graphs)
    stages = target.stages(graphs)
    client = connect()
    device = find_device(client, args.device, target.entry["htp_arch"])
    check_files(stages)
    hub = Hub(client, device, Ledger(args.ledger))
    submitted, not_submitted = submit(hub, target, stages, args.compile)
    figures, failed = collect(hub, submitted)
    failures = not_submitted | failed
    outcome = make_report(target, device.name, graphs, args.compile, submitted, figures, failures)
    if args.json is not None:
        write_file(args.json, to_json(outcome))
    print(to_markdown(outcome))
    for name, message in failures.items():
        report(PROGRAM, name, message)
    if failures:
        raise HubError(
            f"{len(failures)} of {len(stages)} stages have no figures; run the same command again for these: what was "
            "uploaded and submitted is not repeated"
        )


def graph_list(text: str) -> list[str]:
    graphs = text.split(",")
    if not set(graphs) <= set(GRAPHS) or len(set(graphs)) < len(graphs):
        raise argparse.ArgumentTypeError(f"expected different ones of {','.join(GRAPHS)}, got {text!r}")
    return graphs


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aihub.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("package", nargs="?", type=Path, metavar="PACKAGE", help="a directory that meki-compile was run on")
    add("--device", metavar="NAME", help="a device of AI Hub, by its exact name")
    add("--list-devices", action="store_true", help="print all devices instead")
    add("--soc", metavar="CHIP", help="which of the chips that PACKAGE is compiled for")
    graphs = f"of {','.join(GRAPHS)} (default: all that are compiled)"
    add("--graphs", type=graph_list, metavar="G,...", help=graphs)
    add("--compile", action="store_true", help="let AI Hub compile the graphs")
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    add(
        "--ledger",
        type=Path,
        metavar="FILE",
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meki-hub" / "ids.json",
        help="where ids of uploads and jobs are kept; delete it to measure anew (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if not args.list_devices and (args.package is None or args.device is None):
        parser.error("PACKAGE and --device are needed, or --list-devices")
    return run_command(PROGRAM, print_devices if args.list_devices else lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
