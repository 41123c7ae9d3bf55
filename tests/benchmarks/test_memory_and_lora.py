"""A memory beside a LoRA: equal weights, the same batches, and a table of what they are worth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meki.models.architectures.llama import LlamaConfig
from meki.models.checkpoints.huggingface import load_model, save_pretrained
from meki.models.tokenizer import TokenizerSpec, train_tokenizer
from meki.models.train import command
from meki.models.train.data import TokenFile

pytest.importorskip("peft", reason="needs peft: pip install '.[lora]'")

from benchmarks import memory_and_lora

STORY = "A dog lived with a baker, and every morning it carried a loaf to the miller. " * 20
LENGTH = 16


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shape = {"vocab_size": 280, "layers": 2, "hidden": 32, "ffn": 32, "heads": 2, "kv_heads": 1, "head_dim": 16}
    model = LlamaConfig.from_settings({**shape, "context": 32}).module().initialise(7)
    spec = TokenizerSpec(train_tokenizer([STORY], 280).to_str().encode(), eos_token_ids=(0,))
    save_pretrained(tmp_path / "base", model, spec, provenance={})
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": STORY}))
    options = ["--base", str(tmp_path / "base"), "--freeze", "--set", "memory_dim=16", "--data"]
    recipe = [
        "--length",
        str(LENGTH),
        "--batch",
        "2",
        "--tokens",
        str(2 * LENGTH * 20),
        "--warmup",
        "2",
        "--rate",
        "5e-3",
    ]
    assert command.main([*options, str(tmp_path / "story.jsonl"), "-o", str(tmp_path / "run"), *recipe]) == 0
    return tmp_path / "run"


def test_the_table(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = run.parent / "story.jsonl"
    monkeypatch.setattr("sys.argv", ["", str(run), "--base", str(run.parent / "base"), "--texts", str(text)])
    capsys.readouterr()
    assert memory_and_lora.main() == 0
    first = capsys.readouterr().out
    _, _, *lines, _, end = first.splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines}
    assert cells["base"][0] == "0"
    # Two layers of W_gate and W_out, 16 x 32 each, and a norm; of rank 1: q, o, gate, up and down 64 each, k and v 48.
    assert cells["with the memory"][0] == f"{2 * (2 * 16 * 32 + 32):,}"
    assert cells["with the LoRA"][0] == f"{2 * (5 * 64 + 2 * 48) * 3:,}" and "rank 3; 20 steps, 640 tokens" in end

    tokens = TokenFile.open(run / "measured-story.jsonl.tokens")
    starts = np.linspace(0, len(tokens.ids) - LENGTH - 1, min(64, (len(tokens.ids) - 1) // LENGTH)).astype(int)
    for name, folder in (("base", run.parent / "base"), ("with the memory", run / "model")):
        model, losses = load_model(folder)[0], []
        for start in starts:
            ids = torch.from_numpy(np.array(tokens.ids[start : start + LENGTH + 1], np.int64))
            with torch.no_grad():
                losses.append(F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).item())
        expected = np.mean(losses) * len(tokens.ids) / tokens.bytes / math.log(2)
        assert float(cells[name][1].split()[0]) == pytest.approx(expected, abs=1e-4)
    base, memory, lora = (float(cells[name][1].split()[0]) for name in ("base", "with the memory", "with the LoRA"))
    assert memory < base - 0.05 and lora < base - 0.05

    monkeypatch.setattr(memory_and_lora, "train", None)  # the LoRA is kept
    assert memory_and_lora.main() == 0
    assert capsys.readouterr().out == first
