"""The command line meki-convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from meki.models import convert
from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.checkpoints.huggingface import save_pretrained
from meki.models.tokenizer import TokenizerSpec
from meki.package import bundled_models, find_model, read_manifest, stored_models


@pytest.fixture
def checkpoint(make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path) -> Path:
    path = tmp_path / "run"
    save_pretrained(path, make_model(), tokenizer_spec, provenance={"weights": "random", "tokens": "0"})
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
    assert manifest["provenance"] == {"source": "run", "format": "huggingface", "weights": "random", "tokens": "0"}
    assert manifest["files"] == expected["files"]  # the same bytes as from the model itself
    summary = capsys.readouterr().out
    assert "weights int8, 8.50 bits a weight" in summary and "memory.rom" in summary
    errors = manifest["quantization_error"]
    assert f"{errors['weights']['overall']:.5f} overall" in summary and f"{errors['rows']:.6f}" in summary


def test_end_tokens_beyond_the_vocabulary(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [0, 300, 4294967295]}')
    assert convert.main([str(checkpoint), "-o", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer"]["eos_token_ids"] == [0]
    warning = "meki-convert: warning: end tokens 300, 4294967295 are ignored, the vocabulary's ids are 0 to 299; "
    assert [line[: len(warning)] for line in capsys.readouterr().err.splitlines() if "warning" in line] == [warning]


def test_options(checkpoint: Path, make_package: Callable[..., Path], tmp_path: Path) -> None:
    output, elsewhere, card = tmp_path / "out", tmp_path / "t.json", tmp_path / "card.md"
    (checkpoint / "tokenizer.json").rename(elsewhere)
    card.write_text("# Card\n")
    options = ["--name", "small", "--weights", "float32", "--rows", "int8", "--tokenizer", elsewhere, "--card", card]
    assert convert.main([str(checkpoint), "-o", str(output), *map(str, options)]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    expected = json.loads((make_package(weights="float32", rows="int8") / "manifest.json").read_text())
    assert manifest["name"] == "small"
    assert (output / "README.md").read_text() == "# Card\n"
    del manifest["files"]["README.md"]
    assert manifest["files"] == expected["files"]


@pytest.fixture
def small_config(make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> LlamaConfig:
    """What `--random small` names; its vocabulary holds the bundled tokenizer's."""
    config = make_model(vocab_size=4096).config
    monkeypatch.setitem(convert.SIZES, "small", config.settings())
    return config


def test_random(small_config: LlamaConfig, tmp_path: Path) -> None:
    manifests = []
    for name in ("first", "second"):
        output = tmp_path / name
        assert convert.main(["--random", "small", "--weights", "int4", "--rows", "int8", "-o", str(output)]) == 0
        manifests.append(json.loads((output / "manifest.json").read_text()))
        bundled = bundled_models()["meki-tiny"] / "tokenizer.json"
        assert (output / "tokenizer.json").read_bytes() == bundled.read_bytes()
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0]["architecture"] == small_config.manifest()
    assert manifests[0]["provenance"] == {"weights": "random", "configuration": "small"}
    assert (manifests[0]["weights"]["type"], manifests[0]["memory"]["row_type"]) == ("int4", "int8")
    # Normal values in blocks of 32 lose some 8.4% in 4 bits, test_quantize says why; rows some 0.6% in 8.
    errors = manifests[0]["quantization_error"]
    assert 0.08 < errors["weights"]["worst"] < 0.09 and 0.004 < errors["rows"] < 0.008


@pytest.mark.usefixtures("small_config")
def test_random_with_a_tokenizer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, output = checkpoint / "tokenizer.json", tmp_path / "out"
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


def test_without_an_output_the_package_is_in_the_store(
    checkpoint: Path, meki_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint.rename(checkpoint.with_name("My Model"))
    assert convert.main([str(source), "--weights", "float32"]) == 0
    assert 'to run it: meki-run --model my-model "Once upon a time"\n' in capsys.readouterr().out
    assert find_model("my-model") == meki_home / "models" / "my-model"
    assert read_manifest(find_model("my-model"))["name"] == "my-model"
    assert convert.main([str(source)]) == 2
    error = capsys.readouterr().err
    assert "my-model: is in the store already" in error and "--name" in error and "--overwrite" in error
    assert convert.main([str(source), "--overwrite"]) == 0
    assert read_manifest(find_model("my-model"))["weights"]["type"] == "int8"
    template = source / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    assert convert.main([str(source), "--name", "other"]) == 0
    assert "to run it: meki-run --model other --chat\n" in capsys.readouterr().out
    assert sorted(path.name for path in (meki_home / "models").iterdir()) == ["my-model", "other"]


@pytest.mark.usefixtures("small_config")
def test_random_weights_in_the_store() -> None:
    assert convert.main(["--random", "small"]) == 0
    assert read_manifest(find_model("random-small"))["provenance"]["weights"] == "random"


@pytest.mark.parametrize("name", ["My Model", "../up", ".hidden", "a/b", "-", "模型"])
def test_names_that_the_store_does_not_take(
    checkpoint: Path, meki_home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(checkpoint), f"--name={name}"]) == 2
    assert f"the name in the store is {name!r}, expected small letters" in capsys.readouterr().err
    assert not meki_home.exists()


def test_a_failed_conversion_leaves_nothing_in_the_store(
    checkpoint: Path, meki_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"cut off")
    assert convert.main([str(checkpoint)]) == 1
    assert stored_models() == {} and "not a complete safetensors file" in capsys.readouterr().err


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, tmp_path / "out", tmp_path / "gone", code=2)
    assert "gone: no such file or directory; expected a Hugging Face folder" in error


