"""Folders whose linear layers GPTQ, AWQ, AutoRound or compressed-tensors has quantised: config.json says how, and the
tensors of a layer become the one weight that they stand for, NAME.weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks import Blocks
from ..config import as_number
from ..memories.base import ALL
from .checkpoint import CheckpointError
from .quantized_layers import AwqLayer, FirstGptqLayer, GptqLayer, Layer, PackedLayer, Scheme
from .safetensors_files import SafetensorsFiles

_REMEDY = "take the original model, a GGUF file or another quantisation of it"
_ROTATIONS = ("rotation", "rotation_config", "spinquant_config", "transform_config")
"""Say that inputs are to be rotated, too."""
_DEFAULT_RUN = 128
"""Of all these methods."""
_BY_GROUP = (True, "group", "dynamic")
"""What actorder is where groups are of inputs in another order."""
_AUTO_ROUND: Mapping[str, type[Layer]] = {
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq"), FirstGptqLayer),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2"), GptqLayer),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq"), AwqLayer),
}
"""By packing_format; what may follow it is a kernel's name."""


class QuantizedFiles:
    """The tensors of safetensors files, those of quantised layers as the weights that they stand for."""

    def __init__(self, files: SafetensorsFiles, kind: type[Layer], scheme: Scheme) -> None:
        """kind: of all quantised layers. CheckpointError for a layer that cannot be read."""
        self._files = files
        ending = f".{kind.CODES}"
        names = [name.removesuffix(ending) for name in files.shapes if name.endswith(ending)]
        self._layers = {f"{name}.weight": kind(files, name, scheme) for name in names}
        members = {member for layer in self._layers.values() for member in layer.members()}
        self.shapes = {name: shape for name, shape in files.shapes.items() if name not in members}
        self.shapes |= {name: (layer.outputs, layer.inputs) for name, layer in self._layers.items()}

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """float32; of a quantised layer scale * (code - zero)."""
        layer = self._layers.get(name)
        return self._files.read(name, rows) if layer is None else torch.from_numpy(layer.values(rows))

    def blocks(self, name: str, rows: slice = ALL) -> Blocks | None:
        """Those rows of a layer as they are stored (`Layer.blocks`). None if it is not quantised, or not in blocks."""
        layer = self._layers.get(name)
        return None if layer is None else layer.blocks(rows)

    @property
    def has_blocks(self) -> bool:
        return any(layer.blocks(slice(0)) is not None for layer in self._layers.values())

    def is_zero_bias(self, name: str) -> bool:
        """Whether it is the bias of a quantised layer and changes nothing: some exporters give one to all."""
        weight = f"{name.removesuffix('.bias')}.weight"
        return name.endswith(".bias") and weight in self._layers and not self._files.read(name).any()


def quantized_files(path: Path, config: Any, files: SafetensorsFiles) -> QuantizedFiles:
    """The tensors of a model that is quantised as config.json at `path` says. config: its quantization_config.

    CheckpointError for a method or a layout that is not supported, and for layers that cannot be read.
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: quantization_config is {config!r}, expected an object; download it again")
    methods: dict[str, Callable[[Path, dict[str, Any]], type[Layer]]] = {
        "gptq": _gptq,
        "awq": _awq,
        "auto-round": _auto_round,
        "intel/auto-round": _auto_round,
        "compressed-tensors": _compressed_tensors,
    }
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in methods:
        raise CheckpointError(
            f"{path}: quantization_config: quant_method is {method!r}; supported are {', '.join(methods)} with "
            f"integers of 4 or 8 bits; {_REMEDY}"
        )
    for name in _ROTATIONS:
        _check(path, name, config.get(name) or None, None)
    kind = methods[method](path, config)
    return QuantizedFiles(files, kind, _scheme(path, config, kind))


def _scheme(path: Path, config: dict[str, Any], kind: type[Layer]) -> Scheme:
    objects = list(_objects(config))
    runs = [as_number(its[name]) for its in objects for name in ("group_size", "q_group_size") if name in its]
    for run in runs:
        if run is not None and (type(run) is not int or run < -1 or run == 0):
            raise CheckpointError(
                f"{path}: quantization_config: group_size is {run!r}, expected a number of inputs or -1; correct it"
            )
    groups = [its for its in objects if "num_bits" in its]  # of compressed-tensors
    needed = []
    if groups and all(its.get("symmetric") is False for its in groups):
        needed.append(kind.ZEROS)
    if config.get("desc_act") is True or (groups and all(its.get("actorder") in _BY_GROUP for its in groups)):
        needed.append(kind.INPUT_GROUPS)
    symmetric = config.get("sym") is True or config.get("zero_point") is False
    return Scheme([run for run in runs if run not in (None, -1)] or [_DEFAULT_RUN], needed, symmetric)


def _objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The object itself and all that are in it: some layers may have settings of their own, wherever they stand."""
    values: list[Any] = [config]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            yield value
            values += value.values()
        elif isinstance(value, list):
            values += value


def _gptq(path: Path, config: dict[str, Any]) -> type[Layer]:
    versions = {"gptq": FirstGptqLayer, "gptq_v2": GptqLayer}
    layout = "marlin" if config.get("is_marlin_format") else config.get("checkpoint_format", config.get("format"))
    return versions[_check(path, "checkpoint_format", str(layout or "gptq").lower(), *versions)]


def _awq(path: Path, config: dict[str, Any]) -> type[Layer]:
    layout = "llm-awq" if config.get("backend") == "llm-awq" else config.get("version", config.get("format"))
    _check(path, "version", str(layout or "gemm").lower(), "gemm")
    return AwqLayer


def _auto_round(path: Path, config: dict[str, Any]) -> type[Layer]:
    stated = config.get("packing_format") or config.get("backend")  # the second in older files
    layout = ":".join(str(stated or "auto_round:auto_gptq").replace("autoround", "auto_round").split(":")[:2])
    return _AUTO_ROUND[_check(path, "packing_format", layout, *_AUTO_ROUND)]


def _compressed_tensors(path: Path, config: dict[str, Any]) -> type[Layer]:
    _check(path, "format", config.get("format"), "pack-quantized")
    return PackedLayer


def _check(path: Path, name: str, value: Any, *supported: Any) -> Any:
    if value not in supported:
        raise CheckpointError(
            f"{path}: quantization_config: {name} is {value!r}; supported is {' or '.join(map(repr, supported))}; "
            f"{_REMEDY}"
        )
    return value
