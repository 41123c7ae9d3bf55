"""Questions from JSON lines, in the fields that the harness's own task of that name reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..package.files import open_text

Document = dict[str, Any]

_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
_QUESTION = {"query", "choices", "gold"}


def find_file(directory: Path, name: str) -> Path | None:
    """The file of JSON lines that `name` has in a directory, compressed or not."""
    names = [name, *([_OTHER_NAMES[name]] if name in _OTHER_NAMES else [])]
    files = (directory / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def read_documents(path: Path, task: str) -> list[Document]:
    """The documents of a file, one a line: in the fields that the harness's task reads, or in the plain form, of which
    those are made. ValueError, naming the line, for what is no document; OSError."""
    documents: list[Document] = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise TypeError(f"a JSON {type(document).__name__}, expected an object")
                documents.append(_from_plain(task, document))
                if documents[-1].keys() != documents[0].keys():
                    raise ValueError(f"has {', '.join(document)}: other fields than the lines before")
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is no question of {task}: {error}") from error
    if not documents:
        raise ValueError(f"{path}: has no question; give a file with one on each line")
    return documents


def _from_plain(task: str, line: Document) -> Document:
    """What the harness's task reads, if the line has the plain form; else the line."""
    plain, convert = _PLAIN.get(task, (set(), dict))
    if line.keys() != plain:
        return line
    options = line.get("choices", line.get("context_options", []))
    if options and line["gold"] not in range(len(options)):
        raise ValueError(f"its gold is {line['gold']!r}, expected from 0 to {len(options) - 1}")
    return convert(line)


def _labelled(line: Document) -> Document:
    """As the data sets of ARC and OpenBookQA have it."""
    labels = [chr(ord("A") + index) for index in range(len(line["choices"]))]
    return {"choices": {"text": line["choices"], "label": labels}, "answerKey": labels[line["gold"]]}


def _arc(line: Document) -> Document:
    return {"question": line["query"].removeprefix("Question: "), **_labelled(line)}


def _openbookqa(line: Document) -> Document:
    return {"question_stem": line["query"], **_labelled(line)}


def _piqa(line: Document) -> Document:
    first, second = line["choices"]
    goal = line["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": line["gold"]}


def _boolq(line: Document) -> Document:
    if line["choices"] != ["no", "yes"]:
        raise ValueError(f'its choices are {line["choices"]}, expected ["no", "yes"]')
    passage, found, question = line["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    if not found:
        raise ValueError('its query has no "\\nQuestion: " between passage and question')
    return {"passage": passage, "question": question.removesuffix("?"), "label": line["gold"]}


def _copa(line: Document) -> Document:
    first, second = line["choices"]
    premise, found, connector = line["query"].rpartition(", ")
    question = {"because": "cause", "therefore": "effect"}.get(connector)
    if not found or question is None:
        raise ValueError('its query does not end with ", because" or ", therefore"')
    return {
        "premise": f"{premise}.",
        "question": question,
        "choice1": first,
        "choice2": second,
        "label": line["gold"],
    }


def _winogrande(line: Document) -> Document:
    first, second = line["context_options"]
    before = os.path.commonprefix([first, second])  # noqa: RUF071 (of any two strings)
    return {
        "sentence": f"{before}_ {line['continuation']}",
        "option1": first.removeprefix(before),
        "option2": second.removeprefix(before),
        "answer": str(line["gold"] + 1),
    }


def _lambada(line: Document) -> Document:
    return {"text": f"{line['context']} {line['continuation']}"}


_PLAIN: dict[str, tuple[set[str], Callable[[Document], Document]]] = {
    "arc_easy": (_QUESTION, _arc),
    "arc_challenge": (_QUESTION, _arc),
    "openbookqa": (_QUESTION, _openbookqa),
    "piqa": (_QUESTION, _piqa),
    "boolq": (_QUESTION, _boolq),
    "copa": (_QUESTION, _copa),
    "winogrande": ({"context_options", "continuation", "gold"}, _winogrande),
    "lambada_openai": ({"context", "continuation"}, _lambada),
}
"""The plain form of tasks: the fields of a line, and what makes a document of it."""

_OTHER_NAMES = {"openbookqa": "openbook_qa"}
"""Of files in the plain form."""
