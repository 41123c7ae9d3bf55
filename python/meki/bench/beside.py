"""Decode of one package in turns with the dense backbone of another."""

from __future__ import annotations

from collections.abc import Callable

from .. import _core
from .contender import Package
from .environment import describe
from .report import Report, make_report


def measure_beside(
    base: Package,
    other: Package,
    plan: _core.Plan,
    advance: Callable[[str], None],
    bandwidth_bytes: int,
    *,
    rom: str = "warm",
) -> Report:
    """A report of `other`, and of `base` with its memory off. plan: one that compares, without a prefill.

    rom: "warm", or "cold" as the plan has it. advance: called with what is about to run. bandwidth_bytes: read to
    measure the bandwidth, each time.
    """
    engines = [other.engine(), base.engine(memory=False)]
    return make_report(
        [other.contender(engines[0]), base.contender(engines[1], memory=False)],
        plan,
        _core.measure(engines, plan, advance, bandwidth_bytes),
        parts=[],
        environment=describe(other, engines[0]),
        protocol={
            "synthetic_depth": plan.synthetic_depth,
            "compare": "dense",
            "depths": plan.depths,
            "rom": rom if other.has_memory else None,
            "rom_delay_ms": other.options.get("rom_delay_ms", 0.0),
            "row_cache_mib": other.options.get("row_cache", 0) if other.has_memory else 0,
        },
    )
