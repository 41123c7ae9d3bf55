"""Lines of a markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(names: Sequence[str], align: str) -> Iterator[str]:
    """The two lines above the rows. align: of each column, "l" or "r"; columns beyond it are numbers, aligned right."""
    yield row(names)
    yield row([{"l": "---", "r": "---:"}[side] for side in align.ljust(len(names), "r")])
