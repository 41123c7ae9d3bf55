"""The command meki-train, from text to a package."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from meki import Engine
from meki.models import convert
from meki.models.checkpoints.huggingface import load_model
from meki.models.tokenizer import train_tokenizer
from meki.models.train import command
from meki.models.train.trainer import Trainer

from .small import STORIES


def test_from_text_to_a_package(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "8 steps, 256 tokens" in out and "held-out loss" in out
    assert convert.main([str(tmp_path / "run" / "model"), "-o", str(tmp_path / "package"), "--weights", "float32"]) == 0
    engine = Engine(tmp_path / "package")
    assert not engine.random_weights
    assert len(engine.generate("The dog", max_new_tokens=4, ignore_eos=True).token_ids) == 4
    assert engine.manifest["provenance"]["data"] == "stories.txt"
    assert command.main(arguments) == 0  # done: nothing is left to do
    text = Path(arguments[2])
    other = tmp_path / "more.txt"
    other.write_text(text.read_text() + "more")
    assert command.main([arguments[0], "--data", str(other), *arguments[3:]]) == 2
    assert "train.tokens: has the tokens of stories.txt as they were then, not of " in capsys.readouterr().err


def test_ctrl_c_stops_after_a_step_and_the_same_command_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer) -> float:
        loss = step(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert command.main(arguments) == 130
    assert "note: stopped at step 3 of 8; the same command goes on" in capsys.readouterr().err
    assert command.main(arguments) == 0
    unbroken = [str(tmp_path / "other") if argument == str(tmp_path / "run") else argument for argument in arguments]
    assert command.main(unbroken) == 0
    (ours, _), (theirs, _) = (load_model(tmp_path / name / "model") for name in ("run", "other"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({0: "no-size"}, 2, "no-size: neither a size (meki-tiny, "),
        ({2: "absent.txt"}, 2, "absent.txt: no such file of text"),
        ({-1: "20"}, 2, "--tokens is 20, one step has 32: 2 sequences of 16; give more"),
        ({8: "3"}, 2, "--micro-batch is 2, expected a divisor of --batch 3"),
        ({10: "-1"}, 2, "--warmup"),
        ({9: "--rate", 10: "-1"}, 2, "argument --rate: expected a learning rate from 0 to 1, got '-1'"),
        ({9: "--last-rate", 10: "nan"}, 2, "argument --last-rate: expected a learning rate from 0 to 1, got 'nan'"),
        ({9: "--set", 10: "layer=3"}, 2, "argument --set: expected FIELD=VALUE with a FIELD out of "),
        ({9: "--set", 10: "layers=0"}, 2, "argument --set: layers must be an integer from 1"),
        ({9: "--set", 10: "vocab_size=256"}, 2, "vocab_size is 256, expected at least 257"),
        ({9: "--tokenizer", 10: "absent.json"}, 2, "absent.json: no such tokenizer; give a tokenizer.json"),
        ({9: "--device", 10: "gpu"}, 2, "--device is 'gpu', expected one that PyTorch finds here: cpu"),
        ({9: "--device", 10: "cuda"}, 2, "--device is 'cuda', expected one that PyTorch finds here: cpu"),
        ({6: "/dev/null"}, 2, "/dev/null: is no directory, nor can be one; choose another path"),
        ({6: "/dev/null/run"}, 2, "/dev/null/run: is no directory, nor can be one; choose another path"),
    ],
)
def test_what_cannot_be(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[int, str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    changed = list(arguments)
    for index, value in change.items():
        changed[index] = value
    try:
        got = command.main([*changed, "--micro-batch", "2"])
    except SystemExit as exit:
        got = exit.code
    assert got == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*"))


def test_files_that_are_no_settings_or_no_text(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("[")
    assert command.main([str(tmp_path / "bad.json"), *arguments[1:]]) == 2
    assert "bad.json: not valid JSON" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"layers": 0}')
    assert command.main([str(tmp_path / "bad.json"), *arguments[1:]]) == 2
    assert "bad.json: layers must be an integer from 1" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{}")
    assert command.main([arguments[0], "--data", str(tmp_path / "bad.jsonl"), *arguments[3:]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("meki-train: error: ") and 'line 1 is no object with a "text"' in error


def test_more_tokens_than_an_integer_of_32_bits_has(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    changed = [*arguments[:-1], str(10**10), "--tokenizer", "absent.json"]
    assert command.main(changed) == 2
    assert "absent.json" in capsys.readouterr().err  # which is looked for after the options are read


def test_the_tokenizer_of_a_run(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"one": train_tokenizer(STORIES, 300), "two": train_tokenizer(STORIES, 299), "large": None, "no": None}
    files["large"] = train_tokenizer([*STORIES, "Many more words are in here than a small vocabulary can have"], 400)
    files["endless"] = Tokenizer(models.BPE({"a": 0}, []))
    for name, tokenizer in files.items():
        (tmp_path / f"{name}.json").write_text("{}" if tokenizer is None else tokenizer.to_str())

    def run(name: str) -> tuple[int, str]:
        code = command.main([*arguments, "--tokenizer", str(tmp_path / f"{name}.json")])
        return code, capsys.readouterr().err

    for name, message in (
        ("no", "no.json: tokenizer: not in the tokenizers library's JSON format"),
        ("large", "tokenizer: its largest token id is "),
        ("endless", "tokenizer: has no end token, which stands between two texts"),
    ):
        code, error = run(name)
        assert code == 1 and message in error, error
    assert not list((tmp_path / "run").iterdir())
    assert run("one")[0] == 0
    code, error = run("two")
    assert code == 2 and "train.tokens: has tokens of another tokenizer; give the same to go on" in error
    assert run("one")[0] == 0


def test_a_tokenizer_of_text_that_came_to_nothing_is_not_kept(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert command.main([arguments[0], "--data", str(tmp_path / "empty.txt"), *arguments[3:]]) == 1
    assert command.main(arguments) == 0
    kept = (tmp_path / "run" / "tokenizer.json").read_text()
    assert kept == train_tokenizer(STORIES, 300).to_str(pretty=True)
