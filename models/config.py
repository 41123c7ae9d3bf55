"""Settings of models: the rule that each has to keep, and the errors of what cannot be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A configuration that no model can have."""


class CompileError(RuntimeError):
    """A model, or a stage of it, that cannot run on an NPU, or that its compiler does not compile."""


class Rule(NamedTuple):
    """What a setting can be."""

    expected: str
    holds: Callable[[object], bool]


def integer(least: int, most: int) -> Rule:
    """`most`: the largest that the package format holds."""
    return Rule(f"an integer from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def one_of(names: Collection[str]) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in (*names,))  # which may not be hashable


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf


POSITIVE = Rule("a positive number", is_positive)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
WIDTH = 1 << 20
"""The largest width of a vector in a package."""


def as_number(value: Any) -> Any:
    """What is meant by a number that is written as a text or with a point, as in "1e-06" and 32.0. Else `value`."""
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def frozen(value: Any) -> Any:
    """With tuples for lists, at any depth: as JSON and YAML give it, to what a configuration, a value, can have."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def check(rules: Mapping[str, Rule], settings: Mapping[str, object]) -> None:
    """ConfigError for the first setting that breaks its rule."""
    for name, value in settings.items():
        if not rules[name].holds(value):
            raise ConfigError(f"{name} must be {rules[name].expected}, got {value!r}")
