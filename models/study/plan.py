"""A study's plan: what is trained, on how many tokens, with which seeds, and what of it is shown side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from meki.package.files import read_text

from ..architectures.base import Architecture
from ..architectures.llama import LlamaConfig
from ..arguments import UsageError
from ..config import POSITIVE, ConfigError, check, integer
from ..package import check_exportable
from ..train.trainer import Recipe

WEIGHTS = "int8"
"""Of the packages that decode is measured with."""
_COUNT = integer(1, 10**18)
_RECIPE = {
    **dict.fromkeys(("tokens", "batch", "length", "micro_batch"), _COUNT),
    **dict.fromkeys(("rate", "last_rate", "weight_decay", "clip"), POSITIVE),
    "warmup": integer(0, 10**18),
}


@dataclass(frozen=True)
class Section:
    """A table of the report."""

    title: str
    models: tuple[str, ...]
    seeds: tuple[int, ...] = (1,)
    line: bool = False
    """Whether a line is fitted to the loss over the logarithm of the memory's size."""


@dataclass(frozen=True)
class Claim:
    """That one model has a lower held-out loss than each of several."""

    text: str
    better: str
    than: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    title: str
    baseline: str
    """The model that others are compared with."""
    models: Mapping[str, Architecture]
    recipe: Recipe
    """But for its seed."""
    sections: tuple[Section, ...]
    claims: tuple[Claim, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """UsageError, naming what is wrong."""
        if not path.is_file():
            raise UsageError(f"{path}: no such plan; give a YAML file (docs/cli.md#meki-study)")
        try:
            return cls._parsed(yaml.safe_load(read_text(path)))
        except (yaml.YAMLError, RecursionError) as error:
            raise UsageError(f"{path}: not valid YAML: {error}".replace("\n", " ")) from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path}: {error}") from error

    @classmethod
    def _parsed(cls, values: Any) -> Self:
        values = _object("plan", values, ("title", "baseline", "base", "recipe", "models", "sections"), ("claims",))
        models = {}
        for name, changes in _mapping("models", values["models"]).items():
            settings = {**_mapping("base", values["base"]), **_mapping(f"model {name}", changes or {})}
            try:
                models[str(name)] = LlamaConfig.from_settings(settings)
                check_exportable(models[str(name)], WEIGHTS)
            except ConfigError as error:
                raise ConfigError(f"model {name}: {error}") from error
        needed = ("tokens", "batch", "length", "rate", "warmup")
        recipe = _object("recipe", values["recipe"], needed, [name for name in _RECIPE if name not in needed])
        check(_RECIPE, recipe)
        recipe = {"micro_batch": recipe["batch"], "last_rate": recipe["rate"] / 10, **recipe}
        plan = cls(
            title=str(values["title"]),
            baseline=str(values["baseline"]),
            models=models,
            recipe=Recipe(**recipe),
            sections=tuple(_section(section) for section in _list("sections", values["sections"])),
            claims=tuple(_claim(claim) for claim in _list("claims", values.get("claims", []))),
        )
        named = [name for section in plan.sections for name in section.models]
        compared = [name for claim in plan.claims for name in (claim.better, *claim.than)]
        for name in named:
            if name not in models:
                raise ValueError(f"a section names model {name!r}, which is none of {', '.join(models)}")
        for name in (plan.baseline, *compared):
            if name not in named:
                raise ValueError(f"model {name!r} is compared but in no section; sections have {', '.join(named)}")
        if unused := sorted(models.keys() - set(named)):
            raise ValueError(f"no section has {', '.join(unused)}; add one or leave the models out")
        if len({model.vocab_size for model in models.values()}) > 1:
            raise ValueError("models differ in vocab_size, and so in their tokens; give one to all")
        return plan

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(model, seed), in the order of the sections; all first seeds, then all second ones."""
        first: dict[tuple[str, int], int] = {}  # where a section that has it has its seed
        for section in self.sections:
            for name in section.models:
                for index, seed in enumerate(section.seeds):
                    first[name, seed] = min(index, first.get((name, seed), index))
        order = {name: index for index, name in enumerate(self._named)}
        return sorted(first, key=lambda run: (first[run], order[run[0]]))

    @property
    def _named(self) -> dict[str, None]:
        return dict.fromkeys(name for section in self.sections for name in section.models)

    def recipe_of(self, seed: int) -> Recipe:
        return dataclasses.replace(self.recipe, seed=seed)


def _section(value: Any) -> Section:
    it = _object("section", value, ("title", "models"), ("seeds", "line"))
    seeds = _list("seeds", it.get("seeds", [1]))
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"section {it['title']}: seeds are {seeds}, expected integers from 0")
    models = tuple(map(str, _list("models", it["models"])))
    return Section(str(it["title"]), models, tuple(seeds), it.get("line") is True)


def _claim(value: Any) -> Claim:
    it = _object("claim", value, ("text", "better", "than"), ())
    return Claim(str(it["text"]), str(it["better"]), tuple(map(str, _list("than", it["than"]))))


def _object(what: str, value: Any, needed: Any, optional: Any) -> dict[str, Any]:
    value = _mapping(what, value)
    for name in needed:
        if name not in value:
            raise ValueError(f"{what}: has no {name!r}; expected {', '.join(needed)}")
    if unknown := [str(name) for name in value if name not in (*needed, *optional)]:
        raise ValueError(f"{what}: unknown {', '.join(unknown)}; expected {', '.join((*needed, *optional))}")
    return value


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: got {value!r}, expected names with values")
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what}: got {value!r}, expected a list")
    return value
