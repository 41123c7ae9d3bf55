"""Speculative decoding on texts: a line for each text and draft, whose counts are those of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.speculation import main


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "fish.txt"
    path.write_text("The cat and the keeper had fish. The cat and the keeper had\n", encoding="utf-8")
    return path


def test_a_line_for_each_text_and_draft(make_package: Callable[..., Path], prompt: Path, capsys) -> None:
    package = make_package("int8")
    options = ["--tokens", "20", "--rounds", "2", "--threads", "1", "--draft", str(package), "--draft-tokens", "3"]
    assert main([str(package), str(prompt), *options]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:]] == [["fish.txt", "lookup"], ["fish.txt", "small"]]
    assert [line[-1] for line in lines[2:]] == ["the same", "the same"]
    # 19 tokens come from decode steps: four of 4 tokens, and one of the 3 that are left.
    assert lines[3][5:7] == ["14", "100%"]
    assert all(float(line[2]) > 0 and float(line[4].split()[0]) > 0 for line in lines[2:])


def test_a_package_without_a_chat_template(make_package: Callable[..., Path], prompt: Path, capsys) -> None:
    assert main([str(make_package("int8")), str(prompt), "--chat", "--rounds", "1"]) == 2
    assert "no chat template" in capsys.readouterr().err
