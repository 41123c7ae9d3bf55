"""aihub.profile --compile: AI Hub compiles the graphs that a package was compiled from."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.aihub import package as hub_package
from benchmarks.aihub import profile as hub
from benchmarks.aihub.client import HubError
from meki.models.qnn.stages import Options, plan, write_stage
from meki.models.qnn.weights import PackageWeights

pytest.importorskip("qai_hub", reason="AI Hub's client is not installed: pip install 'meki[hub]'")

from qai_hub.client import SourceModelType, _determine_model_type

from . import stub as ai_hub
from .case import MEDIANS, profile
from .stub import StubHub


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for writing a package's graphs; the temporary directory of the test."""

    @contextlib.contextmanager
    def written(target: Any, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / f"{name}.onnx"
            directory.mkdir()
            (directory / f"{name}.onnx").write_bytes(b"graph of " + name.encode())
            (directory / f"{name}.data").write_bytes(bytes(1500))
            yield directory

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(hub, "written_stage", written)
    return temporary


def test_graphs_are_compiled_and_then_profiled(stub: StubHub, package: Path, tmp_path: Path, graphs: Path) -> None:
    out = tmp_path / "out.json"
    for _ in range(2):
        assert profile(package, "--graphs", "decode,head", "--compile", "--json", str(out)) == 0
    assert (stub.posts("models"), stub.posts("jobs")) == (3, 6)
    uploads = [upload for upload in stub.models.values() if upload.producer is None]
    assert [upload.files() for upload in uploads] == [
        {f"{name}.onnx/{name}.onnx": b"graph of " + name.encode(), f"{name}.onnx/{name}.data": bytes(1500)}
        for name in ("decode.0", "decode.1", "head")
    ]
    assert all(upload.message.is_directory for upload in uploads)
    compiled = [job.message.compile_job for job in stub.jobs.values() if job.kind == "compile"]
    assert {job.options for job in compiled} == {hub.COMPILE_OPTIONS}
    profiled = [job.message.inference_job.model.model_id for job in stub.jobs.values() if job.kind == "profile"]
    assert profiled == [job.target_model.model_id for job in compiled]
    report = json.loads(out.read_text())
    assert report["results"][0]["npu_us"] == MEDIANS["decode.0"] + MEDIANS["decode.1"] + MEDIANS["head"]
    assert report["protocol"]["compiled_by"] == "AI Hub"
    assert [job["type"] for job in report["stages"][0]["jobs"]] == ["compile", "inference"]
    assert list(graphs.iterdir()) == []  # no graph and no archive of the client is left


def test_a_failed_compilation_is_reported_and_tried_again(
    stub: StubHub, package: Path, graphs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reasons = {("compile", "head"): "Unsupported operator.", ("profile", "head"): "Its model was not compiled."}
    assert profile(package, "--graphs", "head", "--compile") == 1
    errors = capsys.readouterr().err
    assert "compile job j0 failed: Unsupported operator." in errors and "was not compiled" not in errors
    stub.reasons.clear()
    assert profile(package, "--graphs", "head", "--compile") == 0
    assert (stub.posts("models"), stub.posts("jobs")) == (1, 4)


def test_a_failed_profile_does_not_repeat_the_compilation(stub: StubHub, package: Path, graphs: Path) -> None:
    stub.reasons["profile", "head"] = "The device restarted."
    assert profile(package, "--graphs", "head", "--compile") == 1
    stub.reasons.clear()
    assert profile(package, "--graphs", "head", "--compile") == 0
    assert sorted(job.kind for job in stub.jobs.values()) == ["compile", "profile", "profile"]


def test_a_compilation_that_fails_between_two_runs(
    stub: StubHub, package: Path, graphs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.job_limit = 1
    assert profile(package, "--graphs", "head", "--compile") == 1  # compiles, but there is no profile job
    stub.job_limit, stub.reasons["compile", "head"] = None, "Unsupported operator."
    stub.jobs["j0"].polls = 100
    capsys.readouterr()
    assert profile(package, "--graphs", "head", "--compile") == 1
    assert "compile job j0 failed: Unsupported operator." in capsys.readouterr().err
    stub.reasons.clear()
    stub.jobs["j0"].polls = 0
    assert profile(package, "--graphs", "head", "--compile") == 0
    assert stub.posts("models") == 1


def test_a_compilation_that_names_no_model(
    stub: StubHub, package: Path, graphs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the client documents it of jobs of its older versions; it waits for their end."""
    monkeypatch.setitem(ai_hub.STATES, "compile", [])
    stub.names_compiled_models = False
    stub.reasons["compile", "head"] = "Unsupported operator."
    for reason in ("failed: Unsupported operator.", "names no compiled model"):
        assert profile(package, "--graphs", "decode,head", "--compile") == 1
        errors = capsys.readouterr().err
        assert f"aihub: head: compile job j{len(stub.jobs) - 1} {reason}" in errors
        stub.reasons.clear()
    stub.names_compiled_models = True
    assert profile(package, "--graphs", "decode,head", "--compile") == 0  # nothing of these is remembered


@pytest.mark.parametrize("name", ["decode.0", "prefill.1", "head"])
def test_a_graph_is_written_as_ai_hub_takes_it(make_package: Callable[..., Path], tmp_path: Path, name: str) -> None:
    package = make_package("float32", layers=2)
    manifest = json.loads((package / "manifest.json").read_text())
    entry = {"context": 64, "chunk": 16, "precision": "float16", "dense_decode": None}
    with hub_package.written_stage(hub_package.Target(package, manifest, "sm8750", entry, {}), name) as directory:
        assert directory.name == f"{name}.onnx"
        assert {file.name for file in directory.iterdir()} == {f"{name}.onnx", f"{name}.data"}
        assert _determine_model_type(directory) == SourceModelType.ONNX
        model = onnx.load(directory / f"{name}.onnx")  # with the weights beside it
    assert not directory.exists()

    weights = PackageWeights(package, manifest)
    plans = [stage for stages in plan(weights, Options(64, 16, "float16", False)).values() for stage in stages]
    (stage,) = [stage for stage in plans if stage.name == name]
    expected = onnx.load(write_stage(weights, stage, tmp_path))
    assert model.graph.node == expected.graph.node and model.graph.input == expected.graph.input
    assert {tensor.name: tensor.raw_data for tensor in model.graph.initializer} == {
        tensor.name: tensor.raw_data for tensor in expected.graph.initializer
    }


def test_a_stage_of_another_version_is_refused(make_package: Callable[..., Path]) -> None:
    package = make_package("float32", layers=2)
    manifest = json.loads((package / "manifest.json").read_text())
    entry = {"context": 64, "chunk": 16, "precision": "float16", "dense_decode": None}
    target = hub_package.Target(package, manifest, "sm8750", entry, {})
    with pytest.raises(HubError, match="compile the package again"), hub_package.written_stage(target, "decode.7"):
        pass
