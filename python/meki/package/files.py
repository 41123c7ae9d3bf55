"""Files: output that is there as a whole or not at all, JSON objects, and the files of a package."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds, removes it otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Nothing new stands at `path` before all of `data` does."""
    with replace_file(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replace_directory(path: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory beside `path`; renames it to `path` if the block succeeds, removes it otherwise.

    FileExistsError if `path` exists, unless `overwrite` is set and it has a file `marker`, as what is replaced must. Of
    a symbolic link, what it leads to is replaced.
    """
    check_target(path, marker, overwrite)
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be made: {error.strerror}; choose another path") from error
    try:
        yield partial
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(path: Path, marker: str, overwrite: bool) -> None:
    """FileExistsError if `replace_directory` would refuse `path`."""
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path}: is a symbolic link to nothing; remove it or choose another path")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another path, or overwrite it (--overwrite)")
    if path.exists() and not (path / marker).is_file():
        raise FileExistsError(f"{path}: exists, but has no {marker}, so it is not overwritten; remove it")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, naming it, if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def list_files(directory: Path, progress: Callable[[int, int], object]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 sum of every file. progress: called with (bytes done, in all)."""
    paths = sorted(directory.iterdir())
    total, done = sum(path.stat().st_size for path in paths), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path, advance)} for path in paths}


def file_sha256(path: Path, advance: Callable[[int], object]) -> str:
    """SHA-256 of a file in hexadecimal; `advance` is called with each block's size."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
