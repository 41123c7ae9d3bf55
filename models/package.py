"""Exports a model to a package directory (docs/package-format.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from meki.package import file_sha256

from .decoder import Decoder
from .graph import check_exportable, write_graphs
from .quantize import WEIGHT_BLOCK
from .rom import RomLayout, write_rom
from .source import Source, model_source
from .tokenizer import END_OF_STORY

FORMAT = "meki-package"
VERSION = 2
MANIFEST = "manifest.json"

PhaseProgress = Callable[[str, int, int], object]
"""Called with (what is being written, done, in all)."""


@contextlib.contextmanager
def replace_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory beside `path`; renames it to `path` if the block succeeds, removes it otherwise.

    FileExistsError if `path` exists, unless it is a package and `overwrite` is set.
    """
    check_target(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(path: Path, overwrite: bool) -> None:
    """FileExistsError if a package cannot be written to `path`."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another path, or overwrite it (--overwrite)")
    if path.exists() and not (path / MANIFEST).is_file():
        raise FileExistsError(
            f"{path}: exists and is not a package (no {MANIFEST}), so it is not overwritten; remove it"
        )


def check_tokenizer(tokenizer_json: bytes, vocab_size: int) -> Tokenizer:
    """The tokenizer. ValueError if it is not one, or if it has ids that the model does not know."""
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer: not in the tokenizers library's JSON format: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: its largest token id is {largest}, but the model's vocabulary has {vocab_size} tokens; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def _list_files(directory: Path, progress: Callable[[int, int], object]) -> dict[str, dict[str, Any]]:
    paths = sorted(directory.iterdir())
    total, done = sum(path.stat().st_size for path in paths), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path, advance)} for path in paths}


def export_package(
    model: Decoder | Source,
    tokenizer_json: bytes,
    out: Path,
    *,
    name: str,
    weights: str = "int8",
    rows: str = "float16",
    provenance: dict[str, str],
    card: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: PhaseProgress | None = None,
) -> dict[str, Any]:
    """Writes `model` (a Decoder: float32, training form) as the package `out` and returns its manifest.

    weights: float32, int8 or int4; rows: float32, float16, int8 or int4; tokenizer_json: the text of a tokenizer.json;
    card: the text of the README. eos_token_ids: None means the end-of-story token, where the tokenizer has it. Nothing
    is at `out` before the package is complete. FileExistsError for an existing target (see `replace_directory`),
    ConfigError or ValueError for a model that cannot be exported so: shapes, tokenizer, or weights that are not finite.
    """
    source = model_source(model) if isinstance(model, Decoder) else model
    config = source.config
    check_target(out, overwrite)
    check_exportable(config, weights)
    layout = RomLayout(config.vocab_size, config.layers, config.memory_dim, rows) if config.memory_dim else None
    end = check_tokenizer(tokenizer_json, config.vocab_size).token_to_id(END_OF_STORY)
    if eos_token_ids is None:
        eos_token_ids = [] if end is None else [end]
    if not all(0 <= token < config.vocab_size for token in eos_token_ids):
        raise ValueError(f"eos_token_ids: got {list(eos_token_ids)}, expected ids of 0 to {config.vocab_size - 1}")
    report: PhaseProgress = progress or (lambda phase, done, total: None)

    with replace_directory(out, overwrite) as directory:
        graphs = write_graphs(
            config, source.weights, weights, directory, lambda done, total: report("dense weights", done, total)
        )
        errors = graphs.errors
        quantization_error: dict[str, Any] = {
            "weights": {"overall": errors.overall, "worst": errors.worst, "worst_tensor": errors.worst_tensor}
        }
        memory = None
        if layout:
            summary = write_rom(
                directory / "memory.rom",
                layout,
                source.row_blocks(),
                lambda done, total: report("memory rows", done, total),
            )
            memory = {"kind": "meki", "file": "memory.rom", "row_type": rows, "content_id": summary.content_id}
            quantization_error["rows"] = summary.relative_error
        (directory / "tokenizer.json").write_bytes(tokenizer_json)
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "architecture": dataclasses.asdict(config),
            "memory": memory,
            "stages": graphs.stages,
            "dense_stages": graphs.dense_stages,
            "weights": {
                "type": weights,
                "block": None if weights == "float32" else WEIGHT_BLOCK,
                "decode_bytes": graphs.decode_bytes,
                "dense_decode_bytes": graphs.dense_decode_bytes,
            },
            "tokenizer": {"file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": list(eos_token_ids)},
            "files": _list_files(directory, lambda done, total: report("checksums", done, total)),
            "quantization_error": quantization_error,
            "provenance": provenance,
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest
