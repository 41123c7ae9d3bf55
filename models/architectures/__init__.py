"""Decoders, by their kind. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ConfigError, Rule
from ..ffns import FFNS
from ..memories import MEMORIES
from .base import Architecture
from .gemma3 import Gemma3Config
from .gemma4 import Gemma4Config
from .llama import LlamaConfig

ARCHITECTURES: dict[str, type[Architecture]] = {kind.kind: kind for kind in (LlamaConfig, Gemma3Config, Gemma4Config)}

SETTINGS: dict[str, Rule] = {
    name: rule
    for kinds in (ARCHITECTURES, FFNS, MEMORIES)
    for rules in [kind.RULES for kind in kinds.values()]
    for name, rule in rules.items()
}
"""All settings that `--set` knows."""


def read_config(manifest: Mapping[str, Any]) -> Architecture:
    """The configuration that a package's manifest describes. ConfigError for kinds that this version does not have."""
    architecture, memory = manifest["architecture"], manifest["memory"]
    for name, entry, known in (("architecture", architecture, ARCHITECTURES), ("memory", memory, MEMORIES)):
        if entry is not None and entry.get("kind") not in known:
            raise ConfigError(
                f"{name}.kind is {entry.get('kind')!r}, this version has {', '.join(known)}; convert the model again"
            )
    settings = {name: value for name, value in architecture.items() if name != "kind"}
    if memory is not None:
        settings |= MEMORIES[memory["kind"]].from_manifest(memory)
    return ARCHITECTURES[architecture["kind"]].from_settings(settings)
