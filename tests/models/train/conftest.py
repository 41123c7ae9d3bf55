"""Text, tokens, a run in a directory of its own, and a command line for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki.models.architectures.llama import LlamaConfig
from meki.models.tokenizer import END_OF_STORY, TokenizerSpec, train_tokenizer
from meki.models.train import data
from meki.models.train.trainer import Recipe, Trainer

from .small import SMALL, STORIES


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


@pytest.fixture
def arguments(text: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    common = ["--data", str(text), "--valid", str(text), "-o", str(tmp_path / "run"), "--batch", "2", "--warmup", "2"]
    return [str(tmp_path / "small.json"), *common, "--tokens", str(2 * 16 * 8)]
