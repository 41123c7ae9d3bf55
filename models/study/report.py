"""From a study's results to its report: markdown, with what each claim comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from meki.bench.markdown import head, row
from meki.bench.stats import CONFIDENCE

from .plan import Claim, Plan, Section
from .runs import Result

COLUMNS = (
    *("model", "weights in RAM", "a token's", "in ROM", "held-out loss", "seeds apart", "bits a byte"),
    *("beside {}", "its loss after", "decode", "minutes"),
)


@dataclass(frozen=True)
class Outcomes:
    """What has been measured of a plan: results by (model, seed), and speeds as `measure_speeds` gives them."""

    plan: Plan
    results: Mapping[tuple[str, int], Result]
    speeds: Mapping[str, Any] | None

    def of(self, model: str) -> list[Result]:
        """In the order of the seeds."""
        return [self.results[run] for run in sorted(self.results) if run[0] == model]

    def within(self, section: Section) -> Outcomes:
        """Those of the section's seeds: what it shows side by side saw the same."""
        return replace(self, results={run: its for run, its in self.results.items() if run[1] in section.seeds})

    def models(self, section: Section) -> list[str]:
        """Those that there are results of."""
        return [model for model in section.models if self.within(section).of(model)]

    def loss(self, model: str) -> float:
        """The mean over the seeds."""
        return float(np.mean([result["loss"] for result in self.of(model)]))

    def apart(self, model: str) -> float | None:
        """The greatest difference that a seed makes; None: there is one."""
        losses = [result["loss"] for result in self.of(model)]
        return max(losses) - min(losses) if len(losses) > 1 else None

    def noise(self) -> float | None:
        """The greatest change that another seed makes in how a model compares with the baseline; None: of no model has
        there been another."""
        compared = (self.differences(name, self.plan.baseline) for name in self.plan.models)
        return max((max(its) - min(its) for its in compared if len(its) > 1), default=None)

    def differences(self, model: str, other: str) -> list[float]:
        """Losses of `model` less those of `other`, seed by seed."""
        theirs = {result["seed"]: result["loss"] for result in self.of(other)}
        return [result["loss"] - theirs[result["seed"]] for result in self.of(model) if result["seed"] in theirs]

    def share_to_reach(self, model: str, other: str) -> float | None:
        """Of its training, what `model` needs to reach the last held-out loss of `other`; seeds averaged, None: one
        does not reach it."""
        lasts = {result["seed"]: result["curve"][-1][1] for result in self.of(other)}
        shares = []
        for result in self.of(model):
            if result["seed"] not in lasts:
                continue
            reached = [step for step, loss in result["curve"] if loss <= lasts[result["seed"]]]
            if not reached:
                return None
            shares.append(reached[0] / result["curve"][-1][0])
        return float(np.mean(shares)) if shares else None


@dataclass(frozen=True)
class Line:
    """loss = at + slope * log2(size), least squares, with the interval of the slope and of the line."""

    slope: float
    interval: tuple[float, float]
    r2: float
    predict: Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]
    """Of sizes: the line, and half the width of its interval."""


