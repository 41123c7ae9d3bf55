"""A report as markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .markdown import head, row
from .parts import PARTS
from .report import Report

_ABSENT = "-"
_RESULT_FIELDS = (
    *("test", "depth", "tokens", "memory", "threads", "synthetic_depth", "median", "p10", "p90"),
    *("bytes_per_token", "kv_bytes", "weight_bytes", "row_bytes", "bandwidth_fraction", "row_hit_rate"),
    "storage_bytes_per_token",
)
_PROTOCOL_FIELDS = ("repetitions", "rom", "rom_delay_ms", "row_cache_mib")
_ENVIRONMENT_FIELDS = (
    *("model", "random_weights", "weights", "rows", "kv_type"),
    *("cpu", "simd", "onnxruntime", "meki", "started"),
)


def check_writable(path: Path) -> None:
    """ValueError if no new file can be put at `path`, or in place of the one there."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file")
    check_directory(path.parent)


def check_directory(path: Path) -> None:
    """ValueError if no file can be put into the directory `path`."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"{path} is not a directory that can be written to; give another, or create it first")


def to_json(report: Report) -> bytes:
    return (json.dumps(report, indent=2) + "\n").encode()


def to_csv(report: Report) -> bytes:
    """A header and one line a result. An empty field: there was nothing to measure."""
    text = io.StringIO()
    common = {field: report["environment"][field] for field in _ENVIRONMENT_FIELDS}
    common |= {field: report["protocol"][field] for field in _PROTOCOL_FIELDS}
    bandwidths = {entry["threads"]: entry["gb_s"] for entry in report["read_bandwidth"]}
    rows = [
        {field: result[field] for field in _RESULT_FIELDS}
        | {f"stall_us_{rank}": (result["stall_us"] or {}).get(rank) for rank in ("p50", "p99")}
        | common
        | {"read_bandwidth_gb_s": bandwidths[result["threads"]]}
        for result in report["results"]
    ]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_markdown(report: Report) -> str:
    sections = [_environment(report), _results(report)]
    if report["compare"]:
        sections.append(_comparison(report))
    if report["parts"]:
        sections.append(_parts(report))
    return "\n\n".join("\n".join(section) for section in sections)


def _environment(report: Report) -> Iterator[str]:
    it, protocol = report["environment"], report["protocol"]
    rows = f", {it['rows']} rows ({it['rom_access']}, {protocol['rom']})" if it["rows"] else ""
    yield f"## {it['model']}"
    yield ""
    yield f"- {it['weights']} weights{rows}, {it['kv_type']} KV cache"
    cores = f"{it['cores']} cores" + (
        f" ({it['available_cores']} available)" if it["available_cores"] != it["cores"] else ""
    )
    yield f"- {it['cpu']}, {cores}, {threads_of(report)}, {it['simd']} kernels"
    software = f"meki {it['meki']}, onnxruntime {it['onnxruntime']}, Python {it['python']}"
    yield f"- {software}, {it['system']}, {it['started']}"
    rounds = protocol["repetitions"]
    yield (
        f"- medians of {rounds} interleaved round{'s' if rounds > 1 else ''}; read bandwidth in the same run "
        + ", ".join(
            f"{entry['gb_s']:.1f} GB/s" + f" ({threads_text(entry['threads'])})" * (len(report["read_bandwidth"]) > 1)
            for entry in report["read_bandwidth"]
        )
    )
    if (memory := report["memory"]) is not None:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {memory[name] / 1e6:,.0f} MB" for name in memory if name != "resident"
        )
        several = " of both models" if report["compare"] else " for every number of threads"
        caches = "all caches" + several * (bool(report["compare"]) or len(report["read_bandwidth"]) > 1)
        yield f"- resident memory of the process with {caches}: {memory['resident'] / 1e6:,.0f} MB ({parts})"
    yield from (f"- **{label}**" for label in report["labels"])


def _results(report: Report) -> Iterator[str]:
    cold, cached = report["protocol"]["rom"] == "cold", report["protocol"]["row_cache_mib"] > 0
    header = [
        "test",
        "depth",
        "memory",
        "threads",
        "tokens/s",
        "p10",
        "p90",
        "wait p50, us",
        "wait p99, us",
        "MB a token",
    ]
    header += ["of bandwidth", *(["rows from the cache"] if cached else [])]
    yield from head([*header, *(["from storage, bytes a token"] if cold else [])], "lll")
    for result in report["results"]:
        stall = result["stall_us"] or {}
        yield row(
            [
                f"{result['test']} {result['tokens']}",
                f"{result['depth']:,}" + (" (synthetic)" if result["synthetic_depth"] else ""),
                result["memory"],
                str(result["threads"]),
                *(_number(result[key], ",.1f") for key in ("median", "p10", "p90")),
                *(_number(stall.get(rank), ",.2f") for rank in ("p50", "p99")),
                _number(result["bytes_per_token"], ",.1f", 1e-6),
                _number(result["bandwidth_fraction"], ".0%"),
                *([_number(result["row_hit_rate"], ".0%")] if cached else []),
                *([_number(result["storage_bytes_per_token"], ",.0f")] if cold else []),
            ]
        )


def _comparison(report: Report) -> Iterator[str]:
    if report["protocol"]["compare"] == "ram":
        yield "Speed with rows from storage, relative to the same model with all of them in RAM:"
        ratio = "from storage / in RAM"
    else:
        yield "Speed with the memory, relative to the same package with its memory switched off:"
        ratio = "with memory / dense"
    yield ""
    yield from head(["depth", ratio, "95% confidence interval", "groups"], "l")
    for entry in report["compare"]:
        interval = entry["ci95"]
        shown = "needs 6 groups" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        yield row([f"{entry['depth']:,}", f"{entry['ratio']:.4f}", shown, str(len(entry["samples"]))])


def _parts(report: Report) -> Iterator[str]:
    yield (
        "Time of a decode step by part, in microseconds. From a run of its own under ONNX Runtime's profiler, which "
        "slows it, from a cache that was filled, not computed:"
    )
    yield ""
    entries = report["parts"]
    yield from head(["part", *(part_title(report, entry) for entry in entries)], "l")
    totals = [sum(entry["us_per_token"].values()) for entry in entries]
    for part in PARTS:
        times = [entry["us_per_token"][part] for entry in entries]
        yield row([part, *(f"{time:,.1f} ({time / total:.0%})" for time, total in zip(times, totals, strict=True))])
    yield row(["sum", *(f"{total:,.1f}" for total in totals)])


def threads_of(report: Report) -> str:
    """The numbers of threads that it has figures of, such as "1 and 2 threads"."""
    counts = [entry["threads"] for entry in report["read_bandwidth"]]
    return " and ".join([*map(str, counts[:-1]), threads_text(counts[-1])])


def part_title(report: Report, entry: dict[str, Any]) -> str:
    """What one of its "parts" is of."""
    several = len(report["read_bandwidth"]) > 1
    return f"{entry['memory']} at {entry['depth']:,}" + f", {threads_text(entry['threads'])}" * several


def threads_text(count: int) -> str:
    """Such as "2 threads"."""
    return f"{count} thread{'s' * (count > 1)}"


def _number(value: Any, form: str, unit: float = 1.0) -> str:
    return _ABSENT if value is None else format(value * unit, form)
