"""Tasks of the harness over a directory of our own: its templates and metrics, our lines."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the harness: pip install 'meki[eval]'")

import datasets

from meki.evaluation.documents import read_documents
from meki.evaluation.tasks import load_tasks

pytestmark = pytest.mark.usefixtures("offline")

# What is written here is nobody's data set: a line as the hub has it, the same in the plain form, and the harness's
# requests for it, which are read off its templates.
LABELLED = {"text": ["wool", "stone", "glass", "iron"], "label": ["A", "B", "C", "D"]}
ARC_HUB = {"id": "q1", "question": "Which of these is soft?", "choices": LABELLED, "answerKey": "A"}
ARC_PLAIN = {"query": "Question: Which of these is soft?", "choices": LABELLED["text"], "gold": 0}
ARC = [("Question: Which of these is soft?\nAnswer:", f" {text}") for text in LABELLED["text"]]
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]], int | str]] = {
    "arc_easy": (ARC_HUB, ARC_PLAIN, ARC, 0),
    "arc_challenge": (ARC_HUB, ARC_PLAIN, ARC, 0),
    "openbookqa": (
        {"question_stem": "A candle that burns gets", "choices": LABELLED, "answerKey": "C"},
        {"query": "A candle that burns gets", "choices": LABELLED["text"], "gold": 2},
        [("A candle that burns gets", f" {text}") for text in LABELLED["text"]],
        2,
    ),
    "piqa": (
        {"goal": "Keep a door open.", "sol1": "Use a wedge.", "sol2": "Use a wish.", "label": 0},
        {"query": "Question: Keep a door open.\n", "choices": ["Use a wedge.", "Use a wish."], "gold": 0},
        [
            ("Question: Keep a door open.\nAnswer:", " Use a wedge."),
            ("Question: Keep a door open.\nAnswer:", " Use a wish."),
        ],
        0,
    ),
    "boolq": (
        {"passage": "Boats -- A boat floats.\nQuestion: is asked here.", "question": "does a boat float", "label": 1},
        {
            "query": "Passage: Boats -- A boat floats.\nQuestion: is asked here.\nQuestion: does a boat float?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
        [
            ("Boats -- A boat floats.\nQuestion: is asked here.\nQuestion: does a boat float?\nAnswer:", " no"),
            ("Boats -- A boat floats.\nQuestion: is asked here.\nQuestion: does a boat float?\nAnswer:", " yes"),
        ],
        1,
    ),
    "copa": (
        {
            "premise": "The old, tired dog slept.",
            "question": "cause",
            "choice1": "It had run all day.",
            "choice2": "It was a cat.",
            "label": 0,
        },
        {"query": "The old, tired dog slept, because", "choices": ["it had run all day.", "it was a cat."], "gold": 0},
        [
            ("The old, tired dog slept because", "  it had run all day."),
            ("The old, tired dog slept because", "  it was a cat."),
        ],
        0,
    ),
    "winogrande": (
        {"sentence": "Sara paid Sam as _ had won.", "option1": "Sara", "option2": "Sam", "answer": "2"},
        {
            "context_options": ["Sara paid Sam as Sara", "Sara paid Sam as Sam"],
            "continuation": "had won.",
            "gold": 1,
        },
        [("Sara paid Sam as Sara", " had won."), ("Sara paid Sam as Sam", " had won.")],
        1,
    ),
    "lambada_openai": (
        {"text": "The ship\n\ncame in, and the keeper saw the ship"},
        {"context": "The ship\n\ncame in, and the keeper saw the", "continuation": "ship"},
        [("The ship\n\ncame in, and the keeper saw the", " ship")],
        " ship",
    ),
}


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def requests(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", FORMS)
def test_prompts_are_the_harness_s_own_to_the_character(name: str, tmp_path: Path) -> None:
    hub, plain, expected, gold = FORMS[name]
    for line in (hub, plain):
        write_lines(tmp_path / f"{name}.jsonl", line)
        task = load_tasks([name], directory=tmp_path)["tasks"][name]
        assert requests(task) == expected
        (document,) = task.eval_docs
        target = task.doc_to_target(document) if name != "winogrande" else task.doc_to_text(document)
        choices = None if name == "copa" else target  # whose target is a text
        assert choices in (None, gold, str(gold))
        metrics = task.process_results(document, [(-1.0 - (at != gold), False) for at in range(len(expected))])
        if name != "lambada_openai":
            assert metrics["acc"] == 1.0


def test_any_task_in_the_fields_of_the_hub(tmp_path: Path) -> None:
    lines = [
        {
            "activity_label": "Roof",
            "ctx_a": "A man sits [title] there.",
            "ctx_b": "he",
            "endings": ["falls  off.", "[step] sleeps."],
            "label": "1",
        }
    ]
    write_lines(tmp_path / "hellaswag.jsonl", *lines)
    (tmp_path / "sciq.jsonl.xz").write_bytes(
        lzma.compress(
            json.dumps(
                {
                    "support": " Wool is soft.",
                    "question": "What is soft?",
                    "distractor1": "stone",
                    "distractor2": "glass",
                    "distractor3": "iron",
                    "correct_answer": "wool",
                }
            ).encode()
        )
    )
    tasks = load_tasks(["hellaswag", "sciq"], directory=tmp_path)["tasks"]
    assert requests(tasks["hellaswag"]) == [
        ("Roof: A man sits. there. He", " falls off."),
        ("Roof: A man sits. there. He", "  sleeps."),
    ]
    assert requests(tasks["sciq"])[3] == ("Wool is soft.\nQuestion: What is soft?\nAnswer:", " wool")


def test_examples_before_a_question(tmp_path: Path) -> None:
    questions = [context for context, _ in FORMS["piqa"][2]]
    write_lines(tmp_path / "piqa.jsonl", FORMS["piqa"][1])
    example = {"query": "Question: Boil water.\n", "choices": ["Heat it.", "Cool it."], "gold": 0}
    write_lines(tmp_path / "piqa.train.jsonl", example, example)

    def contexts(num_fewshot: int | None) -> list[str]:
        task = load_tasks(["piqa"], directory=tmp_path, num_fewshot=num_fewshot)["tasks"]["piqa"]
        return [context for context, _ in requests(task)]

    assert contexts(None) == contexts(0) == questions
    assert contexts(1) == [f"Question: Boil water.\nAnswer: Heat it.\n\n{question}" for question in questions]
    with pytest.raises(ValueError, match=r"piqa.train.jsonl has 2 lines, expected more than the 2 examples"):
        contexts(2)
    (tmp_path / "piqa.train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no piqa.train.jsonl, of which piqa takes its 1 examples"):
        contexts(1)


def test_the_other_name_of_a_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "openbook_qa.jsonl", FORMS["openbookqa"][1])
    assert requests(load_tasks(["openbookqa"], directory=tmp_path)["tasks"]["openbookqa"]) == FORMS["openbookqa"][2]


@pytest.mark.usefixtures("few_tasks")
def test_no_such_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'arc_esay'; did you mean arc_easy"):
        load_tasks(["piqa", "arc_esay"], directory=tmp_path)


@pytest.mark.slow
def test_no_such_task_among_all_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'helaswag'; did you mean hellaswag"):
        load_tasks(["helaswag"], directory=tmp_path)


@pytest.mark.usefixtures("few_tasks")
def test_a_group_has_no_data_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ai2_arc is a group of tasks; name those of it"):
        load_tasks(["ai2_arc"], directory=tmp_path)


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no piqa.jsonl, .jsonl.xz or .jsonl.gz; put the data there"):
        load_tasks(["piqa"], directory=tmp_path)


def test_without_a_network_a_task_says_what_it_needs() -> None:
    with pytest.raises(OSError, match=r"piqa: its data is loaded from the hub, which fails: .* --task-data"):
        load_tasks(["piqa"])


def test_lines_of_another_task_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa.jsonl", FORMS["lambada_openai"][1])
    with pytest.raises(ValueError, match=r"piqa.jsonl: its lines lack what piqa reads: .* plain form"):
        load_tasks(["piqa"], directory=tmp_path)


BAD: dict[str, tuple[str, Callable[[], str], str]] = {
    "no JSON": ("piqa", lambda: "{", "line 2 is no question of piqa"),
    "no object": ("piqa", lambda: "[]", "a JSON list, expected an object"),
    "other fields": ("piqa", lambda: '{"goal": "x"}', "has goal: other fields than the lines before"),
    "gold out of range": (
        "piqa",
        lambda: json.dumps({**FORMS["piqa"][1], "gold": 2}),
        "gold is 2, expected from 0 to 1",
    ),
    "gold below": ("piqa", lambda: json.dumps({**FORMS["piqa"][1], "gold": -1}), "gold is -1, expected from 0 to 1"),
    "three choices": ("piqa", lambda: json.dumps({**FORMS["piqa"][1], "choices": ["a", "b", "c"]}), "too many values"),
    "choices of boolq": (
        "boolq",
        lambda: json.dumps({**FORMS["boolq"][1], "choices": ["yes", "no"]}),
        r"its choices are \['yes', 'no'\], expected",
    ),
    "no question": (
        "boolq",
        lambda: json.dumps({**FORMS["boolq"][1], "query": "Passage: A boat."}),
        "between passage and question",
    ),
    "no connector": (
        "copa",
        lambda: json.dumps({**FORMS["copa"][1], "query": "The dog slept, so"}),
        'does not end with ", because" or ", therefore"',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    name, line, message = BAD[case]
    path = write_lines(tmp_path / f"{name}.jsonl", FORMS[name][1])
    path.write_text(f"{path.read_text()}{line()}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(path, name)
    assert f"{path}: line 2" in str(caught.value)


def test_a_file_without_a_question(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no question; give a file with one on each line"):
        read_documents(write_lines(tmp_path / "piqa.jsonl"), "piqa")


@pytest.mark.usefixtures("few_tasks")
def test_a_group_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str) -> dict[str, datasets.Dataset]:
        assert path == "allenai/ai2_arc"
        lines = [ARC_HUB, {**ARC_HUB, "question": f"A question of {name}?"}]
        return dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(lines))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = load_tasks(["ai2_arc", "arc_easy"])["tasks"]
    assert {name: requests(task)[4][0] for name, task in tasks.items()} == {
        "arc_easy": "Question: A question of ARC-Easy?\nAnswer:",
        "arc_challenge": "Question: A question of ARC-Challenge?\nAnswer:",
    }


def test_the_lines_that_the_documentation_shows(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `(\w+)`.*\| `(\{.*\})` \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == FORMS.keys() - {"arc_challenge"}
    for name, line in rows:
        (document,) = read_documents(write_lines(tmp_path / f"{name}.jsonl", json.loads(line)), name)
        assert document.keys() == FORMS[name][0].keys() - {"id"}
