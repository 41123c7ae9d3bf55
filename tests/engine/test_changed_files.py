"""Files of a package that change under a running engine: one PackageError, no wrong word, no dead process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meki import Engine, PackageError

# In a process of its own: what is guarded against is death by SIGBUS.
CHANGE = """
import os, sys
from pathlib import Path
from meki import Engine, PackageError

package, name, change, moment, access, prefetch = sys.argv[1:]
path = Path(package, name)
content = path.read_bytes()
options = {"max_new_tokens": 40, "seed": 1}
prompt = "The old lighthouse " * 5
expected = Engine(package).generate(prompt, **options).text

def generate(engine):
    try:
        return engine.generate(prompt, prefetch=prefetch == "True", **options).text
    except PackageError as error:
        return error

engine = Engine(package, rom_access=access, threads=2, row_cache=0)
stream = engine.stream(prompt, prefetch=prefetch == "True", **options)
if moment == "decode":
    next(stream)
if change == "replace":  # by another file of that name, which is what careful programs do
    other = path.with_suffix(".new")
    other.write_bytes(bytes(len(content)))
    other.rename(path)
elif change == "rewrite":
    path.write_bytes(bytes(len(content)))
else:
    os.truncate(path, int(change))
try:
    got = stream.finish().text
except PackageError as error:
    got = error
again = generate(engine)
path.write_bytes(content)
assert generate(Engine(package, rom_access=access)) == expected
assert isinstance(again, PackageError) == isinstance(got, PackageError), (got, again)
print("as before" if got == expected else repr(got))
"""


def change(package: Path, name: str, what: str, *, moment: str, access: str = "pread", prefetch: bool = True) -> str:
    """What came of a generation in which a file changed."""
    command = [sys.executable, "-c", CHANGE, str(package), name, what, moment, access, str(prefetch)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, (run.returncode, run.stderr)
    return run.stdout


@pytest.fixture
def copy(make_package: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda weights: Path(shutil.copytree(make_package(weights), tmp_path / "package"))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("access", ["mmap", "pread", "direct"])
def test_a_rom_that_shrinks(copy: Callable[[str], Path], access: str, prefetch: bool) -> None:
    got = change(copy("int8"), "memory.rom", "8192", moment="decode", access=access, prefetch=prefetch)
    assert got.startswith("PackageError")
    assert "shrank" in got


def test_rows_that_were_read_outlive_the_rom(copy: Callable[[str], Path]) -> None:
    package = copy("int8")
    engine = Engine(package)
    before = engine.logits([5, 6, 7])
    os.truncate(package / "memory.rom", 8192)
    np.testing.assert_array_equal(engine.logits([5, 6, 7]), before)
    with pytest.raises(PackageError, match=r"bundle 200 .*shrank"):
        engine.logits([5, 200, 7])


@pytest.mark.parametrize("moment", ["prefill", "decode"])
@pytest.mark.parametrize("keep", [0, 4096, 100_000, -1], ids=["nothing", "a-page", "some", "all-but-one-byte"])
@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_weights_that_shrink(copy: Callable[[str], Path], weights: str, keep: int, moment: str) -> None:
    package = copy(weights)
    size = (package / "weights.bin").stat().st_size
    got = change(package, "weights.bin", str(keep % size), moment=moment)
    assert got.startswith("PackageError")
    assert f"weights.bin: {keep % size} bytes, it had {size} while it was in use" in got


def test_weights_that_are_overwritten(copy: Callable[[str], Path]) -> None:
    got = change(copy("int8"), "weights.bin", "rewrite", moment="decode")
    assert "weights.bin: it was written to while it was in use" in got


@pytest.mark.parametrize("name", ["weights.bin", "memory.rom", "stage1.onnx"])
def test_files_that_are_replaced_go_on_as_they_were(copy: Callable[[str], Path], name: str) -> None:
    assert change(copy("int8"), name, "replace", moment="decode") == "as before\n"
