"""What is said about compiled targets before anything of them is run: no file here is a graph."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meki import Engine, _core
from meki.cli.info import main as info
from meki.cli.run import main as run
from meki.engine import find_qnn_provider
from meki.package import read_manifest

STAGES = ("decode.0", "prefill.0", "head")


@pytest.fixture
def compiled(change_package: Callable[..., Path], package: Path) -> Path:
    """A copy of the package with a target "sm8750"."""
    files: dict[str, bytes] = {"embed.onnx": b"embed", "embed.bin": b"table"}
    for stage in STAGES:
        files |= {f"{stage}.onnx": stage.encode(), f"{stage}_qnn.bin": f"binary of {stage}".encode()}
    layers = json.loads((package / "manifest.json").read_text())["architecture"]["layers"]
    target: dict[str, Any] = {
        "chip": "Snapdragon 8 Elite",
        "soc_model": 69,
        "htp_arch": 79,
        "precision": "float16",
        "context": 48,
        "chunk": 16,
        "embed": "embed.onnx",
        "decode": [{"file": "decode.0.onnx", "rows": [0, layers]}],
        "prefill": [{"file": "prefill.0.onnx", "rows": [0, layers]}],
        "head": "head.onnx",
        "dense_decode": None,
        "dense_prefill": None,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    path = change_package(lambda manifest: manifest.update(qnn={"sm8750": target}))
    root = path / "qnn" / "sm8750"
    root.mkdir(parents=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return path


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package onnxruntime_qnn whose library is missing."""
    library = tmp_path / "libonnxruntime_providers_qnn.so"
    module = ModuleType("onnxruntime_qnn")
    module.get_library_path = lambda: str(library)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", module)
    return library


def edit_target(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest["qnn"]["sm8750"])
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_the_provider_is_found_in_its_package(provider: Path) -> None:
    assert find_qnn_provider() == provider


def test_without_its_package_the_command_to_install_it_is_named(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)  # what Python takes for "not there"
    with pytest.raises(ImportError, match=r"pip install 'meki\[qnn\]'"):
        Engine(compiled, provider="qnn")
    assert run(["--model", str(compiled), "--provider", "qnn", "text"]) == 1
    assert "pip install 'meki[qnn]'" in capsys.readouterr().err


@pytest.mark.usefixtures("provider")
def test_a_package_that_is_not_compiled_names_the_command(package: Path, compiled: Path, capsys) -> None:
    assert run(["--model", str(package), "--provider", "qnn", "text"]) == 2
    assert f"not compiled for any chip; run meki-compile {package} --soc " in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"only for sm8750; run meki-compile {compiled} --soc sm8650"):
        Engine(compiled, provider="qnn", soc="sm8650")


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("kv_type", ["float32", "int8", "int4"])
def test_compiled_stages_have_one_kv_type(compiled: Path, kv_type: str, capsys) -> None:
    assert run(["--model", str(compiled), "--provider", "qnn", "--kv-type", kv_type, "text"]) == 2
    assert f"kv_type is {kv_type}, expected float16" in capsys.readouterr().err


def test_a_provider_that_does_not_exist_and_a_chip_without_one(compiled: Path, capsys) -> None:
    with pytest.raises(ValueError, match='"npu", expected cpu or qnn'):
        Engine(compiled, provider="npu")
    assert run(["--model", str(compiled), "--soc", "sm8750", "text"]) == 2
    assert 'soc is "sm8750", which only the provider qnn can run on' in capsys.readouterr().err


