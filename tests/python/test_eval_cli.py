"""meki-eval on a small package, through main()."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki import Engine
from meki.cli.eval import main

TEXT = "The old lighthouse keeper counted the ships and wrote their names in a blue book. " * 12
PIQA = [
    {"query": "Question: Keep a door open.\n", "choices": ["Use a wedge.", "Use a wish."], "gold": 0},
    {"query": "Question: Boil water.\n", "choices": ["Cool it.", "Heat it."], "gold": 1},
    {
        "query": "Question: Read the name of a ship in the night.\n",
        "choices": ["Use a lamp.", "Use a fish."],
        "gold": 0,
    },
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "piqa.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in PIQA))
    return tmp_path


def evaluate(package: Path, data: Path, *arguments: str, tasks: str = "piqa") -> int:
    return main([str(package), "--tasks", tasks, "--task-data", str(data), "--threads", "1", *arguments])


def score(engine: Engine, context: str, continuation: str) -> float:
    first, ids = engine.tokenizer.encode(context).ids, engine.tokenizer.encode(context + continuation).ids
    logits = engine.logits(ids).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(logs[at - 1, ids[at]] for at in range(len(first), len(ids))))


needs_harness = pytest.mark.usefixtures("offline", "harness")


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason="needs the harness: pip install 'meki[eval]'")


@needs_harness
def test_accuracy_of_a_task(package: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(package, data, "--kv-type", "float32", "-o", str(data / "out.json")) == 0
    printed = capsys.readouterr()
    assert "random weights" in printed.err
    engine = Engine(package, threads=1, kv_type="float32")
    right = []
    for line in PIQA:
        scores = [score(engine, f"{line['query']}Answer:", f" {choice}") for choice in line["choices"]]
        right.append(int(np.argmax(scores)) == line["gold"])
    found = json.loads((data / "out.json").read_text())
    assert found["results"]["piqa"]["acc,none"] == pytest.approx(np.mean(right))
    about = {"model_name": "small", "random_weights": True, "kv_type": "float32", "max_length": 128, "limit": None}
    assert {name: found[name] for name in about} == about
    assert f"{np.mean(right):.4f}" in printed.out and "piqa" in printed.out
    assert printed.out.startswith("small: float32 KV cache, at most 128 tokens\n\n|")  # the table alone


@needs_harness
@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit(package: Path, data: Path, capsys: pytest.CaptureFixture[str], limit: int) -> None:
    assert evaluate(package, data, "--limit", str(limit), "-o", str(data / "out.json")) == 0
    assert json.loads((data / "out.json").read_text())["results"]["piqa"]["sample_len"] == limit


@needs_harness
def test_a_request_longer_than_the_context(package: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{line['query']}Answer: {choice}" for line in PIQA for choice in line["choices"]]
    lengths = sorted(len(ids.ids) for ids in Engine(package, threads=1).tokenizer.encode_batch(texts))
    assert lengths[1] < lengths[2]
    context = lengths[2] - 2  # the last token is predicted only
    assert evaluate(package, data, "--context", str(context)) == 0
    assert f"meki-eval: note: 4 of 6 requests do not fit the context of {context} " in capsys.readouterr().err


@needs_harness
def test_a_question_that_the_task_fails_on(package: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"premise": "The dog slept.", "question": "cause", "choice1": "It ran.", "choice2": "It sat.", "label": 0}
    (data / "copa.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps({**line, 'question': 'why'})}\n")
    assert evaluate(package, data, tasks="copa") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == "meki-eval: error: copa: the harness fails on its data: KeyError('why')"


def refusals(harness: bool) -> dict[str, tuple[list[str], int, str]]:
    tasks = {
        "unknown task": (["--tasks", "piqua", "--task-data", "."], 2, "unknown task 'piqua'; did you mean piqa"),
        "no data": (["--tasks", "arc_easy", "--task-data", "."], 1, ".: has no arc_easy.jsonl, .jsonl.xz or .jsonl.gz"),
        "no hub": (["--tasks", "piqa"], 1, "piqa: its data is loaded from the hub, which fails"),
    }
    plain = {
        "neither": ([], 2, "one of the arguments --tasks --perplexity is required"),
        "both": (["--tasks", "piqa", "--perplexity", "text"], 2, "not allowed with"),
        "no names": (["--tasks", ","], 2, "expected names with commas between them"),
        "limit 0": (["--tasks", "piqa", "--limit", "0"], 2, "expected an integer of at least 1, got '0'"),
        "limit of a text": (["--perplexity", "text", "--limit", "1"], 2, "--limit is about tasks; omit it"),
        "no text": (["--perplexity", "text"], 2, "text: no such file of text"),
        "empty text": (["--perplexity", "empty"], 2, "empty: has no text"),
        "no place": (["--perplexity", "empty", "-o", "nowhere/out.json"], 2, "nowhere"),
    }
    return tasks if harness else plain


def assert_refused(package: Path, capsys: pytest.CaptureFixture[str], case: tuple[list[str], int, str]) -> None:
    arguments, code, message = case
    try:
        found = main([str(package), *arguments])
    except SystemExit as exit:
        found = int(exit.code or 0)
    printed = capsys.readouterr()
    assert (found, printed.out) == (code, "")
    assert printed.err.startswith("meki-eval: error: ") and printed.err.count("\n") == 1
    assert message in printed.err


@needs_harness
@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize("case", refusals(harness=True))
def test_refused_tasks(package: Path, tmp_path: Path, capsys: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(package, capsys, refusals(harness=True)[case])


@pytest.mark.parametrize("case", refusals(harness=False))
def test_refused(package: Path, tmp_path: Path, capsys: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    assert_refused(package, capsys, refusals(harness=False)[case])


def test_without_the_harness(package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert_refused(package, capsys, (["--tasks", "piqa"], 1, "pip install 'meki[eval]'"))


@needs_harness
def test_no_such_model_is_told_before_data_is_loaded(tmp_path: Path, capsys: Any) -> None:
    assert_refused(tmp_path / "nowhere", capsys, (["--tasks", "piqa"], 2, "nowhere"))


def test_perplexity(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--kv-type", "float32", "--context", "40", "-o", str(tmp_path / "out.json")]
    assert main([str(package), "--perplexity", str(text), "--threads", "1", *options]) == 0
    engine = Engine(package, threads=1, kv_type="float32")
    ids = engine.tokenizer.encode(TEXT).ids
    whole, nats = [0, *ids], 0.0
    for first in range(1, len(whole), 40):
        end = min(first + 40, len(whole))
        piece = whole[end - 41 : end]
        logits = engine.logits(piece).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats -= sum(logs[at - 1, piece[at]] for at in range(41 - (end - first), 41))
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["tokens"], found["bytes"], found["context"]) == (len(ids), len(TEXT), 40)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-4)
    assert f"{found['bits_per_byte']:.4f} bits a byte" in capsys.readouterr().out


def test_ctrl_c(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 1000)
    interrupt = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        arguments = ["--perplexity", str(text), "--threads", "1", "-o", str(tmp_path / "out.json")]
        assert main([str(package), *arguments]) == 130
    finally:
        interrupt.cancel()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out.json").exists()
