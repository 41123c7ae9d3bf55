"""A naive runtime for packages: plain ONNX Runtime with a ROM reader written from docs/rom-format.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest


def crc32c_bitwise(data: bytes) -> int:
    """CRC-32C by its definition (RFC 3720), a bit at a time."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def read_rom(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """The header's fields and all rows, float32 [layers, vocab_size, row_dim], element by element; checks nothing."""
    names = "version mark vocab_size layers row_dim row_type group bundle_bytes bundle_stride data_offset file_bytes"
    header: dict[str, Any] = dict(zip(names.split(), struct.unpack_from("<IIQIIIIQQQQ", data, 8), strict=True))
    header.update(magic=data[:8], content_id=data[72:88], reserved=data[88:4092], checksum=data[4092:4096])
    layers, row_dim, kind = header["layers"], header["row_dim"], header["row_type"]
    groups = -(-row_dim // header["group"]) if header["group"] else 0
    row_bytes = {1: 2 * row_dim, 2: row_dim, 3: (row_dim + 1) // 2, 4: 4 * row_dim}[kind]
    rows = np.zeros((layers, header["vocab_size"], row_dim), np.float32)
    for token in range(header["vocab_size"]):
        start = header["data_offset"] + token * header["bundle_stride"]
        scales = struct.unpack_from(f"<{layers * groups}e", data, start)
        for layer in range(layers):
            row = start + 2 * layers * groups + layer * row_bytes
            for i in range(row_dim):
                if kind in (1, 4):
                    code = "<e" if kind == 1 else "<f"
                    rows[layer, token, i] = struct.unpack_from(code, data, row + struct.calcsize(code) * i)[0]
                    continue
                if kind == 2:
                    code = struct.unpack_from("<b", data, row + i)[0]
                else:
                    code = (data[row + i // 2] >> (4 * (i % 2)) & 15) - 8
                rows[layer, token, i] = np.float32(scales[layer * groups + i // header["group"]]) * np.float32(code)
    return header, rows


class ReferenceSession:
    """One sequence on one package. Every buffer is bound by hand; the KV cache is updated in place."""

    def __init__(self, package: Path, capacity: int | None = None) -> None:
        self.manifest = json.loads((package / "manifest.json").read_text())
        self.architecture = self.manifest["architecture"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.stages = [
            onnxruntime.InferenceSession(package / stage["file"], options, providers=["CPUExecutionProvider"])
            for stage in self.manifest["stages"]
        ]
        memory = self.manifest["memory"]
        self.rows = read_rom((package / memory["file"]).read_bytes())[1] if memory else None
        shape = (
            1,
            self.architecture["kv_heads"],
            capacity or self.architecture["context"],
            self.architecture["head_dim"],
        )
        # Garbage beyond the sequence must not matter: NaN shows it if it does.
        self.cache = {
            f"{layer}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32))
            for layer in range(self.architecture["layers"])
            for part in ("key", "value")
        }
        self.length = 0

    def step(self, ids: np.ndarray, logit_index: list[int] | None = None) -> np.ndarray:
        """Appends tokens; float32 logits [len(logit_index), vocab_size], of all of them if None."""
        index = np.arange(len(ids)) if logit_index is None else np.array(logit_index)
        self.length += len(ids)
        values: dict[str, np.ndarray] = {
            "token_ids": np.array(ids, np.int64)[None],
            "seqlens_k": np.array([self.length - 1], np.int32),
            "total_sequence_length": np.array(self.length, np.int32),
            "logit_index": index.astype(np.int64),
        }
        if self.rows is not None:
            values["rows"] = np.ascontiguousarray(self.rows[:, ids])
        for stage in self.stages:
            binding = stage.io_binding()
            for value in stage.get_inputs():
                if value.name.startswith("past."):
                    binding.bind_ortvalue_input(value.name, self.cache[value.name.removeprefix("past.")])
                else:
                    binding.bind_cpu_input(value.name, values[value.name])
            outputs = []
            for value in stage.get_outputs():
                if value.name.startswith("present."):
                    binding.bind_ortvalue_output(value.name, self.cache[value.name.removeprefix("present.")])
                else:
                    binding.bind_output(value.name, "cpu")
                    outputs.append(value.name)
            stage.run_with_iobinding(binding)
            bound = dict(zip((v.name for v in stage.get_outputs()), binding.get_outputs(), strict=True))
            values.update({name: bound[name].numpy() for name in outputs})
        return values["logits"]


@pytest.fixture(scope="session")
def reference_session() -> type[ReferenceSession]:
    return ReferenceSession


@pytest.fixture(scope="session")
def naive_rom() -> Callable[[bytes], tuple[dict[str, Any], np.ndarray]]:
    return read_rom


@pytest.fixture(scope="session")
def naive_crc32c() -> Callable[[bytes], int]:
    return crc32c_bitwise
