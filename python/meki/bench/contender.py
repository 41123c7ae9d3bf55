"""The package under test, opened with its memory or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import _core
from ..engine import Engine
from ..package import MANIFEST, read_manifest, reads_per_token


@dataclass(frozen=True)
class Contender:
    """One of the things that a round measures in turn."""

    threads: int
    """That compute."""
    memory: str
    """Its kind, such as "meki", with " in RAM" where all its rows are; or "dense": none, or it is switched off."""
    weight_bytes: int
    """Of the weights that one decode step reads."""
    row_bytes: int
    """Of the bundles that one decode step reads; 0 without a memory."""

    def with_rows_in_ram(self) -> Contender:
        """What `_core.with_rows_in_ram` makes of this one's engine."""
        return replace(self, memory=f"{self.memory} in RAM")


@dataclass(frozen=True)
class Package:
    """A package and the engine options that all its engines have in common."""

    path: Path
    manifest: dict[str, Any]
    options: Mapping[str, Any]
    """Keyword arguments of `Engine`."""

    @classmethod
    def open(cls, path: Path, options: Mapping[str, Any]) -> Package:
        """Checks the package. PackageError if it cannot be used."""
        manifest = read_manifest(path)
        for key in ("decode_bytes", "dense_decode_bytes"):
            got = manifest["weights"].get(key)
            if type(got) is not int and (key == "decode_bytes" or manifest["memory"] is not None):
                raise _core.PackageError(
                    f"{path / MANIFEST}: weights.{key} is {got!r}, expected a number of bytes; convert the model again"
                )
        return cls(path, manifest, options)

    @property
    def has_memory(self) -> bool:
        return self.manifest["memory"] is not None

    @property
    def rom(self) -> Path | None:
        """The file of the memory rows."""
        return self.path / self.manifest["memory"]["file"] if self.has_memory else None

    @property
    def context(self) -> int:
        """The longest sequence of the model, in tokens."""
        return int(self.manifest["architecture"]["context"])

    def engine(self, *, memory: bool = True, profile: str = "") -> _core.Engine:
        """memory and profile: as of `Engine`."""
        return Engine(self.path, **self.options, memory=memory, profile=profile)._core

    def with_threads(self, threads: int) -> Package:
        """The same with engines of so many threads."""
        return replace(self, options={**self.options, "threads": threads})

    def contender(self, engine: _core.Engine, *, memory: bool = True) -> Contender:
        """What `engine`, opened with the same `memory`, is in a measurement."""
        weights = self.manifest["weights"]
        rom = self.rom if memory else None
        bundle_bytes = _core.Rom(str(rom)).info.bundle_bytes if rom else 0
        return Contender(
            threads=engine.threads,
            memory=self.manifest["memory"]["kind"] if rom else "dense",
            weight_bytes=weights["decode_bytes" if memory or not self.has_memory else "dense_decode_bytes"],
            row_bytes=bundle_bytes * reads_per_token(self.manifest),
        )
