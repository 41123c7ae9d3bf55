"""What generations at once cost each other: the arithmetic of the table, and one of a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.concurrency import Speed, lines, main, speed


def test_speed() -> None:
    # From 3.0 on, when the second has begun, to 6.0, when the first has ended: 3 pieces and 2.
    its = speed([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [3.0, 5.0, 5.5, 9.0]])
    assert its.tokens_per_s == pytest.approx(5 / 3)
    assert its.p50_ms == pytest.approx(1000)
    assert its.p95_ms == pytest.approx(3500)
    # None of which there are both.
    assert speed([[1.0, 2.0], [3.0, 4.0]]).tokens_per_s == 0


def test_lines() -> None:
    rounds = {
        1: [Speed(100, 10, 11), Speed(50, 20, 22), Speed(80, 12, 14)],
        4: [Speed(200, 20, 21), Speed(150, 30, 33), Speed(240, 17, 18)],
    }
    assert list(lines(rounds)) == [["1", "80", "12.0", "14.0", "1.00"], ["4", "200", "20.0", "21.0", "3.00"]]


def test_a_package(make_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--concurrency", "1", "3", "--tokens", "30", "--rounds", "1", "--threads", "1"]
    assert main([str(make_package("int8")), *options]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in table[2:]] == ["1", "3"]
