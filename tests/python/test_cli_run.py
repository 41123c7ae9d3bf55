"""meki-run: most through main(), what concerns the process itself through a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meki import Engine
from meki.cli.run import main

PROMPT = "Once upon a time"
RANDOM = "random weights: the text means nothing\n"
FIXED = ["--seed", "7", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def text(engine: Engine) -> str:
    return engine.generate(PROMPT, seed=7, max_new_tokens=12).text


def run(package: Path, *arguments: str) -> int:
    return main(["--model", str(package), "--threads", "1", *arguments])


@pytest.mark.parametrize("arguments", [[PROMPT], ["--prompt", PROMPT]])
def test_a_prompt_on_the_command_line(
    package: Path, text: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(package, *FIXED, *arguments) == 0
    assert capsys.readouterr() == (text + "\n", RANDOM)


def test_token_ids_as_a_prompt(package: Path, engine: Engine, text: str, monkeypatch, capsys) -> None:
    ids = ",".join(map(str, engine.tokenizer.encode(PROMPT).ids))
    assert run(package, *FIXED, "--prompt-ids", ids) == 0
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(package, *FIXED, "--prompt-ids", ids) == 0
    assert capsys.readouterr().out == PROMPT + text + "\n"


def test_where_a_text_ends(package: Path, engine: Engine, capsys) -> None:
    unlimited = engine.generate(PROMPT, seed=7, max_new_tokens=0, ignore_eos=True)
    assert unlimited.finish_reason == "context"
    arguments = ["--seed", "7", "--max-new-tokens", "-1", "--ignore-eos", "--json", PROMPT]
    assert run(package, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == unlimited.token_ids
    end = unlimited.token_ids[9]
    assert run(package, *arguments, "--stop-token-id", str(end)) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["token_ids"] == unlimited.token_ids[: unlimited.token_ids.index(end) + 1]
    assert out["finish_reason"] == "stop"


@pytest.mark.parametrize("arguments", [[], ["-"], ["--file", "-"]])
def test_a_prompt_on_standard_input(package: Path, text: str, arguments: list[str], stdin, capsys) -> None:
    stdin(PROMPT.encode() + b"\n")
    assert run(package, *FIXED, *arguments) == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_prompt_in_a_file(package: Path, text: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert run(package, *FIXED, "--file", str(tmp_path / "prompt.txt")) == 0
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_what_an_editor_adds_is_no_part_of_the_prompt(
    package: Path, text: str, tmp_path: Path, stdin, capsys, end: str
) -> None:
    """The mark before a text that some editors put there, and how its last line ends."""
    prompt = f"\ufeff{PROMPT}{end}"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    stdin(prompt.encode())
    for arguments in (["--file", str(tmp_path / "prompt.txt")], [], ["--prompt", f"\ufeff{PROMPT}"]):
        assert run(package, *FIXED, *arguments) == 0
        assert capsys.readouterr().out == text + "\n"


def test_a_file_in_the_home_directory(package: Path, text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run(package, *FIXED, "--file=~/prompt.txt") == 0  # a shell leaves it so
    assert capsys.readouterr().out == text + "\n"


TURNS = {
    b"The fox\n and the cat\n": ["The fox", " and the cat"],
    b"\xef\xbb\xbfThe fox\r\n and the cat\r\n": ["The fox", " and the cat"],
    b'"""\nThe fox\n\n and\n"""\n the cat': ["The fox\n\n and", " the cat"],
    b'"""The fox\r\n and"""\r\n the "cat"""\r\n': ["The fox\n and", ' the "cat"""'],
    b'"""The fox"""\n"""\n\n and\n\n"""\n': ["The fox", "\n and\n"],
}


@pytest.mark.parametrize("data", TURNS, ids=range(len(TURNS)))
def test_turns(package: Path, engine: Engine, data: bytes, stdin, capsys) -> None:
    stdin(data)
    assert run(package, *FIXED, "--interactive") == 0
    session = engine.session()
    texts = [session.generate(turn, seed=7, max_new_tokens=12).text for turn in TURNS[data]]
    assert capsys.readouterr().out == "".join(text + "\n" for text in texts)


