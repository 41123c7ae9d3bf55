"""Time to the first token by part: real processes on small packages."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.first_token import __main__ as first_token


def test_parts_add_up(make_package: Callable[..., Path]) -> None:
    package = str(make_package("int8"))
    arguments = argparse.Namespace(model=package, threads=1, prompt="The old lighthouse", repetitions=2)
    samples = first_token.measure(arguments)
    assert len(samples) == 2
    for sample in samples:
        assert sample.keys() == first_token.PARTS.keys()
        assert all(seconds > 0 for seconds in sample.values())
        outer = ("interpreter", "imports", "manifest and checksums", "opening", "first token", "rest")
        assert sum(sample[part] for part in outer) == pytest.approx(sample["total"])
        assert max(sample["engine"], sample["tokenizer"]) <= sample["opening"]
        assert sample["prefill"] <= sample["first token"]


def test_the_table_has_medians_in_milliseconds() -> None:
    samples = [dict.fromkeys(first_token.PARTS, seconds) for seconds in (0.5, 0.001, 2.0)]
    lines = first_token.table(samples).splitlines()
    assert lines[0] == "| part | ms | p10 | p90 |" and len(lines) == 2 + len(first_token.PARTS)
    # Of three sorted values, p10 lies at position 0.2 and p90 at 1.8.
    assert lines[2] == "| Python starts | 500.0 | 100.8 | 1,700.0 |"


def test_a_model_that_cannot_be_opened_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_token.main(["no-such-model", "--repetitions", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("first_token: error: ") and "no model 'no-such-model'" in error and error.count("\n") == 1
