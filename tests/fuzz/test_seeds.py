"""The seeds of the fuzz targets in Python, among them all that a run has found; those in C++ are CTest's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.targets import SEEDS, TARGETS, time_limit

CASES = [(name, seed) for name in TARGETS for seed in sorted((SEEDS / name).iterdir())]


@pytest.mark.parametrize(("name", "seed"), CASES, ids=[f"{name}-{seed.name}" for name, seed in CASES])
def test_a_seed_is_accepted_or_refused(name: str, seed: Path) -> None:
    with time_limit(20):
        TARGETS[name](seed.read_bytes())


def test_every_target_has_seeds() -> None:
    assert {name for name, _ in CASES} == set(TARGETS)
