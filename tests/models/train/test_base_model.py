"""A memory for an existing model: what it begins with, what is trained of it, what is kept, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meki import Engine
from meki.models import convert
from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.checkpoints.huggingface import load_model, save_pretrained
from meki.models.tokenizer import END_OF_STORY, TokenizerSpec, train_tokenizer
from meki.models.train import command
from meki.models.train.optimizer import Optimizer
from meki.models.train.trainer import Trainer

STORIES = ["A dog lived with a baker, and every morning it carried a loaf.", "The cat did not like the dog."] * 12
SMALL: dict[str, Any] = {
    **{"vocab_size": 300, "layers": 2, "hidden": 32, "ffn": 32, "heads": 2, "kv_heads": 1, "head_dim": 16},
    "context": 16,
}
MEMORIES: dict[str, list[str]] = {
    "meki": ["memory_dim=32"],
    "ple": ["ple_dim=16"],
    "engram": ["engram_dim=32", "engram_layers=[1]", "engram_heads=2", "engram_rows=50"],
}
STEPS = 20
Train = Callable[..., Path]


def save_base(path: Path, seed: int = 7, **settings: Any) -> Decoder:
    """A model whose weights float16 does not have, and its tokenizer, as a Hugging Face folder."""
    model = LlamaConfig.from_settings({**SMALL, **settings}).module().initialise(seed, std=0.2)
    tokenizer = TokenizerSpec(train_tokenizer(STORIES, 300).to_str().encode(), eos_token_ids=(0,))
    save_pretrained(path, model, tokenizer, provenance={"license": "free"})
    return model


@pytest.fixture
def base(tmp_path: Path) -> Decoder:
    return save_base(tmp_path / "base")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{END_OF_STORY}\n".join(STORIES))
    return path


@pytest.fixture
def arguments(base: Decoder, text: Path, tmp_path: Path) -> list[str]:
    tokens = str(4 * 16 * STEPS)
    recipe = ["--length", "16", "--tokens", tokens, "--rate", "5e-3", "--warmup", "2", "--set", "memory_dim=32"]
    return ["--base", str(tmp_path / "base"), "--data", str(text), "-o", str(tmp_path / "run"), "--freeze", *recipe]


def changed(arguments: list[str], **changes: str | None) -> list[str]:
    """With other values of options, or None: without the option."""
    result = list(arguments)
    for name, value in changes.items():
        at = result.index(f"--{name}") if name != "o" else result.index("-o")
        result[at : at + 2] = [] if value is None else [result[at], value]
    return result


def trainers(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Trainer]:
    """Those that commands make from now on; each stops after `stop_at` steps."""
    made: list[Trainer] = []
    train = Trainer.train

    def run(self: Trainer, stop: Callable[[], bool]) -> None:
        made.append(self)
        train(self, lambda: stop() or self.step == stop_at, log_every=1)

    monkeypatch.setattr(Trainer, "train", run)
    return made


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


# What it begins with.


@pytest.mark.parametrize("kind", MEMORIES)
def test_step_0_is_the_base_to_the_bit(
    kind: str, arguments: list[str], base: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    logits: list[torch.Tensor] = []

    def run(self: Trainer, stop: Callable[[], bool]) -> None:
        with torch.no_grad():
            logits.append(self.model(ids))
        assert self.config.memory and self.config.memory.kind == kind
        self.step = STEPS

    monkeypatch.setattr(Trainer, "train", run)
    sets = [part for setting in MEMORIES[kind] for part in ("--set", setting)]
    assert command.main([*changed(arguments, set=None), *sets]) == 0
    with torch.no_grad():
        assert torch.equal(logits[0], base(ids))


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_memory_learns_and_the_base_stays(
    kind: str, arguments: list[str], base: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainers(monkeypatch)
    sets = [part for setting in MEMORIES[kind] for part in ("--set", setting)]
    assert command.main([*changed(arguments, set=None), *sets]) == 0
    log, weights, run = losses(tmp_path / "run"), base.state_dict(), made[0]
    assert log[-1] < log[0] - 0.3  # measured 0.5 to 1.2
    fresh = run.config.module().initialise(1).state_dict()
    for name, tensor in run.model.state_dict().items():
        if name in weights:
            assert torch.equal(tensor, weights[name]), name
        elif tensor.is_floating_point():
            assert not torch.equal(tensor, fresh[name]), name
    saved, provenance = load_model(tmp_path / "run" / "model")  # to the bit, too
    assert all(torch.equal(saved.state_dict()[name], weights[name]) for name in weights)
    assert provenance["base"] == "base (frozen)" and provenance["weights"] == f"{kind} memory added with meki-train"
    assert provenance["license"] == "free" and provenance["data"] == "stories.txt"


def test_the_first_step_moves_the_gain_alone(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = trainers(monkeypatch)
    step, gradients = Optimizer.step, []

    def noted(self: Optimizer, *rates: float) -> None:
        named = made[0].model.named_parameters()
        gradients.append({name for name, its in named if its.grad is not None and its.grad.to_dense().any()})
        step(self, *rates)

    monkeypatch.setattr(Optimizer, "step", noted)
    assert command.main(arguments) == 0
    memory = {name for name, _ in made[0].model.named_parameters() if ".meki." in name}
    assert gradients[0] == {name for name in memory if name.endswith("post_norm.weight")}
    assert gradients[1] == memory


# What is trained, and kept.


def test_a_frozen_base_has_no_state(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainers(monkeypatch)
    assert command.main(arguments) == 0
    assert all(".meki." in name for name, its in made[0].model.named_parameters() if its.requires_grad)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["model"] and all(".meki." in name for name in state["model"])
    assert len(state["optimizer"]["dense"]["state"]) + len(state["optimizer"]["tables"]["first"]) == len(state["model"])


def test_a_base_with_a_rate_of_its_own(
    arguments: list[str], base: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainers(monkeypatch)
    both = [argument for argument in arguments if argument != "--freeze"]
    assert command.main([*both, "--base-rate", "1e-3"]) == 0
    groups = {id(parameter): group for group in made[0].optimizer.dense.param_groups for parameter in group["params"]}
    weights = base.state_dict()
    for name, parameter in made[0].model.named_parameters():
        rate = 1e-3 if name in weights else 5e-3
        if name.endswith("embeddings.weight"):  # the memory's
            assert id(parameter) not in groups
            continue
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(rate * made[0]._rate(STEPS - 1) / 5e-3), name
        assert (group["weight_decay"] > 0) == (parameter.dim() == 2 and name != "embed_tokens.weight"), name
        assert name not in weights or not torch.equal(parameter, weights[name]), name
    assert load_model(tmp_path / "run" / "model")[1]["base"] == "base (rate 0.001)"
    frozen = changed(arguments, o=str(tmp_path / "frozen"))
    assert command.main(frozen) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "frozen")[-1]


@pytest.mark.parametrize("how", ["--freeze", "--base-rate=1e-3"])
def test_a_resumed_run_equals_an_unbroken_one(how: str, arguments: list[str], tmp_path: Path) -> None:
    arguments = [how if argument == "--freeze" else argument for argument in arguments]
    with pytest.MonkeyPatch.context() as patch:
        trainers(patch, stop_at=7)
        command.main(arguments)
    with pytest.MonkeyPatch.context() as patch:
        made = trainers(patch)
        assert command.main(arguments) == 0
        assert len(losses(tmp_path / "run")) == STEPS  # 7, and the others
        assert command.main(changed(arguments, o=str(tmp_path / "unbroken"))) == 0
    for name, tensor in made[0].model.state_dict().items():
        assert torch.equal(tensor, made[1].model.state_dict()[name]), name
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


def test_another_run_is_not_gone_on_with(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 0
    save_base(tmp_path / "other", seed=8)
    (tmp_path / "scratch.json").write_text(json.dumps({**SMALL, "memory_dim": 32}))
    scratch = [str(tmp_path / "scratch.json"), "--tokenizer", str(tmp_path / "base" / "tokenizer.json")]
    end = arguments.index("--data")
    for others, message in (
        (changed(arguments, base=str(tmp_path / "other")), "the run there has recipe base = '"),
        (["--base-rate=1e-3" if one == "--freeze" else one for one in arguments], "recipe base_rate = 0.0, not 0.001"),
        ([*scratch, *(one for one in arguments[end:] if one != "--freeze")], "the run there has recipe base = '"),
    ):
        assert command.main(others) == 2
        assert message in capsys.readouterr().err
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    assert command.main(changed(arguments, base=str(moved))) == 0  # it is the content that counts


# What comes out.


def test_a_package_that_says_what_the_training_form_says_and_without_memory_what_the_base_says(
    arguments: list[str], tmp_path: Path
) -> None:
    assert command.main(arguments) == 0
    model, _ = load_model(tmp_path / "run" / "model")
    ids = [5, 80, 17, 200, 41, 9]
    for weights, rows in (("float32", "float32"), ("int8", "float16")):
        packages = {}
        for name, source, options in (("base", "base", []), ("memory", "run/model", ["--rows", rows])):
            packages[name] = tmp_path / f"{name}-{weights}"
            made = convert.main([str(tmp_path / source), "-o", str(packages[name]), "--weights", weights, *options])
            assert made == 0
        base = Engine(packages["base"], kv_type="float32")
        off = Engine(packages["memory"], kv_type="float32", memory=False)
        on = Engine(packages["memory"], kv_type="float32")
        np.testing.assert_array_equal(off.logits(ids), base.logits(ids))
        said = [engine.generate("A dog", max_new_tokens=9, temperature=0, ignore_eos=True) for engine in (off, base)]
        assert said[0].token_ids == said[1].token_ids
        assert np.abs(on.logits(ids) - base.logits(ids)).max() > 0.1
        if weights == "float32":
            with torch.no_grad():
                expected = model(torch.tensor([ids]))[0].numpy()
            np.testing.assert_allclose(on.logits(ids), expected, rtol=0, atol=1e-4)
        assert on.manifest["provenance"]["base"] == "base (frozen)"


# What cannot be.


@pytest.mark.parametrize(
    ("add", "remove", "message"),
    [
        ([], "--base", "one of the arguments CONFIG --base is required"),
        (["meki-tiny"], "", "not allowed with argument"),
        (["--base-rate", "1e-3"], "", "argument --base-rate: not allowed with argument --freeze"),
        ([], "--freeze", "--base: are its weights to change? give --freeze, or --base-rate R"),
        (["meki-tiny"], "--base", "--freeze and --base-rate are for the model of --base; name one, or omit them"),
        (["--base", "absent"], "--base", "--base: absent: no such file or directory; expected a Hugging Face folder"),
        (
            [],
            "--set",
            "--base: no memory is to be added; give the width of one (engram_dim, per_layer_dim, memory_dim, ple_dim)",
        ),
        (["--set", "ple_dim=16"], "", "a model has one memory; set all others to 0"),
        (["--set", "memory_projector=linear", "--set", "memory_experts=static"], "", "has no projector"),
        (["--rate", "0"], "", "--rate is 0, expected more"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    add: list[str],
    remove: str,
    message: str,
) -> None:
    if remove:
        at = arguments.index(remove)
        arguments[at : at + (1 if remove == "--freeze" else 2)] = []
    try:
        code = command.main([*add[:1], *arguments, *add[1:]] if add == ["meki-tiny"] else [*arguments, *add])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "state.pt").exists()


def test_models_that_cannot_be_a_base(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(code: int) -> str:
        assert command.main(arguments) == code
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
        return capsys.readouterr().err

    base = tmp_path / "base"
    whole = (base / "config.json").read_text()
    (base / "config.json").write_text(whole.replace('"model_type": "qwen3"', '"model_type": "mamba"'))
    assert "mamba" in fail(1)
    (base / "config.json").write_text(whole)
    tokenizer = base / "tokenizer.json"
    words = [*STORIES, "Many more words are in here than a small vocabulary can have"]
    tokenizer.write_text(train_tokenizer(words, 400).to_str())
    assert "tokenizer: its largest token id is " in fail(1)
    tokenizer.unlink()
    assert f"--base: {base} has no tokenizer.json; name the model's with --tokenizer" in fail(2)
    save_pretrained(
        base,
        LlamaConfig.from_settings({**SMALL, "ple_dim": 16}).module(),
        provenance={},
        overwrite=True,
    )
    assert f"--base: {base} has a memory already (ple); give a model without one" in fail(2)
    (base / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: not a complete safetensors file" in fail(1)


def test_held_out_loss_before_and_after(
    arguments: list[str], base: Decoder, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, "--valid", str(text)]) == 0
    before, _, after, _ = capsys.readouterr().out.splitlines()
    found = [float(line.split("held-out loss ")[1].split()[0]) for line in (before, after)]
    assert before.startswith(f"{tmp_path / 'base'}: held-out loss ")
    ids = torch.from_numpy(np.fromfile(tmp_path / "run" / "valid.tokens", np.uint16).astype(np.int64))
    starts = np.linspace(0, len(ids) - 17, 64).astype(int)
    windows = torch.stack([ids[start : start + 17] for start in starts])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(base(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert found[0] == pytest.approx(expected.item(), abs=1e-3) and found[1] < found[0] - 0.2
    assert (
        command.main([*arguments, "--valid", str(text)]) == 0
    )  # of a run that is there the base is not measured again
    assert "base: held-out" not in capsys.readouterr().out


def test_settings_of_the_base(arguments: list[str], tmp_path: Path) -> None:
    """Those that are no memory's are in place of what the checkpoint says, and the tokenizer is the base's own."""
    assert command.main([*arguments, "--set", "context=64"]) == 0
    model, _ = load_model(tmp_path / "run" / "model")
    assert model.config.context == 64 and model.config.memory is not None and model.config.memory.dim == 32
    spec = json.loads((tmp_path / "run" / "model" / "tokenizer.json").read_text())
    assert spec == json.loads((tmp_path / "base" / "tokenizer.json").read_text())
