"""The training recipe: data, schedule, and that a resumed run is the run that was not interrupted."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from meki.models import train
from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.checkpoints.huggingface import load_model
from meki.models.memories.meki import MeKiConfig
from meki.models.tokenizer import END_OF_STORY, train_tokenizer

STORIES = [
    "The baker's dog\n\nA dog lived with a baker, and every morning it carried a loaf to the miller.",
    "The miller's cat\n\nThe cat of the miller did not like the dog, but it liked the loaf.",
    "The loaf\n\nOne morning there was no loaf. The dog sat before the oven, and the cat sat beside it.",
] * 4

SMALL = LlamaConfig(
    vocab_size=300, layers=2, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16, context=16, memory=MeKiConfig(16)
)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """The arguments that name a small corpus."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(train.SEPARATOR.join(STORIES))
    return ["--train", str(tmp_path / "train.txt"), "--valid", str(tmp_path / "valid.txt"), "--config", "small"]


@pytest.fixture(autouse=True)
def small_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.SIZES, "small", SMALL.settings())


def test_streams_hold_every_story_with_its_end(corpus: list[str]) -> None:
    stories = train.read_stories(Path(corpus[1]))
    assert stories == STORIES
    tokenizer = train_tokenizer(stories, 300)
    stream = train.tokenize(tokenizer, stories)
    end = tokenizer.token_to_id(END_OF_STORY)
    assert stream.dtype == np.uint16
    assert (stream == end).sum() == len(STORIES)
    ends = np.flatnonzero(stream == end)
    assert tokenizer.decode(stream[: ends[0]].tolist()) == STORIES[0]
    assert tokenizer.decode(stream[ends[0] + 1 : ends[1]].tolist()) == STORIES[1]


def test_an_epoch_shows_every_window_once() -> None:
    length, batch = 8, 2
    stream = np.arange(8 * 41 + 1, dtype=np.uint16)
    per_epoch = (len(stream) - length - 1) // length
    seen = torch.cat([train.batch_at(stream, step, batch, length, seed=3) for step in range(per_epoch // batch)])
    assert seen.shape == (per_epoch, length + 1)
    for window in seen:
        assert window.tolist() == list(range(int(window[0]), int(window[0]) + length + 1))
    assert len({int(window[0]) for window in seen}) == per_epoch  # no window twice
    again = train.batch_at(stream, 0, batch, length, seed=3)
    assert torch.equal(again, seen[:batch])
    assert not torch.equal(again, train.batch_at(stream, 0, batch, length, seed=4))


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    rates = [train.learning_rate(step, 1000, 2e-3, 100) for step in range(1001)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[99] == pytest.approx(2e-3)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[1000] == pytest.approx(2e-4)
    assert rates[550] == pytest.approx(2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_tables_norms_and_scales_do_not_decay() -> None:
    model = Decoder(SMALL)
    decayed, others = train.make_optimizer(model, 1e-3).param_groups
    assert decayed["weight_decay"] > 0 == others["weight_decay"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    for parameter in others["params"]:
        assert "embed" in names[id(parameter)] or parameter.dim() < 2
    assert all(parameter.dim() == 2 for parameter in decayed["params"])


def test_a_resumed_run_equals_an_unbroken_one(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 12
    common = [*corpus, "--batch", "2", "--warmup", "3", "--tokens", str(steps * 2 * SMALL.context)]
    train.main([*common, "--out", str(tmp_path / "unbroken")])

    calls = 0
    loss_of = train.loss_of

    def interrupted(*arguments: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return loss_of(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_of", interrupted)
        with pytest.raises(SystemExit, match=f"stopped at step 5 of {steps}"):
            train.main([*common, "--out", str(tmp_path / "resumed")])
    train.main([*common, "--out", str(tmp_path / "resumed")])

    (unbroken, provenance), (resumed, _) = (load_model(tmp_path / run / "model") for run in ("unbroken", "resumed"))
    assert provenance["tokens"] == str(steps * 2 * SMALL.context)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_learns(corpus: list[str], tmp_path: Path) -> None:
    train.main([*corpus, "--out", str(tmp_path / "run"), "--batch", "8", "--warmup", "5", "--tokens", str(60 * 8 * 16)])
    model, _ = load_model(tmp_path / "run" / "model")
    with np.load(tmp_path / "run" / "streams.npz") as streams:
        loss = train.held_out_loss(model, streams["valid"], SMALL.context, 8)
    assert loss < math.log(SMALL.vocab_size) - 1  # the corpus repeats itself: far better than uniform after 60 steps
