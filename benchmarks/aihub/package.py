"""What profile.py profiles: the stages of a compiled package, and the graphs that they were compiled from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from meki.package import check_sha256, compiled_targets, read_manifest, target_directory

from .client import HubError

GRAPHS = ("decode", "prefill", "head", "dense_decode", "dense_prefill")


@dataclass(frozen=True)
class Stage:
    """One compiled graph."""

    name: str
    graph: str
    """One of GRAPHS."""
    binary: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Target:
    """A package as compiled for one chip."""

    package: Path
    manifest: dict[str, Any]
    soc: str
    entry: dict[str, Any]
    """The member of the manifest's "qnn"."""
    graphs: dict[str, list[Stage]]
    """Those of GRAPHS that were compiled, in their order."""

    def stages(self, graphs: Sequence[str]) -> list[Stage]:
        """ValueError for a graph that was not compiled."""
        for graph in graphs:
            if graph not in self.graphs:
                raise ValueError(
                    f"{self.package} has no {graph} for {self.soc}, only {', '.join(self.graphs)}: leave it out of "
                    "--graphs, or compile it (a package with a memory: meki-compile --dense)"
                )
        return [stage for graph in graphs for stage in self.graphs[graph]]


def read_target(package: Path, soc: str | None) -> Target:
    """PackageError for a package that is not valid, ValueError for one that is not compiled for `soc`, or without a
    `soc` not for exactly one chip."""
    manifest = read_manifest(package, "qnn", soc or "")
    targets = compiled_targets(manifest)
    soc = soc or next(iter(targets))
    entry, directory = targets[soc], target_directory(package, soc)
    parts = {graph: entry[graph] for graph in GRAPHS} | {"head": [{"file": entry["head"]}]}
    graphs = {
        graph: [_stage(directory, graph, Path(part["file"]).stem, entry["files"]) for part in parts[graph]]
        for graph in GRAPHS
        if parts[graph] is not None
    }
    return Target(package, manifest, soc, entry, graphs)


def _stage(directory: Path, graph: str, name: str, files: dict[str, Any]) -> Stage:
    binary = f"{name}_qnn.bin"
    return Stage(name, graph, directory / binary, files[binary]["bytes"], files[binary]["sha256"])


def check_files(stages: Sequence[Stage]) -> None:
    """OSError for a binary that is missing or damaged."""
    total = sum(stage.bytes for stage in stages)
    with tqdm(desc="checking", total=total, unit="B", unit_scale=True, disable=None) as progress:
        for stage in stages:
            check_sha256(stage.binary, stage.sha256, progress.update)


@contextlib.contextmanager
def written_stage(target: Target, name: str) -> Iterator[Path]:
    """The graph that a stage was compiled from, for as long as the context lasts, as AI Hub takes it: a directory
    NAME.onnx of NAME.onnx and its weights, NAME.data."""
    try:
        import onnx

        from meki.models.qnn.stages import Options, plan, write_stage
        from meki.models.qnn.weights import PackageWeights
    except ImportError as error:
        raise HubError(f"--compile writes the graphs anew ({error}): pip install 'meki[models]'") from error
    entry = target.entry
    options = Options(entry["context"], entry["chunk"], entry["precision"], entry["dense_decode"] is not None)
    weights = PackageWeights(target.package, target.manifest)
    plans = {stage.name: stage for stages in plan(weights, options).values() for stage in stages}
    if name not in plans:
        raise HubError(f"{name} is none of {', '.join(plans)}: another version compiled it; compile the package again")
    with tempfile.TemporaryDirectory(prefix="meki-hub-") as scratch:
        directory = Path(scratch) / f"{name}.onnx"
        directory.mkdir()
        path = write_stage(weights, plans[name], directory)
        # AI Hub tells weights (.data) from compiled graphs (.bin) by the suffix.
        (data,) = (file for file in directory.iterdir() if file != path)
        data.rename(directory / f"{name}.data")
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for field in tensor.external_data:
                if field.key == "location":
                    field.value = f"{name}.data"
        onnx.save(model, path)
        yield directory
