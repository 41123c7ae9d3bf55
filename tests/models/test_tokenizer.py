"""A tokenizer.json and what stands beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from meki.models.tokenizer import END_OF_STORY, TokenizerSpec, read_tokenizer


@pytest.fixture
def folder(tokenizer_json: bytes, tmp_path: Path) -> Path:
    """A tokenizer with two more special tokens, 300 and 301."""
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    assert tokenizer.get_vocab_size() == 300
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_alone(folder: Path) -> None:
    spec = read_tokenizer(folder / "tokenizer.json")
    assert spec == TokenizerSpec((folder / "tokenizer.json").read_bytes(), eos_token_ids=(0,))


def test_alone_without_the_end_of_story(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(END_OF_STORY, "<|other|>"))
    assert read_tokenizer(path).eos_token_ids == ()


def test_all_that_belongs_to_it(folder: Path) -> None:
    special = {
        "bos_token": {"content": "<|im_start|>", "special": True},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "unk_token": "<|im_end|>",
    }
    write(folder, "tokenizer_config.json", {**special, "add_bos_token": True, "chat_template": "{{ Ünicode }}"})
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": None, "max_length": 9}
    write(folder, "generation_config.json", {"eos_token_id": [301, 7], "do_sample": True, **sampling})
    write(folder, "config.json", {"eos_token_id": 8})
    spec = read_tokenizer(folder / "tokenizer.json")
    assert spec.bos_token_id == 300
    assert spec.eos_token_ids == (301, 7, 8)
    assert spec.chat_template == "{{ Ünicode }}"
    assert spec.sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert spec.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|im_end|>"}


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": None}])
def test_beginning_that_is_not_added(folder: Path, settings: dict[str, Any]) -> None:
    write(folder, "tokenizer_config.json", {"bos_token": "<|im_start|>", **settings})
    assert read_tokenizer(folder / "tokenizer.json").bos_token_id is None


def test_end_tokens_that_are_stated(folder: Path) -> None:
    """No guess where a file speaks, be it of none."""
    write(folder, "generation_config.json", {"eos_token_id": []})
    assert read_tokenizer(folder / "tokenizer.json").eos_token_ids == ()
    write(folder, "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    assert read_tokenizer(folder / "tokenizer.json").eos_token_ids == (301,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<|gone|>"}, "has no token '<|gone|>', which the files beside it name"),
        ("tokenizer_config.json", {"bos_token": "<|gone|>", "add_bos_token": True}, "has no token '<|gone|>'"),
        ("generation_config.json", {"do_sample": True, "top_p": 2}, "generation_config.json: top_p is 2.0"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id has [1], expected token ids"),
        ("config.json", {"eos_token_id": "2"}, "eos_token_id has '2', expected token ids"),
    ],
)
def test_neighbours_of_another_form(folder: Path, name: str, value: Any, message: str) -> None:
    write(folder, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tokenizer(folder / "tokenizer.json")


def test_several_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert read_tokenizer(folder / "tokenizer.json").chat_template == "plain"
    (folder / "chat_template.jinja").write_bytes(b"a file\r\nof its own")  # which comes first, byte for byte
    assert read_tokenizer(folder / "tokenizer.json").chat_template == "a file\r\nof its own"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ({"default": "x"}, "it is a dict, expected a string"),
        ([{"name": "default", "template": 3}], "it is a int, expected a string"),
        ("{% endfor %}", "line 1: "),
    ],
)
def test_a_template_that_cannot_be_used(folder: Path, template: Any, reason: str) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": template})
    with pytest.warns(
        UserWarning, match=rf"{folder}/tokenizer_config.json: the chat template .*: {reason}.*--chat-tem"
    ):
        assert read_tokenizer(folder / "tokenizer.json").chat_template is None


@pytest.mark.parametrize("stated", [{}, {"temperature": None}, {"temperature": 1}])
def test_sampling_without_a_temperature_is_at_1(folder: Path, stated: dict[str, Any]) -> None:
    """As transformers does; the runtime's own default is lower."""
    write(folder, "generation_config.json", {"do_sample": True, "top_k": 20, **stated})
    assert read_tokenizer(folder / "tokenizer.json").sampling == {"temperature": 1.0, "top_k": 20}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_neighbours(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{folder / name}: (not valid JSON|got a JSON list)"):
        read_tokenizer(folder / "tokenizer.json")


def test_missing_and_damaged(folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"gone.json: no such tokenizer; name a tokenizer.json with --tokenizer"
    ):
        read_tokenizer(folder / "gone.json")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.warns(UserWarning, match=r"chat_template.jinja: the chat template cannot be used .*: 'utf-8' codec"):
        assert read_tokenizer(folder / "tokenizer.json").chat_template is None
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{folder}/tokenizer.json: tokenizer: not in the tokenizers library"):
        read_tokenizer(folder / "tokenizer.json")


def test_a_panic_of_the_library(folder: Path) -> None:
    """Which is no Exception: a prefix that is longer than the word that it should begin."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "abc"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=rf"{folder}/tokenizer.json: tokenizer: not in .*range.*; get it from"):
        read_tokenizer(folder / "tokenizer.json")


def test_a_model_without_a_token_for_what_it_lacks(folder: Path) -> None:
    """It can be loaded, and fails on nearly any text: conversion says so, not the first prompt."""
    model = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match="Encountered an unknown token"):
        read_tokenizer(folder / "tokenizer.json")
