"""benchmarks.aihub when something is wrong: token, network, devices, packages. One clear message each."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from benchmarks.aihub import profile as hub

pytest.importorskip("qai_hub", reason="AI Hub's client is not installed: pip install 'meki[hub]'")

from ..compiled import SOC, write_targets
from .case import DEVICE, configure, error_of, profile
from .stub import StubHub


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

    expect(2, 'not compiled for "sm8650"', "--soc", "sm8650")
    expect(2, "is not a directory", "--json", str(tmp_path / "none" / "out.json"))
    target = json.loads((package / "manifest.json").read_text())["qnn"][SOC]
    write_targets(package, {SOC: target, "sm8650": target})
    expect(2, "choose one of these chips")
    write_targets(package, {SOC: target | {"dense_decode": None, "dense_prefill": None}})
    expect(2, "has no dense_decode", "--graphs", "dense_decode")
    write_targets(package, {SOC: target | {"head": "../../secret.onnx"}})
    expect(1, "expected a plain file name")
    write_targets(package, {SOC: {key: value for key, value in target.items() if key != "chunk"}})
    expect(1, 'has no "chunk"')
    write_targets(package, {})
    expect(2, "meki-compile")
    (package / "manifest.json").write_text("{")
    expect(1, "not valid JSON")
    (package / "manifest.json").unlink()
    expect(1, "is not a package")


def test_a_damaged_binary_is_not_uploaded(stub: StubHub, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = package / "qnn" / SOC / "head_qnn.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert profile(package) == 1
    assert "SHA-256" in error_of(capsys) and not stub.models
    path.unlink()
    assert profile(package) == 1
    assert "head_qnn.bin" in error_of(capsys) and not stub.models
