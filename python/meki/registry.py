"""Where models are found: packages that are bundled with the installation by name, any other by path."""

from __future__ import annotations

import os
from pathlib import Path

from . import models
from ._core import PackageError
from .models.config import CONFIGS


class ModelNotFoundError(PackageError):
    """No package of this name, and no directory of this path."""


def bundled_models() -> dict[str, Path]:
    """The packages inside the installed `meki.models`, by name."""
    manifests = (manifest for root in models.__path__ for manifest in Path(root).glob("*/manifest.json"))
    return {manifest.parent.name: manifest.parent for manifest in manifests}


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The package directory of a model: an existing directory is taken as a path, anything else as a bundled name.

    ModelNotFoundError if there is neither; it says what can be done.
    """
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return Path(name)
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    if name in CONFIGS:
        raise ModelNotFoundError(
            f"{name} is a known configuration, but nobody has published weights for it and none are installed; to make "
            f"a package of a checkpoint: `pip install 'meki[models]'` and `meki-convert CHECKPOINT -o {name}` (or, to "
            f"measure speed with random weights, `meki-convert --random {name} -o {name}`), then run it from the same "
            "directory or give its path"
        )
    known = [f"{known} (bundled)" for known in sorted(bundled)]
    known += [f"{known} (configuration only)" for known in CONFIGS if known not in bundled]
    raise ModelNotFoundError(
        f"no model {name!r}: it is neither a directory nor a known name; known: {', '.join(known)}; "
        "the path of a package directory works too"
    )
