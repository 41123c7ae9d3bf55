"""memory.rom as written, through a naive reader of docs/rom-format.md (conftest.read_rom)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki import _core
from meki.models.quantize import quantize_rows
from meki.models.rom import RomLayout, StoredRows, write_rom

NaiveRom = Callable[[bytes], tuple[dict[str, Any], np.ndarray]]


def blocks_of(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, rows.shape[1], size):
        yield rows[:, start : start + size]


@settings(max_examples=25, deadline=None)
@given(
    vocab_size=st.integers(1, 40),
    layers=st.integers(1, 4),
    row_dim=st.integers(1, 67),
    row_type=st.sampled_from(["float16", "int8", "int4", "float32"]),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_byte(
    tmp_path_factory: pytest.TempPathFactory,
    naive_rom: NaiveRom,
    naive_crc32c: Callable[[bytes], int],
    vocab_size: int,
    layers: int,
    row_dim: int,
    row_type: str,
    block: int,
    seed: int,
) -> None:
    rows = np.random.default_rng(seed).standard_normal((layers, vocab_size, row_dim), dtype=np.float32)
    path = tmp_path_factory.mktemp("rom") / "memory.rom"
    summary = write_rom(path, RomLayout(vocab_size, layers, row_dim, row_type), blocks_of(rows, block))
    data = path.read_bytes()
    header, stored = naive_rom(data)

    code, group, row_bytes = {
        "float16": (1, 0, 2 * row_dim),
        "int8": (2, row_dim, row_dim),
        "int4": (3, 32, (row_dim + 1) // 2),
        "float32": (4, 0, 4 * row_dim),
    }[row_type]
    payload = layers * (row_bytes + (2 * -(-row_dim // group) if group else 0))
    unit = 4 if payload + 4 < 256 else 64
    stride = -(-(payload + 4) // unit) * unit
    content_id = hashlib.sha256(data[4096:]).digest()[:16]
    expected = {
        **{"magic": b"MEKIROM\n", "version": 1, "mark": 0x01020304},
        **{"entries": vocab_size, "layers": layers, "row_dim": row_dim, "row_type": code, "group": group},
        **{"bundle_bytes": payload + 4, "bundle_stride": stride, "data_offset": 4096},
        **{"file_bytes": -(-(4096 + vocab_size * stride) // 4096) * 4096, "content_id": content_id},
        **{"reserved": bytes(4004), "checksum": struct.pack("<I", naive_crc32c(data[:4092]))},
    }
    assert header == expected
    assert len(data) == header["file_bytes"]
    assert summary.content_id == content_id.hex()

    for token in range(vocab_size):
        bundle = data[4096 + token * stride : 4096 + (token + 1) * stride]
        assert bundle[payload : payload + 4] == struct.pack("<I", naive_crc32c(bundle[:payload]))
        assert bundle[payload + 4 :] == bytes(stride - payload - 4)
        if row_type == "int4" and row_dim % 2:
            for layer in range(layers):
                assert bundle[payload - (layers - layer - 1) * row_bytes - 1] >> 4 == 8
    assert data[4096 + vocab_size * stride :] == bytes(len(data) - 4096 - vocab_size * stride)

    np.testing.assert_array_equal(stored, quantize_rows(rows, row_type, "rows")[2])
    error = np.linalg.norm(stored.astype(np.float64) - rows) / np.linalg.norm(rows)
    # The same sum in another order.
    assert summary.relative_error == pytest.approx(error, rel=1e-6, abs=1e-12)


FINITE = np.array([half for half in range(1 << 16) if half & 0x7C00 != 0x7C00], np.uint16).view(np.float16)
"""Every scale that there can be."""


@settings(max_examples=25, deadline=None)
@given(
    entries=st.integers(1, 40),
    layers=st.integers(1, 4),
    row_dim=st.integers(1, 100),
    row_type=st.sampled_from(["int8", "int4"]),
    grouped=st.booleans(),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_stored_rows(
    tmp_path_factory: pytest.TempPathFactory,
    naive_rom: NaiveRom,
    entries: int,
    layers: int,
    row_dim: int,
    row_type: str,
    grouped: bool,
    block: int,
    seed: int,
) -> None:
    """Codes and scales go into the file as they are: those of the least code and of either sign, too."""
    group = 32 if grouped or row_type == "int4" else row_dim
    low, high = (-128, 127) if row_type == "int8" else (-8, 7)
    generator = np.random.default_rng(seed)
    codes = generator.integers(low, high, (layers, entries, row_dim), np.int8, endpoint=True)
    scales = generator.choice(FINITE, (layers, entries, -(-row_dim // group)))
    parts = zip(blocks_of(codes, block), blocks_of(scales, block), strict=True)
    path = tmp_path_factory.mktemp("rom") / "memory.rom"
    layout = RomLayout(entries, layers, row_dim, row_type, grouped)
    summary = write_rom(path, layout, (StoredRows(*part) for part in parts))
    assert summary.relative_error == 0.0

    header, stored = naive_rom(path.read_bytes())
    assert header["group"] == group
    spread = scales.astype(np.float32).repeat(group, axis=2)[..., :row_dim]
    np.testing.assert_array_equal(stored, spread * codes.astype(np.float32))
    rom = _core.Rom(path)
    rom.verify(0, entries)
    assert (rom.info.row_type, rom.info.content_id) == (row_type, summary.content_id)


@pytest.mark.parametrize(
    ("layout", "codes", "scales", "message"),
    [
        (("int8",), np.zeros((2, 10, 64)), np.ones((2, 10, 2)), "codes .* with scales .* do not fit"),
        (("int8", True), np.zeros((2, 10, 64)), np.ones((2, 10, 1)), "codes .* with scales .* do not fit"),
        (("int4",), np.zeros((2, 10, 64)), np.ones((2, 9, 2)), "codes .* with scales .* do not fit"),
        (("float16",), np.zeros((2, 10, 64)), np.ones((2, 10, 0)), "codes .* with scales .* do not fit"),
        (("int8", True), np.zeros((2, 10, 32)), np.ones((2, 10, 1)), "rows .* do not fit"),
        (("int4",), np.zeros((2, 10, 64)), np.full((2, 10, 2), -np.inf), "bundles 0 to 9: has scales that are infin"),
        (("int4",), np.full((2, 10, 64), -9), np.ones((2, 10, 2)), "codes are -9 to -9, expected -8 to 7"),
    ],
)
def test_stored_rows_that_do_not_fit(
    tmp_path: Path, layout: tuple[Any, ...], codes: np.ndarray, scales: np.ndarray, message: str
) -> None:
    rows = StoredRows(codes.astype(np.int8), scales.astype(np.float16))
    with pytest.raises(ValueError, match=message):
        write_rom(tmp_path / "r", RomLayout(10, 2, 64, *layout), [rows])
    assert list(tmp_path.iterdir()) == []


def test_float_rows_in_groups(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bundles 0 to 9: float32 values do not fit"):
        write_rom(tmp_path / "r", RomLayout(10, 2, 64, "int8", grouped=True), [np.ones((2, 10, 64), np.float32)])


def test_crc32c_known_answer(naive_crc32c: Callable[[bytes], int]) -> None:
    """The reference of these tests against RFC 3720, B.4: 32 bytes of zeros, and 0, 1, .., 31."""
    assert naive_crc32c(bytes(32)) == 0x8A9136AA
    assert naive_crc32c(bytes(range(32))) == 0x46DD794E


def test_progress_ends_at_the_vocabulary(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    rows = np.ones((2, 10, 3), np.float32)
    write_rom(tmp_path / "r", RomLayout(10, 2, 3, "int8"), blocks_of(rows, 4), lambda *call: calls.append(call))
    assert calls == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 9, 3), "got rows of 9 bundles, expected 10"),
        ((2, 11, 3), "bundles 0 to 10 do not fit"),
        ((1, 10, 3), "do not fit"),
        ((2, 10, 4), "do not fit"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_rom(tmp_path / "r", RomLayout(10, 2, 3, "int8"), [np.ones(shape, np.float32)])
    assert list(tmp_path.iterdir()) == []


def test_a_bad_value_names_the_bundles_and_leaves_nothing(tmp_path: Path) -> None:
    rows = np.ones((2, 10, 3), np.float32)
    rows[1, 6, 0] = np.nan
    with pytest.raises(ValueError, match="memory rows of bundles 4 to 7"):
        write_rom(tmp_path / "r", RomLayout(10, 2, 3, "int8"), blocks_of(rows, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("entries", 0), ("entries", 2**31), ("layers", 65_536), ("row_dim", 0), ("row_dim", 1_048_577)],
)
def test_layouts_beyond_the_format(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"ROM {field}: got {value}"):
        RomLayout(**{"entries": 10, "layers": 2, "row_dim": 3, "row_type": "int8", field: value})
    with pytest.raises(ValueError, match="row type: got 'int2'"):
        RomLayout(10, 2, 3, "int2")
    with pytest.raises(ValueError, match="row type: got 'float16' with scales"):
        RomLayout(10, 2, 3, "float16", grouped=True)
