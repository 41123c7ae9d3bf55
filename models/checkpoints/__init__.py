"""Checkpoints from elsewhere, as an export takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, check_fetched
from .gguf_file import is_gguf, open_gguf
from .huggingface import CONFIG, is_huggingface, open_huggingface
from .megatron import is_megatron, open_megatron

_EXPECTED = (
    "expected a Hugging Face folder (config.json and safetensors), a GGUF file, or a Megatron-LM checkpoint "
    "(model_optim_rng.pt or a directory above it)"
)


def open_checkpoint(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """Looks at `path` and opens what it finds. Names, shapes and settings are read, of the weights only a head that is
    said to be the embedding.

    overrides: settings that the user states. FileNotFoundError; CheckpointError.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; {_EXPECTED}")
    if path.is_file():
        check_fetched(path)
    if is_huggingface(path):
        return open_huggingface(path, overrides)
    if is_gguf(path):
        return open_gguf(path, overrides)
    if is_megatron(path):
        return open_megatron(path, overrides)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: weights without a configuration; give the folder that has its config.json")
    inside = [*path.glob("snapshots/*/config.json"), *sorted(path.glob("*.gguf"))]
    if inside:  # a cache of Hugging Face's, which keeps versions; a folder of GGUF files, each a model or a part of one
        found = inside[0].parent if inside[0].name == CONFIG else inside[0]
        raise CheckpointError(f"{path}: the model is not here, but at {found}; give that")
    raise CheckpointError(f"{path}: not a known kind of checkpoint; {_EXPECTED}")


__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]
