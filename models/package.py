"""Exports a model to a package directory (docs/package-format.md)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from meki.chat import parse_template
from meki.package.files import MANIFEST, check_target, list_files, replace_directory

from .architectures.base import Architecture, Model
from .blocks import BLOCK, Floats
from .calibration import CalibratedBlocks
from .config import ConfigError
from .graph.cpu import CpuGraph, PackedGraph
from .graph.tensors import TensorFile
from .graph.weights import WEIGHTS_FILE, MatrixBlocks, Progress, WeightStore
from .quantize import SOURCE, WEIGHT_TYPES, Int4Recipe
from .rom import RomLayout, StoredRows, write_rom
from .source import Source, model_source
from .tokenizer import TokenizerSpec, parse_tokenizer

FORMAT = "meki-package"
VERSION = 6
_HEAD_DIM_MULTIPLE, _MOST_HEAD_DIM = 16, 512  # of heads that the runtime's attention takes

PhaseProgress = Callable[[str, int, int], object]
"""Called with (what is being written, done, in all)."""


def no_progress(phase: str, done: int, total: int) -> None:
    """A `PhaseProgress` that nobody sees."""


def manifest_text(manifest: dict[str, Any]) -> str:
    """What manifest.json has."""
    return json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_exportable(config: Architecture, weight_type: str) -> None:
    """ConfigError if the runtime could not run a graph of this configuration with such weights."""
    if weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"weight type: got {weight_type!r}, expected one of {', '.join(WEIGHT_TYPES)}")
    for head_dim in config.head_dims:
        if head_dim % _HEAD_DIM_MULTIPLE == 0 and head_dim <= _MOST_HEAD_DIM:
            continue
        raise ConfigError(
            f"head_dim is {head_dim}: the runtime's attention needs a multiple of {_HEAD_DIM_MULTIPLE} up to "
            f"{_MOST_HEAD_DIM}; "
            "such a model cannot be exported"
        )
    memory = {next(iter(config.memory.SETTINGS)): config.memory.dim} if config.memory else {}
    for name, size in {**config.widths(), **memory}.items():
        if size % BLOCK and weight_type not in ("float32", SOURCE):
            raise ConfigError(
                f"{name} is {size}: {weight_type} weights need a multiple of {BLOCK}; use float32 weights"
            )


def matrix_blocks(source: Source, weights: str, calibration: Tensor | None) -> MatrixBlocks | None:
    """What decides the types of matrices that are not float32; as of `export_package`."""
    match weights:
        case "int4" if calibration is not None:
            return CalibratedBlocks(source, calibration)
        case "int4":
            return Int4Recipe(source.config.layers)
        case _:
            return source.blocks if weights == SOURCE else None


def write_graphs(
    source: Source,
    weights: str,
    directory: Path,
    progress: Progress | None = None,
    calibration: Tensor | None = None,
) -> tuple[CpuGraph, CpuGraph | None]:
    """Writes the stages and their weights file into `directory`, of a model with a memory also those without it.

    ValueError for weights that are not finite.
    """
    config = source.config
    with (directory / WEIGHTS_FILE).open("wb") as file:
        blocks = matrix_blocks(source, weights, calibration)
        store = WeightStore(source.weights, TensorFile(file), config.ram_parameters, progress, blocks)
        kind = CpuGraph if weights == "float32" else PackedGraph
        graph, dense = kind(config, store), None
        config.program(graph)
        for index, stage in enumerate(graph.stages):
            stage.save(directory / f"stage{index}.onnx")
        if config.memory:
            backbone = config.without_memory()
            dense = kind(backbone, store)
            backbone.program(dense)
            dense.stages[0].save(directory / "dense.onnx")
    return graph, dense


def memory_rows(source: Source, rows: str) -> tuple[RomLayout, Callable[[], Iterator[Floats | StoredRows]]]:
    """The ROM of a model with a memory, and what is written to it; rows: as of `export_package`. ConfigError."""
    memory = source.config.memory
    assert memory is not None
    bundles = memory.bundles(source.config)
    if rows != SOURCE:
        return RomLayout(*bundles, rows), source.row_blocks
    if source.rows is None:
        raise ConfigError(
            f"rows: {SOURCE!r} keeps the rows of a checkpoint that has them in int8 or int4 with a scale for every "
            "32 values, this one does not; choose another type"
        )
    return RomLayout(*bundles, source.rows.row_type, grouped=True), source.rows.blocks


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
    model: Model | Source,
    tokenizer: TokenizerSpec,
    out: Path,
    *,
    name: str,
    weights: str = "int8",
    rows: str = "float16",
    calibration: Tensor | None = None,
    provenance: dict[str, str],
    card: str | None = None,
    overwrite: bool = False,
    progress: PhaseProgress = no_progress,
) -> dict[str, Any]:
    """Writes `model` (a `Model`: float32, training form) as the package `out` and returns its manifest.

    weights: of WEIGHT_TYPES; rows: of ROW_TYPES, or "source", as the checkpoint has them; calibration: a text's token
    ids, int64 [n, length], with which int4 weights are rounded (without, each for itself); card: the text of the
    README. Nothing is at `out` before the package is complete. FileExistsError for an existing target (see
    `replace_directory`), ConfigError or ValueError for a model that cannot be exported so: shapes, tokenizer, or
    weights that are not finite.
    """
    source = model_source(model) if isinstance(model, Model) else model
    config = source.config
    check_target(out, MANIFEST, overwrite)
    check_exportable(config, weights)
    if weights == SOURCE and source.blocks is None:
        raise ConfigError(
            f"weights: {SOURCE!r} keeps the quantised matrices of a checkpoint, this one has none; choose another type"
        )
    table = config.memory
    rom = memory_rows(source, rows) if table else None
    check_tokenizer(tokenizer, config.vocab_size)
    if tokenizer.chat_template is not None:
        parse_template(tokenizer.chat_template)

    with replace_directory(out, MANIFEST, overwrite) as directory:
        graph, dense = write_graphs(
            source, weights, directory, functools.partial(progress, "dense weights"), calibration
        )
        errors = graph.store.errors
        quantization_error: dict[str, Any] = {
            "weights": {"overall": errors.overall, "worst": errors.worst, "worst_tensor": errors.worst_tensor}
        }
        memory = None
        if table and rom:
            layout, blocks = rom
            extra = table.files(config, source.weights)  # may fail: before the rows, which take long
            report = functools.partial(progress, "memory rows")
            summary = write_rom(directory / "memory.rom", layout, blocks(), report)
            file = {"file": "memory.rom", "row_type": layout.row_type, "content_id": summary.content_id}
            for file_name, data in extra.items():
                (directory / file_name).write_bytes(data)
            memory = {**table.manifest(config, extra), **file}
            quantization_error["rows"] = summary.relative_error
        (directory / "tokenizer.json").write_bytes(tokenizer.json)
        chat_template = None
        if tokenizer.chat_template is not None:
            chat_template = {"file": "chat_template.jinja", "variables": dict(tokenizer.special_tokens)}
            (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
        parameters = {"ram": config.ram_parameters, "rom": config.rom_parameters}
        if config.active_parameters != config.ram_parameters:
            parameters["active"] = config.active_parameters
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "architecture": config.manifest(),
            "kv_caches": config.kv_caches(),
            "memory": memory,
            "parameters": parameters,
            "stages": [
                {"file": f"stage{index}.onnx", "rows": stage.rows and [stage.rows.start, stage.rows.stop]}
                for index, stage in enumerate(graph.stages)
            ],
            "dense_stages": dense and [{"file": "dense.onnx"}],
            "weights": {
                "type": weights,
                "block": None if weights == "float32" else BLOCK,
                "types": graph.store.types,
                "decode_bytes": graph.decode_bytes,
                "dense_decode_bytes": dense and dense.decode_bytes,
            },
            "tokenizer": {
                "file": "tokenizer.json",
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_ids": list(tokenizer.eos_token_ids),
                "chat_template": chat_template,
            },
            "sampling": dict(tokenizer.sampling),
            "files": list_files(directory, functools.partial(progress, "checksums")),
            "quantization_error": quantization_error,
            "provenance": provenance,
        }
        (directory / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    return manifest
