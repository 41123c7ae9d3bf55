"""Training-form checkpoints: one safetensors file whose metadata holds the configuration."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .config import ConfigError, ModelConfig
from .decoder import Decoder


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds, removes it otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path: Path, model: Decoder, provenance: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Writes every parameter as `dtype`; `provenance` holds what is known about the training, as strings."""
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replace_file(path) as partial:
        save_file(tensors, partial, metadata={"config": model.config.to_json(), **provenance})


def load_checkpoint(path: Path) -> tuple[Decoder, dict[str, str]]:
    """The model in float32 and its provenance. ConfigError if the file is not such a checkpoint."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        if "config" not in metadata:
            raise ConfigError(f"{path}: no configuration in its metadata; expected a checkpoint of meki.models.train")
        config = ModelConfig.from_dict(json.loads(metadata.pop("config")))
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = Decoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConfigError(f"{path}: tensor {name}: shape {found.get(name)}, expected {expected.get(name)}")
    model.load_state_dict(tensors)
    return model, metadata
