"""The command line meki-convert."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from meki.models import convert
from meki.models.checkpoint import save_checkpoint
from meki.models.config import ModelConfig
from meki.models.decoder import Decoder


@pytest.fixture
def checkpoint(make_model: Callable[..., Decoder], tokenizer_json: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "model.safetensors"
    path.parent.mkdir()
    save_checkpoint(path, make_model(), {"weights": "random", "tokens": "0"})
    (path.parent / "tokenizer.json").write_bytes(tokenizer_json)
    return path


def fails(capsys: pytest.CaptureFixture[str], output: Path, *argv: object, code: int = 1) -> str:
    """The one line on stderr of a command that fails with status `code` and leaves nothing beside `output`."""
    before = sorted(output.parent.rglob("*"))
    assert convert.main([*map(str, argv), "-o", str(output)]) == code
    assert sorted(output.parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("meki-convert: error: ")
    return lines[0]


def test_defaults(
    checkpoint: Path, make_package: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert convert.main([str(checkpoint), "-o", str(output)]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    expected = json.loads((make_package(weights="int8", rows="float16") / "manifest.json").read_text())
    assert manifest["name"] == "out"
    assert manifest["provenance"] == {"weights": "random", "tokens": "0"}
    assert manifest["files"] == expected["files"]  # the same bytes as from the model itself
    summary = capsys.readouterr().out
    assert "weights int8" in summary and "memory.rom" in summary
    errors = manifest["quantization_error"]
    assert f"{errors['weights']['overall']:.5f} overall" in summary and f"{errors['rows']:.6f}" in summary


def test_options(checkpoint: Path, make_package: Callable[..., Path], tmp_path: Path) -> None:
    output, elsewhere, card = tmp_path / "out", tmp_path / "t.json", tmp_path / "card.md"
    checkpoint.with_name("tokenizer.json").rename(elsewhere)
    card.write_text("# Card\n")
    options = ["--name", "small", "--weights", "int4", "--rows", "int8", "--tokenizer", elsewhere, "--card", card]
    assert convert.main([str(checkpoint), "-o", str(output), *map(str, options)]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    expected = json.loads((make_package(weights="int4", rows="int8") / "manifest.json").read_text())
    assert manifest["name"] == "small"
    assert (output / "README.md").read_text() == "# Card\n"
    del manifest["files"]["README.md"]
    assert manifest["files"] == expected["files"]


@pytest.fixture
def small_config(make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """What `--random small` names; its vocabulary holds the bundled tokenizer's."""
    config = make_model(vocab_size=4096).config
    monkeypatch.setitem(convert.CONFIGS, "small", config)
    return config


def test_random(small_config: ModelConfig, tmp_path: Path) -> None:
    manifests = []
    for name in ("first", "second"):
        output = tmp_path / name
        assert convert.main(["--random", "small", "--weights", "int4", "--rows", "int8", "-o", str(output)]) == 0
        manifests.append(json.loads((output / "manifest.json").read_text()))
        assert (output / "tokenizer.json").read_bytes() == convert.BUNDLED_TOKENIZER.read_bytes()
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0]["architecture"] == dataclasses.asdict(small_config)
    assert manifests[0]["provenance"] == {"weights": "random", "configuration": "small"}
    assert (manifests[0]["weights"]["type"], manifests[0]["memory"]["row_type"]) == ("int4", "int8")
    # Normal values in blocks of 32 lose some 8.7% in 4 bits, test_quantize says why; rows some 0.6% in 8.
    errors = manifests[0]["quantization_error"]
    assert 0.08 < errors["weights"]["overall"] < 0.09 and 0.004 < errors["rows"] < 0.008


@pytest.mark.usefixtures("small_config")
def test_random_with_a_tokenizer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, output = checkpoint.with_name("tokenizer.json"), tmp_path / "out"
    gone = tmp_path / "gone.json"
    assert f"{gone}: no such tokenizer" in fails(capsys, output, "--random", "small", "--tokenizer", gone, code=2)
    assert convert.main(["--random", "small", "--tokenizer", str(tokenizer), "-o", str(output)]) == 0
    assert (output / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_existing_target(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert convert.main([str(checkpoint), "-o", str(output), "--weights", "float32"]) == 0
    capsys.readouterr()
    assert "--overwrite" in fails(capsys, output, checkpoint, code=2)
    assert convert.main([str(checkpoint), "-o", str(output), "--overwrite"]) == 0
    assert json.loads((output / "manifest.json").read_text())["weights"]["type"] == "int8"


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gone.safetensors: no such file" in fails(capsys, tmp_path / "out", tmp_path / "gone.safetensors", code=2)


def test_directory_as_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "directory"
    source.mkdir()
    assert f"{source}: no such file" in fails(capsys, tmp_path / "out", source, code=2)


def test_not_safetensors(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write_text("certainly not a checkpoint")
    assert f"{checkpoint}: not a safetensors file" in fails(capsys, tmp_path / "out", checkpoint)


def test_safetensors_of_something_else(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"weight": torch.ones(3)}, checkpoint)
    assert "no configuration in its metadata" in fails(capsys, tmp_path / "out", checkpoint)


def test_no_tokenizer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.with_name("tokenizer.json").unlink()
    error = fails(capsys, tmp_path / "out", checkpoint, code=2)
    assert "run/tokenizer.json" in error and "--tokenizer" in error


def test_tokenizer_too_large(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.with_name("tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])
    tokenizer.save(str(path))
    assert "the model's vocabulary has 300 tokens" in fails(capsys, tmp_path / "out", checkpoint)


def test_missing_card(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "card.md" in fails(capsys, tmp_path / "out", checkpoint, "--card", tmp_path / "card.md", code=2)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["x.safetensors"],
        ["-o", "y"],
        ["x", "-o", "y", "--weights", "int2"],
        ["x", "-o", "y", "--fast"],
        ["x", "-o", "y", "--random", "meki-0.6b"],
        ["-o", "y", "--random", "meki-7b"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        convert.main(argv)
    assert error.value.code == 2
    assert "usage: meki-convert" in capsys.readouterr().err


def test_interrupt(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: convert.ProgressBars, phase: str, done: int, total: int) -> None:
        if phase == "memory rows":
            raise KeyboardInterrupt

    monkeypatch.setattr(convert.ProgressBars, "update", interrupt)
    assert convert.main([str(checkpoint), "-o", str(tmp_path / "out")]) == 130
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert "nothing written" in capsys.readouterr().err
