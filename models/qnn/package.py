"""Adds the stages of a chip to a package: PACKAGE/qnn/CHIP/ and an entry of its manifest (docs/package-format.md)."""

from __future__ import annotations

import contextlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meki.package import check_parsed_files, check_sha256, compiled_targets, read_manifest, target_directory
from meki.package.files import MANIFEST, check_target, list_files, locked, replace_directory, replace_file

from ..graph.weights import WEIGHTS_FILE
from ..package import PhaseProgress, manifest_text, no_progress
from .chips import CHIPS
from .compiler import Compiled, compile_stage
from .stages import Options, StaticStage, plan, write_stage
from .weights import PackageWeights

EMBED = "embed.onnx"
_PREFILL_OPTIMIZATION = 2  # 3 takes three times as long, and the binary has the same size
_LISTS = ("decode", "prefill", "dense_decode", "dense_prefill")


def compile_package(
    package: Path, soc: str, options: Options, *, overwrite: bool = False, report: PhaseProgress = no_progress
) -> tuple[dict[str, Any], dict[str, Compiled]]:
    """Compiles a package's stages for a chip of CHIPS; returns the manifest's entry and what became of each stage.

    The package is unchanged until all stages are compiled. FileExistsError if it has stages for the chip already,
    unless `overwrite` is set; PackageError for a damaged package, ConfigError for options that do not suit it,
    CompileError if the compiler refuses or fails, RuntimeError while another process compiles for the same chip.
    report: called with stages done, and in all.
    """
    chip = CHIPS[soc]
    manifest = read_manifest(package)
    out = target_directory(package, soc)
    overwrite = overwrite or soc not in compiled_targets(manifest)  # a directory that nobody refers to is a leftover
    check_target(out, EMBED, overwrite)
    weights = PackageWeights(package, manifest)
    options.check(weights)
    plans = plan(weights, options)
    total = sum(map(len, plans.values()))
    compiled: dict[str, Compiled] = {}
    report("checksums", 0, total)
    check_parsed_files(package, manifest)
    check_sha256(package / WEIGHTS_FILE, manifest["files"][WEIGHTS_FILE]["sha256"], lambda size: None)

    # The manifest's text is on the disk before the directory is renamed into place, and is renamed right after it.
    with (
        contextlib.ExitStack() as stack,
        replace_file(package / MANIFEST) as new_manifest,
        replace_directory(out, EMBED, overwrite) as directory,
    ):
        report("embedding", 0, total)
        plans["head"][0].graph(weights).save_embedding(directory / EMBED)
        for stage in (stage for stages in plans.values() for stage in stages):
            report(stage.name, len(compiled), total)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".stage.") as scratch:
                source = write_stage(weights, stage, Path(scratch))
                optimization = 3 if stage.shape.tokens == 1 else _PREFILL_OPTIMIZATION
                compiled[stage.name] = compile_stage(source, directory / source.name, chip, optimization)
        report("checksums", total, total)
        entry = {
            "chip": chip.name,
            "soc_model": chip.soc_model,
            "htp_arch": chip.htp_arch,
            "precision": options.precision,
            "context": options.context,
            "chunk": options.chunk,
            "embed": EMBED,
            **{name: [_entry(stage) for stage in plans[name]] if name in plans else None for name in _LISTS},
            "head": "head.onnx",
            "nodes": sum(stage.nodes for stage in compiled.values()),
            "files": list_files(directory, lambda done, total: None),
            "tools": {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")},
        }
        stack.enter_context(locked(package / MANIFEST, wait=True))  # of other chips, which may have come meanwhile
        manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
        manifest.setdefault("qnn", {})[soc] = entry
        new_manifest.write_text(manifest_text(manifest), encoding="utf-8")
    return entry, compiled


def _entry(stage: StaticStage) -> dict[str, Any]:
    rows = stage.rows and [stage.rows.start, stage.rows.stop]
    return {"file": f"{stage.name}.onnx", "rows": rows}
