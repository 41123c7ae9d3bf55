"""How fast a study's models decode through the engine, each in turns with the baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meki import _core
from meki.bench.beside import measure_beside
from meki.bench.contender import Package

from ..architectures.base import Architecture
from ..checkpoints import open_checkpoint
from ..checkpoints.checkpoint import checkpoint_source
from ..package import export_package
from ..source import random_source
from ..tokenizer import TokenizerSpec
from .plan import WEIGHTS

TOKENS, ROUNDS = 64, 10
BANDWIDTH_BYTES = 1 << 26


def measure_speeds(
    configs: Mapping[str, Architecture],
    checkpoints: Mapping[str, Path],
    tokenizer: TokenizerSpec,
    baseline: str,
    out: Path,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Decode from an empty cache, int8 weights and KV, float16 rows: by model `tokens_per_s`, `ratio` to the baseline
    and its interval `ci95`; which had random weights (`random`); and where this was (`environment`).

    checkpoints: by model; of one that has none the weights are random, which takes as long. out: where packages are
    made.
    """
    options = {"row_cache": 0}
    packages = {}
    for name, config in configs.items():
        advance(f"{name}: package")
        source = checkpoint_source(open_checkpoint(checkpoints[name], {})) if name in checkpoints else None
        provenance = {} if source else {"weights": "random"}
        export_package(
            source or random_source(config),
            tokenizer,
            out / name,
            name=name,
            weights=WEIGHTS,
            provenance=provenance,
            overwrite=True,
        )
        packages[name] = Package.open(out / name, options)
    plan = _core.Plan(depths=(0,), prefill=0, tokens=TOKENS, repetitions=ROUNDS, compare=True)
    models, environment, threads = {}, {}, 0
    for name, package in packages.items():
        say = functools.partial(_say, advance, name)
        report = measure_beside(packages[baseline], package, plan, say, BANDWIDTH_BYTES)
        (compared,), environment = report["compare"], report["environment"]
        speed, threads = report["results"][0]["median"], report["results"][0]["threads"]
        models[name] = {"tokens_per_s": speed, "ratio": compared["ratio"], "ci95": compared["ci95"]}
    keys = ("cpu", "simd", "meki")
    random = [name for name in configs if name not in checkpoints]
    return {
        "models": models,
        "random": random,
        "environment": {**{key: environment[key] for key in keys}, "threads": threads},
    }


def _say(advance: Callable[[str], None], name: str, text: str) -> None:
    advance(f"{name}: {text}")
