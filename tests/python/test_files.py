"""Output that several processes make at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from meki.package.files import locked, replace_directory, write_file

MARKER = "manifest.json"


def fill(path: Path, number: int, rounds: int) -> None:
    """Replaces `path` many times by a directory whose two files tell who made it."""
    for _ in range(rounds):
        try:
            with replace_directory(path, MARKER, overwrite=True) as directory:
                for name in (MARKER, "weights.bin"):
                    (directory / name).write_text(str(number))
                    time.sleep(0.001)
        except RuntimeError as error:
            assert "is writing it; wait for its end or choose another path" in str(error), error


def write(path: Path, number: int, rounds: int) -> None:
    for _ in range(rounds):
        write_file(path, str(number).encode() * 10_000)


def together(work, path: Path, processes: int = 4, rounds: int = 50) -> None:
    context = multiprocessing.get_context("fork")  # starts at once; the workers touch nothing but files
    workers = [context.Process(target=work, args=(path, number, rounds)) for number in range(1, processes + 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * processes


def test_one_directory_is_one_process_work(tmp_path: Path) -> None:
    out = tmp_path / "package"
    together(fill, out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]
    assert sorted(entry.name for entry in out.iterdir()) == [MARKER, "weights.bin"]
    assert (out / MARKER).read_text() == (out / "weights.bin").read_text()


def test_one_file_is_one_process_work(tmp_path: Path) -> None:
    together(write, tmp_path / "report.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    text = (tmp_path / "report.json").read_text()
    assert text == text[0] * 10_000


def test_who_holds_it(tmp_path: Path) -> None:
    out = tmp_path / "package"
    with (
        locked(out),
        pytest.raises(RuntimeError, match=rf"{out}: process {os.getpid()} is writing it"),
        replace_directory(out, MARKER, overwrite=False),
    ):
        pytest.fail("entered what is locked")
    with replace_directory(out, MARKER, overwrite=False) as directory:  # nothing is left of it
        (directory / MARKER).touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_a_holder_that_died_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / ".package.lock").write_text("4711")  # of a process that was killed
    with replace_directory(tmp_path / "package", MARKER, overwrite=False) as directory:
        (directory / MARKER).touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_what_lies_beside_it_is_left_alone(tmp_path: Path) -> None:
    """A directory whose name begins alike, in the making; what a killed run left of this one goes."""
    with replace_directory(tmp_path / "package.int4", MARKER, overwrite=False) as other:
        (other / MARKER).touch()
        (tmp_path / ".package.4711.partial").mkdir()
        with replace_directory(tmp_path / "package", MARKER, overwrite=False) as directory:
            (directory / MARKER).touch()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["package", "package.int4"]
    assert (tmp_path / "package.int4" / MARKER).is_file()
