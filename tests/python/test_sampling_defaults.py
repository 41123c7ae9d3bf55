"""What a package says about sampling: the defaults of its generations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import Engine, PackageError
from meki.cli.info import main as info
from meki.cli.run import main as run

TEXT = "The keeper"


@pytest.fixture
def package_with(change_package: Callable[..., Path], chat_package: Path) -> Callable[[object], Path]:
    return lambda sampling: change_package(lambda manifest: manifest.update(sampling=sampling), chat_package)


def ids(engine: Engine, **options: Any) -> list[int]:
    return engine.generate(TEXT, max_new_tokens=12, seed=3, **options).token_ids


def test_they_come_before_the_runtimes_and_after_the_calls(
    package_with: Callable[[object], Path], chat_engine: Engine
) -> None:
    sampling = {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2}
    engine = Engine(package_with(sampling), threads=1, kv_type="float32")
    assert ids(engine) == ids(chat_engine, **sampling) != ids(chat_engine)
    assert ids(engine, temperature=0) == ids(chat_engine, **{**sampling, "temperature": 0})


def test_a_chat_is_sampled_if_the_package_says_so(package_with: Callable[[object], Path], chat_engine: Engine) -> None:
    messages = [{"role": "user", "content": TEXT}]
    engine = Engine(package_with({"temperature": 1.7}), threads=1, kv_type="float32")
    options = {"max_new_tokens": 12, "seed": 3}
    sampled = chat_engine.session().chat(messages, temperature=1.7, **options).token_ids
    assert engine.chat(messages, **options).token_ids == sampled
    assert sampled != chat_engine.session().chat(messages, **options).token_ids


def test_command_lines(package_with: Callable[[object], Path], capsys: pytest.CaptureFixture[str]) -> None:
    package = package_with({"temperature": 0.0, "top_k": 3})
    texts = []
    for seed in ("1", "2"):
        assert run(["--model", str(package), TEXT, "--max-new-tokens", "8", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]  # the most probable tokens
    assert info([str(package)]) == 0
    assert "sampling          temperature 0, top k 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sampling",
    [None, [], {"seed": 1}, {"top_p": -1}, {"top_p": "0.9"}, {"temperature": -1}, {"top_k": 2.5}, {"min_p": None}],
)
def test_what_cannot_be(package_with: Callable[[object], Path], sampling: object) -> None:
    with pytest.raises(PackageError, match=r"manifest\.json: sampling is .*expected"):
        Engine(package_with(sampling))
