"""A package (docs/package-format.md): where it is found, what its manifest says, and how its files are written."""

from .files import MANIFEST, file_sha256
from .manifest import (
    check_parsed_files,
    check_sha256,
    compiled_targets,
    has_random_weights,
    read_manifest,
    reads_per_token,
    target_directory,
)
from .registry import ModelNotFoundError, bundled_models, find_model
from .store import remove_model, store, stored_model, stored_models

__all__ = [
    "MANIFEST",
    "ModelNotFoundError",
    "bundled_models",
    "check_parsed_files",
    "check_sha256",
    "compiled_targets",
    "file_sha256",
    "find_model",
    "has_random_weights",
    "read_manifest",
    "reads_per_token",
    "remove_model",
    "store",
    "stored_model",
    "stored_models",
    "target_directory",
]
