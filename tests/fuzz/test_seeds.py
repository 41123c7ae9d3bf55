"""The seeds of the fuzz targets in Python, among them all that a run has found; those in C++ are CTest's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.targets import MOST_MEMORY, SEEDS, TARGETS, memory_limit, time_limit

CASES = [(name, seed) for name in TARGETS for seed in sorted((SEEDS / name).iterdir())]


@pytest.mark.parametrize(("name", "seed"), CASES, ids=[f"{name}-{seed.name}" for name, seed in CASES])
def test_a_seed_is_accepted_or_refused(name: str, seed: Path) -> None:
    with time_limit(20), memory_limit(MOST_MEMORY):
        TARGETS[name](seed.read_bytes())
