"""Profiling in AI Hub, against a stand-in on the loopback interface that speaks the messages of AI Hub's own client."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("qai_hub", reason="AI Hub's client is not installed: pip install 'meki[hub]'")

from qai_hub import client
from qai_hub import public_api_pb2 as pb

from ..compiled import STAGES, compiled_package
from .case import DEVICE, MEDIANS, TIMES, binary, profile
from .stub import StubHub, profile_detail


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
    assert "aihub: head: model" in (errors := capsys.readouterr().err) and "(403)" in errors and not stub.jobs
    stub.bucket_refuses = False
    assert profile(package, "--graphs", "head") == 0
    assert [upload.content for upload in stub.models.values()] == [None, binary(package, "head")]


def test_a_step_with_a_stage_left_out_has_no_time(stub: StubHub, package: Path, tmp_path: Path) -> None:
    assert profile(package, "--graphs", "decode,dense_prefill", "--json", str(tmp_path / "out.json")) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [entry["npu_us"] for entry in report["results"]] == [None, MEDIANS["dense_prefill.0"]]
    assert len(stub.jobs) == 3


def test_a_package_without_memory_is_dense(stub: StubHub, make_package: Callable[..., Path], tmp_path: Path) -> None:
    package = compiled_package(make_package(memory_dim=0), tmp_path / "dense")
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
        patch.setattr(client.time, "sleep", interrupt)
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
    assert "aihub: decode.1: profile job j1 failed: Failed to load the context binary." in captured.err
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
    assert "You have reached your limit of 2 jobs." in errors and "aihub: dense_decode.0: not submitted" in errors
    assert stub.posts("models") == 3  # what comes behind the limit is not uploaded in vain
    report = json.loads((tmp_path / "out.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == ["decode.0", "decode.1"]
