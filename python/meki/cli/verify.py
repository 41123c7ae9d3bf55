"""Checks every byte of a package against its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import _core
from ..package import check_sha256, compiled_targets, target_directory

_STEP = 1 << 20
"""Bytes of bundles read between two signs of progress."""


def verify_package(directory: Path, manifest: dict[str, Any]) -> None:
    """PackageError for the first file whose SHA-256 sum, or ROM bundle whose CRC-32C, is not what it should be;
    compiled targets that were left out of this copy are passed over. Shows progress on stderr if that is a terminal."""
    files: dict[Path, dict[str, Any]] = {directory / name: entry for name, entry in manifest["files"].items()}
    for chip, target in compiled_targets(manifest).items():
        root = target_directory(directory, chip)
        if root.exists():
            files.update((root / name, entry) for name, entry in target["files"].items())
    total = sum(entry["bytes"] for entry in files.values())
    with tqdm(total=total, desc="SHA-256", unit="B", unit_scale=True, leave=False, disable=None) as progress:
        for path, entry in files.items():
            check_sha256(path, entry["sha256"], progress.update)
    if manifest["memory"] is not None:
        _verify_rom(directory / manifest["memory"]["file"])


def _verify_rom(path: Path) -> None:
    rom = _core.Rom(str(path))
    bundles = rom.info.vocab_size
    step = max(1, _STEP // rom.info.bundle_stride)
    with tqdm(total=bundles, desc="bundles", unit="", unit_scale=True, leave=False, disable=None) as progress:
        for first in range(0, bundles, step):
            count = min(step, bundles - first)
            rom.verify(first, count)
            progress.update(count)
