"""The store: a directory with a package for each model that is known by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .files import remove_directory

HUB = "hf:"
"""Begins what names a checkpoint on the Hugging Face Hub: hf:ORG/NAME[@REVISION][/FILE.gguf]."""


def store() -> Path:
    """`MEKI_HOME/models`, else `XDG_DATA_HOME/meki/models`, else `~/.local/share/meki/models`; it need not exist."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.join("~", ".local", "share")
    return Path(os.path.expanduser(os.environ.get("MEKI_HOME") or os.path.join(data, "meki")), "models")


def stored_models() -> dict[str, Path]:
    """What the store has by name, damaged or not. OSError if it cannot be read."""
    try:
        return {path.name: path for path in sorted(store().iterdir()) if _is_name(path.name)}
    except FileNotFoundError:
        return {}


def stored_model(name: str) -> Path | None:
    """What the store has under this name, damaged or not."""
    path = store() / name
    return path if _is_name(name) and os.path.lexists(path) else None


def remove_model(name: str) -> None:
    """Removes what the store has under this name; of a symbolic link, not what it leads to. As `remove_directory`."""
    assert _is_name(name), name
    remove_directory(store() / name)


def plain_name(text: str) -> str:
    """`text` as a name in the store: small letters, digits, `.`, `_`, `-`. Empty if there is nothing of that kind."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")


def name_of_source(source: str) -> str:
    """The name that the package of a checkpoint gets unless it is given one. source: a path or what `HUB` begins."""
    path = Path(re.sub("@[^/]*", "", source)) if source.startswith(HUB) else Path(source).resolve()
    whole = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name)  # of a split model's first file, too
    return plain_name(whole)


def _is_name(name: str) -> bool:
    """Files whose names begin with a dot are those of `replace_directory`."""
    return bool(name) and name == os.path.basename(name) and not name.startswith(".")
