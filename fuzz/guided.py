"""Runs a target of targets.py under atheris, which is libFuzzer for Python.

python -m fuzz.guided TARGET [LIBFUZZER_OPTION...] CORPUS...
"""

from __future__ import annotations

import copy
import json
import random
import sys
from typing import Any

import atheris

# What reads the bytes; PyTorch and numpy would only be slower.
with atheris.instrument_imports(include=["meki", "gguf", "jinja2", "zipfile"]):
    from fuzz.targets import MOST_MEMORY, TARGETS, memory_limit

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31,
    2**32 - 1,
    2**64,
    0.5,
    1e308,
    float("nan"),
    "",
    "a",
    "\ud83d",
    [],
    {},
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Half of the time another value in one of the JSON texts that zero bytes part; libFuzzer's own way otherwise, and
    for what is none."""
    chance = random.Random(seed)
    texts = data.split(b"\0")
    index = chance.randrange(len(texts))
    try:
        value = json.loads(texts[index])
        found = places(value)
        if not found or chance.random() < 0.5:
            raise ValueError
    except (ValueError, RecursionError):
        mutated: bytes = atheris.Mutate(data, most)
        return mutated
    container, key = chance.choice(found)
    other, there = chance.choice(found)
    if chance.random() < 0.2:
        del container[key]
    else:
        container[key] = copy.deepcopy(chance.choice((other[there], chance.choice(VALUES))))
    texts[index] = json.dumps(value).encode()
    return b"\0".join(texts)[:most]


def main() -> None:
    _, target, *options = sys.argv
    atheris.Setup([f"fuzz.{target}", *options], TARGETS[target], custom_mutator=mutate)
    with memory_limit(MOST_MEMORY):
        atheris.Fuzz()


if __name__ == "__main__":
    main()