@pytest.mark.parametrize(
    ("data", "named"),
    [(b"a\xff\n", "not UTF-8 at byte 1"), (b'"""a\nb\n', 'a turn begins with """, but does not end with them')],
)
def test_turns_that_cannot_be_read(package: Path, data: bytes, named: str, stdin, capsys) -> None:
    stdin(data)
    assert run(package, *FIXED, "--interactive") == 2
    assert f"meki-run: error: standard input: {named}" in capsys.readouterr().err


def test_a_terminal_shows_the_prompt_first(package: Path, text: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(package, *FIXED, PROMPT) == 0
    assert capsys.readouterr().out == PROMPT + text + "\n"


def test_json(package: Path, engine: Engine, text: str, capsys) -> None:
    assert run(package, *FIXED, "--json", PROMPT) == 0
    out = json.loads(capsys.readouterr().out)
    expected = engine.generate(PROMPT, seed=7, max_new_tokens=12)
    assert set(out) == {"model", "text", "token_ids", "finish_reason", "stop", "stats", "random_weights"}
    assert (out["model"], out["text"], out["token_ids"]) == (engine.name, text, expected.token_ids)
    assert (out["finish_reason"], out["random_weights"]) == (expected.finish_reason, True)
    assert out["stats"]["seed"] == 7
    assert out["stats"]["rom_requests"] == expected.stats.rom_requests


def test_trained_weights_are_not_called_random(change_package: Callable[..., Path], capsys) -> None:
    path = change_package(lambda manifest: manifest["provenance"].update(weights="trained on stories"))
    assert run(path, *FIXED, "--json", PROMPT) == 0
    captured = capsys.readouterr()
    assert "random_weights" not in json.loads(captured.out)
    assert captured.err == ""


def test_every_option_reaches_the_engine(package: Path, engine: Engine, capsys) -> None:
    options = (
        "--temperature 1.2 --top-k 50 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --seed 3 --max-new-tokens 30"
    )
    settings = "--context 64 --rom-access pread --no-prefetch"
    assert run(package, *options.split(), *settings.split(), "--stop", "e", "--stop", "o", "--json", PROMPT) == 0
    out = json.loads(capsys.readouterr().out)
    expected = engine.generate(
        PROMPT,
        temperature=1.2,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=3,
        max_new_tokens=30,
        stop=["e", "o"],
    )
    assert out["token_ids"] == expected.token_ids
    assert out["finish_reason"] == expected.finish_reason
    assert out["stats"]["rom_access"] == "pread"


def test_stats(package: Path, capsys) -> None:
    assert run(package, *FIXED, "--stats", PROMPT) == 0
    err = capsys.readouterr().err
    for part in (RANDOM.strip(), "seed          7\n", "tokens/s", "memory rows", "pread", "wait for rows", "MB"):
        assert part in err


def test_the_row_cache_in_the_stats(package: Path, capsys) -> None:
    counts = {}
    for size in (0, 1):
        # 100 of 300 tokens: some come twice.
        arguments = ["--max-new-tokens", "100", "--ignore-eos", "--row-cache", str(size), "--json", "--stats"]
        assert run(package, *FIXED, *arguments, PROMPT) == 0
        printed = capsys.readouterr()
        counts[size] = json.loads(printed.out)["stats"]
        reads = counts[size]["rom_requests"] - counts[size]["rom_hits"]
        cached = f"pread; {counts[size]['rom_hits']:,} from the row cache"
        assert f"{reads:,} reads, {counts[size]['rom_bytes']:,} bytes, {cached}" in printed.err
    assert counts[0]["rom_hits"] == 0 and counts[1]["rom_hits"] > 0
    assert counts[0]["rom_requests"] == counts[1]["rom_requests"]


def test_seed_repeats_the_text(package: Path, text: str, capsys) -> None:
    for _ in range(2):
        assert run(package, *FIXED, PROMPT) == 0
    assert capsys.readouterr().out == (text + "\n") * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "-1", PROMPT], "temperature"),
        (["--top-p", "2", PROMPT], "top_p"),
        (["--seed", "-3", PROMPT], "seed"),
        (["--max-new-tokens", "-2", PROMPT], "max_new_tokens"),
        (["--stop-token-id", "300", PROMPT], "stop_token_ids must be from 0 to 299, got 300"),
        (["--prompt-ids", "1,2", "--interactive"], "--prompt-ids is a whole prompt; omit --chat and --interactive"),
        (["--prompt-ids", "1,300"], "each token id of a prompt must be from 0 to 299, got 300"),
        (["--threads", "-1", PROMPT], "threads"),
        (["--row-cache", "-1", PROMPT], "row_cache must be from 0 to 1048576"),
        (["--context", "1000000", PROMPT], "context is 1000000"),
        (["--context", "3", "a b c d e f"], "context holds 3"),
        (["--stop", "", PROMPT], "stop string"),
        (["--file", "/no/such/file"], "/no/such/file: No such file"),
        (["--interactive", PROMPT], "--interactive"),
        (["--model", "meki-4b", PROMPT], "nobody has published"),
        (["--model", "no-such-model", PROMPT], "no-such-model"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(package: Path, arguments: list[str], named: str, capsys) -> None:
    assert run(package, *arguments) == 2
    captured = capsys.readouterr()
    *_, last = captured.err.splitlines()
    assert last.startswith("meki-run: error: ") and named in last
    assert captured.err.replace(RANDOM, "").count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "--interactive"],
        ["--rom-access", "tape", PROMPT],
        ["--no-such-option"],
        [PROMPT, "--file", "x"],
        ["--max-new-tokens", "many", PROMPT],
        ["--prompt-ids", "1,2", PROMPT],
        ["--prompt-ids", "1,,2"],
    ],
)
def test_errors_of_the_parser_exit_2(package: Path, arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(package, *arguments)
    assert caught.value.code == 2
    assert "meki-run: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "8", "--prompt", PROMPT], "unknown option --max-tokens; did you mean --max-new-tokens?"),
        ([PROMPT, "--seeed=3", "--json", "--interactive"], "unknown option --seeed; did you mean --seed?"),
        (["--no-such-option", PROMPT], "unknown option --no-such-option; see --help"),
    ],
)
def test_an_unknown_option_is_named_before_all_else(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"meki-run: error: {message}\n")


