"""Structured output: on meki-tiny, which knows stories and no JSON, so that the constraint does all the work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meki import Engine
from meki.generation import GenerationResult
from meki.structured.trial import try_grammar

PROMPT = "Once upon a time"

SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -7, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 110, "multipleOf": 5},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 1},
    {"type": "string", "maxLength": 9},
    {"type": "string", "minLength": 12, "maxLength": 20},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,8} [0-9]{4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"enum": ["red", 'a "quoted" green', "bl\\ue", 7, None, [1, {"a": 2}]]},
    {"const": {"fixed": [True, "ä漢🦊"]}},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "string", "maxLength": 4}]},
    {"type": ["integer", "null"], "minimum": 3, "maximum": 30},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"x": {"allOf": [{"type": "integer", "minimum": 0}, {"maximum": 9}]}},
        "required": ["x"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            },
            "leaf": {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"], "maxProperties": 1},
        },
        "$ref": "#/$defs/tree",
    },
]

REGEXES = [
    "yes|no|maybe",
    "[0-9]{3}-[0-9]{4}",
    "(the|a) (fox|hen) (ran|sat)( away)?\\.",
    "[^a-z]{1,5}",
    "ä漢🦊{2}",
    "",
    "\\$[1-9][0-9]{0,4}\\.[0-9]{2}",
]

SUMS = """\
start: number (sign number)*
sign: " + " | " - "
number: /[1-9][0-9]?/
"""


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine("meki-tiny", threads=1)


def check_json(result: GenerationResult, schema: Any) -> Any:
    """The value, of an answer that is complete."""
    assert result.finish_reason == "eos", result.text
    value = json.loads(result.text)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
    return value


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_are_of_their_schema(tiny: Engine, schema: dict[str, Any], temperature: float) -> None:
    for seed in range(3):
        options = {"temperature": temperature, "seed": seed, "max_new_tokens": 0}
        check_json(tiny.generate(PROMPT, json_schema=schema, **options), schema)
        check_json(tiny.generate(PROMPT, json_schema=json.dumps(schema), repetition_penalty=1.3, **options), schema)


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6)
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-1000, 1000).flatmap(
        lambda low: st.integers(0, 2000).map(lambda room: {"type": "integer", "minimum": low, "maximum": low + room})
    ),
    st.integers(0, 5).map(lambda length: {"type": "string", "minLength": length, "maxLength": length + 3}),
    st.lists(TEXTS | st.booleans() | st.integers(-9, 9) | st.none(), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(TEXTS, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    least = draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inner), "minItems": least, "maxItems": least + draw(st.integers(0, 2))}


def alternatives(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas})


@given(
    st.recursive(SCALARS, lambda inner: objects(inner) | arrays(inner) | alternatives(inner), max_leaves=5),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_answers_are_of_any_schema(tiny: Engine, schema: dict[str, Any], seed: int) -> None:
    result = tiny.generate(PROMPT, json_schema=schema, seed=seed, temperature=1, max_new_tokens=0)
    if result.finish_reason == "eos":
        check_json(result, schema)
    else:  # many nested arrays of long strings
        assert result.finish_reason == "context"


def test_any_json(tiny: Engine) -> None:
    complete = 0
    for seed in range(20):
        result = tiny.generate(PROMPT, json_schema=True, seed=seed, temperature=2, max_new_tokens=200)
        if result.finish_reason == "eos":
            json.loads(result.text)
            complete += 1
    assert complete > 0


@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_their_regular_expression(tiny: Engine, regex: str) -> None:
    for seed in range(5):
        result = tiny.generate(PROMPT, regex=regex, seed=seed, temperature=1.5)
        assert result.finish_reason == "eos"
        assert re.fullmatch(regex, result.text), result.text


def test_answers_are_of_their_grammar(tiny: Engine) -> None:
    for seed in range(5):
        result = tiny.generate(PROMPT, grammar=SUMS, seed=seed, temperature=1, max_new_tokens=0)
        if result.finish_reason == "eos":
            assert re.fullmatch(r"[1-9][0-9]?( [+-] [1-9][0-9]?)*", result.text), result.text


def test_an_answer_that_is_cut_off_says_so(tiny: Engine) -> None:
    cut = tiny.generate(PROMPT, regex="[a-z ]{400}", max_new_tokens=5, seed=1)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)
    full = tiny.generate(PROMPT, regex="[a-z]{4000}", max_new_tokens=0, seed=1, context=40)
    assert full.finish_reason == "context"
    assert re.fullmatch("[a-z]*", full.text)


def test_the_last_token_may_complete_the_answer(tiny: Engine) -> None:
    whole = tiny.generate(PROMPT, regex="[0-9]{6}", temperature=0)
    again = tiny.generate(PROMPT, regex="[0-9]{6}", temperature=0, max_new_tokens=len(whole.token_ids))
    assert (again.text, again.finish_reason) == (whole.text, "eos")


def test_stops_seeds_and_streams_are_as_without(tiny: Engine) -> None:
    options = {"regex": "[a-z]{5,40}(, [a-z]+){3}!", "seed": 5, "temperature": 1.0}
    whole = tiny.generate(PROMPT, **options)
    assert tiny.generate(PROMPT, **options).token_ids == whole.token_ids
    stream = tiny.stream(PROMPT, **options)
    assert "".join(stream) == whole.text
    assert stream.result.finish_reason == whole.finish_reason == "eos"
    stopped = tiny.generate(PROMPT, stop=", ", **options)
    assert (stopped.text, stopped.finish_reason) == (whole.text.partition(", ")[0], "stop")
    at = tiny.generate(PROMPT, stop_token_ids=[whole.token_ids[1]], **options)
    assert (at.token_ids, at.finish_reason) == (whole.token_ids[:2], "stop")
    drafted = tiny.generate(PROMPT, draft="lookup", **options)
    assert drafted.token_ids == whole.token_ids


def test_a_draft_changes_nothing(tiny: Engine) -> None:
    prompt = "1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3,"
    options = {"regex": "( [1-5],){30}", "seed": 3, "temperature": 0.3}
    plain = tiny.generate(prompt, **options)
    drafted = tiny.generate(prompt, draft="lookup", **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.accepted_tokens > 0


def test_without_a_constraint_all_is_as_before(tiny: Engine) -> None:
    before = Engine("meki-tiny", threads=1).generate(PROMPT, seed=9, max_new_tokens=30)
    tiny.generate(PROMPT, regex="[a-z]{9}")
    session = tiny.session()
    assert session.generate(PROMPT, seed=9, max_new_tokens=30).token_ids == before.token_ids
    session.generate(" And then", regex="[0-9]{4}")
    tokens = session.tokens
    assert session.generate(" she", seed=9, max_new_tokens=5).token_ids
    other = tiny.session()
    other.stream(tokens, max_new_tokens=1).close()
    assert other.generate(" she", seed=9, max_new_tokens=5).token_ids == session.tokens[-5:]


def test_threads_have_constraints_of_their_own(tiny: Engine) -> None:
    failures: list[BaseException] = []

    def work(regex: str, first_seed: int) -> None:
        try:
            for seed in range(first_seed, first_seed + 8):
                result = tiny.generate(PROMPT, regex=regex, seed=seed, temperature=1)
                assert re.fullmatch(regex, result.text), result.text
        except BaseException as error:
            failures.append(error)

    jobs = [("[a-f]{20}", 0), ("[0-9]{20}", 0), ("[a-f]{20}", 100), ("( [a-z]+){5}", 0)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_streams_of_one_constraint_side_by_side(tiny: Engine) -> None:
    alone = [tiny.generate(PROMPT, regex="[a-z]{3,30}[0-9]", seed=seed, temperature=1).text for seed in range(3)]
    streams = [tiny.stream(PROMPT, regex="[a-z]{3,30}[0-9]", seed=seed, temperature=1) for seed in range(3)]
    texts = [""] * 3
    for _ in range(40):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == alone


def test_no_thread_stays(tiny: Engine) -> None:
    others = set(threading.enumerate())
    for _ in range(3):
        stream = tiny.stream(PROMPT, regex="[a-z]{50}", seed=1)
        next(stream)
        del stream
    tiny.generate(PROMPT, regex="[a-z]{5}")
    started = set(threading.enumerate()) - others
    helpers = [thread for thread in started if thread.name.startswith("meki-grammar")]
    for helper in helpers:
        helper.join(timeout=60)
    assert not any(helper.is_alive() for helper in helpers)


def refused(engine: Engine, **options: Any) -> str:
    session = engine.session()
    session.stream(PROMPT).close()
    tokens = session.tokens
    with pytest.raises(ValueError) as caught:
        session.generate(" and", **options)
    assert session.tokens == tokens
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex exclude each other"),
        ({"regex": "a", "grammar": 'start: "a"'}, "regex and grammar exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"json_schema": "{"}, "json_schema cannot be used: it is no JSON"),
        ({"json_schema": "[]"}, "a schema is a JSON object"),
        ({"json_schema": "false"}, "a schema is a JSON object"),
        ({"json_schema": {"minimum": float("nan")}}, "it is no JSON"),
        ({"json_schema": {"const": object()}}, "it is no JSON"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema cannot be used"),
        ({"json_schema": {"type": "word"}}, "json_schema cannot be used: Invalid type: word"),
        ({"json_schema": {"not": {}}}, "not"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
        ({"json_schema": {"$ref": "#"}}, "there is no text of this kind"),
        ({"json_schema": {"$ref": "https://example.com/schema.json"}}, "example.com"),
        ({"regex": "(a"}, "regex cannot be used"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"grammar": "start: nope"}, 'grammar cannot be used: at 1(8): unknown name: "nope"'),
        ({"grammar": ""}, "grammar cannot be used: Empty grammar"),
        ({"grammar": "start: start"}, "there is no text of this kind"),
    ],
    ids=lambda value: str(value)[:50].encode("ascii", "replace").decode(),
)
def test_what_cannot_be_used_is_named(tiny: Engine, options: dict[str, Any], words: str) -> None:
    assert words in refused(tiny, **options)


def test_values_of_a_wrong_type(tiny: Engine) -> None:
    for options in ({"json_schema": False}, {"json_schema": 3}, {"regex": b"a"}, {"grammar": ["start"]}):
        with pytest.raises(TypeError, match=next(iter(options))):
            tiny.generate(PROMPT, **options)
    result = tiny.generate(PROMPT, json_schema=None, regex=None, grammar=None, seed=1, max_new_tokens=3)
    assert result.token_ids == tiny.generate(PROMPT, seed=1, max_new_tokens=3).token_ids


def definitions(count: int, link: str) -> dict[str, Any]:
    chain = {f"d{index}": json.loads(link % f"#/$defs/d{index + 1}") for index in range(count)}
    return {"$defs": {**chain, f"d{count}": {}}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, dict[str, Any]] = {
    "nested schemas": {"json_schema": '{"items":' * 100_000 + "{}" + "}" * 100_000},
    "nested values": {"json_schema": '{"const":' + "[" * 100_000 + "]" * 100_000 + "}"},
    "a chain of references": {"json_schema": definitions(20_000, '{"$ref": "%s"}')},
    "a chain of arrays": {"json_schema": definitions(20_000, '{"type": "array", "items": {"$ref": "%s"}}')},
    "many values": {"json_schema": {"enum": [f"value {index}" for index in range(100_000)]}},
    "many properties": {"json_schema": {"properties": {f"p{index}": {} for index in range(20_000)}}},
    "many alternatives": {
        "json_schema": {
            "allOf": [{"anyOf": [{"properties": {f"{i} {j}": {}}} for j in range(10)]} for i in range(10)],
        }
    },
    "regular expressions with a text in common": {
        "json_schema": {"allOf": [{"type": "string", "pattern": f".*a.{{{index}}}"} for index in range(20)]}
    },
    "nested groups": {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    "nested rules": {"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000},
    "a chain of rules": {
        "grammar": "start: r0\n" + "".join(f"r{index}: r{index + 1}\n" for index in range(50_000)) + 'r50000: "a"'
    },
    "doubling terminals": {
        "grammar": "start: R0\n" + "".join(f"R{index}: R{index + 1} R{index + 1}\n" for index in range(60)) + 'R60: "a"'
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused(tiny: Engine, name: str) -> None:
    assert "cannot be used" in refused(tiny, **HOSTILE[name])


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "(((a{1000}){1000}){1000}){1000}"},
        {"regex": "a" * 300_000},
        {"grammar": "start: a{1000000000}\na: /x/"},
        {"grammar": "start: " + "A\nA: " + " & ".join(f"~/.*a.{{{index}}}.*/" for index in range(16))},
        {"json_schema": {"type": "string", "minLength": 10**9}},
        {"json_schema": {"type": "array", "minItems": 10**9, "items": {"type": "boolean"}}},
        {"json_schema": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
    ],
    ids=lambda options: str(options)[:50],
)
def test_enormous_texts_end_in_an_error_or_with_the_context(tiny: Engine, options: dict[str, Any]) -> None:
    """What is small to write down and large as an automaton is found out step by step; a step has limits."""
    try:
        result = tiny.generate(PROMPT, temperature=1, seed=1, max_new_tokens=30, **options)
    except ValueError as error:
        assert "cannot be used" in str(error)
    else:
        assert result.finish_reason == "length" or "json_schema" in options


def test_what_failed_is_compiled_anew(tiny: Engine) -> None:
    regex = "(((a{1000}){1000}){1000}){1000}"
    for _ in range(2):
        with pytest.raises(ValueError, match="regex cannot be used"):
            tiny.generate(PROMPT, regex=regex, temperature=0)
    assert tiny.generate(PROMPT, regex="a{9}").text == "a" * 9


def test_grammars_are_compiled_once(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr("meki.structured.trial.try_grammar", lambda grammar, *_: tried.append(grammar) or "")
    engine = Engine("meki-tiny", threads=1)
    for _ in range(3):
        engine.generate(PROMPT, regex="once")
        engine.generate(PROMPT, json_schema={"const": 1})
        engine.generate(PROMPT, json_schema='{ "const": 1 }')
    assert len(tried) == 2


def test_a_trial_that_cannot_begin_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import llguidance

    monkeypatch.setattr(llguidance, "__file__", str(tmp_path / "nowhere" / "llguidance" / "__init__.py"))
    with pytest.raises(RuntimeError, match="llguidance"):
        try_grammar('start: "a"', 300, {"<end>": 0})


def test_without_llguidance_the_error_says_what_to_install(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ImportError, match=r"regex needs the package llguidance; run `pip install 'meki\[structured\]'`"
    ):
        tiny.generate(PROMPT, regex="never seen")
    assert tiny.generate(PROMPT, max_new_tokens=2).token_ids


def test_only_who_asks_for_it_loads_llguidance() -> None:
    code = "import sys; from meki import Engine; Engine('meki-tiny').generate('a', max_new_tokens=1); "
    code += "sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
