"""Studies: plans, what their reports make of results, and the command from plan to report."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from meki.models.architectures.llama import LlamaConfig
from meki.models.study import command, runs, speed
from meki.models.study.logit_lens import divergences
from meki.models.study.plan import Claim, Plan, Section
from meki.models.study.report import Outcomes, fit_line, markdown, verdict
from meki.package.files import locked

REPOSITORY = Path(__file__).parents[3]
PLAN: dict[str, Any] = {
    "title": "A small study",
    "baseline": "dense",
    "recipe": {"tokens": 256, "batch": 2, "length": 16, "rate": 0.002, "warmup": 2},
    "base": {
        **{"vocab_size": 300, "layers": 2, "hidden": 32, "ffn": 32, "heads": 2, "kv_heads": 1, "head_dim": 16},
        **{"context": 128, "memory_dim": 0},
    },
    "models": {"dense": None, "m32": {"memory_dim": 32}, "m64": {"memory_dim": 64}, "m96": {"memory_dim": 96}},
    "sections": [
        {"title": "All", "models": ["dense", "m32"], "seeds": [1, 2]},
        {"title": "Sizes", "models": ["m32", "m64", "m96"], "line": True},
    ],
    "claims": [{"text": "MeKi is better", "better": "m32", "than": ["dense"]}],
}
TEXT = "\n<|story|>\n".join(
    f"The dog of baker {number} sat before the oven, and the cat beside it." for number in range(40)
)

ENVIRONMENT = {"cpu": "A processor", "threads": 2, "simd": "avx2", "meki": "1.0"}


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**PLAN, **changes}))
        return path

    return write


def fabricated(losses: dict[tuple[str, int], float], **changes: Any) -> Outcomes:
    """Outcomes of PLAN with these losses, reached halfway."""
    plan = Plan._parsed(PLAN)
    results = {
        (name, seed): {
            **{"model": name, "seed": seed, "loss": loss, "bits_per_byte": loss / 2, "minutes": 3.0},
            "device": "CPU, float32",
            **{"ram_weights": 1000, "active_weights": 1000, "rom_weights": plan.models[name].rom_parameters},
            **{"curve": [[4, loss + 0.01], [8, loss]], "logit_lens": [1.0, 0.0]},
        }
        for (name, seed), loss in losses.items()
    }
    return Outcomes(plan, results, changes.get("speeds"))


# Plans.


def test_a_plan(write_plan: Callable[..., Path]) -> None:
    plan = Plan.read(write_plan())
    assert plan.runs == [("dense", 1), ("m32", 1), ("m64", 1), ("m96", 1), ("dense", 2), ("m32", 2)]
    assert plan.models["m64"] == LlamaConfig.from_settings({**PLAN["base"], "memory_dim": 64})
    recipe = plan.recipe_of(7)
    assert (recipe.steps, recipe.micro_batch, recipe.seed) == (8, 2, 7)
    assert recipe.last_rate == pytest.approx(0.0002)
    assert plan.sections[1] == Section("Sizes", ("m32", "m64", "m96"), (1,), line=True)


def test_a_run_of_two_sections_is_one(write_plan: Callable[..., Path]) -> None:
    sections = [
        {"title": "A", "models": ["dense", "m32"], "seeds": [1, 2]},
        {"title": "B", "models": ["m32"], "seeds": [2]},
    ]
    models = {name: PLAN["models"][name] for name in ("dense", "m32")}
    plan = Plan.read(write_plan(sections=sections, models=models))
    assert plan.runs == [("dense", 1), ("m32", 1), ("m32", 2), ("dense", 2)]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks/studies").glob("*.yaml")), ids=lambda it: it.name)
def test_plans_of_the_repository(path: Path) -> None:
    plan = Plan.read(path)
    names = {"dense", "meki", "static-only", "dynamic-only", "linear-G", "ple", "engram", "moe"}
    assert names <= plan.models.keys()
    assert (
        len(
            {
                (its.memory.position, its.memory.fusion)
                for its in plan.models.values()
                if its.memory and its.memory.kind == "meki"
            }
        )
        == 7
    )
    (line,) = (section for section in plan.sections if section.line)
    assert len({plan.models[name].rom_parameters for name in line.models}) >= 4
    assert len([run for run in plan.runs if run[1] == 2]) >= 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "plan: unknown titel; expected title"),
        ({"recipe": {"tokens": 256}}, "recipe: has no 'batch'; expected tokens, batch"),
        ({"recipe": {**PLAN["recipe"], "tokens": 1}}, "--tokens is 1"),
        ({"recipe": {**PLAN["recipe"], "tokens": "many"}}, "tokens must be an integer from 1"),
        ({"recipe": {**PLAN["recipe"], "rate": True}}, "rate must be a positive number"),
        ({"models": {**PLAN["models"], "m32": {"memory_dmi": 32}}}, "model m32: unknown configuration keys"),
        ({"models": {**PLAN["models"], "m32": {"memory_dim": 33}}}, "model m32: memory_dim is 33: int8 weights need"),
        ({"models": {**PLAN["models"], "x": None}}, "no section has x; add one or leave the models out"),
        ({"models": {**PLAN["models"], "m32": {"vocab_size": 301}}}, "models differ in vocab_size"),
        ({"models": []}, r"models: got \[\], expected names with values"),
        ({"baseline": "x"}, "model 'x' is compared but in no section"),
        ({"sections": [{"title": "All", "models": ["dense", "y"]}]}, "a section names model 'y', which is none of"),
        ({"sections": [{"title": "All", "models": ["dense"], "seeds": [-1]}]}, r"seeds are \[-1\], expected integers"),
        ({"sections": "all"}, "sections: got 'all', expected a list"),
        ({"claims": [{"text": "x", "better": "m32"}]}, "claim: has no 'than'"),
    ],
)
def test_plans_that_cannot_be(write_plan: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Plan.read(write_plan(**changes))
    assert str(error.value).startswith(str(write_plan()))


# What becomes of results.


def test_the_line_and_its_intervals() -> None:
    sizes, losses = [1e6, 2e6, 4e6, 8e6, 16e6], [4.0, 3.92, 3.85, 3.75, 3.70]
    line = fit_line(sizes, losses)
    assert line is not None
    x = np.log2(sizes)
    slope, intercept = np.polyfit(x, losses, 1)
    errors = losses - intercept - slope * x
    t = 3.18245  # Student's t of 3 degrees of freedom, 97.5%, from a printed table
    half = t * math.sqrt(sum(errors**2) / 3 / sum((x - x.mean()) ** 2))
    assert line.slope == pytest.approx(slope)
    assert line.interval == pytest.approx((slope - half, slope + half), rel=1e-5)
    assert line.r2 == pytest.approx(np.corrcoef(x, losses)[0, 1] ** 2)
    middle, half = line.predict(np.array([4e6]))  # in the middle, only the mean is uncertain
    assert middle[0] == pytest.approx(np.mean(losses))
    assert half[0] == pytest.approx(t * math.sqrt(sum(errors**2) / 3 / 5), rel=1e-5)
    assert fit_line([1e6, 2e6, 2e6], [4.0, 3.9, 3.8]) is None


CLAIM = Claim("", "m32", ("dense",))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({("dense", 1): 4.0, ("m32", 1): 3.9, ("dense", 2): 4.1, ("m32", 2): 3.9}, "**shown**: -0.1500 beside dense"),
        ({("dense", 1): 4.0, ("m32", 1): 4.1, ("dense", 2): 4.0, ("m32", 2): 4.3}, "**not shown**: +0.2000"),
        (
            {("dense", 1): 4.0, ("m32", 1): 4.1, ("dense", 2): 4.0, ("m32", 2): 3.8},
            "**open**: -0.0500 beside dense",
        ),
        ({("dense", 1): 4.0, ("m32", 1): 3.9}, "**open**: -0.1000 beside dense, one seed"),
        ({("dense", 1): 4.0}, "not measured"),
    ],
)
def test_what_runs_say_of_a_claim(losses: dict[tuple[str, int], float], expected: str) -> None:
    assert verdict(fabricated(losses), CLAIM).startswith(expected)


def test_one_seed_has_to_exceed_what_another_makes_elsewhere() -> None:
    losses = {("dense", 1): 4.0, ("dense", 2): 4.2, ("m32", 1): 3.9, ("m32", 2): 4.05}  # -0.1 and -0.15
    for m64, expected in ((3.96, "**open**"), (3.94, "**shown**"), (4.04, "**open**"), (4.06, "**not shown**")):
        outcomes = fabricated({**losses, ("m64", 1): m64})
        assert outcomes.noise() == pytest.approx(0.05)
        assert verdict(outcomes, Claim("", "m64", ("dense",))).startswith(expected)


def test_how_soon_a_model_has_the_baselines_loss() -> None:
    outcomes = fabricated({("dense", 1): 4.0, ("m32", 1): 3.9, ("m64", 1): 3.995, ("m96", 1): 4.1})
    assert outcomes.share_to_reach("m32", "dense") == 0.5
    assert outcomes.share_to_reach("m64", "dense") == 1.0
    assert outcomes.share_to_reach("m96", "dense") is None


def test_a_report_of_what_there_is() -> None:
    assert "0 of 6 runs are done" in markdown(fabricated({}), "meki-study plan.yaml", {})
    speeds = {
        "models": {"m32": {"ratio": 0.9912, "ci95": [0.98, 1.0], "tokens_per_s": 100.0}},
        "random": [],
        "environment": ENVIRONMENT,
    }
    losses = {("dense", 1): 4.0, ("dense", 2): 4.2, ("m32", 1): 3.9, ("m32", 2): 4.0, ("m64", 1): 3.8}
    text = markdown(fabricated(losses, speeds=speeds), "meki-study plan.yaml", {"Curves": "study/curves.svg"})
    lines = text.splitlines()
    rom = 2 * 300 * 32
    assert "5 of 6 runs are done, 0.2 hours of training." in text and "    meki-study plan.yaml" in lines
    assert "| dense | 1,000 | 1,000 | 0 | 4.1000 | 0.2000 | 2.0500 | - | - | - | 3 + 3 |" in lines
    decode = "50% | 0.991 (0.980 to 1.000)"
    assert f"| m32 | 1,000 | 1,000 | {rom:,} | 3.9500 | 0.1000 | 1.9750 | -0.1500 | {decode} | 3 + 3 |" in lines
    # The second section is of the first seed.
    assert f"| m32 | 1,000 | 1,000 | {rom:,} | 3.9000 | - | 1.9500 | -0.1000 | {decode} | 3 |" in lines
    assert "Trained on: CPU, float32 (5 runs; seeds 1, 2)." in text
    assert f"| m64 | 1,000 | 1,000 | {2 * rom:,} | 3.8000 | - | 1.9000 | -0.2000 | 50% | - | 3 |" in lines
    assert "m96" not in text and "Twice the ROM" not in text  # two sizes make no line
    assert "A processor, 2 threads" in text and "![Curves](study/curves.svg)" in lines


def test_logit_lens() -> None:
    model = LlamaConfig.from_settings({**PLAN["base"], "memory_dim": 32}).module().initialise(3, std=0.2)
    ids = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    got = divergences(model, ids)
    sums, count = [0.0, 0.0], 0
    with torch.no_grad():
        for row in ids:
            ends = []
            for layers in (1, 2):  # a decoder that stops there
                cut = LlamaConfig.from_settings({**PLAN["base"], "memory_dim": 32, "layers": layers}).module()
                cut.load_state_dict({name: model.state_dict()[name] for name in cut.state_dict()})
                ends.append(F.softmax(cut(row[None, :-1])[0].double(), dim=-1))
            for token in range(8):
                count += 1
                for layer in range(2):
                    p, q = ends[1][token], ends[layer][token]
                    sums[layer] += float((p * (p / q).log()).sum())
    # float32 against float64.
    np.testing.assert_allclose(got, [total / count for total in sums], atol=1e-5)
    assert got[0] > 0.01


# The command.


@pytest.fixture
def arguments(write_plan: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(speed, "TOKENS", 8)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    text = str(tmp_path / "text.txt")
    places = ["-o", str(tmp_path / "study.md"), "--runs", str(tmp_path / "runs")]
    return [str(write_plan()), "--data", text, "--valid", text, *places]


def test_from_plan_to_report(
    arguments: list[str],
    write_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'study.md'}: 6 of 6 runs\n" and "note: m96, seed 1" in err
    text = (tmp_path / "study.md").read_text()
    kept = json.loads((tmp_path / "study/results.json").read_text())
    assert [(its["model"], its["seed"]) for its in kept["results"]] == Plan.read(write_plan()).runs
    for its in kept["results"]:
        assert its["loss"] == pytest.approx(its["curve"][-1][1], abs=0.3)  # over all windows, and over some
        assert (
            len(its["curve"]) == 8 and its["curve"][-1][0] == 8 and its["logit_lens"][-1] == pytest.approx(0, abs=1e-6)
        )
        assert 0 < its["minutes"] < 10
    assert kept["speeds"]["models"].keys() == PLAN["models"].keys()
    assert kept["speeds"]["models"]["m32"]["ratio"] > 0
    for image in ("weights", "curves", "logit_lens", "line1"):
        assert f"](study/{image}.svg)" in text
        ElementTree.parse(tmp_path / "study" / f"{image}.svg")
    assert len({f"{its['loss']:.4f}" for its in kept["results"]}) == 6

    # The same again: nothing is trained. Without its runs, too.
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(runs, "Trainer", None)
    assert command.main(arguments) == 0
    assert (tmp_path / "study.md").read_text() == text
    assert json.loads((tmp_path / "study/results.json").read_text()) == kept

    # Results from elsewhere, speeds not: decode is measured with random weights.
    kept["speeds"] = None
    (tmp_path / "study/results.json").write_text(json.dumps(kept))
    assert command.main(arguments) == 0
    measured = json.loads((tmp_path / "study/results.json").read_text())["speeds"]
    assert measured["random"] == [*PLAN["models"]] and measured["models"]["m32"]["ratio"] > 0
    listed = ", ".join(PLAN["models"])
    random = f"Trained elsewhere, so measured with random weights, which takes as long: {listed}."
    assert random in (tmp_path / "study.md").read_text() and random not in text

    # Another recipe: those results do not count.
    monkeypatch.undo()
    measured = {**measured, "models": {"m32": {"tokens_per_s": 1.0, "ratio": 1.5, "ci95": None}}}
    monkeypatch.setattr(speed, "measure_speeds", lambda *_: measured)
    write_plan(recipe={**PLAN["recipe"], "tokens": 128})
    assert command.main(arguments) == 0
    again = json.loads((tmp_path / "study/results.json").read_text())
    assert again["speeds"] == measured  # nor do the speeds
    other = again["results"]
    assert all(its["curve"][-1][0] == 4 for its in other) and len(other) == 6


def test_ctrl_c_and_a_run_that_another_process_has(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = runs.Trainer._step

    def interrupted(self: Any) -> float:
        if self.out.name == "m32-1" and self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(runs.Trainer, "_step", interrupted)
    assert command.main(arguments) == 130
    assert "note: stopped with 1 of 6 runs; the same command goes on" in capsys.readouterr().err
    assert "1 of 6 runs are done" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "runs/m32-1/state.pt").exists() and not (tmp_path / "runs/m64-1").exists()

    monkeypatch.setattr(runs.Trainer, "_step", step)
    with locked(tmp_path / "runs/m64-1"):
        assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "m64, seed 1: another process is at it" in err and "dense, seed 1" not in err and "5 of 6 runs" in out
    text = (tmp_path / "study.md").read_text()
    assert "5 of 6 runs are done" in text and "Decode:" not in text
    curve = json.loads((tmp_path / "runs/m32-1/result.json").read_text())["curve"]
    assert [point[0] for point in curve] == list(range(1, 9))


def test_what_another_process_has_done_meanwhile(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs.Runs._train

    def meanwhile(self: runs.Runs, name: str, seed: int, stop: Any) -> None:
        train(self, name, seed, stop)
        if (name, seed) == ("dense", 1):
            other = runs.Runs(self.plan, self.text, self.out, [], device="cpu", compile=False)
            train(other, "m32", 1, stop)
            train(other, "m64", 1, stop)

    monkeypatch.setattr(runs.Runs, "_train", meanwhile)
    monkeypatch.setattr(speed, "measure_speeds", lambda *_: {"models": {}, "random": [], "environment": ENVIRONMENT})
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "6 of 6 runs" in out and "m96, seed 1" in err and "m32, seed 1" not in err and "m64, seed 1" not in err


def test_what_is_missing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main([str(tmp_path / "no.yaml"), *arguments[1:]]) == 2
    assert "no.yaml: no such plan; give a YAML file" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [")
    assert command.main([str(tmp_path / "bad.yaml"), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert "bad.yaml: not valid YAML: " in error and error.count("\n") == 1
    (tmp_path / "short.txt").write_text("Short.")
    assert command.main([arguments[0], "--data", str(tmp_path / "short.txt"), *arguments[3:]]) == 2
    assert "the training text has" in capsys.readouterr().err
    assert command.main([*arguments, "-o", str(tmp_path / "report")]) == 2
    assert "report, expected a .md" in capsys.readouterr().err and not (tmp_path / "report").exists()
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "scipy" else True)
    assert command.main(arguments) == 2
    assert "needs scipy, not installed; run pip install 'meki[study]'" in capsys.readouterr().err
