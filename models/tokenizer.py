"""What a model makes of text: its tokenizer, the tokens that begin and end one, its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_STORY = "<|story|>"
"""Stands between two stories; the model emits it when a story is over."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer and what belongs to it."""

    json: bytes
    """The text of a tokenizer.json (the tokenizers library's format)."""
    bos_token_id: int | None = None
    """Put before every text, unless the tokenizer does that itself."""
    eos_token_ids: tuple[int, ...] = ()
    """Each ends a generation."""
    chat_template: str | None = None
    """Jinja, as Hugging Face's tokenizers have it."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Variables of the chat template: {"bos_token": "<s>", "eos_token": "</s>"}."""


def parse_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """ValueError if it is not the text of a tokenizer.json."""
    try:
        return Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer: not in the tokenizers library's JSON format: {error}") from error


def read_tokenizer(path: Path) -> TokenizerSpec:
    """A tokenizer.json with what stands beside it, as Hugging Face lays a model out.

    tokenizer_config.json (special tokens, chat template), chat_template.jinja, generation_config.json and config.json
    (end tokens) are all optional. Where no file names an end token, it is the end-of-story token, if there is one.
    FileNotFoundError if `path` is not a file; ValueError, naming the file, for what cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer; name a tokenizer.json with --tokenizer")
    text = path.read_bytes()
    try:
        tokenizer = parse_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = _read_json(path.with_name("tokenizer_config.json"))
    special = {key: token for key in config if key.endswith("_token") and (token := _content(config[key])) is not None}
    ends = [tokenizer.token_to_id(special["eos_token"])] if "eos_token" in special else []
    for name in ("generation_config.json", "config.json"):
        listed = _read_json(path.with_name(name)).get("eos_token_id")
        ends += listed if isinstance(listed, list) else [listed]
    ends = [token for token in ends if token is not None] or [tokenizer.token_to_id(END_OF_STORY)]
    bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
    return TokenizerSpec(
        text,
        bos_token_id=bos if config.get("add_bos_token") is True else None,
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        chat_template=_chat_template(path.with_name("chat_template.jinja"), config),
        special_tokens=special,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def _content(token: object) -> str | None:
    """The text of a special token: a string, or an object that describes it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, for tools and the like
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def train_tokenizer(stories: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` entries, of which 256 are bytes and one is the end of a story (id 0)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_STORY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer
