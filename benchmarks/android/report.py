"""From runs on a phone to a report in the shape of docs/benchmark.md, and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from meki.bench.markdown import head, row
from meki.bench.report import Report
from meki.bench.stats import median_interval, percentiles
from meki.cli.output import SIMULATED

from .bench import Run, Variant
from .device import HOT_CELSIUS, Phone

LOW_BATTERY = 20
_MEMORY = "resident_bytes", "peak_resident_bytes"  # of meki_bench's process; the greatest of its runs
_SPEEDS = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}


def make_report(
    runs: Sequence[Run],
    variants: Sequence[Variant],
    *,
    phone: Phone,
    environment: dict[str, Any],
    protocol: dict[str, Any],
    notes: Sequence[str],
    failure: str | None,
) -> Report:
    """notes: labels that the runs do not tell. failure: why there are not more runs."""
    by_variant = {variant: its for variant in variants if (its := [run for run in runs if run.variant == variant])}
    tests = [test for test, speeds in _SPEEDS.items() if any(run.report[speeds] for run in runs)]
    results = [_result(test, variant, its) for test in tests for variant, its in by_variant.items()]
    dense = Variant("dense", None)
    compare = [
        _comparison(test, variant, its, by_variant[dense])
        for test in tests
        for variant, its in by_variant.items()
        if variant != dense and dense in by_variant
    ]
    return {
        "results": results,
        "compare": [entry for entry in compare if entry["samples"]],
        "environment": _environment(runs, phone) | environment,
        "memory": {
            str(variant): {name: max(_known(its, name), default=None) for name in _MEMORY}
            for variant, its in by_variant.items()
        },
        "protocol": protocol,
        "labels": [*_labels(runs), *notes, *([f"not complete: {failure.splitlines()[0]}"] if failure else [])],
        "failure": failure,
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def _environment(runs: Sequence[Run], phone: Phone) -> dict[str, Any]:
    """What the first run says that says it: those of the dense model know nothing of the ROM."""
    names = (
        *("model", "random_weights", "provider", "simulated", "shared_memory", "soc", "precision", "weights"),
        *("kv_type", "threads", "simd", "rom_access", "onnxruntime", "version"),
    )
    return {"phone": dataclasses.asdict(phone), **{name: next(iter(_known(runs, name)), None) for name in names}}


def _known(runs: Sequence[Run], name: str) -> list[Any]:
    return [run.report[name] for run in runs if run.report.get(name) is not None]


def _speeds(test: str, runs: Sequence[Run]) -> list[float]:
    return [speed for run in runs for speed in run.report[_SPEEDS[test]]]


def _joint(test: str, runs: Sequence[Run]) -> float:
    """Tokens/s of several runs together: each repetition has the same number of tokens, so times add up."""
    speeds = _speeds(test, runs)
    return len(speeds) / sum(1 / speed for speed in speeds)


def _result(test: str, variant: Variant, runs: Sequence[Run]) -> dict[str, Any]:
    samples, decode = _speeds(test, runs), test == "decode"
    median, p10, p90 = percentiles(samples, 50, 10, 90)
    stalls = [stall for run in runs for stall in run.report["stall_us"]] if decode else []
    currents = [current for run in runs for current in run.milliamperes]
    fetched = _known(runs, "storage_bytes_per_token")
    celsius = [run.after.battery_celsius for run in runs if run.after.battery_celsius is not None]
    return {
        "test": test,
        "depth": runs[0].report["depth"] if decode else 0,
        "tokens": runs[0].report["tokens" if decode else "prefill_tokens"],
        "memory": variant.memory,
        "rom": variant.rom,
        "synthetic_depth": decode and runs[0].report["synthetic_depth"],
        "samples": samples,
        "median": median,
        "p10": p10,
        "p90": p90,
        "stall_us": dict(zip(("p50", "p99"), percentiles(stalls, 50, 99), strict=True)) if stalls else None,
        "storage_bytes_per_token": sum(fetched) / len(runs) if decode and len(fetched) == len(runs) else None,
        "battery_ma": percentiles(currents, 50)[0] if currents else None,
        "battery_celsius": max(celsius, default=None),
    }


def _comparison(test: str, variant: Variant, runs: Sequence[Run], dense: Sequence[Run]) -> dict[str, Any]:
    """A sample is the ratio of the speeds in one whole round, in which each of the two ran twice."""
    samples = []
    for number in sorted({run.round for run in runs}):
        ours, theirs = ([run for run in its if run.round == number] for its in (runs, dense))
        if len(ours) == len(theirs) == 2:
            samples.append(_joint(test, ours) / _joint(test, theirs))
    interval = median_interval(samples)
    return {
        "test": test,
        "depth": runs[0].report["depth"] if test == "decode" else 0,
        "rom": variant.rom,
        "samples": samples,
        "ratio": percentiles(samples, 50)[0] if samples else None,
        "ci95": None if interval is None else list(interval),
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    labels = []
    if any(run.report["simulated"] for run in runs):
        labels.append(SIMULATED)
    if any(run.report["random_weights"] for run in runs):
        labels.append("random weights: speed can be measured, the text means nothing")
    if any(run.report["synthetic_depth"] for run in runs):
        labels.append("synthetic depth: the cache was filled, not computed")
    if unshared := sum(run.report["provider"] == "qnn" and not run.report["shared_memory"] for run in runs):
        labels.append(
            f"KV cache copied: in {unshared} of {len(runs)} runs the NPU did not share its memory, and all of it was "
            "copied every step"
        )
    if cold := [run.report.get("storage_bytes_per_token") for run in runs if run.variant.rom == "cold"]:
        labels.append("cold ROM: dropped from the page cache before every step; the system may keep pages")
        if unseen := sum(not fetched for fetched in cold):  # 0 or unknown
            labels.append(
                f"cold ROM: storage reads not seen in {unseen} of {len(cold)} runs: the system kept the pages, so that "
                "these were warm, or does not count reads"
            )
    if hot := sum(run.before.hot for run in runs):
        labels.append(f"hot: {hot} of {len(runs)} runs began throttled or with a battery of {HOT_CELSIUS:g} C or more")
    if any(run.before.thermal_status is None and run.before.battery_celsius is None for run in runs):
        labels.append("temperature unknown: the phone does not tell it")
    if any(run.before.plugged for run in runs):
        labels.append("plugged in: the current is what the battery gave or took, not what the phone used")
    if any(run.before.battery_percent is not None and run.before.battery_percent < LOW_BATTERY for run in runs):
        labels.append(f"battery below {LOW_BATTERY}%: phones save power then")
    if runs and not any(run.milliamperes for run in runs):
        labels.append("battery current unknown: the phone does not tell it, or a run takes less than a second")
    return labels


def to_markdown(report: Report) -> str:
    """The paper's arrangement: a row for the dense model and one for each state of the ROM."""
    it, phone = report["environment"], report["environment"]["phone"]
    lines = [
        f"## {it['model']} on {phone['model']} ({phone['chip'] or 'unknown chip'})",
        "",
        f"- provider {it['provider']}, {it['precision'] or it['weights']} weights, {it['kv_type']} KV cache"
        + (f", {it['threads']} threads, {it['simd']} kernels" if it["provider"] == "cpu" else ""),
        f"- meki_bench {it['version']}, onnxruntime {it['onnxruntime']}, Android {phone['release']}, {it['started']}",
        f"- medians (p10 to p90); ratios with 95% confidence interval over {report['protocol']['rounds']} interleaved "
        "rounds",
        *(f"- **{label}**" for label in report["labels"]),
        "",
        *_table(report),
    ]
    return "\n".join(lines)


