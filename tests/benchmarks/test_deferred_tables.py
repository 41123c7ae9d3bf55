"""What tables whose rows are moved when they are read save."""

from __future__ import annotations

import pytest

from benchmarks.deferred_tables import main


def test_both_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--vocab", "20000", "--layers", "2", "--memory-dim", "64", "--tokens", "16", "--steps", "3"]) == 0
    title, _, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("2 tables of 20,000 x 64, of which a step reads ")
    seconds = {cells[1].strip(): float(cells[3]) for line in lines if (cells := line.split("|"))}
    # 16 rows of 20,000, or all of them: hundreds of times the work, so that no other load can turn it around.
    assert seconds["deferred"] < seconds["AdamW"]
