"""Files: output that is there as a whole or not at all, text and JSON objects, and the files of a package."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_LFS_POINTER = b"version https://git-lfs."


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """No two processes, nor threads, are in a block for the same `path` at once: RuntimeError that names who is in it,
    unless `wait` is set.

    A file beside `path` is the lock, for as long as the block lasts or its process lives.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                holder = f"process {file.read() or 'of unknown number'}"
                raise RuntimeError(f"{path}: {holder} is writing it; wait for its end or choose another path") from None
            try:
                current = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                current = False
            if not current:
                continue  # whoever had it was just removing it
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds, removes it otherwise.

    Of several processes at once the last one's file stays. `locked` is for those that must not.
    """
    partial = _partial(path)
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
    a symbolic link, what it leads to is replaced. RuntimeError if another process is in such a block for `path`.
    """
    _check_link(path)
    target, path = path, path.resolve()
    partial = _partial(path)
    replaced = path.with_name(f".{path.name}.replaced")
    with contextlib.ExitStack() as stack:
        try:
            with contextlib.suppress(FileExistsError):  # if that is no directory, the next line says so
                path.parent.mkdir(parents=True)
            stack.enter_context(locked(path))
            for left in path.parent.iterdir():
                if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+\.partial", left.name):  # of a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise OSError(f"{path}: cannot be made: {error.strerror}; choose another path") from error
        check_target(target, marker, overwrite)
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


def remove_directory(path: Path) -> None:
    """Removes a directory with all that is in it, a file, or a symbolic link, not what it leads to. A directory has
    another name before the first of its files goes. OSError; RuntimeError if another process writes it."""
    try:
        with locked(path):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                removed = path.rename(_partial(path))
                shutil.rmtree(removed)
    except OSError as error:
        raise OSError(f"{path}: cannot be removed: {error.strerror or error}; make {path.parent} writable") from error


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path}: is a symbolic link to nothing; remove it or choose another path")


def check_target(path: Path, marker: str, overwrite: bool) -> None:
    """FileExistsError if `replace_directory` would refuse `path`."""
    _check_link(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another path, or overwrite it (--overwrite)")
    if path.exists() and not (path / marker).is_file():
        raise FileExistsError(f"{path}: exists, but has no {marker}, so it is not overwritten; remove it")


def check_downloaded(path: Path) -> None:
    """ValueError if the file is a pointer of Git LFS, which a clone has in the place of what it did not fetch."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path}: is a Git LFS pointer, not the file itself; fetch it: git lfs pull")


def decode_text(data: bytes) -> str:
    """The text of a file, line ends as they are, without what editors and downloads put around it: a byte-order mark,
    zeros behind the end. ValueError if it is no Unicode text."""
    return data.decode(json.detect_encoding(data)).rstrip("\0")


def read_text(path: Path) -> str:
    """`decode_text` of a file. OSError; ValueError, naming it, if it is none."""
    check_downloaded(path)
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}; download it again") from error


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file, which may be compressed: .xz or .gz. ValueError, naming it, where it turns out to be none."""
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason}; convert it to UTF-8") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut off: {error}; compress or download it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; of a key that is there twice, the last. ValueError, naming it, if there is none."""
    text = read_text(path)
    try:
        value = json.loads(text)
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
