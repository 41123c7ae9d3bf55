"""Profiling in AI Hub, against a stand-in on the loopback interface that speaks the messages of AI Hub's own client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub
import hub_package
import numpy as np
import onnx
import pytest
from hub_client import HubError

from meki.models.qnn.stages import Options, plan, write_stage
from meki.models.qnn.weights import PackageWeights

pytest.importorskip("qai_hub", reason="AI Hub's client is not installed: pip install 'meki[hub]'")

from qai_hub import public_api_pb2 as pb
from qai_hub.client import SourceModelType, _determine_model_type
from qai_hub.util import session

from .hub_stub import TOKEN, StubHub, profile_detail

DEVICE = "Snapdragon 8 Elite QRD"
STAGES = ("decode.0", "decode.1", "prefill.0", "prefill.1", "head", "dense_decode.0", "dense_prefill.0")
# Medians are not the fastest runs, and neither are they symmetric.
TIMES = {name: [1000 * (i + 2), 1000 * (i + 1) + 1, 1000 * (i + 5)] for i, name in enumerate(STAGES)}
MEDIANS = {name: statistics.median(times) for name, times in TIMES.items()}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with StubHub() as server:
        server.add_device("Samsung Galaxy S24 (Family)", "14", "chipset:sm8650", "hexagon:v75", "framework:qnn")
        server.add_device(DEVICE, "14", "chipset:sm8750", "hexagon:v79", "framework:qnn")
        server.add_device(DEVICE, "15", "chipset:sm8750", "hexagon:v79", "framework:qnn")
        server.profiles = {name: profile_detail(times) for name, times in TIMES.items()}
        configure(tmp_path, monkeypatch, server.url)
        yield server


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, token: str = TOKEN) -> None:
    ini = tmp_path / "client.ini"
    ini.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\n")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(ini))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "MAX_RETRIES", 1)  # the client's own, which takes half a minute
    monkeypatch.setattr(session, "BACKOFF_FACTOR", 0)
    monkeypatch.setattr(hub, "POLL_SECONDS", 0.001)


def write_package(path: Path, **changes: Any) -> Path:
    """A package of which everything is there that hub.py reads; the binaries are noise."""
    directory = path / "qnn" / "sm8750"
    directory.mkdir(parents=True)
    files = {}
    for i, name in enumerate(STAGES):
        content = np.random.default_rng(i).bytes(900 + 700 * i)  # one part, several parts of the stand-in
        (directory / f"{name}_qnn.bin").write_bytes(content)
        files[f"{name}_qnn.bin"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    graphs = ("decode", "prefill", "dense_decode", "dense_prefill")
    target = {
        "chip": "Snapdragon 8 Elite",
        "soc_model": 69,
        "htp_arch": 79,
        "precision": "float16",
        "context": 256,
        "chunk": 32,
        "embed": "embed.onnx",
        **{
            graph: [{"file": f"{name}.onnx", "rows": None} for name in STAGES if name.split(".")[0] == graph]
            for graph in graphs
        },
        "head": "head.onnx",
        "files": files,
        "tools": {"onnxruntime-qnn": "2.7.0"},
    }
    write_manifest(path, {"sm8750": target | changes})
    return path


def write_manifest(path: Path, targets: dict[str, Any]) -> None:
    manifest = {"name": "small", "memory": {}, "provenance": {"weights": "random"}, "qnn": targets}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package")


def profile(package: Path, *args: str, device: str = DEVICE) -> int:
    return hub.main([str(package), "--device", device, *args])


def binary(package: Path, name: str) -> bytes:
    return (package / "qnn" / "sm8750" / f"{name}_qnn.bin").read_bytes()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, but for progress bars."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hub.py: ")]
    return line


# What is uploaded, and what is made of the answers


def test_binaries_are_profiled_as_they_are(
    stub: StubHub, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(package, "--json", str(tmp_path / "out.json")) == 0
    assert sorted(upload.sha256 for upload in stub.models.values()) == sorted(
        hashlib.sha256(binary(package, name)).hexdigest() for name in STAGES
    )
    assert {upload.message.model_type for upload in stub.models.values()} == {pb.MODEL_TYPE_QNN_CONTEXT_BINARY}
    jobs = [job.message.inference_job for job in stub.jobs.values()]
    assert {(job.device.name, job.device.os, job.options) for job in jobs} == {(DEVICE, "15", "--qairt_version latest")}

    report = json.loads((tmp_path / "out.json").read_text())
    assert {stage["stage"]: stage["samples_us"] for stage in report["stages"]} == TIMES
    for stage in report["stages"]:
        times = TIMES[stage["stage"]]
        assert stage["median_us"] == statistics.median(times)
        assert min(times) <= stage["p10_us"] < stage["median_us"] < stage["p90_us"] <= max(times)
        assert stage["estimated_inference_time_us"] == min(times)
        assert stage["memory_peak_range_bytes"] == [1_000_000, 3_000_000]
        assert (stage["first_load_us"], stage["warm_load_us"]) == (70_000, 20_000)
        assert stage["layers"] == {"NPU": 5}
        assert stage["jobs"][0]["url"].startswith(f"{stub.url}/jobs/{stage['jobs'][0]['id']}")
    steps = {(entry["memory"], entry["test"]): entry for entry in report["results"]}
    assert {key: (entry["tokens"], entry["npu_us"]) for key, entry in steps.items()} == {
        ("meki", "decode"): (1, MEDIANS["decode.0"] + MEDIANS["decode.1"] + MEDIANS["head"]),
        ("meki", "prefill"): (32, MEDIANS["prefill.0"] + MEDIANS["prefill.1"]),
        ("dense", "decode"): (1, MEDIANS["dense_decode.0"] + MEDIANS["head"]),
        ("dense", "prefill"): (32, MEDIANS["dense_prefill.0"]),
    }
    assert report["failures"] == []
    assert (report["environment"]["device"], report["environment"]["device_os"]) == (DEVICE, ["15"])
    assert report["environment"]["random_weights"]
    assert report["protocol"]["compiled_by"] == "meki-compile"
    printed = capsys.readouterr().out
    assert printed.startswith(f"## small on {DEVICE}, 15\n")
    assert "| decode 1 | meki | 11.00 | decode.0 + decode.1 + head |" in printed  # ms: 2 + 3 + 6
    for label in report["labels"]:
        assert f"- **{label}**" in printed
    assert any("estimate" in label for label in report["labels"]) and any(
        "random weights" in x for x in report["labels"]
    )


def test_upload_with_credentials(
    stub: StubHub, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.bucket = "a-bucket"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", stub.url)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # else the body is wrapped in chunks
    stub.bucket_refuses = True
    assert profile(package, "--graphs", "head") == 1
    assert "hub.py: head: model" in (errors := capsys.readouterr().err) and "(403)" in errors and not stub.jobs
    stub.bucket_refuses = False
    assert profile(package, "--graphs", "head") == 0
    assert [upload.content for upload in stub.models.values()] == [None, binary(package, "head")]


def test_a_step_with_a_stage_left_out_has_no_time(stub: StubHub, package: Path, tmp_path: Path) -> None:
    assert profile(package, "--graphs", "decode,dense_prefill", "--json", str(tmp_path / "out.json")) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [entry["npu_us"] for entry in report["results"]] == [None, MEDIANS["dense_prefill.0"]]
    assert len(stub.jobs) == 3


def test_a_package_without_memory_is_dense(stub: StubHub, tmp_path: Path) -> None:
    package = write_package(tmp_path / "dense", dense_decode=None, dense_prefill=None)
    manifest = json.loads((package / "manifest.json").read_text()) | {"memory": None}
    (package / "manifest.json").write_text(json.dumps(manifest))
    assert profile(package, "--json", str(tmp_path / "out.json")) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(entry["test"], entry["memory"]) for entry in results] == [("decode", "dense"), ("prefill", "dense")]


def test_layers_off_the_npu_are_said(stub: StubHub, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.profiles["decode.0"] = profile_detail([5], npu=4, cpu=2)
    stub.profiles["head"] = profile_detail([5], npu=0)
    assert profile(package, "--graphs", "decode,head") == 0
    printed = capsys.readouterr().out
    assert "decode.0: not all of 6 layers ran on the NPU: 2 on CPU" in printed
    assert "head: AI Hub does not say where its layers ran" in printed
    assert "decode.1:" not in printed


# Later runs


def test_a_second_run_submits_nothing(stub: StubHub, package: Path, tmp_path: Path) -> None:
    for name in ("first.json", "second.json"):
        assert profile(package, "--json", str(tmp_path / name)) == 0
    assert stub.posts("models") == stub.posts("jobs") == len(STAGES)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json"))
    assert first["stages"] == second["stages"] and first["results"] == second["results"]


def test_an_interrupted_run_is_collected_by_the_next(
    stub: StubHub, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out.json"
    stub.polls_in_a_state = 2
    with monkeypatch.context() as patch:
        patch.setattr(hub.time, "sleep", interrupt)
        assert profile(package, "--graphs", "head", "--json", str(out)) == 130
    assert not out.exists()
    assert profile(package, "--graphs", "head", "--json", str(out)) == 0
    assert stub.posts("models") == stub.posts("jobs") == 1
    assert json.loads(out.read_text())["stages"][0]["samples_us"] == TIMES["head"]


def test_what_ai_hub_no_longer_has_is_sent_again(stub: StubHub, package: Path) -> None:
    assert profile(package, "--graphs", "head") == 0
    stub.models.clear()
    assert profile(package, "--graphs", "head") == 0
    assert stub.posts("models") == 2


def test_another_device_needs_no_second_upload(stub: StubHub, package: Path) -> None:
    stub.add_device("Another phone", "15", "hexagon:v79", "framework:qnn")
    assert profile(package, "--graphs", "head") == profile(package, "--graphs", "head", device="Another phone") == 0
    assert (stub.posts("models"), stub.posts("jobs")) == (1, 2)


@pytest.mark.parametrize("content", ["not JSON", "[1]"])
def test_a_broken_ledger_is_named(
    stub: StubHub, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    ledger = tmp_path / "ids.json"
    ledger.write_text(content)
    assert profile(package, "--graphs", "head", "--ledger", str(ledger)) == 1
    assert f"{ledger}: expected" in capsys.readouterr().err and not stub.models


# Jobs that fail


def test_a_failed_job_leaves_the_others(
    stub: StubHub, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    stub.reasons["profile", "decode.1"] = "Failed to load the context binary."
    assert profile(package, "--json", str(out)) == 1
    captured = capsys.readouterr()
    assert "hub.py: decode.1: profile job j1 failed: Failed to load the context binary." in captured.err
    assert f"1 of {len(STAGES)} stages have no figures" in captured.err
    assert "| decode 1 | meki | a stage is missing |" in captured.out
    report = json.loads(out.read_text())
    assert [failure["stage"] for failure in report["failures"]] == ["decode.1"]
    assert {stage["stage"] for stage in report["stages"]} == set(STAGES) - {"decode.1"}
    assert report["results"][0]["npu_us"] is None

    stub.reasons.clear()
    assert profile(package, "--json", str(out)) == 0  # only the one that failed is submitted again
    assert (stub.posts("models"), stub.posts("jobs")) == (len(STAGES), len(STAGES) + 1)


def test_a_profile_without_times_is_a_failure(stub: StubHub, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.profiles["head"] = profile_detail([])
    assert profile(package, "--graphs", "head") == 1
    assert "the profile has no inference times" in capsys.readouterr().err


def test_a_quota_ends_submitting_not_collecting(
    stub: StubHub, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.job_limit = 2
    assert profile(package, "--graphs", "decode,head,dense_decode", "--json", str(tmp_path / "out.json")) == 1
    errors = capsys.readouterr().err
    assert "You have reached your limit of 2 jobs." in errors and "hub.py: dense_decode.0: not submitted" in errors
    assert stub.posts("models") == 3  # what comes behind the limit is not uploaded in vain
    report = json.loads((tmp_path / "out.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == ["decode.0", "decode.1"]


# Compiled by AI Hub


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
    monkeypatch.setattr(hub_package, "written_stage", written)
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


# Errors


def test_no_token(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.ini"
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(missing))
    for content in (None, "[api]\napi_url = http://127.0.0.1\n", "no section"):
        if content is not None:
            missing.write_text(content)
        assert profile(package) == 1
        line = error_of(capsys)
        assert str(missing) in line and "https://aihub.qualcomm.com" in line
        assert line.endswith("qai-hub configure --api_token TOKEN")


def test_wrong_token(
    stub: StubHub,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure(tmp_path, monkeypatch, stub.url, token="expired")
    assert profile(package) == 1
    line = error_of(capsys)
    assert "does not accept the API token" in line and "qai-hub configure --api_token TOKEN" in line


def test_unknown_device(stub: StubHub, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(package, device="snapdragon 8 elite") == 2
    line = error_of(capsys)
    assert f"similar ones: {DEVICE}" in line and "--list-devices" in line and not stub.models


def test_device_of_another_generation(stub: StubHub, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(package, device="Samsung Galaxy S24 (Family)") == 2
    assert "has Hexagon v75, but the package is compiled for v79" in error_of(capsys) and not stub.models


def test_no_network(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    configure(tmp_path, monkeypatch, f"http://127.0.0.1:{port}")
    assert profile(package) == 1
    assert "Could not connect" in error_of(capsys)


def test_missing_client(package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "qai_hub", None)
    assert profile(package) == 1
    assert error_of(capsys).endswith("pip install 'meki[hub]'")


def test_list_devices(stub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.main(["--list-devices"]) == 0
    assert f"| {DEVICE} | 15 | sm8750 | v79 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [[], ["package"], ["--device", "x"], ["package", "--device", "x", "--graphs", "decode,decode"]]
)
def test_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        hub.main(args)
    assert exit.value.code == 2
    assert "needed" in (text := capsys.readouterr().err) or "expected" in text


def test_packages_that_cannot_be_profiled(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def expect(code: int, message: str, *args: str) -> None:
        assert profile(package, *args) == code
        assert message in error_of(capsys)

    expect(2, "not for 'sm8650'", "--soc", "sm8650")
    expect(2, "is not a directory", "--json", str(tmp_path / "none" / "out.json"))
    manifest = (package / "manifest.json").read_text()
    target = json.loads(manifest)["qnn"]["sm8750"]
    write_manifest(package, {"sm8750": target, "sm8650": target})
    expect(2, "choose one with --soc")
    write_manifest(package, {"sm8750": target | {"dense_decode": None}})
    expect(2, "has no dense_decode", "--graphs", "dense_decode")
    write_manifest(package, {"sm8750": target | {"head": "../../secret.onnx"}})
    expect(1, "expected a plain name")
    write_manifest(package, {"sm8750": {key: value for key, value in target.items() if key != "chunk"}})
    expect(1, "'chunk'")
    write_manifest(package, {})
    expect(1, "meki-compile")
    (package / "manifest.json").write_text("{")
    expect(1, "expected the manifest of a package")


def test_a_damaged_binary_is_not_uploaded(stub: StubHub, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = package / "qnn" / "sm8750" / "head_qnn.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert profile(package) == 1
    assert "SHA-256" in error_of(capsys) and not stub.models
    path.unlink()
    assert profile(package) == 1
    assert "head_qnn.bin" in error_of(capsys) and not stub.models
