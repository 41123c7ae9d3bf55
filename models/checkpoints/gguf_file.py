"""GGUF files of the architectures llama, smollm3, qwen2, qwen3, gemma3 and gemma4, read with the gguf package.

Keys and tensor names are those of the GGUF specification; what they leave open is as llama.cpp has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFEndian, GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from ..architectures.base import Architecture
from ..blocks import Blocks, Codes
from ..memories.base import ALL
from .checkpoint import Checkpoint, CheckpointError, Part, check_setting, check_window, make_config
from .gemma_config import RELATIVES, unused_weights
from .gguf_blocks import empty_blocks, unpack
from .gguf_gemma import GEMMA, ROPE_FACTORS, gemma_fields
from .gguf_names import stored_name
from .gguf_tokenizer import read_gguf_tokenizer

_MAGIC = b"GGUF"
_ARCHITECTURES = ("llama", "smollm3", "qwen2", "qwen3", *GEMMA)
_PAIRED = ("llama", "smollm3")
"""Have their queries and keys in the order of rotated pairs."""
_OLDER_TYPES = ("Q4_2", "Q4_3", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8")
_NEWER_TYPES = ("MXFP4", "NVFP4", "Q1_0", "Q2_0")
_TYPE_NAMES = dict(zip((4, 5, 31, 32, 33, 36, 37, 38, 39, 40, 41, 42), _OLDER_TYPES + _NEWER_TYPES, strict=True))
"""Types of tensors that ggml had once, or that versions of the gguf package may not have yet."""
_AT_ONCE = 1 << 22  # values that are unpacked together: what is in memory beside the result
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""Of a file of a split model: the model's, its number from 1, how many there are."""

