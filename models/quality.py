"""The quality of a package: how far its predictions are from those of its source's own weights in float32."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from meki import Engine
from meki.evaluation.comparison import compare
from meki.evaluation.perplexity import HeldOut
from meki.package.files import MANIFEST, locked, write_file
from meki.package.signature import SIGNATURE

from .arguments import Opened, UsageError
from .package import PhaseProgress, export_package, manifest_text


def add_quality(package: Path, opened: Opened, file: Path, text: str, progress: PhaseProgress) -> dict[str, Any]:
    """Measures the package over `text`, that of `file`, and writes what it finds into the manifest, which is returned
    (`quality`, docs/package-format.md).

    The engine runs the package as it does by default. The reference is the opened model, exported with float32 weights
    and rows into a directory that is in the package as long as this takes, and run with a float32 KV cache. The package
    is unchanged until all is measured. UsageError for a text of less than two tokens, a model that is not the
    package's, and a signed package; OSError, RuntimeError, and as `Engine` and `export_package`.
    """
    signature = package / SIGNATURE
    if signature.exists():
        raise UsageError(
            f"{package}: is signed, and what is written into {MANIFEST} would make the signature wrong; "
            f"remove {signature}, and sign the package again afterwards"
        )
    engine = Engine(package)
    _check_same(package, engine.manifest, opened)
    context = engine.session().context
    held_out = HeldOut.of_text(engine, text, context)
    if held_out.tokens < 2:
        raise UsageError(f"{file}: has {held_out.tokens} token; give a text of at least two")
    with _reference(package, opened, progress) as reference:
        found = compare(reference, engine, held_out, context, functools.partial(progress, "predictions"))
    quality = {
        "source": opened.provenance["source"],
        "text": file.name,
        "bytes": held_out.bytes,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": held_out.tokens,
        "context": context,
        "kv_type": engine.kv_type,
        **asdict(found),
    }
    with locked(package / MANIFEST, wait=True):
        manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
        if manifest["files"] != engine.manifest["files"]:
            raise RuntimeError(f"{package}: was replaced while it was measured; measure it again")
        manifest["quality"] = quality
        data = manifest_text(manifest).encode(errors="replace")  # names of files may not be UTF-8
        write_file(package / MANIFEST, data)
    return dict(manifest)


def _check_same(package: Path, manifest: dict[str, Any], opened: Opened) -> None:
    """UsageError if the package cannot be of this model: another configuration, or another tokenizer."""
    source = opened.provenance["source"]
    remedy = "give the source that the package was made of, and as it was converted"
    config, memory = opened.source.config, opened.source.config.memory
    section = memory and memory.manifest(config, memory.files(config, opened.source.weights))
    theirs = json.loads(json.dumps({"architecture": config.manifest(), "memory": section}))
    for part in theirs:
        its, expected = (described[part] or {"kind": None} for described in (manifest, theirs))
        for name in (name for name in expected if name in its and its[name] != expected[name]):
            got, wanted = shown(its[name]), shown(expected[name])
            raise UsageError(f"{package}: {part}.{name} is {got}, of {source} it is {wanted}; {remedy} (--set)")
    if (package / manifest["tokenizer"]["file"]).read_bytes() != opened.tokenizer.json:
        raise UsageError(f"{package}: its tokenizer is not that of {source}; {remedy} (--tokenizer)")


@contextlib.contextmanager
def _reference(package: Path, opened: Opened, progress: PhaseProgress) -> Iterator[Engine]:
    """The model in float32; its weights are mapped, not in memory."""
    config = opened.source.config
    needed, free = 4 * (config.ram_parameters + config.rom_parameters), shutil.disk_usage(package).free
    if free < needed:
        raise OSError(
            f"{package}: the source in float32 takes {needed / 1e9:.3f} GB there while it is compared with, "
            f"{free / 1e9:.3f} GB are free; make room"
        )
    with tempfile.TemporaryDirectory(dir=package, prefix=".reference.") as directory:
        out = Path(directory) / "float32"
        export_package(
            opened.source,
            opened.tokenizer,
            out,
            name="reference",
            weights="float32",
            rows="float32",
            provenance=opened.provenance,
            progress=progress,
        )
        yield Engine(out, kv_type="float32")
