"""Exports a model to a package directory (docs/package-format.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meki.chat import parse_template
from meki.package.files import MANIFEST, check_target, list_files, replace_directory

from .decoder import Decoder
from .graph import check_exportable, write_graphs
from .quantize import WEIGHT_BLOCK
from .rom import RomLayout, write_rom
from .source import Source, model_source
from .tokenizer import TokenizerSpec, parse_tokenizer

FORMAT = "meki-package"
VERSION = 3

PhaseProgress = Callable[[str, int, int], object]
"""Called with (what is being written, done, in all)."""


def check_tokenizer(tokenizer: TokenizerSpec, vocab_size: int) -> None:
    """ValueError if it is not one, or if it has ids that the model does not know."""
    vocabulary = parse_tokenizer(tokenizer.json).get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: its largest token id is {largest}, but the model's vocabulary has {vocab_size} tokens; "
            "use the tokenizer that the model was trained with"
        )
    for field, ids in (("bos_token_id", [tokenizer.bos_token_id]), ("eos_token_ids", tokenizer.eos_token_ids)):
        for token in ids:
            if token is not None and not (type(token) is int and 0 <= token < vocab_size):
                raise ValueError(f"tokenizer: {field} has {token!r}, expected ids of 0 to {vocab_size - 1}")


def export_package(
    model: Decoder | Source,
    tokenizer: TokenizerSpec,
    out: Path,
    *,
    name: str,
    weights: str = "int8",
    rows: str = "float16",
    provenance: dict[str, str],
    card: str | None = None,
    overwrite: bool = False,
    progress: PhaseProgress | None = None,
) -> dict[str, Any]:
    """Writes `model` (a Decoder: float32, training form) as the package `out` and returns its manifest.

    weights: float32, int8 or int4; rows: float32, float16, int8 or int4; card: the text of the README. Nothing is at
    `out` before the package is complete. FileExistsError for an existing target (see `replace_directory`), ConfigError
    or ValueError for a model that cannot be exported so: shapes, tokenizer, or weights that are not finite.
    """
    source = model_source(model) if isinstance(model, Decoder) else model
    config = source.config
    check_target(out, MANIFEST, overwrite)
    check_exportable(config, weights)
    layout = RomLayout(config.vocab_size, config.layers, config.memory_dim, rows) if config.memory_dim else None
    check_tokenizer(tokenizer, config.vocab_size)
    if tokenizer.chat_template is not None:
        parse_template(tokenizer.chat_template)
    report: PhaseProgress = progress or (lambda phase, done, total: None)

    with replace_directory(out, MANIFEST, overwrite) as directory:
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
        (directory / "tokenizer.json").write_bytes(tokenizer.json)
        chat_template = None
        if tokenizer.chat_template is not None:
            chat_template = {"file": "chat_template.jinja", "variables": dict(tokenizer.special_tokens)}
            (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "architecture": config.to_dict(),
            "memory": memory,
            "stages": graphs.stages,
            "dense_stages": graphs.dense_stages,
            "weights": {
                "type": weights,
                "block": None if weights == "float32" else WEIGHT_BLOCK,
                "decode_bytes": graphs.decode_bytes,
                "dense_decode_bytes": graphs.dense_decode_bytes,
            },
            "tokenizer": {
                "file": "tokenizer.json",
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_ids": list(tokenizer.eos_token_ids),
                "chat_template": chat_template,
            },
            "sampling": dict(tokenizer.sampling),
            "files": list_files(directory, lambda done, total: report("checksums", done, total)),
            "quantization_error": quantization_error,
            "provenance": provenance,
        }
        (directory / MANIFEST).write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    return manifest
