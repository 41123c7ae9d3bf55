"""Structured output over 500 random schemas and prompts, hostile ones among them: what is complete is valid."""

from __future__ import annotations

from collections import Counter

import pytest

from meki import Engine

from .random_schemas import outcome

COUNT = 500


@pytest.mark.slow
def test_what_is_complete_is_valid() -> None:
    engine = Engine("meki-tiny", threads=1)
    ends = Counter(outcome(engine, number, 0) for number in range(COUNT))
    # Some texts are longer than the context: a story teller writes the digits of a number, or a list, without an end.
    assert ends["eos"] >= 0.8 * COUNT, ends
    assert ends["eos"] + ends["context"] == COUNT, ends
