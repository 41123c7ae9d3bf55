"""The row cache on a text: hits are a naive count, times are those of the engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.row_cache import main, speed
from meki import Engine

# Herman Melville, Moby-Dick, chapters 1 and 2 (1851, in the public domain): what docs/results.md measures with.
NOVEL = Path(__file__).parents[1] / "data" / "moby_dick.txt"
TEXT = NOVEL.read_text(encoding="utf-8")[:400]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_hits_are_tokens_that_came_before(make_package: Callable[..., Path], text: Path, capsys) -> None:
    package = make_package("int8")
    options = ["--depth", "20", "--warm-up", "11", "--tokens", "16", "--rom-delay-ms", "0", "--caches", "0,1"]
    assert main([str(package), str(text), *options]) == 0
    _, _, without, cached = (
        [cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()
    )
    ids = Engine(package).tokenizer.encode(TEXT).ids
    hits = sum(token in {0, *ids[:position]} for position, token in enumerate(ids[11:27], start=11))
    assert 0 < hits < 16
    assert (without[1], without[2], cached[1], cached[2]) == ("0", "0.0%", "1", f"{hits / 16:.1%}")


def test_speed_is_that_of_all_groups_together() -> None:
    ratio, low, high = speed(np.array([[10.0, 5.0], [10.0, 10.0], [20.0, 15.0]]))
    assert ratio == 0.75
    assert 0.5 <= low < 0.75 < high <= 1.0
    assert speed(np.array([[4.0, 3.0]] * 5)) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize(
    ("options", "memory_dim", "message"),
    [
        (["--tokens", "12"], 32, "these a multiple of 8"),
        (["--tokens", "8", "--warm-up", "5000"], 32, "5,000 to warm up"),
        (["--tokens", "8", "--warm-up", "8", "--depth", "1000"], 32, "context"),
        (["--tokens", "8", "--warm-up", "8", "--depth", "20"], 0, "has no memory"),
    ],
)
def test_what_does_not_fit(
    make_package: Callable[..., Path], text: Path, options: list[str], memory_dim: int, message: str, capsys
) -> None:
    assert main([str(make_package("int8", memory_dim=memory_dim)), str(text), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("row_cache: error: ") and message in error and error.count("\n") == 1