_FIELDS = {
    "layers": "block_count",
    "hidden": "embedding_length",
    "ffn": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "context": "context_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Settings and their keys, without the architecture's name before them."""


class _UnknownTypeError(Exception):
    """A tensor is of no type that the library has."""


class _Reader(GGUFReader):
    """The library's reader, but the end of the file is an error: it would go on with empty values, without an end if
    the length of an array is damaged. And a type that it does not know is an error of its own; arrays are read fast."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(f"it ends after {len(self.data)} bytes, in the middle of what is at {offset}")
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """An array at once: the library's views, one of each element, take half a minute for a large vocabulary."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = GGUFValueType(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        start, types = orig_offs + 12, [GGUFValueType.ARRAY, kind]
        if kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [values], [0], types
        if kind != GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        order: Literal["big", "little"] = "big" if self.endianess == GGUFEndian.BIG else "little"
        data, texts, at = self.data.data, [], start
        for _ in range(count):
            first = at + 8
            at = first + int.from_bytes(data[at:first], order)
            if at > len(data) or first > len(data):
                raise ValueError(f"it ends after {len(data)} bytes, in the middle of a text at {first - 8}")
            texts.append(data[first:at])
        return at - orig_offs, texts, list(range(count)), types

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            _, name, _, _, (type,), _ = field.parts
            if type not in GGMLQuantizationType.__members__.values():
                known = f" ({_TYPE_NAMES[type]})" if type in _TYPE_NAMES else ""
                raise _UnknownTypeError(
                    f"tensor {bytes(name).decode(errors='replace')} is stored as type {type}{known}"
                )
        super()._build_tensors(start_offs, fields)


class GgufFile:
    """The metadata and the tensors of a GGUF file, or of all parts of a split model. Tensors are read, not mapped: what
    was read is not kept."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata. path: of the file, or of the first part. OSError; CheckpointError for a file that is no
        complete GGUF file, and for parts that are missing or another model's."""
        self.path = path
        self.metadata, tensors = _read_head(path)
        self._tensors = {tensor.name: (path, tensor) for tensor in tensors}
        """And which file has it."""
        parts = _find_parts(path, self.metadata)
        for number, part in enumerate(parts[1:], 1):
            self._add(part, {"split.no": number, "split.count": len(parts)})
        total = self.metadata.get("split.tensors.count")
        if len(parts) > 1 and total != len(self._tensors):
            raise CheckpointError(
                f"{path}: split.tensors.count is {total!r}, but its {len(parts)} parts have {len(self._tensors)}; they "
                "are not of one model, download them again"
            )
        self.shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, (_, tensor) in self._tensors.items()}

    def _add(self, part: Path, expected: Mapping[str, int]) -> None:
        metadata, tensors = _read_head(part)
        for key, value in expected.items():
            if (got := metadata.get(key)) != value:
                raise CheckpointError(
                    f"{part}: {key} is {got!r}, expected {value} of a part of {self.path.name}; it is another model's, "
                    "download it again"
                )
        for tensor in tensors:
            if tensor.name in self._tensors:
                there = self._tensors[tensor.name][0].name
                raise CheckpointError(f"{part}: tensor {tensor.name} is also in {there}; expected it once")
            self._tensors[tensor.name] = part, tensor

    @property
    def types(self) -> str:
        """The types of the tensors, the one with the most values first, such as "Q4_K, F32"."""
        values: dict[str, int] = {}
        for _, tensor in self._tensors.values():
            values[tensor.tensor_type.name] = values.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        return ", ".join(sorted(values, key=lambda name: -values[name]))

    def number(self, key: str, default: float | None = None) -> Any:
        """The value of `key`; of an array (of one value a layer) that of all. CheckpointError if they differ, and for a
        text."""
        value = self.metadata.get(key, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if value is not None and type(value) not in (int, float):
            raise CheckpointError(f"{self.path}: {key} is {value!r}; supported is one number")
        return value

    def rope_factor(self, architecture: str) -> float:
        """What linear scaling divides all rotary frequencies by; 1: there is none. CheckpointError for another kind of
        scaling."""
        kind = self.metadata.get(f"{architecture}.rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise CheckpointError(
                f"{self.path}: {architecture}.rope.scaling.type is {kind!r}; supported are 'none' and 'linear'"
            )
        keys = ("rope.scaling.factor", "rope.scale_linear") if kind == "linear" else ()  # the second is of older files
        return next(filter(None, (self.number(f"{architecture}.{key}") for key in keys)), 1.0)  # 0 says nothing

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """float32; those rows of dimension 0. Reads and dequantises no others."""
        shape = self.shapes[name]
        if len(shape) == 1:  # a row of its own
            return self._read(name, 0, (1, *shape))[0][rows]
        start, stop, _ = rows.indices(shape[0])
        return self._read(name, start, (stop - start, *shape[1:]))

    def blocks(self, name: str, rows: slice = ALL) -> Blocks | None:
        """Those rows of a matrix as the file holds them (`unpack`); reads no others. None if it is no matrix, or if no
        type of BLOCK_TYPES holds it. CheckpointError for a scale or a minimum that float16 does not hold."""
        shape, type = self.shapes[name], self._tensors[name][1].tensor_type
        if len(shape) != 2:
            return None
        start, stop, _ = rows.indices(shape[0])
        whole = empty_blocks(type, stop - start, shape[1])
        if whole is None:
            return None
        for at, stored in self._pieces(name, start, (stop - start, shape[1])):
            try:
                piece = unpack(stored, type)
            except ValueError as error:
                raise CheckpointError(
                    f"{self._tensors[name][0]}: tensor {name}, stored as {type.name}: {error}; choose another "
                    "quantisation of the model, or have its weights rounded anew: --weights int8"
                ) from error
            if piece is None:
                return None
            whole.codes[at], whole.scales[at] = piece.codes, piece.scales
            if whole.minimums is not None and piece.minimums is not None:
                whole.minimums[at] = piece.minimums
        return whole

    def is_rounded(self, name: str) -> bool:
        """Whether it is a matrix of a quantised type that no type of BLOCK_TYPES holds."""
        values, _ = GGML_QUANT_SIZES[self._tensors[name][1].tensor_type]  # of a block: plain numbers have blocks of one
        return len(self.shapes[name]) == 2 and values > 1 and self.blocks(name, slice(0)) is None

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> Tensor:
        values, type = np.empty(shape, dtype=np.float32), self._tensors[name][1].tensor_type
        for at, stored in self._pieces(name, first, shape):
            values[at] = dequantize(stored.reshape(len(stored), *shape[1:-1], -1), type)
        return torch.from_numpy(values)

    def _pieces(self, name: str, first: int, shape: tuple[int, ...]) -> Iterator[tuple[slice, Codes]]:
        """A run of rows as it is stored, piece by piece: which of them, and uint8 [rows, bytes of a row]."""
        path, tensor = self._tensors[name]
        row = int(np.prod(shape[1:]))
        row_bytes, step = row * tensor.n_bytes // tensor.n_elements, max(1, _AT_ONCE // row)
        with open(path, "rb") as file:
            file.seek(tensor.data_offset + first * row_bytes)
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                stored = np.fromfile(file, np.uint8, rows * row_bytes)
                yield slice(start, start + rows), stored.reshape(rows, -1)


def _read_head(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """Metadata and where the tensors are, of one file. OSError; CheckpointError."""
    try:
        with np.errstate(all="raise"):  # of sizes that overflow
            reader = _Reader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
    except RecursionError as error:
        raise CheckpointError(
            f"{path}: its metadata has arrays within arrays without end, expected lists of values; the file is "
            "damaged or made to harm, download it again"
        ) from error
    except _UnknownTypeError as error:
        raise CheckpointError(
            f"{path}: {error}, which this version of the gguf package does not know; update it (pip install -U "
            "gguf) or choose another quantisation of the model"
        ) from error
    except (ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: not a complete GGUF file of version 2 or 3: {error}; download or convert it again"
        ) from error
    if reader.endianess == GGUFEndian.BIG:
        raise CheckpointError(f"{path}: is big-endian, expected little-endian; run gguf-convert-endian on it")
    for tensor in reader.tensors:
        _check_type(path, tensor)
    return metadata, reader.tensors


def _check_type(path: Path, tensor: ReaderTensor) -> None:
    type = tensor.tensor_type
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type][1]), np.uint8), type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} is stored as {type.name}, which the gguf package does not dequantise; "
            "choose another quantisation of the model"
        ) from error


