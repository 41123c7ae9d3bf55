"""The options of a generation, checked."""

from __future__ import annotations

import contextlib
import json
import operator
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as shown
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypedDict

from . import _core

DEFAULT_MAX_NEW_TOKENS = 256
DEFAULT_ROW_CACHE = 16
"""MiB."""
DEFAULT_PREFIX_CACHE = 256
"""MiB: of a model of the paper's smallest size a whole sequence of 4,096 tokens."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options that a package may have defaults of its own for."""
PENALTIES = ("presence_penalty", "frequency_penalty")
MOST_LOGPROBS = _core.SamplingOptions.MOST_LOGPROBS


ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream`, `chat` and `stream_chat`. ValueError for a value out of its range.

    What the package's manifest says under "sampling" comes before the defaults below.
    """

    max_new_tokens: int | None
    """Default 256; 0, -1 or None: until the context is full."""
    temperature: float
    """Default 0.8, in a chat 0; 0: always the most probable token."""
    top_k: int
    """Keep the k most probable tokens. Default 0: all."""
    top_p: float
    """Keep the fewest most probable tokens whose probabilities sum to at least this. Default 0.95; 1: all."""
    min_p: float
    """Drop tokens less probable than this times the most probable one's. Default 0: none."""
    repetition_penalty: float
    """Divide positive and multiply negative logits of tokens already in the sequence. Default 1: off."""
    presence_penalty: float
    """-2 .. 2: subtracted from the logits of tokens that this generation has made so far. Default 0: off."""
    frequency_penalty: float
    """-2 .. 2: the same, times how often it has made them. Default 0: off."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids, behind all penalties; -100 .. 100. Default none."""
    logprobs: int | None
    """0 .. 20: tell the log-probability of each token that is chosen, and of so many most probable ones
    (`GenerationResult.logprobs`): those of the model, before penalties, bias and temperature. Default None: do not."""
    seed: int | None
    """0 .. 2**64 - 1. Default None: a fresh random one, to be found in the stats."""
    stop: str | Sequence[str]
    """Strings that end the text; they are not part of it. A special token, which has no text, counts as the text that
    names it, alone ("<|im_end|>") or in a longer string. Default none."""
    stop_token_ids: Sequence[int]
    """Tokens that end the text, besides the model's own end tokens. Default none."""
    ignore_eos: bool
    """The model's end tokens do not end the generation: they stay in the sequence, and it goes on. Default False."""
    json_schema: Mapping[str, Any] | str | Literal[True] | None
    """The text is JSON of this schema, a dict or its JSON text; True: any JSON. Default None. Of this and the next two,
    one at most; the generation ends ("eos") where the text is complete. They need the extra `structured`."""
    regex: str | None
    """The text is one that this regular expression matches from beginning to end, in the syntax of Rust's regex crate.
    Default None."""
    grammar: str | None
    """The text is one of this grammar, in the variant of Lark's syntax that llguidance reads. Default None."""


class ChatOptions(GenerationOptions, total=False):
    """Keyword arguments of `chat` and `stream_chat`."""

    tools: Sequence[Mapping[str, Any]] | None
    """JSON schemas of the functions that the model may call, as OpenAI's API has them, for the template to write into
    the conversation. Default None."""
    tool_choice: ToolChoice | None
    """"auto": the model may call tools; "none": as without `tools`; "required": it calls one or several, with arguments
    of their schemas; {"type": "function", "function": {"name": ...}}: it calls this one, once. The last two need the
    extra `structured`. Default None: "auto"."""
    parallel_tool_calls: bool
    """False: an answer has one call at most; the generation ends ("eos") where another begins. Default True."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the chat template, as {"enable_thinking": False}. Default None. ValueError for one that the template
    does not have."""
    continue_final_message: bool
    """The last message is the beginning of the answer: the model goes on with its text. Default False."""


@dataclass(frozen=True)
class Form:
    """What a text is to be like."""

    option: Literal["json_schema", "regex", "grammar", "tool_choice"]
    text: str
    """The schema as JSON, the regular expression, the grammar (that of `tool_choice`, too)."""


@dataclass(frozen=True)
class CheckedOptions:
    """`GenerationOptions` with defaults filled in."""

    sampling: _core.SamplingOptions
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    form: Form | None
    """None: any."""


def check_integer(name: str, value: int, maximum: int, minimum: int = 0) -> int:
    """`value` if it is an integer from `minimum` to `maximum`; TypeError or ValueError naming it otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} must be from {minimum} to {maximum}, got {number}")
    return number


def check_number(name: str, value: float) -> float:
    """`value` as a float; TypeError naming it if it is not a number."""
    if isinstance(value, SupportsFloat | SupportsIndex):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # an array of several, an integer beyond floats
            return float(value)
    raise TypeError(f"{name} must be a number, got {shown(value)}")


def check_flag(name: str, value: bool) -> bool:
    """`value`; TypeError naming it if it is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_text(name: str, value: str) -> str:
    """`value`; TypeError naming it if it is not a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {shown(value)}")
    return value


def check_path(name: str, value: str | os.PathLike[str]) -> str:
    """`value` as a str; TypeError naming it if it is not a path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {shown(value)}")
    return os.fsdecode(value)


def check_token_ids(name: str, token_ids: Sequence[int]) -> list[int]:
    """A list of them; TypeError naming them if they are not a sequence of integers that 64 bits hold."""
    if not isinstance(token_ids, str | bytes | bytearray):
        with contextlib.suppress(TypeError, OverflowError):
            return array("q", token_ids).tolist()
    raise TypeError(f"{name} must be a sequence of integers, got {shown(token_ids)}")


def check_options(options: GenerationOptions, vocab_size: int = 2**31) -> CheckedOptions:
    """TypeError for an unknown option or a value of a wrong type; ValueError for a value out of range.

    vocab_size: of the model, which token ids are to be below."""
    known = GenerationOptions.__annotations__.keys()
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"unknown generation option {unknown[0]!r}; known: {', '.join(known)}")
    values: dict[str, Any] = {name: value for name, value in options.items() if name in (*SAMPLING, *PENALTIES)}
    for name, value in values.items():
        values[name] = check_integer(name, value, 2**31 - 1) if name == "top_k" else check_number(name, value)
    seed = options.get("seed")
    # 32 bits are fresh enough, and exact in every JSON reader.
    seed = int.from_bytes(os.urandom(4)) if seed is None else check_integer("seed", seed, 2**64 - 1)
    values["logit_bias"] = _check_bias(options.get("logit_bias", {}), vocab_size)
    if (logprobs := options.get("logprobs")) is not None:
        values["logprobs"] = check_integer("logprobs", logprobs, MOST_LOGPROBS)
    sampling = _core.SamplingOptions(seed=seed, **values)
    sampling.check(vocab_size)  # raises what a generation would raise later
    stop = options.get("stop", ())
    if not isinstance(stop, str | Sequence):
        raise TypeError(f"stop must be a str or several, got {shown(stop)}")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"every stop string must be a str that is not empty, got {stop!r}")
    stop_token_ids = check_token_ids("stop_token_ids", options.get("stop_token_ids", ()))
    for token_id in stop_token_ids:
        check_integer("each of stop_token_ids", token_id, vocab_size - 1)
    most = options.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    most = 0 if most is None else max(0, check_integer("max_new_tokens", most, 2**31 - 1, minimum=-1))
    ignore_eos = check_flag("ignore_eos", options.get("ignore_eos", False))
    checked = CheckedOptions(sampling, most, stop, tuple(stop_token_ids), ignore_eos, form=None)
    return hold_to(checked, _check_form(options))


def _check_bias(bias: Mapping[int, float], vocab_size: int) -> list[tuple[int, float]]:
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {shown(bias)}")
    return [
        (check_integer("each token id of logit_bias", id, vocab_size - 1), check_number("logit_bias", value))
        for id, value in bias.items()
    ]


def hold_to(options: CheckedOptions, form: Form | None) -> CheckedOptions:
    """The same options with a form; ValueError if they exclude each other."""
    if form is None:
        return options
    if options.ignore_eos:
        raise ValueError(
            f"{form.option} and ignore_eos exclude each other: an end token completes such a text; omit one"
        )
    if options.form is not None:
        raise ValueError(f"{options.form.option} and {form.option} exclude each other; give one")
    return replace(options, form=form)


def _check_form(options: GenerationOptions) -> Form | None:
    schema, regex, grammar = (options.get(name) for name in ("json_schema", "regex", "grammar"))
    given: list[Form] = []
    if schema is not None:
        given.append(Form("json_schema", _schema_text(schema)))
    if regex is not None:
        given.append(Form("regex", _unicode_text("regex", regex)))
    if grammar is not None:
        given.append(Form("grammar", _unicode_text("grammar", grammar)))
    if len(given) > 1:
        raise ValueError(f"{' and '.join(form.option for form in given)} exclude each other; give one")
    return given[0] if given else None


def _unicode_text(name: str, value: Any) -> str:
    try:
        check_text(name, value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}; give text that UTF-8 can hold") from error
    return str(value)


def _schema_text(schema: Any) -> str:
    """A JSON schema as an object of JSON."""
    if schema is False or not isinstance(schema, Mapping | str | bool):
        raise TypeError(f"json_schema must be a dict, a text or True, got {shown(schema)}")
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps({} if parsed is True else parsed, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema cannot be used: it is no JSON: {error}") from error
    if not text.startswith("{"):
        raise ValueError(f"json_schema cannot be used: a schema is a JSON object, got {shown(parsed)}")
    return text
