"""A study's plots, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .plan import Section
from .report import Outcomes, section_line, sizes_and_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plots(outcomes: Outcomes) -> dict[str, tuple[str, bytes]]:
    """(title, SVG file) by name, of what has results."""
    first = outcomes.plan.sections[0]
    files = {}
    if any(map(outcomes.models, outcomes.plan.sections)):
        files["weights"] = ("Held-out loss against weights", _draw(lambda *axes: _weights(outcomes, axes), 2))
    if models := outcomes.models(first):
        shown = outcomes.within(first)
        files["curves"] = ("Held-out loss while training", _draw(lambda axes: _curves(shown, models, axes)))
        files["logit_lens"] = ("LogitLens", _draw(lambda axes: _logit_lens(shown, models, axes)))
    for index, section in enumerate(outcomes.plan.sections):
        if section.line and section_line(outcomes, section):
            files[f"line{index}"] = (section.title, _draw(lambda axes, section=section: _line(outcomes, section, axes)))
    return files


def _draw(draw: Callable[..., None], panels: int = 1) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The same results give the same bytes; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "meki", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        draw(*np.atleast_1d(figure.subplots(1, panels, sharey=True)))
        out = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def _weights(outcomes: Outcomes, panels: Sequence[Axes]) -> None:
    models = [model for model in outcomes.plan.models if outcomes.of(model)]
    for axes, key, where in zip(panels, ("ram_weights", "rom_weights"), ("RAM", "ROM"), strict=True):
        for model in models:
            x, y = outcomes.of(model)[0][key] / 1e6, outcomes.loss(model)
            axes.plot([x], [y], "o")
            axes.annotate(model, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=7)
        axes.set_xlabel(f"million weights in {where}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats a token")


def _curves(outcomes: Outcomes, models: Sequence[str], axes: Axes) -> None:
    tokens = outcomes.plan.recipe.batch * outcomes.plan.recipe.length
    for model in models:
        curves = np.array([result["curve"] for result in outcomes.of(model)])
        axes.plot(curves[0, :, 0] * tokens / 1e6, curves[:, :, 1].mean(axis=0), label=model)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("held-out loss, nats a token; mean over seeds")
    axes.grid(alpha=0.3)
    axes.legend()


def _logit_lens(outcomes: Outcomes, models: Sequence[str], axes: Axes) -> None:
    for model in models:
        means = np.mean([result["logit_lens"] for result in outcomes.of(model)], axis=0)
        axes.plot(range(1, len(means) + 1), means, marker="o", label=model)
    axes.set_xlabel("layer")
    axes.set_ylabel("KL of its LogitLens from the end, nats")
    axes.grid(alpha=0.3)
    axes.legend()


def _line(outcomes: Outcomes, section: Section, axes: Axes) -> None:
    line = section_line(outcomes, section)
    assert line is not None
    sizes, losses = map(np.asarray, sizes_and_losses(outcomes, section))
    axes.plot(sizes / 1e6, losses, "o")
    at = np.geomspace(sizes.min(), sizes.max(), 50)
    middle, half = line.predict(at)
    axes.plot(at / 1e6, middle)
    axes.fill_between(at / 1e6, middle - half, middle + half, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("million weights in ROM")
    axes.set_ylabel("held-out loss, nats a token")
    axes.grid(alpha=0.3)
