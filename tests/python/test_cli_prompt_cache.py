"""meki-run --prompt-cache: what one run has computed of a prompt, another one begins with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from meki.cli import prompt_cache
from meki.cli.run import main

WORDS = "The old lighthouse keeper counted the ships and wrote their names in a blue book. "
FIRST = WORDS * 3 + "And then the cat"
SECOND = WORDS * 3 + "In the morning"
COMMAND = ["--threads", "1", "--json", "--max-new-tokens", "5", "--seed", "3", "--temperature", "0"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.session"), key=lambda path: path.stat().st_mtime_ns)


def run(capsys: pytest.CaptureFixture[str], package: Path, directory: Path | None, *arguments: str) -> dict[str, Any]:
    cache = [] if directory is None else ["--prompt-cache", str(directory)]
    assert main(["--model", str(package), *COMMAND, *cache, *arguments]) == 0
    out, err = capsys.readouterr()
    return {**json.loads(out), "err": err.removeprefix("random weights: the text means nothing\n")}


def test_a_second_run_begins_where_the_first_was(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt, cached in ((FIRST, 0), (FIRST, -1), (SECOND, 50), (FIRST + " saw it all", 50)):
        got = run(capsys, chat_package, directory, prompt)
        expected = run(capsys, chat_package, None, prompt)
        assert got["token_ids"] == expected["token_ids"]
        assert (got["err"], expected["stats"]["cached_tokens"]) == ("", 0)
        if cached == -1:
            assert got["stats"]["cached_tokens"] == got["stats"]["prompt_tokens"] - 1
        else:
            assert got["stats"]["cached_tokens"] >= cached
            assert bool(got["stats"]["cached_tokens"]) == bool(cached)
    assert len(files(directory)) == 1  # the others had little to add


def test_a_chat_and_token_ids(chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = ["--chat", "--system", WORDS * 3, "--assistant", "The"]
    first = run(capsys, chat_package, directory, *chat, "Who?")
    again = run(capsys, chat_package, directory, *chat, "Why?")
    assert again["stats"]["cached_tokens"] > 50
    for got, question in ((first, "Who?"), (again, "Why?")):
        assert got["token_ids"] == run(capsys, chat_package, None, *chat, question)["token_ids"]
    ids = ",".join(str(20 + index) for index in range(100))
    assert run(capsys, chat_package, directory, "--prompt-ids", ids)["stats"]["cached_tokens"] == 0
    assert run(capsys, chat_package, directory, "--prompt-ids", ids)["stats"]["cached_tokens"] == 99


def test_short_prompts_are_not_worth_a_file(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, chat_package, directory, "The cat")
    assert files(directory) == []


def test_a_prompt_without_room_for_an_answer(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(["7"] * 100)
    got = run(capsys, chat_package, directory, "--context", "100", "--prompt-ids", ids)
    assert (got["token_ids"], got["finish_reason"]) == ([], "context")
    assert files(directory) == []  # nothing was computed


def test_sessions_of_other_kinds_lie_side_by_side(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        for kv_type in ("float32", "float16"):
            got = run(capsys, chat_package, directory, "--kv-type", kv_type, FIRST)
            assert got["err"] == ""
    assert got["stats"]["cached_tokens"] > 0
    assert len(files(directory)) == 2


def test_a_damaged_file_is_told_and_made_again(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(capsys, chat_package, directory, FIRST)["token_ids"]
    (path,) = files(directory)
    whole = path.read_bytes()
    for place in (300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        got = run(capsys, chat_package, directory, FIRST)
        assert got["err"].startswith(f"meki-run: note: prompt cache: {path}: damaged: ")
        assert got["err"].count("\n") == 1
        assert (got["token_ids"], got["stats"]["cached_tokens"]) == (expected, 0)
        assert path.read_bytes() == whole


def test_the_last_used_files_stay(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "MOST_FILES", 2)

    def ask(token: int) -> int:
        ids = ",".join([str(token)] * 80)
        cached: int = run(capsys, chat_package, directory, "--prompt-ids", ids)["stats"]["cached_tokens"]
        return cached

    assert [ask(token) for token in (5, 6, 5, 7, 5, 6)] == [0, 0, 79, 0, 79, 0]
    assert len(files(directory)) == 2
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", files(directory)[0].stat().st_size)
    assert [ask(token) for token in (8, 8, 5)] == [0, 79, 0]
    assert len(files(directory)) == 1


def test_what_killed_processes_left_is_removed(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory.mkdir(parents=True)
    old, new = directory / ".a.session.1.partial", directory / ".b.session.2.partial"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 10_000,) * 2)
    run(capsys, chat_package, directory, FIRST)
    assert (old.exists(), new.exists()) == (False, True)


def test_what_cannot_be_written_is_told(
    chat_package: Path, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, chat_package, None, FIRST)["token_ids"]

    def full(*arguments: Any) -> None:
        raise OSError(f"{directory}: cannot be written: No space left on device; make room")

    monkeypatch.setattr(prompt_cache, "write_session", full)
    got = run(capsys, chat_package, directory, FIRST)
    assert got["token_ids"] == expected
    assert got["err"] == f"meki-run: note: prompt cache: {directory}: cannot be written: No space left on device; " + (
        "make room\n"
    )


def test_processes_share_a_directory(chat_package: Path, directory: Path) -> None:
    """All prompts at once, twice, into room for fewer: whatever comes and goes, every answer is right."""
    prompts = [f"{letter} {FIRST}" for letter in "abc"]
    command = [sys.executable, "-c", "import sys; from meki.cli import prompt_cache, run\n"
               "prompt_cache.MOST_FILES = 1\nsys.exit(run.main())"]  # fmt: skip
    command += ["--model", str(chat_package), *COMMAND]
    alone = [json.loads(subprocess.run([*command, its], capture_output=True, check=True).stdout) for its in prompts]
    for _ in range(2):
        running = [
            subprocess.Popen(
                [*command, "--prompt-cache", directory, its], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for its in prompts
        ]
        for process, expected in zip(running, alone, strict=True):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert json.loads(out)["token_ids"] == expected["token_ids"]
            assert b"damaged" not in err
    assert len(files(directory)) == 1


def test_usage(chat_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(chat_package), "--threads", "1"]
    assert main([*model, "--prompt-cache", str(tmp_path), "--interactive"]) == 2
    assert "--prompt-cache is for one prompt; omit --interactive" in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    assert main([*model, "--prompt-cache", str(tmp_path / "file"), FIRST]) == 1
    assert "file: cannot be made: File exists; choose another directory" in capsys.readouterr().err
