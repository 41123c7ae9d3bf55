"""The check of arrows between the runtime's folders."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTS = """
function(meki_folder name)  # the definition is no call
endfunction()
meki_folder(base SOURCES a.cc)
meki_folder(graph
  DEPENDS base)  # (a comment)
meki_folder(graph/ort
  SOURCES b.cc ops/c.cc
  DEPENDS base graph)
"""
FILES = {
    "base/a.h": "#include <vector>\n",
    "graph/graph.h": '#include "runtime/base/a.h"\n',
    "graph/ort/b.cc": '#include "runtime/graph/graph.h"\n#include "runtime/graph/ort/ops/c.h"\n',
    "graph/ort/ops/c.h": '#include "runtime/graph/ort/b.h"\n',
}


def arrows(root: Path, lists: str, **changes: str) -> list[str]:
    """The lines that the check prints for such a runtime/; changes: what a file of FILES says instead."""
    for name, content in {"CMakeLists.txt": lists, **FILES, **changes}.items():
        path = root / "runtime" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    done = subprocess.run([ROOT / ".ci/arrows", root], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == (1 if done.stdout else 0)
    return done.stdout.splitlines()


def test_arrows_that_go_one_way(tmp_path: Path) -> None:
    assert arrows(tmp_path, LISTS) == []


@pytest.mark.parametrize(
    ("name", "include", "message"),
    [
        ("base/a.h", "runtime/graph/graph.h", "includes graph, expected one of base "),
        ("graph/graph.h", "runtime/graph/ort/b.h", "includes graph/ort, expected one of graph, base "),
        ("graph/ort/ops/c.h", "runtime/engine/engine.h", "includes engine, expected one of graph/ort, base, graph "),
        ("base/a.h", "csrc/module.h", "includes csrc, expected one of base "),
    ],
)
def test_include_that_is_not_declared(tmp_path: Path, name: str, include: str, message: str) -> None:
    (line,) = arrows(tmp_path, LISTS, **{name: f'#pragma once\n  #  include "{include}"\n'})
    assert line.startswith(f"runtime/{name}:2: {message}")


def test_folder_that_is_not_declared(tmp_path: Path) -> None:
    (line,) = arrows(tmp_path, LISTS.replace("meki_folder(graph\n  DEPENDS base)", ""))
    assert line.startswith("runtime/graph/graph.h:1: includes base, expected one of graph ")


def test_cycle(tmp_path: Path) -> None:
    (line,) = arrows(tmp_path, LISTS.replace("meki_folder(base ", "meki_folder(base DEPENDS graph/ort "))
    assert "graph -> base -> graph is a cycle" in line or "base -> graph -> base is a cycle" in line


def test_folder_and_subfolder_are_one(tmp_path: Path) -> None:
    assert arrows(tmp_path, LISTS.replace("  DEPENDS base)", "  DEPENDS base graph/ort)")) == []