def part_names(name: str) -> list[str]:
    """The files of a split model of which one has this name; of another name, that alone."""
    part = _PART_NAME.fullmatch(name)
    if part is None or not 1 <= int(part[2]) <= int(part[3]):
        return [name]
    return [f"{part[1]}-{number:05d}-of-{part[3]}.gguf" for number in range(1, int(part[3]) + 1)]


def _find_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The files of the model of which `path` is the first or the only one. CheckpointError if they are not there."""
    index, count = metadata.get("split.no", 0), metadata.get("split.count", 0)
    if count in (0, 1):
        return [path]
    name = _PART_NAME.fullmatch(path.name)
    if name is None or (int(name[2]) - 1, int(name[3])) != (index, count):
        raise CheckpointError(
            f"{path}: is a part of a split model, split.no is {index!r} and split.count {count!r}, expected a name "
            "that says so, such as NAME-00001-of-00003.gguf; give it the name that it had, beside the others"
        )
    parts = [path.with_name(part) for part in part_names(path.name)]
    if path != parts[0]:
        raise CheckpointError(f"{path}: is part {int(name[2])} of a split model; give the first, {parts[0]}")
    if missing := [part.name for part in parts if not part.is_file()]:
        others = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path}: is the first of {len(parts)} parts, expected all beside it; {', '.join(missing[:3])}{others} "
            f"{'is' if len(missing) == 1 else 'are'} missing, download the whole model"
        )
    return parts


def is_gguf(path: Path) -> bool:
    """By its first bytes or, so that a damaged file is named as such, by its name."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(len(_MAGIC)) == _MAGIC


