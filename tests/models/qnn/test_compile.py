"""meki-compile: what it prints, what it writes, and what it leaves when it fails."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki.models.config import CompileError
from meki.models.qnn import package as package_module
from meki.models.qnn.compile import cache_line, main
from meki.models.qnn.compiler import Compiled
from meki.package import read_manifest
from tests.engine.gemma_models import gemma4

pytestmark = pytest.mark.qnn


@pytest.fixture
def package(make_package: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_package("int8"), tmp_path / "small"))


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies what it should compile; the names of the stages, in order."""
    names: list[str] = []

    def compile_stage(stage: Path, out: Path, chip: Any, optimization: int) -> Compiled:
        names.append(stage.stem)
        binary = out.with_name(f"{out.stem}_qnn.bin")
        shutil.copy(stage, out)
        binary.write_bytes(stage.with_suffix(".bin").read_bytes())
        return Compiled(binary.stat().st_size, 7, 0.5, 10**9)

    monkeypatch.setattr(package_module, "compile_stage", compile_stage)
    return names


def listing(package: Path) -> dict[str, bytes]:
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*") if path.is_file()}


def test_compiles_and_compares(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(package)
    assert main([str(package), "--soc", "sm8750", "--context", "40", "--chunk", "8", "--dense", "--check", "12"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Snapdragon 8 Elite, int8 weights, context 40, prefill in chunks of 8; all [\d,]+ nodes", out)
    for name in ("decode.0", "decode.1", "prefill.0", "prefill.1", "dense_decode.0", "dense_prefill.0", "head"):
        assert re.search(rf"^  {name} +\d+ nodes +[\d.]+ MB +[\d.]+ s +[\d.]+ GB of memory$", out, re.MULTILINE)
    assert re.search(r"^  loaded together: [\d.]+ MB, .* the KV cache takes 0.0 MB more$", out, re.MULTILINE)
    for name in ("small", "without its memory"):
        line = rf"^  {name}, HTP simulator against the CPU over 12 tokens: logits differ by 0\.\d+ \(RMS.* 1\d times$"
        assert re.search(line, out, re.MULTILINE)

    entry = read_manifest(package)["qnn"]["sm8750"]
    assert {key: entry[key] for key in ("soc_model", "htp_arch", "precision", "context", "chunk")} == {
        "soc_model": 69, "htp_arch": 79, "precision": "int8", "context": 40, "chunk": 8,
    }  # fmt: skip
    assert entry["decode"] == [{"file": "decode.0.onnx", "rows": None}, {"file": "decode.1.onnx", "rows": [0, 3]}]
    assert entry["dense_prefill"] == [{"file": "dense_prefill.0.onnx", "rows": None}]
    directory = package / "qnn" / "sm8750"
    assert {path.name for path in directory.iterdir()} == set(entry["files"])
    for name, file in entry["files"].items():
        data = (directory / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    # The rest of the package is untouched.
    after = listing(package)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    manifest = json.loads(after["manifest.json"])
    manifest.pop("qnn")
    assert manifest == json.loads(before["manifest.json"])


def test_the_cache_by_what_layers_see() -> None:
    _, model = gemma4(window=24)
    # Of 7 layers the last 3 share; keys and values of 2 heads, in float16, of 32 in layer 2 and of 16 in 0, 1 and 3.
    assert cache_line(model.config, 100_000) == (
        "64.0 MB more (layers that see all: 1, 25.6 MB; layers that see the last 24 tokens: 3, 38.4 MB)"
    )


def test_defaults_and_a_second_chip(
    package: Path, fake_compiler: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(package), "--soc", "sm8750", "--check", "0"]) == 0
    assert "logits not compared with the CPU's: --check N does it" in capsys.readouterr().out
    assert main([str(package), "--soc", "sm8550", "--precision", "float16", "--check", "0"]) == 0
    entries = read_manifest(package)["qnn"]
    assert list(entries) == ["sm8750", "sm8550"]
    assert (entries["sm8750"]["context"], entries["sm8750"]["chunk"]) == (128, 128)  # what the model has
    assert entries["sm8750"]["dense_decode"] is None
    assert entries["sm8550"]["precision"] == "float16"
    assert fake_compiler == ["decode.0", "decode.1", "prefill.0", "prefill.1", "head"] * 2


def test_what_is_there_is_replaced_only_on_request(
    package: Path, fake_compiler: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(package), "--soc", "sm8750", "--check", "0"]
    assert main(command) == 0
    before = listing(package)
    assert main(command) == 2
    assert re.search(r"qnn/sm8750: exists already; .*--overwrite", capsys.readouterr().err)
    assert listing(package) == before
    assert main([*command, "--chunk", "16", "--overwrite"]) == 0
    assert read_manifest(package)["qnn"]["sm8750"]["chunk"] == 16


@pytest.mark.parametrize("failure", [CompileError("head.onnx: no"), KeyboardInterrupt()])
def test_a_failure_leaves_the_package_as_it_was(
    failure: BaseException, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(package)

    def fail(stage: Path, *rest: Any) -> Compiled:
        raise failure

    monkeypatch.setattr(package_module, "compile_stage", fail)
    interrupted = isinstance(failure, KeyboardInterrupt)
    assert main([str(package), "--soc", "sm8750"]) == (130 if interrupted else 1)
    message = "note: interrupted, the package is unchanged" if interrupted else "error: head.onnx: no"
    assert capsys.readouterr().err.splitlines()[-1] == f"meki-compile: {message}"
    assert listing(package) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--soc", "sm8750", "--context", "129"], 2, "context is 129, this model's can be 2 to 128 tokens"),
        (["--soc", "sm8750", "--chunk", "0"], 2, "chunk is 0, expected 2 to the context of 128 tokens"),
        (["--soc", "sm8750", "--precision", "int4"], 2, "has int8 weights, .* int8 or float16; .*--weights int4"),
        (["--soc", "sm8750", "--check", "500"], 2, "--check is 500, expected 0 to the context of 128 tokens"),
    ],
)
def test_what_cannot_be_compiled(
    arguments: list[str], code: int, message: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(package)
    assert main([str(package), *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"meki-compile: error: .*{message}", line)
    assert listing(package) == before


def test_no_such_package_and_no_such_chip(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "--soc", "sm8750"]) == 2
    assert "no model 'nowhere'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main([str(package), "--soc", "sm1234"])
    assert exit_info.value.code == 2
    assert "sm8750" in capsys.readouterr().err


def test_a_damaged_package(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (package / "weights.bin").open("r+b") as file:
        file.truncate(1000)
    assert main([str(package), "--soc", "sm8750"]) == 1
    assert re.search(r"weights.bin: 1000 bytes, the manifest says \d+", capsys.readouterr().err)


def test_the_missing_provider_names_its_extra(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    assert main([str(package), "--soc", "sm8750"]) == 1
    assert re.search(r"'onnxruntime_qnn' is missing; .*pip install 'meki\[models,qnn\]'", capsys.readouterr().err)


def test_entries_that_come_meanwhile_are_kept(package: Path, fake_compiler: list[str]) -> None:
    """Two chips compiled at the same time: here the other one's run ends while this one compiles."""
    compile_stage = package_module.compile_stage

    def compile_other_first(*arguments: Any) -> Compiled:
        if len(fake_compiler) == 0:
            fake_compiler.append("sm8550 begins")
            assert main([str(package), "--soc", "sm8550", "--check", "0"]) == 0
        return compile_stage(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package_module, "compile_stage", compile_other_first)
        assert main([str(package), "--soc", "sm8750", "--check", "0"]) == 0
    assert set(read_manifest(package)["qnn"]) == {"sm8550", "sm8750"}


def test_damaged_weights(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (package / "weights.bin").open("r+b") as file:
        file.write(b"x")
    assert main([str(package), "--soc", "sm8750"]) == 1
    assert re.search(r"weights.bin: SHA-256 is .*the file is damaged", capsys.readouterr().err)


def test_weights_beyond_float16(make_package: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    package = Path(shutil.copytree(make_package("float32"), tmp_path / "large"))
    data = np.fromfile(package / "weights.bin", np.float32)
    data[:] = 1e6
    data.tofile(package / "weights.bin")
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"]["weights.bin"]["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
    (package / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(package), "--soc", "sm8750"]) == 1
    assert re.search(r"largest magnitude 1e\+06 is beyond float16's 65504", capsys.readouterr().err)
    assert "qnn" not in read_manifest(package)