def test_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "directory"
    source.mkdir()
    assert f"{source}: not a known kind of checkpoint; expected" in fails(capsys, tmp_path / "out", source)
    (source / "notes.txt").write_text("certainly not a checkpoint")
    assert "notes.txt: not a known kind" in fails(capsys, tmp_path / "out", source / "notes.txt")


def test_weights_without_their_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give the folder that has its config.json" in fails(
        capsys, tmp_path / "out", (checkpoint / "model.safetensors").rename(tmp_path / "model.safetensors")
    )


def test_settings(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert convert.main([str(checkpoint), "-o", str(output), "--set", "context=64", "--set", "rope_theta=5e5"]) == 0
    architecture = json.loads((output / "manifest.json").read_text())["architecture"]
    assert (architecture["context"], architecture["rope_theta"]) == (64, 5e5)
    capsys.readouterr()
    error = fails(capsys, tmp_path / "other", checkpoint, "--set", "heads=3")
    assert "heads (3) must be a multiple of kv_heads (2)" in error


@pytest.mark.parametrize(
    "setting",
    [
        "contxt=64",
        "context",
        "context=many",
        "context=null",
        "layers=0",
        "qk_norm=1",
        "rope_factors=[1",
        "norm_eps=NaN",
    ],
)
def test_bad_settings(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --set: " in fails(capsys, tmp_path / "out", tmp_path, "--set", setting, code=2)


def test_no_tokenizer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer.json").unlink()
    error = fails(capsys, tmp_path / "out", checkpoint, code=2)
    assert f"{checkpoint}: has no tokenizer.json" in error and "--tokenizer" in error


def test_tokenizer_too_large(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])
    tokenizer.save(str(path))
    assert "the model's vocabulary has 300 tokens" in fails(capsys, tmp_path / "out", checkpoint)


def test_settings_that_do_not_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, tmp_path / "out", "--random", "meki-tiny", "--set", "heads=7", code=2)
    assert "--set: heads (7) must be a multiple of kv_heads (2)" in error


def test_rows_of_a_model_without_a_memory(
    make_model: Callable[..., Decoder],
    tokenizer_spec: TokenizerSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_pretrained(tmp_path / "dense", make_model(memory_dim=0), tokenizer_spec, provenance={})
    error = fails(capsys, tmp_path / "out", tmp_path / "dense", "--rows", "int8", code=2)
    assert "--rows int8: the model has no memory" in error
    assert convert.main([str(tmp_path / "dense"), "-o", str(tmp_path / "out")]) == 0


def test_tokenizer_of_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, output = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    assert "other/tokenizer.json: no such tokenizer" in fails(capsys, output, checkpoint, "--tokenizer", other, code=2)
    (checkpoint / "tokenizer.json").rename(other / "tokenizer.json")
    assert convert.main([str(checkpoint), "-o", str(output), "--tokenizer", str(other)]) == 0


def test_template_that_cannot_be_used(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is converted without it."""
    file, output = checkpoint / "chat_template.jinja", tmp_path / "out"
    for template, reason in ((b"{% for %}", "line 1: "), (b"\xff", "can't decode byte 0xff")):
        file.write_bytes(template)
        assert convert.main([str(checkpoint), "-o", str(output), "--overwrite"]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith(
            f"meki-convert: warning: {file}: the chat template cannot be used and is left out: "
        )
        assert reason in captured.err and "--chat-template" in captured.err and captured.err.count("\n") == 1
        assert json.loads((output / "manifest.json").read_text())["tokenizer"]["chat_template"] is None


def test_template_of_the_users_own(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    file, output = tmp_path / "mine.jinja", tmp_path / "out"
    for template in (b"{% for %}", b"\xff"):
        file.write_bytes(template)
        error = fails(
            capsys, output, tmp_path / "no-such-checkpoint", "--chat-template", file, code=2
        )  # before all else
        assert f"{file}: not a chat template: " in error and error.endswith("; give one that works")
    file.write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    assert convert.main([str(checkpoint), "-o", str(output), "--chat-template", str(file)]) == 0
    assert (output / "chat_template.jinja").read_bytes() == b"{{ messages[0].content }}"


def test_home_directory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert.main([f"~/{checkpoint.name}", "--output=~/out"]) == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["", "a\nb", "\udcff"])
def test_names_that_cannot_be_printed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    output = tmp_path / "out"
    if name:
        assert "give one of printable characters" in fails(capsys, output, checkpoint, "--name", name, code=2)
    else:
        assert convert.main([str(checkpoint), "-o", str(output), "--name", name]) == 0
        assert json.loads((output / "manifest.json").read_text())["name"] == "out"


def test_output_that_cannot_be(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a symbolic link to nothing" in fails(capsys, tmp_path / "link", checkpoint, code=2)
    (tmp_path / "file").write_text("")
    assert "file/out: cannot be made: Not a directory" in fails(capsys, tmp_path / "file" / "out", checkpoint)


def test_overwriting_what_a_link_leads_to(checkpoint: Path, tmp_path: Path) -> None:
    output, link = tmp_path / "out", tmp_path / "link"
    assert convert.main([str(checkpoint), "-o", str(output)]) == 0
    link.symlink_to(output)
    assert convert.main([str(checkpoint), "-o", str(link), "--overwrite", "--weights", "float32"]) == 0
    assert link.is_symlink()
    assert json.loads((output / "manifest.json").read_text())["weights"]["type"] == "float32"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "out", "run"]


def test_missing_card(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "card.md" in fails(capsys, tmp_path / "out", checkpoint, "--card", tmp_path / "card.md", code=2)


@pytest.mark.parametrize(
    "argv",
    [
        [],
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
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meki-convert: error: ")
    assert ("unknown option --fast" in line) == ("--fast" in argv)


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
