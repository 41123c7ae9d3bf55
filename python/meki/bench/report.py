"""From a measurement to a report: a dict that json can write, from which all other outputs are made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .._core import Block, Case, Measurement, Plan
from .contender import Contender
from .stats import median_interval, percentiles

Report = dict[str, Any]


def make_report(
    contenders: Sequence[Contender],
    plan: Plan,
    measurement: Measurement,
    *,
    parts: list[dict[str, Any]],
    environment: dict[str, Any],
    protocol: dict[str, Any],
) -> Report:
    """The fields are described in docs/benchmark.md. Speeds are tokens/s, GB are 1e9 bytes."""
    bandwidths = {threads: percentiles(samples, 50)[0] for threads, samples in measurement.bandwidths.items()}
    results, compare = [], []
    for index, case in enumerate(measurement.cases):
        # Of each contender: its blocks in each round.
        runs = list(zip(*(blocks[index] for blocks in measurement.rounds), strict=True))
        for contender, its in zip(contenders, runs, strict=True):
            results.append(_result(contender, case, plan, its, bandwidths[contender.threads]))
        if plan.compare and case.kind == "decode":
            compare.append(_comparison(case, *runs))
    return {
        "results": results,
        "read_bandwidth": [
            {
                "threads": threads,
                "gb_s": bandwidths[threads] / 1e9,
                "samples_gb_s": [sample / 1e9 for sample in samples],
            }
            for threads, samples in measurement.bandwidths.items()
        ],
        "compare": compare,
        "parts": parts,
        "environment": environment,
        "memory": measurement.memory,
        "protocol": protocol,
        "labels": _labels(environment, protocol),
    }


def _result(
    contender: Contender, case: Case, plan: Plan, runs: Sequence[Sequence[Block]], bandwidth: float
) -> dict[str, Any]:
    blocks = list(itertools.chain.from_iterable(runs))
    samples = [speed(run) for run in runs]
    median, p10, p90 = percentiles(samples, 50, 10, 90)
    stalls = [stall / 1000 for block in blocks for stall in block.stall_ns]
    size = None if case.kv_bytes is None else contender.weight_bytes + case.kv_bytes + contender.row_bytes
    return {
        "test": case.kind,
        "depth": case.depth,
        "tokens": case.tokens,
        "memory": contender.memory,
        "threads": contender.threads,
        "synthetic_depth": plan.synthetic_depth and case.depth > 1,
        "samples": samples,
        "median": median,
        "p10": p10,
        "p90": p90,
        "stall_us": dict(zip(("p50", "p99"), percentiles(stalls, 50, 99), strict=True)) if stalls else None,
        "bytes_per_token": size,
        "kv_bytes": case.kv_bytes,
        "weight_bytes": None if size is None else contender.weight_bytes,
        "row_bytes": contender.row_bytes,
        "bandwidth_fraction": None if size is None else size * median / bandwidth,
        "row_hit_rate": _hit_rate(blocks),
        "storage_bytes_per_token": _storage(blocks),
    }


def speed(blocks: Sequence[Block]) -> float:
    """Tokens/s of several blocks together."""
    return sum(block.tokens for block in blocks) * 1e9 / sum(block.ns for block in blocks)


def _hit_rate(blocks: Sequence[Block]) -> float | None:
    requests = sum(block.rom_requests for block in blocks)
    return sum(block.rom_hits for block in blocks) / requests if requests else None


def _storage(blocks: Sequence[Block]) -> float | None:
    fetched = [block.storage_bytes for block in blocks if block.storage_bytes is not None]
    return sum(fetched) / sum(block.tokens for block in blocks) if len(fetched) == len(blocks) else None


def _comparison(case: Case, first: Sequence[Sequence[Block]], second: Sequence[Sequence[Block]]) -> dict[str, Any]:
    """Speed of the first contender by that of the second: a sample is the ratio in one group of turns, A B B A."""
    samples, turns = [], Plan.GROUP // Plan.TURN
    for blocks in zip(first, second, strict=True):
        for begin in range(0, len(blocks[0]), turns):
            ours, theirs = (speed(run[begin : begin + turns]) for run in blocks)
            samples.append(ours / theirs)
    interval = median_interval(samples)
    return {
        "test": case.kind,
        "depth": case.depth,
        "samples": samples,
        "ratio": percentiles(samples, 50)[0],
        "ci95": None if interval is None else list(interval),
    }


def _labels(environment: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    """What a reader of any figure here has to know."""
    labels = []
    if environment["random_weights"]:
        labels.append("random weights: speed can be measured, the text means nothing")
    if protocol["synthetic_depth"] and any(depth > 1 for depth in protocol["depths"]):
        labels.append("synthetic depth: the cache was filled, not computed")
    if protocol["rom"] == "cold":
        labels.append("cold ROM: dropped from the page cache before every step; the system may keep pages")
    if protocol["compare"] == "ram":
        labels.append(
            "rows in RAM: all were read before, and resident memory holds them; without --compare it does not"
        )
    if protocol["rom_delay_ms"]:
        labels.append(f"artificial delay: {protocol['rom_delay_ms']:g} ms were added to every read of the ROM")
    if protocol["row_cache_mib"]:
        labels.append(
            f"row cache of {protocol['row_cache_mib']} MiB: all rounds have the same tokens, "
            "so that more rows come from it than in a text"
        )
    if environment["machine_note"]:
        labels.append(environment["machine_note"])
    return labels