@pytest.mark.parametrize("arguments", [["--", "--no option"], ["--", "--seeed"], ["--an aside"], ["--prompt=--seeed"]])
def test_a_prompt_that_begins_with_a_dash(package: Path, arguments: list[str], capsys) -> None:
    assert run(package, *FIXED, *arguments) == 0
    assert capsys.readouterr().err == RANDOM


def test_no_prompt_on_a_terminal(package: Path, stdin, capsys) -> None:
    stdin(b"", terminal=True)
    assert run(package) == 2
    assert "no prompt" in capsys.readouterr().err


def test_a_prompt_that_is_not_utf8(package: Path, stdin, capsys) -> None:
    stdin(b"abc\xff")
    assert run(package) == 2
    assert "standard input: not UTF-8 at byte 3" in capsys.readouterr().err


def test_an_empty_prompt_without_a_first_token(change_package: Callable[..., Path], capsys) -> None:
    path = change_package(lambda manifest: manifest["tokenizer"].update(eos_token_ids=[]))
    assert run(path, "") == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_an_empty_prompt_begins_a_text(package: Path, engine: Engine, capsys) -> None:
    assert run(package, *FIXED, "") == 0
    assert capsys.readouterr().out == engine.generate("", seed=7, max_new_tokens=12).text + "\n"


def test_a_broken_package_exits_1(change_package: Callable[..., Path], capsys) -> None:
    path = change_package(lambda manifest: None)
    with (path / "memory.rom").open("r+b") as file:
        file.truncate(100)
    assert run(path, PROMPT) == 1
    err = capsys.readouterr().err
    assert err.startswith("meki-run: error: ") and "memory.rom" in err and err.count("\n") == 1


def command(package: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "meki.cli.run", "--model", str(package), "--threads", "1", *arguments]


def test_a_process_reads_a_pipe(package: Path, text: str) -> None:
    done = subprocess.run(command(package, *FIXED), input=PROMPT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", RANDOM)


def test_a_closed_pipe_ends_quietly(package: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(package, *FIXED, PROMPT), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, RANDOM)


def test_lines_of_a_pipe_are_turns(package: Path, engine: Engine) -> None:
    """Interactive mode without a terminal: no prompt sign, one line of output a turn unless the text has its own."""
    session = engine.session()
    turns = [session.generate(turn, seed=7, max_new_tokens=12).text for turn in (PROMPT, " The fox")]
    arguments = command(package, *FIXED, "--interactive")
    done = subprocess.run(arguments, input=f"{PROMPT}\n The fox\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "".join(turn + "\n" for turn in turns))
