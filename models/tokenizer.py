"""What a model makes of text: its tokenizer, the tokens that begin and end one, its chat template."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from meki.chat import parse_template
from meki.options import SAMPLING, GenerationOptions, check_options
from meki.package.files import check_downloaded, decode_text, read_object, read_text
from meki.prompt import check_encodes, tokenizer_errors

from .config import as_number

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
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What the model's authors sample with: any of temperature, top_k, top_p, min_p, repetition_penalty."""


def parse_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """ValueError if it is not the text of a tokenizer.json."""
    form = "tokenizer: not in the tokenizers library's JSON format"
    with tokenizer_errors(lambda error: ValueError(f"{form}: {error}; get it from the model's publisher again")):
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
        check_encodes(tokenizer)
    return tokenizer


def read_tokenizer(path: Path) -> TokenizerSpec:
    """A tokenizer.json with what stands beside it, as Hugging Face lays a model out.

    tokenizer_config.json and special_tokens_map.json (special tokens, chat template), added_tokens.json (more tokens),
    chat_template.jinja, generation_config.json (end tokens, sampling) and config.json (end tokens) are all optional. If
    none says what ends a text, it is the end-of-story token, where there is one. FileNotFoundError if `path` is not a
    file; ValueError for what cannot be read, but for a chat template (`usable_template`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer; name a tokenizer.json with --tokenizer")
    text = read_text(path).encode()
    try:
        tokenizer = parse_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    files = {name: path.with_name(f"{name}.json") for name in _BESIDE}
    beside = {name: read_object(file) if file.is_file() else {} for name, file in files.items()}
    config = {**beside["special_tokens_map"], **beside["tokenizer_config"]}
    special = {key: token for key in config if key.endswith("_token") and (token := _content(config[key])) is not None}
    if _add_tokens(path, tokenizer, beside, [*special.values(), *_more_special_tokens(config)]):
        text = tokenizer.to_str().encode()
    begins = config.get("add_bos_token") is True and "bos_token" in special
    ends = [_token_id(path, tokenizer, special["eos_token"])] if "eos_token" in special else []
    named = [beside[name]["eos_token_id"] for name in ("generation_config", "config") if "eos_token_id" in beside[name]]
    for listed in named:
        ends += map(as_number, listed if isinstance(listed, list) else [] if listed is None else [listed])
    if not named and "eos_token" not in config and (end := tokenizer.token_to_id(END_OF_STORY)) is not None:
        ends = [end]
    if wrong := [token for token in ends if type(token) is not int]:
        raise ValueError(f"{path.parent}: eos_token_id has {wrong[0]!r}, expected token ids")
    return TokenizerSpec(
        text,
        bos_token_id=_token_id(path, tokenizer, special["bos_token"]) if begins else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        chat_template=_chat_template(path, config),
        special_tokens=special,
        sampling=_sampling(files["generation_config"], beside["generation_config"]),
    )


_BESIDE = ("special_tokens_map", "tokenizer_config", "added_tokens", "generation_config", "config")
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", *(f"{name}.json" for name in _BESIDE))
"""All that `read_tokenizer` may read."""


def _content(token: object) -> str | None:
    """The text of a special token: a string, or an object that describes it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def without_unknown_tokens(tokenizer: TokenizerSpec, vocab_size: int) -> TokenizerSpec:
    """Without end tokens and special tokens that a model of so many tokens does not have; warnings name them.

    Gemma 3's tokenizer has a token for images, whose model for texts alone has no row for it.
    """
    ends = [token for token in tokenizer.eos_token_ids if not 0 <= token < vocab_size]
    if ends:
        warnings.warn(
            f"end tokens {', '.join(map(str, ends))} are ignored, the vocabulary's ids are 0 to {vocab_size - 1}; if "
            "texts do not end, correct eos_token_id in the model's generation_config.json or config.json",
            stacklevel=2,
        )
        kept = tuple(token for token in tokenizer.eos_token_ids if token not in ends)
        tokenizer = replace(tokenizer, eos_token_ids=kept)
    values = json.loads(tokenizer.json)
    unknown = [token for token in values.get("added_tokens", []) if token["special"] and token["id"] >= vocab_size]
    if unknown:
        names = ", ".join(token["content"] for token in unknown)
        warnings.warn(f"special tokens {names} are left out: the model has {vocab_size} tokens", stacklevel=2)
        values["added_tokens"] = [token for token in values["added_tokens"] if token not in unknown]
        tokenizer = replace(tokenizer, json=json.dumps(values, ensure_ascii=False).encode())
    return tokenizer


_MARKS = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
"""With which Gemma 4 sets off the parts of an answer: its thoughts, calls of tools and their strings."""


def with_visible_marks(tokenizer: TokenizerSpec) -> TokenizerSpec:
    """With text for the marks of an answer's parts, which as special tokens would have none: the parts would run into
    each other, and the chat template could not tell them apart in what it is given back."""
    values = json.loads(tokenizer.json)
    marks = [token for token in values.get("added_tokens", []) if token["special"] and token["content"] in _MARKS]
    if not marks:
        return tokenizer
    for token in marks:
        token["special"] = False
    return replace(tokenizer, json=json.dumps(values, ensure_ascii=False).encode())


