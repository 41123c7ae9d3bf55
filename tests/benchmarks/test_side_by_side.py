"""Packages beside a dense backbone: a line for each and each depth, with what a token reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.side_by_side import main

ENGRAM = {"memory_dim": 0, "engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50}
MIXTURE = {"memory_dim": 0, "ffn_kind": "moe", "experts": 4, "experts_per_token": 2, "ffn": 32}


def test_a_line_for_each(make_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    packages = [
        make_package("int8"),
        make_package("int8"),
        make_package("int8", name="engram", **ENGRAM),
        make_package("int8", name="mixture", **MIXTURE),
    ]
    assert main([*map(str, packages), "--depths", "0,16", "--tokens", "8", "--repetitions", "1"]) == 0
    out, err = capsys.readouterr()
    for name in ("small", "engram", "mixture"):
        assert f"{name}: read bandwidth " in err and f"{name}: random weights: " in err
    assert "engram: row cache of 16 MiB" in err and "mixture: row cache" not in err
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert [line[:3] for line in lines[2:]] == [
        [name, memory, depth]
        for name, memory in (("small", "meki"), ("engram", "engram"), ("mixture", "dense"))
        for depth in ("0", "16")
    ]
    # 3 layers of 32 float16 values and a checksum; 2 * 2 * 2 heads of 16 in two layers; nothing.
    reads = {"meki": ["1", "196"], "engram": ["8", f"{8 * 36}"], "dense": ["0", "0"]}
    for line in lines[2:]:
        assert line[8:10] == reads[line[1]]
        assert (line[6] == line[7] == line[10] == "-") == (line[1] == "dense")
        assert float(line[3]) > 0 and float(line[4]) > 0 and 0 < float(line[5].split()[0]) < 100


def test_one_package_is_nothing_to_compare(make_package: Callable[..., Path], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(make_package("int8"))])
    assert "PACKAGE" in capsys.readouterr().err


def test_a_depth_beyond_the_context(make_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    package = str(make_package("int8"))
    assert main([package, package, "--depths", "1000", "--tokens", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("side_by_side: error: ") and "context" in error and error.count("\n") == 1
