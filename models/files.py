"""Output that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds, removes it otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory beside `path`; renames it to `path` if the block succeeds, removes it otherwise.

    FileExistsError if `path` exists, unless `overwrite` is set and it has a file `marker`, as what is replaced must.
    """
    check_target(path, marker, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
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
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another path, or overwrite it (--overwrite)")
    if path.exists() and not (path / marker).is_file():
        raise FileExistsError(f"{path}: exists, but has no {marker}, so it is not overwritten; remove it")
