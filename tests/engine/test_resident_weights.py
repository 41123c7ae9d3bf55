"""Packed matrices that every step reads lie in memory of the engine, in pages of 2 MiB where the system has them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GIVEN = CHOICE.exists() and "[never]" not in CHOICE.read_text()

# In a process of its own, whose mappings are those of one engine.
MAPPED = """
import re, sys
from meki import Engine

engine = Engine(sys.argv[1], threads=2)
engine.logits([1, 2, 3])
mappings = open("/proc/self/smaps").read()
kib = sum(int(size) for size in re.findall(r"weights\\.bin\\n(?:[A-Z].*\\n)*?Rss: +(\\d+)", mappings))
print(kib)
"""


def mapped_bytes(package: Path) -> int:
    """What of weights.bin is mapped, and resident, after a step."""
    run = subprocess.run([sys.executable, "-c", MAPPED, str(package)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return int(run.stdout) * 1024


def matrices(package: Path, kinds: set[str]) -> dict[str, int]:
    """Bytes of the packed matrices that operators of these kinds have, by where they are in the file."""
    found = {}
    for path in package.glob("stage*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        used = {name for node in graph.node if node.op_type in kinds for name in node.input}
        for tensor in graph.initializer:
            if tensor.name in used and tensor.data_type == onnx.TensorProto.UINT8:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                found[entries["offset"]] = int(entries["length"])
    return found


@pytest.mark.skipif(not GIVEN, reason="the system gives no pages of 2 MiB")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_stays_mapped(make_package: Callable[..., Path], weights: str, tied: bool) -> None:
    """All but the embedding of a model whose head is another matrix: of that a step reads a row."""
    package = make_package(weights, vocab_size=4000, hidden=256, tied_embeddings=tied)
    streamed = sum(matrices(package, {"Linear", "Experts", "Injection"}).values())
    assert streamed > 1 << 20
    total = (package / "weights.bin").stat().st_size
    around = 256 << 10  # alignment in the file, and what the system maps around rows of the embedding that are read
    assert mapped_bytes(package) <= total - streamed + around
