"""meki-list: the models that are found by name."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..package import bundled_models, has_random_weights, read_manifest, store, stored_models
from .arguments import Parser
from .errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = Parser("meki-list", description="Show the models that are found by name.", epilog="Reference: docs/cli.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return run_command(parser.prog, lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    places = {"store": stored_models(), "bundled": bundled_models()}
    models = [_describe(name, where, path) for where, found in places.items() for name, path in sorted(found.items())]
    if arguments.json:
        print(json.dumps({"store": str(store()), "models": models}, indent=2))
    elif models:
        print("\n".join(_lines(models)))


def _describe(name: str, where: str, path: Path) -> dict[str, Any]:
    """What is known of a model; of a damaged one, `problem` alone."""
    entry: dict[str, Any] = {"name": name, "where": where, "path": str(path)}
    try:
        manifest = read_manifest(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except (OSError, ValueError) as error:
        return {**entry, "problem": " ".join(str(error).split())}
    memory = manifest["memory"]
    return {
        **entry,
        "problem": None,
        "bytes": size,
        "kind": manifest["architecture"]["kind"],
        "parameters": manifest["parameters"],
        "weights": manifest["weights"]["type"],
        "matrices": manifest["weights"]["types"],
        "memory": memory and {"kind": memory["kind"], "row_type": memory["row_type"]},
        "random_weights": has_random_weights(manifest),
    }


def _lines(models: list[dict[str, Any]]) -> Iterator[str]:
    rows = [_cells(its) for its in models]
    columns = itertools.zip_longest(*(row[:-1] for row in rows), fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    for row in rows:
        padded = (f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=False))
        yield "  ".join([*padded, row[-1]]).rstrip()


def _cells(its: dict[str, Any]) -> list[str]:
    """The last one is of any width."""
    if its["problem"]:
        return [its["name"], its["where"], f"damaged: {its['problem']}"]
    weights = max(its["matrices"], key=its["matrices"].get) if its["weights"] == "source" else its["weights"]
    decoder = f"{its['kind']} {its['parameters']['ram'] / 1e6:,.1f}M, {weights}"
    memory = f"{its['memory']['kind']} memory, {its['memory']['row_type']}" if its["memory"] else "no memory"
    size = f"{its['bytes'] / 1e6:>8,.1f} MB"
    return [its["name"], its["where"], decoder, memory, size, "random weights" if its["random_weights"] else ""]
