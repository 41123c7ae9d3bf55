"""Where models are found: by path, or by name in the store and among what is bundled with the installation."""

from __future__ import annotations

import contextlib
import os
import shlex
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from .._core import PackageError
from .files import MANIFEST
from .store import HUB, name_of_source, stored_model, stored_models

PUBLISHED_SIZES = ("meki-0.6b", "meki-1.7b", "meki-4b")
"""Configurations of the paper; nobody has published weights for them."""


class ModelNotFoundError(PackageError):
    """No package of this name, and no directory of this path."""


def bundled_models() -> dict[str, Path]:
    """The packages that were installed with this one, by name."""
    bundled = Path(str(files("meki"))) / "packages"
    manifests = bundled.glob(f"*/{MANIFEST}")
    return {manifest.parent.name: manifest.parent for manifest in manifests}


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The package directory of a model: an existing directory is taken as a path, `~` as the home directory; anything
    else is a name, of the store or, if it is not there, of a bundled package.

    ModelNotFoundError if there is none, and for what is yet to be converted; it says what can be done.
    """
    name = os.fspath(name_or_path)
    path = Path(name if os.path.isdir(name) else os.path.expanduser(name))
    if name and path.is_dir() and ((path / MANIFEST).exists() or not (path / "config.json").is_file()):
        return path
    bundled = bundled_models()
    if found := stored_model(name) or bundled.get(name):
        return found
    if name and path.exists():
        raise ModelNotFoundError(_what_to_convert(path))
    if name.startswith(HUB):
        raise ModelNotFoundError(f"{name} is a checkpoint, not a package; {_how_to_convert(name)}")
    if name in PUBLISHED_SIZES:
        raise ModelNotFoundError(
            f"{name} is a known configuration, but nobody has published weights for it and none are installed; to make "
            f"a package of a checkpoint: `pip install 'meki[models]'` and `meki-convert CHECKPOINT --name {name}` (or, "
            f"to measure speed with random weights, `meki-convert --random {name} --name {name}`)"
        )
    known = [*bundled, *PUBLISHED_SIZES]
    with contextlib.suppress(OSError):
        known += stored_models()
    small = name.lower()
    near = [other for other in known if small and small in other.lower()] or get_close_matches(small, known)
    meant = f"; did you mean {' or '.join(sorted(set(near)))}?" if near else ";"
    raise ModelNotFoundError(
        f"no model {name!r}: it is neither a directory nor a known name{meant} meki-list shows all; the path of a "
        "package directory works too"
    )


def _what_to_convert(path: Path) -> str:
    """What there is to say of a model in another form than a package."""
    if not path.is_dir() and path.suffix != ".gguf":
        return (
            f"{path} is a file, a package is a directory; meki-convert makes one of a Hugging Face folder, a GGUF file "
            "or a Megatron-LM checkpoint"
        )
    kind = "a Hugging Face folder" if path.is_dir() else "a GGUF file"
    return f"{path} is {kind}, not a package; {_how_to_convert(str(path))}"


def _how_to_convert(source: str) -> str:
    name = name_of_source(source)
    return f"make one of it: `pip install 'meki[models]'` and `meki-convert {shlex.quote(source)}`, then give {name}"
