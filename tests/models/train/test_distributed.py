"""Training by several processes: the losses of one, however weights and gradients are spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meki.models import convert
from meki.models.checkpoints.huggingface import load_model
from meki.models.tokenizer import END_OF_STORY, train_tokenizer
from meki.models.train import command, data
from meki.models.train.distributed import ALONE
from meki.models.train.log import read_log

from .small import KINDS, SMALL, STORIES
from .together import STEPS, trainer


def torchrun(*command: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """On loopback, through gloo."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*start, *map(str, command)], capture_output=True, text=True, env=environment, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    (path / "stories.txt").write_text(f"\n{END_OF_STORY}\n".join(STORIES))
    tokenizer = train_tokenizer(STORIES, 300)
    tokenizer.save(str(path / "tokenizer.json"))
    data.write_tokens(path / "train.tokens", [path / "stories.txt"], tokenizer, 0)
    return path / "train.tokens"


@pytest.mark.parametrize(
    ("kind", "how"), [("meki", "replicate"), ("meki", "shard"), ("engram", "replicate"), ("experts", "shard")]
)
def test_losses_are_those_of_one_process(kind: str, how: str, tokens: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, **KINDS[kind]}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = trainer(tmp_path / "one", tokens, settings, ALONE, shard=False)
    one.train(log_every=1, evaluate_every=2)
    done = torchrun(Path(__file__).parent / "together.py", tmp_path / "two", tokens, json.dumps(settings), how, 3)
    assert done.returncode == 0, done.stderr
    expected, got = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [entry["step"] for entry in got] == list(range(1, STEPS + 1))
    # Gradients are summed in another order, and fused AdamW amplifies what that rounds otherwise.
    for key in ("loss", "held_out_loss"):
        values = [[entry[key] for entry in log if key in entry] for log in (expected, got)]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-4)
    (model, _), (other, _) = (load_model(tmp_path / name / "model") for name in ("one", "two"))
    for name, tensor in model.state_dict().items():
        # A step moves a weight by at most about its rate, 2e-3, whichever sign rounding gives a gradient of nothing.
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=4e-3, msg=name)
    state = torch.load(tmp_path / "two/state.pt", weights_only=True)
    assert state["step"] == STEPS and state["model"].keys() == model.state_dict().keys()


def test_the_command_under_torchrun(tokens: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(SMALL))
    text = str(tokens.parent / "stories.txt")
    arguments = [settings, "--data", text, "--valid", text, "--tokens", "512", "--batch", "4", "--length", "16"]
    meki_train = Path(sys.executable).parent / "meki-train"
    done = torchrun("--no-python", meki_train, *arguments, "--shard", "--micro-batch", "1", "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0] == f"{tmp_path / 'run'}: 8 steps, 512 tokens"  # said once
    assert convert.main([str(tmp_path / "run/model"), "-o", str(tmp_path / "package"), "--weights", "float32"]) == 0
    assert not (tmp_path / ".run.lock").exists()

    done = torchrun("--no-python", meki_train, *arguments, "-o", tmp_path / "other", processes=3)
    assert done.returncode != 0 and "--batch is 4, expected a multiple of the 3 processes" in done.stderr


def test_one_process_has_nobody_to_share_with(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(tokens.parent / "stories.txt")
    arguments = ["meki-tiny", "--data", text, "-o", str(tmp_path / "run"), "--tokens", "10000", "--shard"]
    assert command.main(arguments) == 2
    assert "--shard spreads weights over several processes, this is one; start them with torchrun" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