def fit_line(sizes: Sequence[float], losses: Sequence[float]) -> Line | None:
    """None for fewer than three sizes. Source of the intervals: Draper and Smith, Applied Regression Analysis, 1.4."""
    if len(set(sizes)) < 3:
        return None
    x, y = np.log2(np.asarray(sizes, np.float64)), np.asarray(losses, np.float64)
    fit = stats.linregress(x, y)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2))
    error = math.sqrt(float(np.sum((y - fit.intercept - fit.slope * x) ** 2)) / (len(x) - 2))
    spread = float(np.sum((x - x.mean()) ** 2))

    def predict(at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        where = np.log2(at)
        half = t * error * np.sqrt(1 / len(x) + (where - x.mean()) ** 2 / spread)
        return fit.intercept + fit.slope * where, half

    half = t * fit.stderr
    return Line(float(fit.slope), (float(fit.slope - half), float(fit.slope + half)), float(fit.rvalue**2), predict)


def section_line(outcomes: Outcomes, section: Section) -> Line | None:
    return fit_line(*sizes_and_losses(outcomes, section))


def sizes_and_losses(outcomes: Outcomes, section: Section) -> tuple[list[int], list[float]]:
    """Weights in ROM and held-out loss of every run of a section."""
    results = [result for model in section.models for result in outcomes.within(section).of(model)]
    return [result["rom_weights"] for result in results], [result["loss"] for result in results]


def verdict(outcomes: Outcomes, claim: Claim) -> str:
    """What the runs say of a claim: several seeds have to agree; of one, the difference has to exceed `noise`."""
    parts = []
    for other in claim.than:
        differences = outcomes.differences(claim.better, other)
        if not differences:
            return "not measured"
        mean, noise = float(np.mean(differences)), outcomes.noise()
        figures = f"{mean:+.4f} beside {other}"
        alike = len(differences) > 1 and min(differences) < 0 < max(differences)
        if alike or (len(differences) == 1 and noise is not None and abs(mean) <= noise):
            parts.append(("open", f"{figures}, no more than a seed makes"))
        elif len(differences) == 1 and noise is None:
            parts.append(("open", f"{figures}, one seed"))
        else:
            parts.append(("shown" if mean < 0 else "not shown", figures))
    kinds = [kind for kind, _ in parts]
    whole = "not shown" if "not shown" in kinds else "open" if "open" in kinds else "shown"
    return f"**{whole}**: {'; '.join(text for _, text in parts)}"


def markdown(outcomes: Outcomes, command: str, plots: Mapping[str, str]) -> str:
    """plots: paths, as the report is to name them, by title."""
    return "\n".join(_lines(outcomes, command, plots)) + "\n"


def _lines(outcomes: Outcomes, command: str, plots: Mapping[str, str]) -> Iterator[str]:
    plan, results = outcomes.plan, outcomes.results
    recipe, base = plan.recipe, plan.models[plan.baseline]
    yield from (f"# {plan.title}", "", "Made by", "", f"    {command}", "")
    hours = sum(result["minutes"] for result in results.values()) / 60
    yield (
        f"{len(results)} of {len(plan.runs)} runs are done, {hours:.1f} hours of training. Each saw {recipe.tokens:,} "
        f"tokens, the same in the same order for a seed: {recipe.steps:,} steps of {recipe.batch} sequences of "
        f"{recipe.length}; AdamW, learning rate {recipe.rate:g} to {recipe.last_rate:g}. The backbone: {base.layers} "
        f"layers of width {base.hidden}, vocabulary {base.vocab_size:,}. Losses are nats a token over the whole "
        f"held-out text, means over seeds; lower is better. {_trained_on([*results.values()])}"
    )
    if claims := plan.claims:
        yield from ("", "## What the paper claims, and what these runs say", "")
        yield from head(("claim", "held-out loss of these runs"), "ll")
        yield from (row((claim.text, verdict(outcomes, claim))) for claim in claims)
        if (noise := outcomes.noise()) is not None:
            yield from (
                "",
                f"Another seed changes a difference by up to {noise:.4f}; one that is smaller, of one seed, is open.",
            )
    for section in plan.sections:
        if models := outcomes.models(section):
            yield from ("", f"## {section.title}", "")
            yield from head([column.format(plan.baseline) for column in COLUMNS], "l")
            yield from (row([*_cells(outcomes.within(section), model)]) for model in models)
            if section.line and (line := section_line(outcomes, section)):
                yield from ("", _fitted(line))
    if outcomes.speeds:
        yield from ("", _how_decoded(plan.baseline, outcomes.speeds))
    for title, path in plots.items():
        yield from ("", f"![{title}]({path})")


def _trained_on(results: Sequence[Result]) -> str:
    """What trained the runs: losses of other numbers differ a little, so it says of which seeds."""
    devices = dict.fromkeys(result["device"] for result in results)
    parts = []
    for device in devices:
        seeds = sorted(result["seed"] for result in results if result["device"] == device)
        parts.append(f"{device} ({len(seeds)} runs; seeds {', '.join(map(str, dict.fromkeys(seeds)))})")
    return f"Trained on: {'; '.join(parts)}." if parts else ""


def _fitted(line: Line) -> str:
    low, high = line.interval
    return (
        f"Twice the ROM changes the loss by {line.slope:+.4f} ({CONFIDENCE:.0%} interval {low:+.4f} to {high:+.4f}): a "
        f"line through the logarithm of the size, R² {line.r2:.2f}."
    )


def _how_decoded(baseline: str, speeds: Mapping[str, Any]) -> str:
    it, random = speeds["environment"], ", ".join(speeds["random"])
    said = f" Trained elsewhere, so measured with random weights, which takes as long: {random}." if random else ""
    return (
        f"Decode: tokens/s through the engine by those of {baseline}, in turns with it, with {CONFIDENCE:.0%} "
        f"intervals; empty cache, int8 weights, {it['cpu']}, {it['threads']} threads, meki {it['meki']}.{said}"
    )


def _cells(outcomes: Outcomes, model: str) -> Iterator[str]:
    first, apart = outcomes.of(model)[0], outcomes.apart(model)
    baseline = outcomes.plan.baseline
    yield model
    yield from (f"{first[key]:,}" for key in ("ram_weights", "active_weights", "rom_weights"))
    yield f"{outcomes.loss(model):.4f}"
    yield "-" if apart is None else f"{apart:.4f}"
    yield f"{np.mean([result['bits_per_byte'] for result in outcomes.of(model)]):.4f}"
    differences = outcomes.differences(model, baseline)
    yield "-" if model == baseline or not differences else f"{np.mean(differences):+.4f}"
    share = outcomes.share_to_reach(model, baseline)
    yield "-" if model == baseline or share is None else f"{share:.0%}"
    speed = (outcomes.speeds or {"models": {}})["models"].get(model)
    yield "-" if speed is None else _ratio(speed)
    yield " + ".join(f"{result['minutes']:.0f}" for result in outcomes.of(model))


def _ratio(speed: Mapping[str, Any]) -> str:
    interval = speed["ci95"]
    return f"{speed['ratio']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
