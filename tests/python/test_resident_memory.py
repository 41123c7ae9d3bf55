"""What proc(5) tells, on this system."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from meki._core import resident_memory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.rom"
    path.write_bytes(bytes(8 << 20))
    return path


def test_resident_memory_of_a_file(file: Path) -> None:
    before = resident_memory(file)
    assert before is not None and before["rom"] == 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert resident_memory(file)["rom"] == 0  # mapped, not touched
        for page in range(0, len(mapping), 4096):
            mapping[page]
        touched = resident_memory(file)
        assert touched["rom"] == len(mapping)
        assert touched["without_rom"] == touched["resident"] - len(mapping)
        assert touched["file"] >= before["file"] + len(mapping)
        assert touched["peak"] >= touched["resident"]
        assert resident_memory(file.with_name("other.rom"))["rom"] == 0
    assert not {"rom", "without_rom"} & resident_memory(None).keys()
