"""Packages that keep a memory's rows as a GGUF file has them, against what the gguf package takes those for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from meki.models import convert
from meki.models.architectures.gemma4 import Gemma4Config
from meki.models.arguments import Opened
from meki.models.checkpoints import Checkpoint, CheckpointError
from meki.models.checkpoints.checkpoint import Part, checkpoint_source
from meki.models.checkpoints.gguf_file import GgufFile
from meki.models.memories import base
from meki.models.memories.gemma_ple import GemmaPLEConfig
from meki.models.tokenizer import TokenizerSpec

ENTRIES, LAYERS = 250, 4
TABLE = GemmaPLEConfig.JOINT_TABLE


def checkpoint_of(path: Path, type: Type, dim: int = 64) -> tuple[Checkpoint, NDArray[np.float32]]:
    """A checkpoint whose table is of that type, all else in float32 under the decoder's own names; and what the table
    stands for, [layers, entries, dim]."""
    config = Gemma4Config(
        **{"vocab_size": 300, "layers": LAYERS, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16},
        **{"full_head_dim": 32, "window": 8, "full_layers": (2,), "context": 128, "norm_eps": 1e-6},
        memory=GemmaPLEConfig(dim, ENTRIES),
    )
    generator, writer = np.random.default_rng(1), GGUFWriter(path, "gemma4")
    table = None
    for name, shape in config.shapes().items():
        values = generator.standard_normal(shape, dtype=np.float32)
        kind = type if name == TABLE else Type.F32
        stored = quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        if name == TABLE:
            table = dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert table is not None
    file = GgufFile(path)
    checkpoint = Checkpoint(
        path,
        config,
        file,
        {name: Part(name, shape) for name, shape in config.shapes().items()},
        read_tokenizer=lambda: None,
        provenance={},
        ignored=lambda name: False,
        blocks=file.blocks,
    )
    rows = np.array([[table[t, layer * dim : (layer + 1) * dim] for t in range(ENTRIES)] for layer in range(LAYERS)])
    return checkpoint, rows


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> Callable[..., tuple[int, Path]]:
    """run(checkpoint, options): the exit code of meki-convert, and the package."""

    def run(checkpoint: Checkpoint, *options: str) -> tuple[int, Path]:
        opened = Opened(checkpoint_source(checkpoint), tokenizer_spec, {})
        monkeypatch.setattr(convert, "open_source", lambda *_: opened)
        out = tmp_path / "out"
        return convert.main([str(checkpoint.path), "-o", str(out), "--weights", "float32", *options]), out

    return run


@pytest.mark.parametrize(
    ("type", "row_type"), [(Type.Q4_0, "int4"), (Type.Q8_0, "int8"), (Type.Q5_0, "int8")], ids=lambda its: str(its)
)
@pytest.mark.parametrize("asked", [(), ("--rows", "source")], ids=["by default", "asked for"])
def test_rows_stay_as_they_are(
    run: Callable[..., tuple[int, Path]],
    naive_rom: Callable[[bytes], tuple[dict[str, Any], NDArray[np.float32]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    type: Type,
    row_type: str,
    asked: tuple[str, ...],
) -> None:
    monkeypatch.setattr(base, "BLOCK_BYTES", 100_000)  # several pieces, the last one shorter
    checkpoint, rows = checkpoint_of(tmp_path / "m.gguf", type)
    code, out = run(checkpoint, *asked)
    assert code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["memory"]["row_type"] == row_type
    assert manifest["quantization_error"]["rows"] == 0.0
    header, stored = naive_rom((out / "memory.rom").read_bytes())
    assert (header["entries"], header["layers"], header["row_dim"], header["group"]) == (ENTRIES, LAYERS, 64, 32)
    # A scale times a code, both of a few bits: exact in float32, however it is computed.
    np.testing.assert_array_equal(stored, rows)


def test_rows_are_rounded_where_that_is_asked_for(
    run: Callable[..., tuple[int, Path]],
    naive_rom: Callable[[bytes], tuple[dict[str, Any], NDArray[np.float32]]],
    tmp_path: Path,
) -> None:
    checkpoint, rows = checkpoint_of(tmp_path / "m.gguf", Type.Q8_0)
    code, out = run(checkpoint, "--rows", "float32")
    assert code == 0
    np.testing.assert_array_equal(naive_rom((out / "memory.rom").read_bytes())[1], rows)


@pytest.mark.parametrize(
    ("type", "dim"),
    [(Type.Q4_1, 64), (Type.F16, 64), (Type.Q8_0, 48)],
    ids=["a minimum", "floats", "a scale across rows"],
)
def test_rows_that_no_rom_holds(
    run: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str], tmp_path: Path, type: Type, dim: int
) -> None:
    checkpoint, _ = checkpoint_of(tmp_path / "m.gguf", type, dim)
    assert checkpoint_source(checkpoint).rows is None
    code, out = run(checkpoint, "--rows", "source")
    assert code == 1 and "rows: 'source' keeps the rows of a checkpoint that has them" in capsys.readouterr().err
    assert not out.exists()
    code, out = run(checkpoint)
    assert code == 0
    assert json.loads((out / "manifest.json").read_text())["memory"]["row_type"] == "float16"


def test_scales_that_turn_out_to_be_beyond_float16(tmp_path: Path) -> None:
    """As of MXFP4, whose type alone does not tell."""
    checkpoint, _ = checkpoint_of(tmp_path / "m.gguf", Type.Q8_0)
    read = checkpoint.blocks
    assert read is not None
    damaged = replace(checkpoint, blocks=lambda name, rows: read(name, rows) if rows.stop == 0 else None)
    rows = checkpoint_source(damaged).rows
    assert rows is not None
    with pytest.raises(CheckpointError, match=r"scales that float16 does not hold; .* --rows float16"):
        list(rows.blocks())