def _table(report: Report) -> Iterator[str]:
    decodes = [result for result in report["results"] if result["test"] == "decode"]
    prefills = {result["rom"]: result for result in report["results"] if result["test"] == "prefill"}
    ratios = {entry["rom"]: entry for entry in report["compare"] if entry["test"] == "decode"}
    depth = decodes[0]["depth"] if decodes else 0
    speeds = [f"decode at {depth:,}, tokens/s", "to dense", "prefill, tokens/s", "wait p50, us", "wait p99, us"]
    yield from head(["", *speeds, "from storage, bytes a token", "battery, mA", "battery, C"], "l")
    for result in decodes:
        stall = result["stall_us"] or {}
        cells = [
            str(Variant(result["memory"], result["rom"])),
            _spread(result),
            _ratio(ratios.get(result["rom"])),
            _spread(prefills.get(result["rom"])),
            *(_number(stall.get(rank), ".1f") for rank in ("p50", "p99")),
            _number(result["storage_bytes_per_token"], ",.0f"),
            _number(result["battery_ma"], ",.0f"),
            _number(result["battery_celsius"], ".1f"),
        ]
        yield row(cells)


def _spread(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    return f"{result['median']:,.1f} ({result['p10']:,.1f} to {result['p90']:,.1f})"


def _ratio(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    interval = entry["ci95"]
    return f"{entry['ratio']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