def _token_id(path: Path, tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{path}: has no token {token!r}, which the files beside it name")
    return int(found)


def _more_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Those that have no role of their own."""
    listed = [config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    tokens = [_content(token) for names in listed for token in (names.values() if isinstance(names, dict) else names)]
    return [token for token in tokens if token is not None]


def _add_tokens(path: Path, tokenizer: Tokenizer, beside: Mapping[str, Any], special: list[str]) -> bool:
    """Adds to the tokenizer of the file `path` what the files beside it say of its tokens, as transformers does: what
    it does not know to be a token would be cut into pieces. Whether that changed it; ValueError where they disagree."""
    stated = _stated_tokens(path, beside, special)
    known = tokenizer.get_added_tokens_decoder()
    for text in special:
        id = tokenizer.token_to_id(text)
        if id is not None and id not in known:
            stated.setdefault(id, AddedToken(text, special=True))
    changed = {id: token for id, token in stated.items() if id not in known or _flags(known[id]) != _flags(token)}
    for id, token in sorted(changed.items()):
        got, occupant = tokenizer.token_to_id(token.content), tokenizer.id_to_token(id)
        if got is None and occupant is None:
            tokenizer.add_tokens([token])
            got = tokenizer.token_to_id(token.content)  # the first id that is free
        if got != id:
            instead = f"there {id} is {occupant!r}" if got is None else f"there its id is {got}"
            raise ValueError(
                f"{path}: the files beside it say that token {token.content!r} has id {id}, but {instead}; correct one "
                "of them, or name the tokenizer that the model was trained with (--tokenizer)"
            )
        tokenizer.add_tokens([token])
    return bool(changed)


def _flags(token: AddedToken) -> tuple[object, ...]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _stated_tokens(path: Path, beside: Mapping[str, Any], special: list[str]) -> dict[int, AddedToken]:
    """By their ids; those of added_tokens.json, which older versions of transformers wrote, if there are no others."""
    decoder = beside["tokenizer_config"].get("added_tokens_decoder")
    try:
        if decoder is None:
            older = beside["added_tokens"].items()
            return {int(id): AddedToken(text, special=text in special) for text, id in older}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            int(id): AddedToken(entry["content"], **{name: entry[name] for name in flags if name in entry})
            for id, entry in decoder.items()
        }
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path.parent}: the added tokens of tokenizer_config.json or added_tokens.json are not ids and tokens: "
            f"{error!r}; download them again"
        ) from error


def _sampling(path: Path, config: Mapping[str, Any]) -> dict[str, float]:
    """Nothing, unless the file says that the model is to be sampled from."""
    if config.get("do_sample") is not True:
        return {}
    stated = {name: config[name] for name in SAMPLING if config.get(name) is not None}
    return checked_sampling(str(path), {"temperature": 1.0, **stated})  # 1 is what transformers samples at


def checked_sampling(where: str, stated: Mapping[str, Any]) -> dict[str, float]:
    """`stated` as options of a generation; ValueError naming `where` if it takes no such ones."""
    stated = {name: as_number(value) for name, value in stated.items()}
    if stated.get("top_k") == -1:  # one of two ways to say that all tokens are kept
        stated["top_k"] = 0
    try:
        check_options(cast(GenerationOptions, stated))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return stated


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path.with_name("chat_template.jinja")
    if file.is_file():
        check_downloaded(file)
        return usable_template(file, file.read_bytes())
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, for tools and the like
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return usable_template(path.with_name("tokenizer_config.json"), template)


def usable_template(file: Path, template: object) -> str | None:
    """The chat template that `file` has, or None. One that cannot be used is left out with a warning: without it, the
    model still completes texts."""
    try:
        text = decode_text(template) if isinstance(template, bytes) else template
        if not isinstance(text, str | None):
            raise ValueError(f"it is a {type(text).__name__}, expected a string")
        if text is not None:
            parse_template(text)
    except ValueError as error:
        remedy = "give one that works with --chat-template, here or to meki-run"
        warnings.warn(f"{file}: the chat template cannot be used and is left out: {error}; {remedy}", stacklevel=2)
        return None
    return text


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


def canonical_ids(tokenizer: Tokenizer) -> list[int]:
    """For each token the number of those that are alike but for case, accents, compatibility forms and the white space
    around them, counted by their first tokens. Part of a character is alike to nothing else.

    Source: "Conditional Memory via Scalable Lookup" (arXiv 2601.07372) and its published code.
    """
    normalizer = normalizers.Sequence(
        [
            *(normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        ]
    )
    numbers: dict[tuple[bool, str], int] = {}
    ids = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text:
            key = (False, str(tokenizer.id_to_token(token)))
        else:
            alike = normalizer.normalize_str(text)
            key = (True, alike.strip() or alike or text)  # white space alone is one space
        ids.append(numbers.setdefault(key, len(numbers)))
    return ids