def test_a_library_that_is_missing_is_named(compiled: Path, tmp_path: Path) -> None:
    """In a process of its own: one that has the real library loaded refuses another before it looks for it."""
    library = tmp_path / "libonnxruntime_providers_qnn.so"
    (tmp_path / "onnxruntime_qnn.py").write_text(f"def get_library_path():\n    return {str(library)!r}\n")
    command = [sys.executable, "-m", "meki.cli.run", "--model", str(compiled), "--provider", "qnn", "text"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"cannot load the QNN provider from {library}" in result.stderr and "onnxruntime-qnn" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_graph_that_was_replaced_is_not_parsed(compiled: Path, provider: Path) -> None:
    target = compiled / "qnn" / "sm8750"
    (target / "decode.0_qnn.bin").write_bytes(b"Binary of decode.0")  # not read before it is loaded
    with pytest.raises(RuntimeError, match=f"cannot load .*{provider.name}"):  # the sums are right, so it got so far
        Engine(compiled, provider="qnn")
    (target / "decode.0.onnx").write_bytes(b"Decode.0")
    with pytest.raises(_core.PackageError, match=r"decode\.0\.onnx: SHA-256"):
        Engine(compiled, provider="qnn")


def test_each_provider_needs_its_own_files(compiled: Path, provider: Path) -> None:
    (compiled / "stage0.onnx").rename(compiled / "stage0.away")
    assert read_manifest(compiled, "qnn")["name"]
    with pytest.raises(_core.PackageError, match=r"stage0\.onnx"):
        read_manifest(compiled)
    (compiled / "stage0.away").rename(compiled / "stage0.onnx")
    (compiled / "qnn" / "sm8750" / "head_qnn.bin").unlink()
    engine = Engine(compiled, threads=1)
    assert (engine.provider, engine.soc, engine.simulated, engine.kv_type) == ("cpu", None, False, "int8")
    assert not engine.shared_memory
    with pytest.raises(_core.PackageError, match=r"head_qnn\.bin"):
        read_manifest(compiled, "qnn")


@pytest.mark.parametrize("value", [None, "0" * 63, 1])
def test_a_checksum_that_is_no_sha256(compiled: Path, value: object) -> None:
    edit_target(compiled, lambda target: target["files"]["head_qnn.bin"].update(sha256=value))
    with pytest.raises(_core.PackageError, match=r'qnn\.sm8750\.files\["head_qnn\.bin"\]\.sha256'):
        read_manifest(compiled)


def test_info(compiled: Path, capsys) -> None:
    assert info([str(compiled), "--verify"]) == 0
    out = capsys.readouterr().out
    size = sum(file.stat().st_size for file in (compiled / "qnn" / "sm8750").iterdir())
    for line in (
        "\ncompiled for sm8750\n",
        "  chip              Snapdragon 8 Elite\n",
        "  precision         float16\n",
        "  context           48 tokens, prefill in chunks of 16\n",
        "  without memory    not compiled\n",
        f"  size              {size} bytes in 8 files\n",
    ):
        assert line in out
    assert info([str(compiled), "--json"]) == 0
    target = json.loads(capsys.readouterr().out)["qnn"]["sm8750"]
    assert target["present"] is True and target["soc_model"] == 69


def test_info_of_a_copy_without_the_target(compiled: Path, capsys) -> None:
    (compiled / "qnn" / "sm8750" / "head.onnx").unlink()
    assert info([str(compiled)]) == 1  # there, but not all of it
    assert "head.onnx" in capsys.readouterr().err
    shutil.rmtree(compiled / "qnn")
    assert info([str(compiled), "--verify"]) == 0
    assert "in 8 files, not in this copy\n" in capsys.readouterr().out


def test_verify_reads_the_binaries(compiled: Path, capsys) -> None:
    (compiled / "qnn" / "sm8750" / "prefill.0_qnn.bin").write_bytes(b"Binary of prefill.0")
    assert info([str(compiled)]) == 0
    capsys.readouterr()
    assert info([str(compiled), "--verify"]) == 1
    assert "prefill.0_qnn.bin: SHA-256" in capsys.readouterr().err


def test_what_a_simulator_computes_is_labelled(package: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in (("provider", "qnn"), ("soc", "sm8750"), ("simulated", True)):
        monkeypatch.setattr(Engine, name, property(lambda self, value=value: value))
    arguments = ["--model", str(package), "--threads", "1", "--max-new-tokens", "2", "--stats"]
    assert run([*arguments, "--json", "text"]) == 0
    captured = capsys.readouterr()
    fields = json.loads(captured.out)
    assert (fields["provider"], fields["soc"], fields["simulated"]) == ("qnn", "sm8750", True)
    label = "HTP simulator: results as on the chip, speed is not"
    assert captured.err.count(f"\n{label}\n") == 1
    assert f"provider      qnn, sm8750 ({label})\n" in captured.err
