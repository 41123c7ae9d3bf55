"""Engine and the package it opens: how a prompt begins, tokenizers, what is damaged or missing, what is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import meki.engine
from meki import Engine, PackageError, Session
from meki.models.tokenizer import END_OF_STORY

PROMPT = "Once upon a time"


def prompt_of(session: Session) -> list[int]:
    session.generate("", max_new_tokens=1)
    return session.tokens[:-1]


def test_an_empty_prompt_begins_a_text_after_the_end_token(engine: Engine) -> None:
    assert prompt_of(engine.session()) == [engine.tokenizer.token_to_id(END_OF_STORY)]


def test_an_empty_prompt_begins_with_bos(change_package: Callable[..., Path]) -> None:
    engine = Engine(change_package(lambda manifest: manifest["tokenizer"].update(bos_token_id=7)), threads=1)
    assert prompt_of(engine.session()) == [7]
    session = engine.session()
    session.generate("a", max_new_tokens=1)
    session.generate("b", max_new_tokens=1)
    assert session.tokens[0] == 7 and session.tokens.count(7) == 1


def test_bos_of_the_tokenizer_is_not_doubled(package: Path, change_package: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    bos = tokenizer.token_to_id(END_OF_STORY)
    tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_STORY} $A", special_tokens=[(END_OF_STORY, bos)])

    def edit(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["bos_token_id"] = bos
        manifest["contents"]["tokenizer.json"] = tokenizer.to_str().encode()

    session = Engine(change_package(edit), threads=1).session()
    session.generate("a", max_new_tokens=1)
    session.generate("b", max_new_tokens=1)
    assert session.tokens[0] == bos and session.tokens[1] != bos
    assert session.tokens[-2] != bos


def test_an_empty_prompt_needs_a_token(endless: Engine) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        endless.generate("")


def test_a_prompt_is_never_truncated(package: Path, change_package: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    plain = tokenizer.encode(PROMPT).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    path = change_package(lambda manifest: manifest["contents"].update({"tokenizer.json": tokenizer.to_str().encode()}))
    session = Engine(path, threads=1).session()
    result = session.generate(PROMPT, max_new_tokens=1)
    assert session.tokens == plain + result.token_ids


def test_a_broken_tokenizer(change_package: Callable[..., Path]) -> None:
    path = change_package(lambda manifest: manifest["contents"].update({"tokenizer.json": b"{}"}))
    with pytest.raises(PackageError, match=r"tokenizer\.json: the tokenizer fails"):
        Engine(path)


@pytest.mark.parametrize("name", ["weights.bin", "memory.rom", "tokenizer.json"])
def test_a_clone_without_its_files(package: Path, tmp_path: Path, name: str) -> None:
    """Of a package that Git LFS keeps."""
    path = shutil.copytree(package, tmp_path / "p")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(PackageError, match=f"{name}: is a Git LFS pointer, .*: git lfs pull"):
        Engine(path)


def test_a_tokenizer_of_a_larger_model(package: Path, change_package: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(100)])
    path = change_package(lambda manifest: manifest["contents"].update({"tokenizer.json": tokenizer.to_str().encode()}))
    with pytest.raises(PackageError, match="largest token id is 399, the model has 300 tokens"):
        Engine(path)


def test_a_token_that_the_model_does_not_have(package: Path, change_package: Callable[..., Path]) -> None:
    """Behind a gap, where opening does not look: a prompt with it is refused."""
    tokenizer = json.loads((package / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    del vocabulary["z"]
    vocabulary["q"] = 4000
    path = change_package(
        lambda manifest: manifest["contents"].update({"tokenizer.json": json.dumps(tokenizer).encode()})
    )
    engine = Engine(path)
    with pytest.raises(ValueError, match="4000"):
        engine.generate("q")
    assert engine.generate("a", max_new_tokens=1).token_ids


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"provenance": None}, "provenance is None"),
        ({"parameters": {"ram": 1.5, "rom": 0}}, r"parameters\.ram is 1\.5"),
        ({"parameters": {"ram": 1, "rom": -1}}, r"parameters\.rom is -1"),
        ({"parameters": {"ram": 1, "rom": 0, "active": "1"}}, r"parameters\.active is '1'"),
        ({"weights": "int8"}, 'weights is "int8"'),
        ({"quantization_error": 0.1}, "quantization_error is 0.1"),
    ],
)
def test_manifest_fields_that_python_reads(
    change_package: Callable[..., Path], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(PackageError, match=named):
        Engine(change_package(lambda manifest: manifest.update(change)))


@pytest.mark.parametrize("bos", [-1, 1 << 31, "0", True])
def test_a_wrong_bos(change_package: Callable[..., Path], bos: object) -> None:
    with pytest.raises(PackageError, match="bos_token_id"):
        Engine(change_package(lambda manifest: manifest["tokenizer"].update(bos_token_id=bos)))


def test_a_path_that_is_not_utf8(package: Path, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    shutil.copytree(package, path)
    assert Engine(path, threads=1).generate(PROMPT, seed=1).token_ids == engine.generate(PROMPT, seed=1).token_ids


def test_no_onnxruntime(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meki.engine, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        Engine(package)


def test_running_a_model_imports_only_what_it_needs(package: Path) -> None:
    program = (
        "import sys; from meki import Engine; Engine(sys.argv[1]).generate('a', max_new_tokens=2);"
        "print([name for name in ('torch', 'numpy', 'onnx', 'onnxruntime', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, package], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
