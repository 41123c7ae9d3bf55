from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import _core
from meki.cli.info import main


def test_text(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(package)]) == 0
    out = capsys.readouterr().out
    manifest = json.loads((package / "manifest.json").read_text())
    rom = _core.Rom(str(package / "memory.rom")).info
    parameters = manifest["parameters"]
    for part in (
        manifest["name"],
        f"{parameters['ram']:,}",
        f"{parameters['rom']:,} in {rom.file_bytes:,} bytes",
        f"{rom.bundle_bytes:,} bytes in one read",
        "float16",
        "stage1.onnx",
        "provenance",
        "random",
        "chat template     none",
    ):
        assert part in out
    for name, entry in manifest["files"].items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {name} ") and "sha256" in line)
        assert f"{entry['bytes']:,} bytes" in line and entry["sha256"][:12] in line
    assert "verified" not in out


def test_json(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(package), "--json", "--verify"]) == 0
    info = json.loads(capsys.readouterr().out)
    manifest = json.loads((package / "manifest.json").read_text())
    for field, value in manifest.items():
        assert info[field] == value
    assert info["ram_parameters"] == manifest["parameters"]["ram"]
    assert info["rom"]["weights"] == manifest["parameters"]["rom"] == 3 * 300 * 32  # layers, tokens, row width
    assert info["rom"]["file_bytes"] == (package / "memory.rom").stat().st_size
    assert info["verified"] is True


def test_a_chat_template(chat_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(chat_package), "--verify"]) == 0
    assert "chat template     chat_template.jinja\n" in capsys.readouterr().out


def test_a_dense_package(make_package, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_package(memory_dim=0)), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "none: a dense model" in out
    assert "verified: all SHA-256 sums are right" in out


def test_a_mixture_of_experts(make_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = make_package(memory_dim=0, ffn_kind="moe", experts=5, experts_per_token=2)
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    parameters = json.loads((path / "manifest.json").read_text())["parameters"]
    assert "FFN 96 x 2 of 5 experts, " in out and "memory            none\n" in out
    assert f"RAM parameters    {parameters['ram']:,}, {parameters['active']:,} of them active a token\n" in out


def test_verify_finds_one_changed_byte(change_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = change_package(lambda manifest: None)
    data = bytearray((path / "weights.bin").read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    (path / "weights.bin").write_bytes(data)
    assert main([str(path)]) == 0  # sizes are right: only --verify reads it all
    capsys.readouterr()
    assert main([str(path), "--verify"]) == 1
    captured = capsys.readouterr()
    for part in ("meki-info: error: ", "weights.bin", expected, hashlib.sha256(data).hexdigest()):
        assert part in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_verify_checks_every_bundle(package: Path, change_package: Callable[..., Path], capsys) -> None:
    """A ROM whose SHA-256 is right, but the last bundle's checksum is not: only the bundles can tell."""
    rom = bytearray((package / "memory.rom").read_bytes())
    info = _core.Rom(str(package / "memory.rom")).info
    last = 4096 + (info.entries - 1) * info.bundle_stride  # docs/rom-format.md: data_offset is 4096
    rom[last] ^= 1
    path = change_package(lambda manifest: manifest["contents"].update({"memory.rom": bytes(rom)}))
    assert main([str(path), "--verify"]) == 1
    err = capsys.readouterr().err
    assert "memory.rom" in err and str(info.entries - 1) in err


def test_what_is_for_people_may_be_anything(change_package: Callable[..., Path], capsys) -> None:
    error = {"weights": {"overall": 0.00538, "worst_tensor": "head"}, "rows": 0}
    path = change_package(lambda manifest: manifest.update(quantization_error=error, provenance={"corpus": ["a", "b"]}))
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "overall 0.0054, worst tensor head\n" in out
    assert "['a', 'b']" in out


QUALITY = {
    "source": "book-model.gguf",
    "text": "book.txt",
    "bytes": 20_000,
    "sha256": "0" * 64,
    "tokens": 4_700,
    "context": 4_096,
    "kv_type": "int8",
    "perplexity": 17.42,
    "reference_perplexity": 17.31,
    "kl_divergence": 0.01234,
    "kl_standard_error": 0.001,
    "same_top_token": 0.961,
}


def test_quality(package: Path, change_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(package)]) == 0
    assert "quality" not in capsys.readouterr().out
    path = change_package(lambda manifest: manifest.update(quality={**QUALITY, "more": None}, provenance={}))
    assert main([str(path)]) == 0
    assert (
        "\nquality           perplexity 17.42 beside 17.31 of book-model.gguf in float32 (+0.64%), "
        "KL divergence 0.01234 ± 0.00100, 96.1% the same next token; 20,000 bytes of book.txt, int8 KV cache\n"
    ) in capsys.readouterr().out
    assert main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] == {**QUALITY, "more": None}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text", 1, "quality.text is 1, expected a string"),
        ("tokens", 0, "quality.tokens is 0, expected a number of them"),
        ("bytes", True, "quality.bytes is True, expected a number of them"),
        ("reference_perplexity", 0, "quality.reference_perplexity is 0, expected a number above 0"),
        ("kl_divergence", "0", "quality.kl_divergence is '0', expected a number"),
    ],
)
def test_quality_that_is_none(
    change_package: Callable[..., Path], capsys: pytest.CaptureFixture[str], field: str, value: Any, message: str
) -> None:
    path = change_package(lambda manifest: manifest.update(quality={**QUALITY, field: value}))
    assert main([str(path)]) == 1
    assert message in capsys.readouterr().err


def test_quality_in_part(change_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    for quality, message in (([], "quality is [], expected an object"), ({}, "quality.source is None, expected a str")):
        path = change_package(lambda manifest, quality=quality: manifest.update(quality=quality))
        assert main([str(path)]) == 1
        assert message in capsys.readouterr().err
        shutil.rmtree(path)


def test_errors(tmp_path: Path, change_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-model"]) == 2
    assert main([str(tmp_path)]) == 1  # a directory, but no package
    assert "manifest.json" in capsys.readouterr().err
    path = change_package(lambda manifest: manifest["architecture"].update(heads=3))
    assert main([str(path)]) == 1
    assert "architecture.heads is 3, expected a multiple of kv_heads, which is 2" in capsys.readouterr().err
