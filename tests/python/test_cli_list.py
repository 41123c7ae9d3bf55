"""meki-list and meki-rm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import Engine
from meki.cli import info, list, rm


@pytest.fixture
def models(meki_home: Path, package: Path, make_package: Callable[..., Path]) -> Path:
    """A store with two models and two damaged entries."""
    models = meki_home / "models"
    shutil.copytree(package, models / "small")
    (models / "dense").symlink_to(make_package(memory_dim=0))
    shutil.copytree(package, models / "cut")
    (models / "cut" / "manifest.json").write_text('{"name":')
    (models / "dangling").symlink_to(models / "nowhere")
    return models


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert list.main(["--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["models"]
    return {f"{its['where']} {its['name']}": its for its in shown}


def test_one_line_a_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *([name, "store"] for name in ("cut", "dangling", "dense", "small")),
        ["meki-tiny", "bundled"],
    ]
    cut, dangling, dense, small, tiny = lines
    assert f"damaged: {models / 'cut' / 'manifest.json'}: " in cut
    assert f"damaged: {models / 'dangling' / 'manifest.json'}: " in dangling
    assert "llama 0.1M, float32  no memory" in dense and dense.endswith(" MB  random weights")
    assert "meki memory, float16" in small and small.endswith(" MB  random weights")
    assert "llama 6.0M, int8" in tiny and tiny.endswith(" MB")


def test_json(models: Path, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, found = json.loads((package / "manifest.json").read_text()), listed(capsys)
    small = found["store small"]
    assert small == {
        "name": "small",
        "where": "store",
        "path": str(models / "small"),
        "problem": None,
        "bytes": sum(file.stat().st_size for file in package.iterdir()),
        "kind": "llama",
        "parameters": manifest["parameters"],
        "weights": "float32",
        "matrices": manifest["weights"]["types"],
        "memory": {"kind": "meki", "row_type": "float16"},
        "random_weights": True,
    }
    assert found["store dense"]["memory"] is None and found["bundled meki-tiny"]["random_weights"] is False
    cut = found["store cut"]
    assert cut.keys() == {"name", "where", "path", "problem"} and "manifest.json" in cut["problem"]


def test_weights_of_a_quantised_source(
    change_package: Callable[..., Path], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["weights"].update(type="source", types={"float32": 10, "int4_minimum": 90})

    shutil.copytree(change_package(edit), models / "of-source")
    assert list.main([]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("of-source "))
    assert "llama 0.1M, int4_minimum  meki memory" in line


def test_without_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys).keys() == {"bundled meki-tiny"}


def test_a_store_that_cannot_be_read(meki_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meki_home.mkdir()
    (meki_home / "models").touch()
    assert list.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("meki-list: error: ") and str(meki_home / "models") in error


def test_names_work_in_the_engine_and_in_commands(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Engine("small", threads=1).path == models / "small"
    assert info.main(["small"]) == 0
    assert str(models / "small") in capsys.readouterr().out


def test_rm(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = (models / "dense").resolve()
    assert rm.main(["-y", "cut", "dense", "dangling", "cut"]) == 0
    assert capsys.readouterr().out.splitlines() == ["cut: removed", "dense: removed", "dangling: removed"]
    assert [path.name for path in models.iterdir()] == ["small"] and (target / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone", "no model in the store"),
        ("meki-tiny", "a bundled model"),
        ("../models/small", "no model in the store"),
        ("", "no model in the store"),
        (".", "no model in the store"),
    ],
)
def test_rm_takes_names_of_the_store_alone(
    models: Path, name: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rm.main(["-y", "small", name]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"meki-rm: error: {name!r} is {why}") and "nothing was removed" in error
    assert (models / "small" / "weights.bin").exists()


def test_rm_of_a_path_in_the_store(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rm.main(["-y", str(models / "small")]) == 2
    assert "expected the name of one in" in capsys.readouterr().err and (models / "small").exists()


def test_rm_asks_on_a_terminal(models: Path, stdin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    for answer in (b"\n", b"n\n", b"", b"yesterday\n"):
        stdin(answer, terminal=True)
        assert rm.main(["small", "cut"]) == 0
        captured = capsys.readouterr()
        assert f"remove small, cut from {models}? [y/N] " in captured.out and "nothing removed" in captured.err
    stdin(b"Y\n", terminal=True)
    assert rm.main(["small", "cut"]) == 0
    assert not (models / "small").exists() and not (models / "cut").exists()


def test_rm_without_a_terminal_wants_to_be_told(
    models: Path, stdin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(b"y\n")
    assert rm.main(["small"]) == 2
    assert "give -y" in capsys.readouterr().err and (models / "small").exists()
