"""Where the time of a decode step goes, from ONNX Runtime's profiler.

A trace is a Chrome trace in JSON: an event `model_run` of category "Session" for every run of the graph, and one of
category "Node" for every kernel in it; `ts` and `dur` are in whole microseconds.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import _core
from .contender import Package

PARTS = (
    "attention",
    "linear",
    "head",
    "embedding",
    "injection",
    "norms and elementwise",
    "sampling",
    "stall",
    "rest",
)
_KERNEL = "_kernel_time"
_LINEAR = {"Linear", "Experts", "MatMul", "Gemm"}


def part_of(node: str, op: str) -> str:
    """The part that a node of a package's graph belongs to, by its name (models/graph/) and operator."""
    if ".meki." in node or ".injected" in node or node.startswith("rows"):
        return "injection"
    if node.startswith("logits"):
        return "head"
    if node.startswith("embedding"):
        return "embedding"
    if op == "Attention":
        return "attention"
    return "linear" if op in _LINEAR else "norms and elementwise"


def trace_times(path: Path, steps: Sequence[bool]) -> dict[str, float]:
    """Microseconds by part, summed over the runs that count. `steps`: for each of the trace's last runs, whether it
    does. RuntimeError if the trace has fewer runs: the profiler drops what is too much for it."""
    events = json.loads(path.read_bytes())
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    if len(starts) < len(steps):
        raise RuntimeError(
            f"{path}: the trace has {len(starts)} runs, {len(steps)} steps were made; profile fewer --tokens"
        )
    starts = starts[len(starts) - len(steps) :]
    times = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL):
            continue
        run = bisect.bisect_right(starts, event["ts"]) - 1
        if run >= 0 and steps[run]:
            times[part_of(event["name"].removesuffix(_KERNEL), event["args"]["op_name"])] += event["dur"]
    return times


def measure_parts(package: Package, plan: _core.Plan, *, memory: bool, depth: int) -> dict[str, Any]:
    """Profiles `plan.tokens` decode steps in an engine of their own.

    The cache is filled, not computed: how long attention takes does not depend on what it reads. The result is a
    report's entry of "parts", in microseconds a token.
    """
    with TemporaryDirectory(prefix="meki-bench-") as directory:
        engine = package.engine(memory=memory, profile=f"{directory}/trace")
        contender = package.contender(engine, memory=memory)
        block, history = _core.profile_decode(engine, plan, depth)
        del engine  # only then are the traces complete
        times = dict.fromkeys(PARTS, 0.0)
        traces = list(Path(directory).iterdir())
        if not traces:
            raise RuntimeError("ONNX Runtime wrote no trace; measure without --parts")
        for trace in traces:
            for part, time in trace_times(trace, history).items():
                times[part] += time
    times["sampling"] = block.sample_ns / 1000
    times["stall"] = sum(block.stall_ns) / 1000
    times["rest"] = block.ns / 1000 - sum(times.values())  # still 0 in the sum
    return {
        "memory": contender.memory,
        "threads": contender.threads,
        "depth": depth,
        "tokens": block.tokens,
        "synthetic_depth": depth > 1,
        "us_per_token": {part: time / block.tokens for part, time in times.items()},
    }
