"""meki-run with a schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from meki.cli.run import main

SCHEMA = {"type": "array", "items": {"enum": ["fox", "hen"]}, "minItems": 2, "maxItems": 2}


def run(*arguments: str) -> int:
    return main(["--threads", "1", "--seed", "1", *arguments, "Once upon a time"])


def test_a_schema_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(SCHEMA, indent=2).encode() + b"\r\n")
    assert run("--json-schema", str(path)) == 0
    assert set(json.loads(capsys.readouterr().out)) <= {"fox", "hen"}
    path.write_text("true")
    assert run("--json-schema", str(path), "--json", "--max-new-tokens", "3") == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] in ("eos", "length")


def test_a_regular_expression(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--regex", "[0-9]{3}-[0-9]{2}") == 0
    assert re.fullmatch("[0-9]{3}-[0-9]{2}\n?", capsys.readouterr().out)


def test_a_grammar_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "words.lark"
    path.write_text('start: word ("," word)~3\nword: /[a-z]{3,5}/\n')
    assert run("--grammar", str(path)) == 0
    assert re.fullmatch("[a-z]{3,5}(,[a-z]{3,5}){3}\n?", capsys.readouterr().out)


@pytest.mark.parametrize("option", ["--json-schema", "--grammar"])
def test_files_that_cannot_be_used(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(option, str(tmp_path / "missing"))
    assert f"argument {option}: expected a file" in capsys.readouterr().err
    path = tmp_path / "file"
    for content, words in ((b"\xff", "not UTF-8 at byte 0"), (b"{", "cannot be used")):
        path.write_bytes(content)
        assert run(option, str(path)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_one_of_them_at_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        run("--regex", "a", "--json-schema", str(path))
    assert "not allowed with argument" in capsys.readouterr().err
    assert run("--regex", "(a") == 2
    assert "regex cannot be used" in capsys.readouterr().err
    assert run("--regex", "a", "--ignore-eos") == 2
    assert "ignore_eos" in capsys.readouterr().err
