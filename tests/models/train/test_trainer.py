"""The loop: the steps of a plain one, runs that are stopped and go on, and what is logged."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meki.models.architectures.llama import LlamaConfig
from meki.models.checkpoints.huggingface import load_model
from meki.models.tokenizer import TokenizerSpec, canonical_ids, parse_tokenizer
from meki.models.train import data
from meki.models.train.log import Log, read_log
from meki.models.train.trainer import Trainer

from .small import KINDS, SMALL, recipe


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_a_plain_loop(kind: str, tokens: data.TokenFile, trainer: Callable[..., Trainer]) -> None:
    steps = 20
    run = trainer("run", recipe(steps), **KINDS[kind])
    run.train(log_every=1)
    logged = [json.loads(line)["loss"] for line in (run.out / "log.jsonl").read_text().splitlines()]

    model = LlamaConfig.from_settings({**SMALL, **KINDS[kind]}).module().initialise(1)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for p in model.parameters() if all(p is not other for other in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    ids = torch.from_numpy(np.array(tokens.ids, np.int64))
    windows = (len(ids) - 17) // 16
    losses = []
    for step in range(steps):
        rate = 2e-3 * (step + 1) / 3 if step < 3 else 2e-4 + 1.8e-3 * (1 + math.cos(math.pi * (step - 3) / 17)) / 2
        batch = []
        for index in range(4 * step, 4 * step + 4):
            random = np.random.default_rng((1, index // windows))
            start = random.integers(16) + random.permutation(windows)[index % windows] * 16
            batch.append(ids[start : start + 17])
        batch = torch.stack(batch)
        loss = F.cross_entropy(model(batch[:, :-1]).reshape(-1, 300), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # The fused optimizer rounds otherwise than the plain one: some ulp a step, amplified over 20 steps.
    np.testing.assert_allclose(logged, losses, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", ["dense", "ple", "engram"])  # the others look at values, which this device has none of
def test_a_model_computes_on_the_device_of_its_weights(kind: str) -> None:
    model = LlamaConfig.from_settings({**SMALL, **KINDS[kind]}).module().to("meta")
    assert model(torch.zeros(2, 9, dtype=torch.int64, device="meta")).shape == (2, 9, 300)


def test_canonical_ids_are_those_of_the_tokenizer(trainer: Callable[..., Trainer], tokenizer: TokenizerSpec) -> None:
    expected = canonical_ids(parse_tokenizer(tokenizer.json))
    run = trainer("run", recipe(2), **KINDS["engram"], engram_canonical=True)
    run.train()
    ids = load_model(run.out / "model")[0].layers[1].engram.canonical_ids
    assert ids.tolist() == [*expected, *range(len(expected), 300)]
    assert len(set(expected)) < len(expected)


def test_micro_batches_change_only_rounding(trainer: Callable[..., Trainer]) -> None:
    losses = []
    for size in (4, 2, 1):
        run = trainer(f"run{size}", recipe(10, micro_batch=size))
        run.train(log_every=1)
        losses.append([json.loads(line)["loss"] for line in (run.out / "log.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["meki", "engram"])
def test_a_resumed_run_equals_an_unbroken_one(kind: str, trainer: Callable[..., Trainer]) -> None:
    unbroken = trainer("unbroken", recipe(12), **KINDS[kind])
    unbroken.train()
    stops = itertools.count(1)
    first = trainer("resumed", recipe(12), **KINDS[kind])
    first.train(lambda: next(stops) == 5)
    assert first.step == 5
    second = trainer("resumed", recipe(12), **KINDS[kind])
    assert second.step == 5
    second.train()
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    (saved, provenance), (other, _) = (load_model(run.out / "model") for run in (unbroken, second))
    assert provenance["tokens"] == str(12 * 4 * 16) and provenance["data"] == "stories"
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_another_run_is_not_gone_on_with(trainer: Callable[..., Trainer]) -> None:
    stops = itertools.count(1)
    trainer("run", recipe(12)).train(lambda: next(stops) == 2)
    for message, its, overrides in (
        ("recipe rate = 0.002, not 0.001; give the same to go on", recipe(12, rate=1e-3), {}),
        ("config memory_dim = 16, not 32", recipe(12), {"memory_dim": 32}),
    ):
        with pytest.raises(ValueError, match=message):
            trainer("run", its, **overrides)


def test_a_run_whose_model_was_not_written_goes_on(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    run = trainer("run", recipe(3))
    with monkeypatch.context() as patch:
        patch.setattr("meki.models.train.trainer.save_pretrained", full)
        with pytest.raises(OSError, match="full"):
            run.train()
    again = trainer("run", recipe(3))
    again.train()
    model, _ = load_model(run.out / "model")
    with run.optimizer.current():
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, run.model.state_dict()[name], rtol=2**-11, atol=2**-24)  # float16


def test_a_damaged_state(trainer: Callable[..., Trainer]) -> None:
    run = trainer("run", recipe(1))
    run.train()
    whole = (run.out / "state.pt").read_bytes()
    cut = [whole[:size] for size in (1000, 8000, len(whole) - 1000)]  # of which PyTorch says different things
    other = io.BytesIO()
    torch.save({}, other)
    for content in (b"", b"x", b"no state at all", *cut, other.getvalue()):
        (run.out / "state.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"state.pt: cannot be read as the state of a run; if it"):
            trainer("run", recipe(1))


@pytest.mark.parametrize("length", [4, 16])
def test_the_shortest_text(
    length: int, text: Path, tokens: data.TokenFile, tokenizer: TokenizerSpec, tmp_path: Path
) -> None:
    def short(count: int) -> data.TokenFile:
        return dataclasses.replace(tokens, ids=tokens.ids[:count])

    def make(train: int, valid: int) -> Trainer:
        config = LlamaConfig.from_settings(SMALL)
        its, files = recipe(4, length=length), (short(train), short(valid))
        return Trainer(config, its, *files, tmp_path, tokenizer=tokenizer, provenance={})

    with pytest.raises(ValueError, match=f"training text has {2 * length} tokens, expected at least {2 * length + 1}"):
        make(2 * length, length + 1)
    with pytest.raises(ValueError, match=f"held-out text has {length} tokens, expected at least {length + 1}"):
        make(2 * length + 1, length)
    run = make(2 * length + 1, length + 1)
    run.train()
    assert run.step == 4


def test_held_out_loss_is_the_mean_of_windows(tokens: data.TokenFile, trainer: Callable[..., Trainer]) -> None:
    run = trainer("run", recipe(4), valid=True)
    starts = np.linspace(0, len(tokens.ids) - 17, 64).astype(int)
    losses = []
    with torch.no_grad():
        for start in starts:
            window = torch.from_numpy(np.array(tokens.ids[start : start + 17], np.int64))
            losses.append(F.cross_entropy(run.model(window[None, :-1])[0], window[1:]).item())
    assert run.held_out_loss() == pytest.approx(np.mean(losses), rel=1e-5)


def test_tensorboard_has_what_the_lines_have(trainer: Callable[..., Trainer]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stops = itertools.count(1)
    trainer("run", recipe(6), valid=True).train(lambda: next(stops) == 3, log_every=1, evaluate_every=2)
    run = trainer("run", recipe(6), valid=True)
    run.train(log_every=1, evaluate_every=2)
    entries = read_log(run.out)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    events = accumulator.EventAccumulator(str(run.out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "rate", "tokens_per_s", "held_out_loss"}
    for name in events.Tags()["scalars"]:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(entry["step"], pytest.approx(entry[name])) for entry in entries if name in entry]
        assert shown == logged


def test_steps_that_were_done_twice_are_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meki.models.train.log.find_spec", lambda _: None)
    for begin in (0, 1):  # killed after step 3, whose last state was that of step 1
        with Log(tmp_path, begin) as log:
            for step in range(begin, 3):
                log.write({"step": step + 1, "loss": 1.0 + begin})
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
