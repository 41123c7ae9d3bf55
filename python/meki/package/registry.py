"""Where models are found: packages that are bundled with the installation by name, any other by path."""

from __future__ import annotations

import os
import shlex
from importlib.resources import files
from pathlib import Path

from .._core import PackageError
from .files import MANIFEST

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
    """The package directory of a model: an existing directory is taken as a path, `~` as the home directory, anything
    else as a bundled name.

    ModelNotFoundError if there is neither, and for what is yet to be converted; it says what can be done.
    """
    name = os.fspath(name_or_path)
    path = Path(name if os.path.isdir(name) else os.path.expanduser(name))
    if name and path.is_dir() and ((path / MANIFEST).exists() or not (path / "config.json").is_file()):
        return path
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    if name and path.exists():
        raise ModelNotFoundError(_what_to_convert(path))
    if name in PUBLISHED_SIZES:
        raise ModelNotFoundError(
            f"{name} is a known configuration, but nobody has published weights for it and none are installed; to make "
            f"a package of a checkpoint: `pip install 'meki[models]'` and `meki-convert CHECKPOINT -o {name}` (or, to "
            f"measure speed with random weights, `meki-convert --random {name} -o {name}`), then run it from the same "
            "directory or give its path"
        )
    known = [f"{known} (bundled)" for known in sorted(bundled)]
    known += [f"{known} (configuration only)" for known in PUBLISHED_SIZES]
    raise ModelNotFoundError(
        f"no model {name!r}: it is neither a directory nor a known name; known: {', '.join(known)}; "
        "the path of a package directory works too"
    )


def _what_to_convert(path: Path) -> str:
    """What there is to say of a model in another form than a package."""
    if not path.is_dir() and path.suffix != ".gguf":
        return (
            f"{path} is a file, a package is a directory; meki-convert makes one of a Hugging Face folder, a GGUF file "
            "or a Megatron-LM checkpoint"
        )
    kind, package = ("a Hugging Face folder", path.resolve().name) if path.is_dir() else ("a GGUF file", path.stem)
    package = shlex.quote(f"{package}-meki")
    return (
        f"{path} is {kind}, not a package; make one of it: `pip install 'meki[models]'` and "
        f"`meki-convert {shlex.quote(str(path))} -o {package}`, then give {package}"
    )
