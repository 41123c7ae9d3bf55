"""Tasks of the lm-evaluation-harness, their data from the hub or from a directory."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from .documents import find_file, read_documents

_NAME = re.compile(rb"""^["']?task["']?: *["']?([^\s"'\[]+)["']?\s*$""", re.MULTILINE)


def load_tasks(names: Sequence[str], *, num_fewshot: int | None = None, directory: Path | None = None) -> TaskDict:
    """What `lm_eval.evaluate` takes, as `lm_eval.simple_evaluate` would make it.

    num_fewshot: examples before a question; None: as many as the task says, and 0 for a task that says nothing or 0.
    directory: has a file NAME.jsonl, or .jsonl.xz or .jsonl.gz, for each task, and NAME.train.jsonl if there are
    examples (docs/evaluation.md); None: the harness loads from the hub. ValueError for a name that is none of the
    harness's tasks and for data that is not the task's; FileNotFoundError, or another OSError, if the data is not to be
    had.
    """
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle choices when they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = _manager(names)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"unknown task {name!r}; {hint}")
    loaded = manager.load(
        [item for name in names for item in _hub_tasks(manager, name)]
        if directory is None
        else [_local_task(manager, name, num_fewshot, directory) for name in names]
    )
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", own or 0 if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def _manager(names: Sequence[str]) -> TaskManager:
    """One that knows the tasks, if there are such. Parsing the harness's 14,000 files takes it half a minute: they are
    for a group or tag of tasks alone, and a name that is neither."""
    found = _task_directories()
    if set(names) <= found.keys():
        return TaskManager(include_defaults=False, include_path=sorted({found[name] for name in names}))
    return TaskManager()


@functools.cache
def _task_directories() -> dict[str, Path]:
    """Where each of the harness's tasks is said, found without parsing."""
    found: dict[str, Path] = {}
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        if match := _NAME.search(file.read_bytes()):
            found.setdefault(match[1].decode(), file.parent)
    return found


def _hub_tasks(manager: TaskManager, name: str) -> list[Any]:
    try:
        loaded = manager.load(name)
    except OSError as error:
        remedy = f"connect, or give --task-data a directory with {name}.jsonl (docs/evaluation.md)"
        raise OSError(f"{name}: its data is loaded from the hub, which fails: {error}; {remedy}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


class _Splits(dict[str, datasets.Dataset]):
    """The splits of a data set: NAME.SPLIT.jsonl where there is such a file, else NAME.jsonl."""

    def __init__(self, directory: Path, name: str) -> None:
        file = find_file(directory, name)
        if file is None:
            raise FileNotFoundError(f"{directory}: has no {name}.jsonl, .jsonl.xz or .jsonl.gz; put the data there")
        self._directory, self._name, self.file = directory, name, file
        self._questions = datasets.Dataset.from_list(read_documents(file, name))

    def __missing__(self, split: str) -> datasets.Dataset:
        file = find_file(self._directory, f"{self._name}.{split}")
        return self._questions if file is None else datasets.Dataset.from_list(read_documents(file, self._name))


def _local_task(manager: TaskManager, name: str, num_fewshot: int | None, directory: Path) -> ConfigurableTask:
    """The harness's own task, templates and metrics, over documents of a directory."""
    if name not in manager.all_subtasks:
        raise ValueError(f"{name} is a group of tasks; name those of it that {directory} has data for")
    splits = _Splits(directory, name)
    override = {"task": name, "custom_dataset": lambda **_: splits}
    try:  # tasks run functions of their own on the documents
        task = manager.load({"group": "local", "task": [override]})["tasks"][name]
    except Exception as error:
        raise ValueError(
            f"{splits.file}: its lines lack what {name} reads: {error!r}; give them the fields of its data on the hub, "
            "or the plain form (docs/evaluation.md)"
        ) from error
    shots = task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
    if shots:
        _check_examples(task, shots, directory, splits)
    return task


def _check_examples(task: ConfigurableTask, shots: int, directory: Path, splits: _Splits) -> None:
    """No question is among its own examples, and there are enough of them."""
    name, split = task.task_name, task.fewshot_cfg.split or task.config.training_split or "train"
    if find_file(directory, f"{name}.{split}") is None:
        raise FileNotFoundError(
            f"{directory}: has no {name}.{split}.jsonl, of which {name} takes its {shots} examples; put it there, or "
            "give --num-fewshot 0"
        )
    if len(splits[split]) <= shots:
        raise ValueError(
            f"{directory}: {name}.{split}.jsonl has {len(splits[split])} lines, expected more than the {shots} "
            "examples before a question; add some, or give a smaller --num-fewshot"
        )
