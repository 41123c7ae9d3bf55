"""Plots of a report. matplotlib comes with the extra `plot` and is imported only here, when asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .output import part_title, threads_of, threads_text
from .parts import PARTS
from .report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_matplotlib() -> None:
    """ValueError if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; run pip install 'meki[plot]'")


def plots(report: Report) -> dict[str, bytes]:
    """PNG files by name: tokens/s against depth, and with "parts" the time by part."""
    files = {"speed.png": _draw(report, _speed)}
    if report["parts"]:
        files["parts.png"] = _draw(report, _parts)
    return files


def _draw(report: Report, draw: Callable[[Report, Axes], None]) -> bytes:
    """One figure, with what must be known of its figures below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    draw(report, axes)
    it = report["environment"]
    caption = [f"{it['cpu']}, {threads_of(report)}, {it['simd']}; meki {it['meki']}", *report["labels"]]
    figure.supxlabel("\n".join(caption), fontsize=8)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _speed(report: Report, axes: Axes) -> None:
    """Median tokens/s of decode against depth, with a band from p10 to p90."""
    decode = [result for result in report["results"] if result["test"] == "decode"]
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in sorted(decode, key=lambda result: result["depth"]):
        lines.setdefault((result["memory"], result["threads"]), []).append(result)
    several = len(report["read_bandwidth"]) > 1
    for (memory, threads), results in lines.items():
        depths, medians, low, high = ([result[key] for result in results] for key in ("depth", "median", "p10", "p90"))
        axes.plot(depths, medians, marker="o", label=memory + f", {threads_text(threads)}" * several)
        axes.fill_between(depths, low, high, alpha=0.25)
    it = report["environment"]
    axes.set_title(f"Decode, {it['model']}: {it['weights']} weights, {it['kv_type']} KV cache")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("tokens/s: median, p10 to p90")
    axes.set_ylim(bottom=0)
    axes.legend()


def _parts(report: Report, axes: Axes) -> None:
    """A stacked bar for every entry of "parts", in milliseconds a token."""
    entries = report["parts"]
    names = [part_title(report, entry) for entry in entries]
    bottom = [0.0] * len(entries)
    for part in PARTS:
        times = [entry["us_per_token"][part] / 1000 for entry in entries]
        axes.bar(names, times, bottom=bottom, label=part, width=0.6)
        bottom = [low + time for low, time in zip(bottom, times, strict=True)]
    axes.set_title(f"A decode step of {report['environment']['model']} by part: profiled, cache filled")
    axes.set_ylabel("ms a token")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