def open_gguf(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The model in the file `path`. CheckpointError for what cannot be converted."""
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        relative = f": {RELATIVES[architecture]}" if architecture in tuple(RELATIVES) else ""
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}{relative}; supported are {', '.join(_ARCHITECTURES)}"
        )
    gemma = architecture in GEMMA
    _check_supported(file, architecture)
    fields = (gemma_fields if gemma else _fields)(file, architecture, overrides)
    config = make_config(path, fields, overrides, file, architecture if gemma else "llama")
    unused = {stored_name(name, gemma) for name in unused_weights(config)}
    unused |= {ROPE_FACTORS} if architecture != "gemma3" else set()
    return Checkpoint(
        path,
        config,
        file,
        {name: _part(name, shape, config, architecture) for name, shape in config.shapes().items()},
        read_tokenizer=lambda: read_gguf_tokenizer(path, file.metadata),
        provenance=_provenance(file, architecture),
        ignored=lambda name: name in unused,
        trimmed="vocab_size" in overrides,
        blocks=file.blocks
        if any(file.blocks(name, slice(0)) or file.is_rounded(name) for name in file.shapes)
        else None,
        rounded=file.is_rounded,
    )


def _check_supported(file: GgufFile, architecture: str) -> None:
    """CheckpointError for what this runtime does not compute."""
    path = file.path
    expected = {
        "general.type": "model",
        f"{architecture}.expert_count": 0,
        f"{architecture}.attention.causal": True,
        f"{architecture}.attention.scale": 0.0,  # that is, the architecture's own
        f"{architecture}.rope.scaling.attn_factor": 1.0,
    }
    for key, value in expected.items():
        if (got := file.metadata.get(key, value)) != value:
            whose = "; it is so in Gemma 4 26B-A4B" if key == "gemma4.expert_count" else ""
            raise CheckpointError(f"{path}: {key} is {got!r}; supported is {value!r}{whose}")
    projections = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
    if bias := next((name for name in file.shapes if name.endswith(".bias") and not name.endswith(projections)), None):
        raise CheckpointError(f"{path}: has the bias {bias}; supported are those of attn_q, attn_k and attn_v")


def _fields(file: GgufFile, architecture: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings."""
    stated = {field: file.number(f"{architecture}.{key}") for field, key in _FIELDS.items()}
    values = {field: value for field, value in stated.items() if value is not None} | dict(overrides)
    window = f"{architecture}.attention.sliding_window"
    check_window(file.path, window, file.number(window, 0) or None, values.get("context"))
    heads, hidden = values.get("heads"), values.get("hidden")
    if heads and hidden:
        values.setdefault("head_dim", hidden // heads)
    for name in values.keys() & {"head_dim", "layers"}:
        check_setting(file.path, name, values[name])
    head_dim = values.get("head_dim")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (got := file.number(f"{architecture}.{key}", head_dim)) != head_dim:
            raise CheckpointError(f"{file.path}: {architecture}.{key} is {got}; supported is head_dim, {head_dim}")
    return {
        "vocab_size": next(iter(file.shapes.get("token_embd.weight", ())), None),
        "kv_heads": heads,
        "rope_theta": 10_000.0,
        "qk_norm": architecture == "qwen3",
        "qkv_bias": "blk.0.attn_q.bias" in file.shapes,
        "tied_embeddings": "output.weight" not in file.shapes,
        "rope_factors": _rope_factors(file, architecture, (head_dim or 0) // 2),
        # Not in the file: every fourth layer, as the one model of this architecture has it.
        "nope_layers": tuple(range(3, values.get("layers", 0), 4)) if architecture == "smollm3" else (),
        **values,
    }


def _rope_factors(file: GgufFile, architecture: str, pairs: int) -> tuple[float, ...]:
    """Divisors of the rotary frequencies, as many as pairs; none if all are 1."""
    factors, factor = [1.0] * pairs, file.rope_factor(architecture)
    if (shape := file.shapes.get(ROPE_FACTORS)) is not None:
        if shape != (pairs,):
            raise CheckpointError(f"{file.path}: {ROPE_FACTORS} has shape {shape}, expected {(pairs,)}")
        factors = file.read(ROPE_FACTORS).tolist()
    factors = [factor * value for value in factors]
    return tuple(factors) if any(factor != 1.0 for factor in factors) else ()


def _part(name: str, shape: tuple[int, ...], config: Architecture, architecture: str) -> Part:
    """Where the decoder's weight `name` is found."""
    stored = stored_name(name, architecture in GEMMA)
    inner = name.rpartition(".")[0].split(".", 2)[-1]
    heads = {"self_attn.q_proj": config.heads, "self_attn.k_proj": config.kv_heads}.get(inner)
    if heads is None or architecture not in _PAIRED:
        return Part(stored, shape)
    return Part(stored, shape, lambda rows: _to_halves(rows, heads))


def _to_halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The rows of each head from rotated pairs (0, 1), (2, 3), ... to rotated halves (0, d/2), (1, d/2 + 1), ..."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _provenance(file: GgufFile, architecture: str) -> dict[str, str]:
    texts = {"name": "general.name", "license": "general.license"}
    stated = {field: str(file.metadata[key]) for field, key in texts.items() if key in file.metadata}
    return {"source": file.path.name, "format": "gguf", "architecture": architecture, "types": file.types, **stated}
