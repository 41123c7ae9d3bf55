"""Writes linear layers as GPTQ, AWQ, AutoRound and compressed-tensors store them, naively: a code at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from meki.models.architectures.llama import Decoder
from meki.models.checkpoints.huggingface import save_pretrained

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass
class Codes:
    """A matrix [outputs, inputs]: scale * (code - zero)."""

    bits: int
    codes: Ints
    """[outputs, inputs], from 0 to 2^bits - 1, as zeros are."""
    zeros: Ints
    """[outputs, groups]"""
    scales: Tensor
    """[outputs, groups], of the type that is stored."""
    groups: Ints
    """[inputs]: the group of each."""

    def values(self) -> Floats:
        scales, values = self.scales.float().numpy(), np.zeros(self.codes.shape, np.float32)
        for row, column in np.ndindex(values.shape):
            group = self.groups[column]
            values[row, column] = scales[row, group] * np.float32(self.codes[row, column] - self.zeros[row, group])
        return values


def quantise(
    weight: Floats,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    groups: Ints | None = None,
) -> Codes:
    """Rounds to the nearest. group: inputs of one, -1 for all; groups: instead, the group of each input."""
    outputs, inputs = weight.shape
    if groups is None:
        groups = np.arange(inputs) // (inputs if group == -1 else group)
    most, middle, count = 2**bits - 1, 2 ** (bits - 1), int(groups.max()) + 1
    scales, zeros = np.zeros((outputs, count), np.float32), np.full((outputs, count), middle)
    for row, of in np.ndindex(scales.shape):
        its = weight[row, groups == of]
        low, high = min(its.min(), 0), max(its.max(), 0)
        scales[row, of] = max(high, -low) / (middle - 1) if symmetric else (high - low) / most
    stored = torch.from_numpy(scales).to(dtype)
    rounded = stored.float().numpy()
    if not symmetric:
        for row, of in np.ndindex(scales.shape):
            zeros[row, of] = min(round(-min(weight[row, groups == of].min(), 0) / rounded[row, of]), most)
    codes = np.clip(np.rint(weight / rounded[:, groups]) + zeros[:, groups], 0, most).astype(np.int64)
    return Codes(bits, codes, zeros, stored, groups)


def to_words(fields: list[tuple[int, int, int]], shape: tuple[int, int], bits: int) -> Tensor:
    """int32 of `shape`. fields: which word (flat), which of its places, what number."""
    words = [0] * (shape[0] * shape[1])
    for word, place, number in fields:
        assert 0 <= number < 1 << bits
        words[word] |= number << bits * place
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32).reshape(shape)


def down(numbers: Ints, bits: int) -> Tensor:
    """Neighbours of a column in a word: [n, k] -> int32 [n * bits / 32, k]."""
    per, (n, k) = 32 // bits, numbers.shape
    fields = [(i // per * k + j, i % per, int(numbers[i, j])) for i in range(n) for j in range(k)]
    return to_words(fields, (-(-n // per), k), bits)


def across(numbers: Ints, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Neighbours of a row in a word: [n, k] -> int32 [n, k * bits / 32]. order: which of 8 are at its places."""
    per, (n, k) = 32 // bits, numbers.shape
    width = -(-k // per)
    places = {inner: place for place, inner in enumerate(order or range(per))}
    fields = [(i * width + j // per, places[j % per], int(numbers[i, j])) for i in range(n) for j in range(k)]
    return to_words(fields, (n, width), bits)


Tensors = dict[str, Tensor]


def gptq_v2(its: Codes) -> Tensors:
    return {
        "qweight": down(its.codes.T, its.bits),
        "qzeros": across(its.zeros.T, its.bits),
        "scales": its.scales.T.contiguous(),
        "g_idx": torch.from_numpy(its.groups.astype(np.int32)),
    }


def gptq(its: Codes) -> Tensors:
    """The first version: in every word of zeros one is subtracted at each place, with what is borrowed."""
    tensors = gptq_v2(its)
    ones = sum(1 << at for at in range(0, 32, its.bits))
    words = [(int(word) - ones) % (1 << 32) for word in tensors["qzeros"].flatten()]
    signed = [word - (1 << 32) if word >> 31 else word for word in words]
    return tensors | {"qzeros": torch.tensor(signed, dtype=torch.int32).reshape(tensors["qzeros"].shape)}


def without_groups(pack: Callable[[Codes], Tensors]) -> Callable[[Codes], Tensors]:
    """As AutoRound has it."""
    return lambda its: {name: tensor for name, tensor in pack(its).items() if name != "g_idx"}


def awq(its: Codes) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": across(its.codes.T, 4, order),
        "qzeros": across(its.zeros.T, 4, order),
        "scales": its.scales.T.contiguous(),
    }


def compressed(its: Codes) -> Tensors:
    tensors = {
        "weight_packed": across(its.codes, its.bits),
        "weight_scale": its.scales,
        "weight_shape": torch.tensor(its.codes.shape),
    }
    if (its.zeros != 2 ** (its.bits - 1)).any():
        tensors["weight_zero_point"] = down(its.zeros, its.bits)
    if (np.diff(its.groups) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(its.groups.astype(np.int32))
    return tensors


def older_compressed(its: Codes) -> Tensors:
    """Zeros in bytes."""
    return compressed(its) | {"weight_zero_point": torch.from_numpy(its.zeros - 2 ** (its.bits - 1)).to(torch.int8)}


COMPRESSED = {
    **{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}},
}
AUTO_ROUND = {"quant_method": "auto-round", "data_type": "int", "bits": 4, "group_size": 32}
LAYOUTS: dict[str, tuple[Callable[[Codes], Tensors], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "gptq_v2": (gptq_v2, {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 32}),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}),
    "auto_round": (without_groups(gptq_v2), {**AUTO_ROUND, "packing_format": "auto_round"}),
    "auto_round:auto_gptq": (without_groups(gptq), {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}),
    "auto_round:auto_awq": (awq, {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}),
    "auto_round, 2024": (
        without_groups(gptq),
        {**AUTO_ROUND, "quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
    ),
    "compressed-tensors": (compressed, COMPRESSED),
    "compressed-tensors, 2024": (older_compressed, COMPRESSED),
}
"""Each with what config.json says, of groups of 32 inputs."""


def write_folder(
    path: Path,
    model: Decoder,
    layout: str = "gptq",
    of: Callable[[str, Floats], Codes | None] = lambda _, weight: quantise(weight),
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Decoder:
    """Saves `model` with its linear layers quantised, and gives it the values that these then have.

    of: what becomes of the weight NAME; None: it stays. config: changes of quantization_config; extra: tensors.
    """
    save_pretrained(path, model, provenance={})
    pack, quantization = LAYOUTS[layout]
    tensors, weights = load_file(path / "model.safetensors"), model.state_dict()
    for name, weight in weights.items():
        stored = name if name == "lm_head.weight" else f"model.{name}"
        if not name.endswith("proj.weight") and name != "lm_head.weight":
            continue
        if (its := of(name, weight.numpy())) is not None:
            del tensors[stored]
            tensors |= {f"{stored.removesuffix('.weight')}.{field}": tensor for field, tensor in pack(its).items()}
            weight.copy_(torch.from_numpy(its.values()))
    save_file({**tensors, **(extra or {})}, path / "model.safetensors", {"format": "pt"})
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] = {**quantization, **(config or {})}
    (path / "config.json").write_text(json.dumps(whole))
    return model
