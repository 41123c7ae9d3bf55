"""A package as meki-compile leaves it, of which no graph can be run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

SOC = "sm8750"
DENSE_STAGES = ("dense_decode.0", "dense_prefill.0")
STAGES = ("decode.0", "decode.1", "prefill.0", "prefill.1", "head", *DENSE_STAGES)


def compiled_package(source: Path, path: Path, *, dense: bool = True, **changes: Any) -> Path:
    """A copy of a package, compiled for SOC; what the compiler would write is noise of 900 bytes and more.

    dense: with the backbone without its memory; changes: of members of the target's entry in the manifest.
    """
    shutil.copytree(source, path)
    manifest = json.loads((path / "manifest.json").read_text())
    memory, layers = manifest["memory"] is not None, manifest["architecture"]["layers"]
    dense = dense and memory
    stages = [stage for stage in STAGES if dense or stage not in DENSE_STAGES]
    names = ["embed.onnx", *(f"{stage}{suffix}" for stage in stages for suffix in (".onnx", "_qnn.bin"))]
    files = {name: np.random.default_rng(i).bytes(900 + 350 * i) for i, name in enumerate(names)}
    cut = [None, [0, layers] if memory else None]
    (path / "qnn" / SOC).mkdir(parents=True)
    for name, content in files.items():
        (path / "qnn" / SOC / name).write_bytes(content)
    entry = {
        "chip": "Snapdragon 8 Elite",
        "soc_model": 69,
        "htp_arch": 79,
        "precision": "float16",
        "context": 64,
        "chunk": 32,
        "embed": "embed.onnx",
        "decode": [{"file": f"decode.{i}.onnx", "rows": rows} for i, rows in enumerate(cut)],
        "prefill": [{"file": f"prefill.{i}.onnx", "rows": rows} for i, rows in enumerate(cut)],
        "head": "head.onnx",
        "dense_decode": [{"file": "dense_decode.0.onnx", "rows": None}] if dense else None,
        "dense_prefill": [{"file": "dense_prefill.0.onnx", "rows": None}] if dense else None,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "tools": {"onnxruntime-qnn": "2.7.0"},
    }
    write_targets(path, {SOC: entry | changes})
    return path


def write_targets(path: Path, targets: dict[str, Any]) -> None:
    """Replaces what a package's manifest says of compiled targets."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"qnn": targets}))
