"""The quality of a package: `meki-convert --check` and `meki-check`."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from meki import Engine
from meki.cli import info
from meki.models import check, convert, quality
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints.huggingface import save_pretrained
from meki.models.progress import ProgressBars
from meki.models.tokenizer import TokenizerSpec
from meki.package import read_manifest

TEXT = "A cat wrote in the book of the lighthouse that a ship came with fish in the night.\n" * 2


@pytest.fixture
def checkpoint(make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "run", make_model(), tokenizer_spec, provenance={"weights": "random"})
    return tmp_path / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def package(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Of int8 weights, not measured."""
    assert convert.main([str(checkpoint), "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Ran(NamedTuple):
    code: int
    out: str
    err: list[str]


@pytest.fixture
def run(package: Path, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run(*arguments): meki-check of `package`. Unless it succeeds, the package is as before; and it leaves nothing."""

    def run_check(*arguments: object, text: Path = text, against: Path = checkpoint) -> Ran:
        before, names = listing(package), sorted(package.iterdir())
        command = [package, "--against", against, "--text", text, *arguments]
        code = check.main([str(argument) for argument in command])
        printed = capsys.readouterr()
        assert code == 0 or listing(package) == before
        assert sorted(package.iterdir()) == names
        return Ran(code, printed.out, printed.err.splitlines())

    return run_check


def refused(ran: Ran, code: int, part: str) -> None:
    assert (ran.code, ran.out, len(ran.err)) == (code, "", 1)
    assert ran.err[0].startswith("meki-check: error: ") and part in ran.err[0]


def naive(reference: Engine, model: Engine) -> dict[str, float]:
    """Of TEXT, which is one window."""
    ids = [0, *model.tokenizer.encode(TEXT, add_special_tokens=False).ids]
    p, q = (
        np.exp(logits := engine.logits(ids[:-1]).astype(np.float64)) / np.exp(logits).sum(axis=1, keepdims=True)
        for engine in (reference, model)
    )
    kl, rows = (p * np.log(p / q)).sum(axis=1), range(len(ids) - 1)
    return {
        "tokens": len(ids) - 1,
        "perplexity": math.exp(-np.log(q[rows, ids[1:]]).mean()),
        "reference_perplexity": math.exp(-np.log(p[rows, ids[1:]]).mean()),
        "kl_divergence": kl.mean(),
        "kl_standard_error": kl.std(ddof=1) / math.sqrt(len(kl)),
        "same_top_token": (p.argmax(axis=1) == q.argmax(axis=1)).mean(),
    }


def test_at_conversion(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, exact = tmp_path / "out", tmp_path / "exact"
    assert convert.main([str(checkpoint), "-o", str(out), "--weights", "int4", "--check", str(text)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert convert.main([str(checkpoint), "-o", str(exact), "--weights", "float32", "--rows", "float32"]) == 0
    found = read_manifest(out)["quality"]
    expected = naive(Engine(exact, kv_type="float32"), Engine(out))
    assert expected["kl_divergence"] > 0.001 and expected["tokens"] < 128
    # One window, one piece: the same numbers but for float64 rounding.
    assert found == {
        "source": "run",
        "text": "text.txt",
        "bytes": len(TEXT),
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "context": 128,
        "kv_type": "int8",
        **{name: pytest.approx(value, rel=1e-9) for name, value in expected.items()},
    }
    change = found["perplexity"] / found["reference_perplexity"] - 1
    said = (
        f"perplexity {found['perplexity']:.2f} beside {found['reference_perplexity']:.2f} of run in float32 "
        f"({change:+.2%}), KL divergence {found['kl_divergence']:.5f} ± {found['kl_standard_error']:.5f}, "
        f"{found['same_top_token']:.1%} the same next token; {len(TEXT)} bytes of text.txt, int8 KV cache; "
        "random weights"
    )
    assert line == f"  quality: {said}"
    capsys.readouterr()
    assert info.main([str(out), "--verify"]) == 0
    assert f"\nquality           {said}\n" in capsys.readouterr().out


def test_later(run: Callable[..., Ran], checkpoint: Path, package: Path, text: Path, tmp_path: Path) -> None:
    before = listing(package)
    ran = run()
    assert (ran.code, ran.err) == (0, []) and ran.out.startswith(f"{package}: perplexity ")
    after = listing(package)
    manifest = json.loads(after.pop("manifest.json"))
    found = manifest.pop("quality")
    assert manifest == json.loads(before.pop("manifest.json")) and after == before
    assert convert.main([str(checkpoint), "-o", str(tmp_path / "other"), "--check", str(text)]) == 0
    assert read_manifest(tmp_path / "other")["quality"] == found
    # Again, with another text: the new figures are in place of the old ones.
    text.write_text(TEXT[:40])
    assert run().code == 0 and read_manifest(package)["quality"]["bytes"] == 40


@pytest.mark.parametrize(
    "overrides",
    [
        {"memory_dim": 0},
        {"memory_dim": 0, "tied_embeddings": False, "qkv_bias": True},
        {"memory_dim": 0, "ple_dim": 32},
        {"memory_dim": 0, "engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50},
        {"memory_dim": 0, "ffn_kind": "moe", "experts": 4, "experts_per_token": 2},
    ],
)
def test_models_of_all_kinds(
    overrides: dict[str, Any],
    make_model: Callable[..., Decoder],
    tokenizer_spec: TokenizerSpec,
    text: Path,
    tmp_path: Path,
) -> None:
    """Their configurations are found equal. What float32 weights do not lose, the int8 KV cache does: it may send a
    token to another expert."""
    save_pretrained(tmp_path / "run", make_model(**overrides), tokenizer_spec, provenance={})
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "run"), "-o", str(out), "--weights", "float32"]) == 0
    assert check.main([str(out), "--against", str(tmp_path / "run"), "--text", str(text)]) == 0
    found = read_manifest(out)["quality"]
    assert 0 < found["kl_divergence"] < 0.1 and found["same_top_token"] > 0.8
    most = 0.1 if "ffn_kind" in overrides else 0.02
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=most)


def test_options_of_the_conversion(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokenizer = tmp_path / "out", tmp_path / "mine.json"
    (checkpoint / "tokenizer.json").rename(tokenizer)
    options = ["--tokenizer", str(tokenizer), "--set", "context=64"]
    assert convert.main([str(checkpoint), "-o", str(out), *options]) == 0
    command = [str(out), "--against", str(checkpoint), "--text", str(text), *options]
    capsys.readouterr()
    assert check.main(command[:-2]) == 2
    assert f"{out}: architecture.context is 64, of run it is 128; " in capsys.readouterr().err
    assert check.main(command) == 0
    assert read_manifest(out)["quality"]["context"] == 64


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"memory_dim": 0}, "memory.kind is 'meki', of other it is None"),
        ({"memory_dim": 64}, "memory.row_dim is 32, of other it is 64"),
        ({"heads": 2}, "architecture.heads is 4, of other it is 2"),
    ],
)
def test_another_model(
    run: Callable[..., Ran],
    make_model: Callable[..., Decoder],
    tokenizer_spec: TokenizerSpec,
    tmp_path: Path,
    overrides: dict[str, Any],
    part: str,
) -> None:
    save_pretrained(tmp_path / "other", make_model(**overrides), tokenizer_spec, provenance={})
    refused(run(against=tmp_path / "other"), 2, part)


def test_another_tokenizer(run: Callable[..., Ran], checkpoint: Path, package: Path) -> None:
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    file.write_text(json.dumps(tokenizer))
    refused(run(), 2, f"{package}: its tokenizer is not that of run; give the source")
    assert run("--tokenizer", package).code == 0


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (None, "text.txt: no such file of text"),
        (b"", "text.txt: has no text"),
        (b"a\xff", "text.txt: not UTF-8"),
        (b"a", "text.txt: has 1 token; give a text of at least two"),
    ],
)
def test_texts_that_nothing_can_be_said_of(
    run: Callable[..., Ran],
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: bytes | None,
    part: str,
) -> None:
    text.unlink()
    if data is not None:
        text.write_bytes(data)
    refused(run(), 2, part)
    out = tmp_path / "new"
    assert convert.main([str(checkpoint), "-o", str(out), "--check", str(text)]) == 2
    error = capsys.readouterr().err
    assert f"meki-convert: error: {text.parent}/{part}" in error
    assert out.exists() == (data == b"a")  # which is known when there is a tokenizer
    assert ("is complete, its quality is not measured" in error) == out.exists()


def test_random_weights(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["--random", "meki-tiny", "-o", str(tmp_path / "new"), "--check", str(text)]) == 2
    assert "error: --check: random weights have no quality" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_signed_package(run: Callable[..., Ran], package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = package / "manifest.json.sig"
    signature.write_bytes(b"x" * 64)
    with monkeypatch.context() as patched:
        patched.setattr(quality, "Engine", None)  # nothing is computed
        refused(run(), 2, f"{package}: is signed, ")
        assert f"remove {signature}, and sign the package again afterwards" in run().err[0]
    signature.unlink()
    assert run().code == 0


def test_what_is_not_there(run: Callable[..., Ran], package: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    refused(run(against=tmp_path / "nowhere"), 2, f"{tmp_path}/nowhere: no such file or directory")
    refused(run(against=text), 1, "not a known kind of checkpoint")
    refused(run("--tokenizer", tmp_path / "nowhere"), 2, "no such tokenizer")
    refused(run("--set", "contxt=1"), 2, "argument --set: ")
    assert check.main([str(tmp_path / "nowhere"), "--against", str(text), "--text", str(text)]) == 2
    assert "nowhere" in capsys.readouterr().err
    (package / "stage0.onnx").write_bytes(b"")
    refused(run(), 1, "stage0.onnx")


def test_too_little_space(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage("/")._replace(free=1000)
        patched.setattr(quality.shutil, "disk_usage", lambda path: usage)
        refused(run(), 1, "0.000 GB are free; make room")

    export = quality.export_package

    def export_in_part(*arguments: Any, **options: Any) -> None:
        export(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quality, "export_package", export_in_part)
    refused(run(), 1, "No space left on device")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while predictions are compared."""

    def update(self: ProgressBars, phase: str, done: int, total: int) -> None:
        if phase == "predictions":
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "update", update)


@pytest.mark.usefixtures("interrupted")
def test_interrupted(run: Callable[..., Ran]) -> None:
    assert run() == (130, "", ["meki-check: note: interrupted, the package is unchanged"])


def test_interrupted_at_conversion(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The package is there, and a note says how it is measured."""
    out = tmp_path / "my package"
    request.getfixturevalue("interrupted")
    assert convert.main([str(checkpoint), "-o", str(out), "--set", "context=64", "--check", str(text)]) == 130
    printed = capsys.readouterr()
    assert "weights int8" in printed.out and "quality" not in printed.out
    note, command = printed.err.removesuffix("\n").split("; to do it: meki-check ")
    assert note == f"meki-convert: note: {out} is complete, its quality is not measured"
    assert "quality" not in read_manifest(out)
    assert {path.name for path in out.iterdir()} == {*read_manifest(out)["files"], "manifest.json"}
    monkeypatch.undo()
    assert check.main(shlex.split(command)) == 0
    assert read_manifest(out)["quality"]["context"] == 64


def test_a_package_that_is_replaced_meanwhile(
    package: Path, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(self: ProgressBars, phase: str, done: int, total: int) -> None:
        if phase == "predictions" and done == total:
            manifest = json.loads((package / "manifest.json").read_text())
            manifest["files"]["weights.bin"]["sha256"] = "0" * 64
            (package / "manifest.json").write_text(json.dumps(manifest))

    monkeypatch.setattr(ProgressBars, "update", update)
    assert check.main([str(package), "--against", str(checkpoint), "--text", str(text)]) == 1
    assert f"{package}: was replaced while it was measured" in capsys.readouterr().err
    assert "quality" not in read_manifest(package)
