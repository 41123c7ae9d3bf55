"""Signed packages: meki-info --verify --key, with keys and signatures that OpenSSL makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from meki.cli.info import main

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_key(directory: Path, name: str, algorithm: str = "ed25519") -> Path:
    """NAME.pem, and the public half of it, which is returned."""
    openssl("genpkey", "-algorithm", algorithm, "-out", directory / f"{name}.pem")
    openssl("pkey", "-in", directory / f"{name}.pem", "-pubout", "-out", directory / f"{name}.pub")
    return directory / f"{name}.pub"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path, "key")


@pytest.fixture
def signed(package: Path, key: Path, tmp_path: Path) -> Path:
    """A package of the test's own, signed as docs/cli.md says."""
    copy = Path(shutil.copytree(package, tmp_path / "signed"))
    manifest, private = copy / "manifest.json", key.with_suffix(".pem")
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", private, "-in", manifest, "-out", f"{manifest}.sig")
    return copy


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """The one line of a refusal; nothing of the package is shown."""
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_signed(signed: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(signed), "--verify", "--key", str(key)]) == 0
    assert f"are right\nsigned by the owner of {key}\n" in capsys.readouterr().out


def test_a_key_without_verify(signed: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give both" in refused(capsys, signed, "--key", key, code=2)


def test_not_signed(package: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "manifest.json.sig: no such file" in refused(capsys, package, "--verify", "--key", key)


def test_signed_by_another(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_key(tmp_path, "other")
    assert "another key has signed it" in refused(capsys, signed, "--verify", "--key", other)


@pytest.mark.parametrize("change", [b"", b"short", b"x" * 64, b"x" * 65])
def test_damaged_signatures(signed: Path, key: Path, change: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (signed / "manifest.json.sig").write_bytes(change)
    assert "not a signature of manifest.json" in refused(capsys, signed, "--verify", "--key", key)


def test_a_changed_manifest(signed: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = signed / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert "was changed after it was signed" in refused(capsys, signed, "--verify", "--key", key)


@pytest.mark.parametrize("name", ["weights.bin", "memory.rom", "tokenizer.json", "stage0.onnx"])
def test_changed_files(signed: Path, key: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = signed / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{name}: SHA-256 is" in refused(capsys, signed, "--verify", "--key", key)


def test_keys_that_are_none(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, nonsense = tmp_path / "missing.pub", tmp_path / "nonsense.pub"
    nonsense.write_text("nonsense")
    x448 = make_key(tmp_path, "ed448", "ed448")
    private = tmp_path / "key.pem"
    for key, part in (
        (missing, "missing.pub: no such key"),
        (nonsense, "not a public key in PEM form"),
        (private, "not a public key in PEM form"),
        (x448, "a key of another kind"),
    ):
        assert part in refused(capsys, signed, "--verify", "--key", key, code=2)
