"""Training: text and its order, the steps of a plain loop, runs that are stopped and go on, and the command."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import lzma
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch.nn import functional as F

from meki import Engine
from meki.models import convert
from meki.models.architectures.llama import LlamaConfig
from meki.models.checkpoints.huggingface import load_model
from meki.models.tokenizer import END_OF_STORY, TokenizerSpec, canonical_ids, parse_tokenizer, train_tokenizer
from meki.models.train import command, data
from meki.models.train.log import Log, read_log
from meki.models.train.trainer import Recipe, Trainer

STORIES = [
    "The baker's dog\n\nA dog lived with a baker, and every morning it carried a loaf to the miller.",
    "The miller's cat\n\nThe cat of the miller did not like the dog, but it liked the loaf.",
    "The loaf\n\nOne morning there was no loaf. The dog sat before the oven, and the cat sat beside it.",
] * 4
SMALL: dict[str, Any] = {
    **{"vocab_size": 300, "layers": 2, "hidden": 32, "ffn": 32, "heads": 2, "kv_heads": 1, "head_dim": 16},
    **{"context": 16, "memory_dim": 16},
}
KINDS: dict[str, dict[str, Any]] = {
    "meki": {},
    "dense": {"memory_dim": 0},
    "ple": {"memory_dim": 0, "ple_dim": 16},
    "engram": {"memory_dim": 0, "engram_dim": 32, "engram_layers": (1,), "engram_heads": 2, "engram_rows": 50},
    "experts": {"memory_dim": 0, "ffn_kind": "moe", "experts": 3, "experts_per_token": 2},
}


def recipe(steps: int, **changes: Any) -> Recipe:
    values = {"batch": 4, "micro_batch": 4, "length": 16, "rate": 2e-3, "last_rate": 2e-4, "warmup": 3, **changes}
    return Recipe(tokens=steps * values["batch"] * values["length"], **values)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerSpec:
    return TokenizerSpec(train_tokenizer(STORIES, 300).to_str().encode(), eos_token_ids=(0,))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(f"\n{END_OF_STORY}\n".join(STORIES))
    return path


@pytest.fixture
def tokens(text: Path, tokenizer: TokenizerSpec, tmp_path: Path) -> data.TokenFile:
    return data.write_tokens(tmp_path / "train.tokens", [text], train_tokenizer(STORIES, 300), 0)


@pytest.fixture
def trainer(tokens: data.TokenFile, tokenizer: TokenizerSpec, tmp_path: Path) -> Callable[..., Trainer]:
    def make(name: str, its: Recipe, valid: bool = False, **overrides: Any) -> Trainer:
        (tmp_path / name).mkdir(exist_ok=True)
        config = LlamaConfig.from_settings({**SMALL, **overrides})
        held_out = tokens if valid else None
        return Trainer(
            config, its, tokens, held_out, tmp_path / name, tokenizer=tokenizer, provenance={"data": "stories"}
        )

    return make


# Text.

LINES = st.lists(st.sampled_from(["one", "two words", "", "  indented", END_OF_STORY, "ünï"]), max_size=30)


@settings(deadline=None)
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), piece=st.sampled_from([1, 10, 1 << 20]))
def test_documents_are_what_stands_between_separators(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, piece: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(end.join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PIECE", piece)
        pieces = list(data.documents(path, END_OF_STORY))
    got, document = [], ""
    for text, ends in pieces:
        document += text
        if ends:
            got.append(document.strip())
            document = ""
    assert document == ""
    parts = "\n".join(lines).split(END_OF_STORY)  # the separator is nothing else here
    assert got == [part.strip() for part in parts if part.strip()]


@pytest.mark.parametrize(
    "pack", [lambda b: ("txt", b), lambda b: ("txt.gz", gzip.compress(b)), lambda b: ("txt.xz", lzma.compress(b))]
)
def test_compressed_text(tmp_path: Path, pack: Callable[[bytes], tuple[str, bytes]]) -> None:
    suffix, packed = pack(f"one\n{END_OF_STORY}\ntwo".encode())
    (tmp_path / f"text.{suffix}").write_bytes(packed)
    assert list(data.documents(tmp_path / f"text.{suffix}", END_OF_STORY)) == [("one", True), ("two", True)]


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n{"text": "three"}\n')
    assert list(data.documents(path, END_OF_STORY)) == [("one\n\ntwo", True), ("three", True)]
    for line in ('{"txt": "x"}', '{"text": 5}', "[]", "{", '{"text": "\\ud800"}', "[" * 100_000):
        path.write_text('{"text": "one"}\n' + line)
        with pytest.raises(ValueError, match=r'text.jsonl: line 2 is no object with a "text"'):
            list(data.documents(path, END_OF_STORY))


def test_tokens_hold_every_document_with_its_end(tokens: data.TokenFile, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(STORIES, 300)
    assert tokens.documents == len(STORIES) == (tokens.ids == 0).sum()
    assert tokens.bytes == sum(len(story.encode()) + 1 for story in STORIES)
    assert tokens.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)
    ends = [-1, *np.flatnonzero(tokens.ids == 0)]
    assert [tokenizer.decode(tokens.ids[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)] == STORIES


def test_text_without_a_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(f"\n{END_OF_STORY}\n \n")
    with pytest.raises(ValueError, match=r"empty.txt: no text; give files with at least one document"):
        data.write_tokens(tmp_path / "t.tokens", [tmp_path / "empty.txt"], train_tokenizer(STORIES, 300), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]  # nothing half-written


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{END_OF_STORY}\none", encoding="utf-8-sig")
    assert list(data.documents(tmp_path / "text.txt", END_OF_STORY)) == [("one", True)]


NOISE = np.random.default_rng(0).bytes(1000).hex().encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "ü".encode("latin-1"), "not UTF-8: "),
        ("latin.jsonl", '{"text": "ü"}'.encode("latin-1"), "not UTF-8: "),
        ("latin.txt.gz", gzip.compress("ü".encode("latin-1"), mtime=0), "not UTF-8: "),
        ("cut.txt.gz", gzip.compress(NOISE)[:-100], "damaged or cut off: "),
        ("cut.txt.xz", lzma.compress(NOISE)[:-100], "damaged or cut off: "),
        ("no.txt.gz", NOISE, "damaged or cut off: "),
        ("no.txt.xz", NOISE, "damaged or cut off: "),
        (
            "decayed.txt.gz",
            gzip.compress(NOISE)[:20] + b"\xff" * 100 + gzip.compress(NOISE)[120:],
            "damaged or cut off",
        ),
        ("decayed.jsonl.xz", lzma.compress(NOISE)[:-100] + b"\0" * 100, "damaged or cut off"),
    ],
)
def test_text_that_cannot_be_read(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    for option in (2, 4):  # --data, --valid
        changed = list(arguments)
        changed[option] = str(tmp_path / name)
        assert command.main(changed) == 1
        assert capsys.readouterr().err.startswith(f"meki-train: error: {tmp_path / name}: {message}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"tokenizer.json", "train.json", "train.tokens"}


def test_an_end_that_the_tokenizer_does_not_have(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: has no token 300, which is to end a text"):
        data.write_tokens(tmp_path / "t.tokens", [text], train_tokenizer(STORIES, 300), 300)
    assert not list(tmp_path.iterdir())


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab")
    sparse = Tokenizer(models.BPE({"end": 0, "a": 1, "b": 70_000}, []))  # three tokens, as far as their number goes
    tokens = data.write_tokens(tmp_path / "t.tokens", [tmp_path / "text.txt"], sparse, 0)
    assert tokens.ids.tolist() == [1, 70_000, 0]


def test_tokens_that_are_not_as_they_were_written(tokens: data.TokenFile, tmp_path: Path) -> None:
    path, about = tmp_path / "train.tokens", tmp_path / "train.json"
    whole, known = path.read_bytes(), about.read_bytes()
    for content, said in ((whole[:-2], known), (whole[:-1], known), (b"", known), (whole, b"{"), (whole, b"{}")):
        path.write_bytes(content)
        about.write_bytes(said)
        with pytest.raises(ValueError, match=r"train.tokens: not as it was written: .*; remove train.json, and"):
            data.TokenFile.open(path)
    path.unlink()
    about.write_bytes(known)
    with pytest.raises(ValueError, match=r"train.tokens: not as it was written"):
        data.TokenFile.open(path)


def test_an_epoch_shows_every_window_once() -> None:
    length, batch = 8, 2
    ids = np.arange(8 * 41 + 1, dtype=np.uint16)
    per_epoch = (len(ids) - length - 1) // length
    seen = torch.cat([data.batch_at(ids, step, batch, length, seed=3) for step in range(per_epoch // batch)])
    assert seen.shape == (per_epoch, length + 1)
    for window in seen:
        assert window.tolist() == list(range(int(window[0]), int(window[0]) + length + 1))
    assert len({int(window[0]) for window in seen}) == per_epoch  # no window twice
    again = data.batch_at(ids, 0, batch, length, seed=3)
    assert torch.equal(again, seen[:batch])
    assert not torch.equal(again, data.batch_at(ids, 0, batch, length, seed=4))


# The optimizer.


# The loop.


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


# The command.


@pytest.fixture
def arguments(text: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    common = ["--data", str(text), "--valid", str(text), "-o", str(tmp_path / "run"), "--batch", "2", "--warmup", "2"]
    return [str(tmp_path / "small.json"), *common, "--tokens", str(2 * 16 * 8)]


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


# What is logged.


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
