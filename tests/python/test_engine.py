"""Engine and Session on a small random package. The tests' reference is `Engine.logits`, which the tests of the models
compare with PyTorch."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import meki.engine
from meki import Engine, PackageError, Session, _core
from meki.models.tokenizer import END_OF_STORY

PROMPT = "Once upon a time"


def without_end(manifest: dict[str, Any]) -> None:
    manifest["tokenizer"]["eos_token_ids"] = []


@pytest.fixture
def endless(change_package: Callable[..., Path]) -> Engine:
    """The same model, but no token ends a text."""
    return Engine(change_package(without_end), threads=1)


def assert_greedy(engine: Engine, tokens: list[int], prompt_length: int) -> None:
    """Every token after the prompt was the most probable one. Prefill and decode sum in different orders, so the best
    two may swap when they are this close: 1e-3 is far below the spread of the logits (about 1)."""
    logits = engine.logits(tokens)
    assert np.std(logits) > 0.1
    for position in range(prompt_length, len(tokens)):
        row = logits[position - 1]
        assert row[tokens[position]] >= row.max() - 1e-3


def test_greedy_text_is_what_the_logits_say(endless: Engine) -> None:
    result = endless.generate(PROMPT, max_new_tokens=24, temperature=0)
    prompt = endless.tokenizer.encode(PROMPT).ids
    assert len(result.token_ids) == 24
    assert_greedy(endless, prompt + result.token_ids, len(prompt))
    assert result.text == endless.tokenizer.decode(result.token_ids)
    assert result.finish_reason == "length"


def test_stats_count_this_generation(endless: Engine) -> None:
    session = endless.session()
    session.generate(PROMPT, max_new_tokens=9)
    stats = session.generate(" and a day", max_new_tokens=12, seed=5).stats
    prompt_tokens = len(endless.tokenizer.encode(" and a day").ids)
    assert (stats.prompt_tokens, stats.new_tokens, stats.seed) == (prompt_tokens, 12, 5)
    assert stats.rom_access == "pread"
    # One bundle for each of the 11 decode steps, at least one for the prompt; no token is read twice for one step.
    assert 12 <= stats.rom_requests <= 11 + prompt_tokens + 1
    assert 0 <= stats.rom_hits <= stats.rom_requests
    assert (stats.rom_bytes > 0) == (stats.rom_hits < stats.rom_requests)
    for measured in (stats.time_to_first_token_s, stats.prefill_tokens_per_s, stats.decode_tokens_per_s):
        assert measured is not None and measured > 0
    assert stats.stall_us_p50 is not None and stats.stall_us_p99 is not None
    assert 0 <= stats.stall_us_p50 <= stats.stall_us_p99
    assert stats.resident_bytes is not None and stats.resident_bytes > 1_000_000


def test_what_was_not_measured_is_none(endless: Engine) -> None:
    stats = endless.generate(PROMPT, max_new_tokens=1).stats  # its one token comes from the prefill
    assert stats.time_to_first_token_s is not None
    assert (stats.decode_tokens_per_s, stats.stall_us_p50, stats.stall_us_p99) == (None, None, None)


def test_same_seed_same_text(endless: Engine) -> None:
    first = endless.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=1.0, seed=11)
    assert endless.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=1.0, seed=11).token_ids == first.token_ids
    assert endless.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=1.0, seed=12).token_ids != first.token_ids


def test_without_a_seed_the_stats_tell_it(endless: Engine) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.5, "top_p": 1.0}
    one, two = (endless.generate(PROMPT, **options) for _ in range(2))
    assert one.stats.seed != two.stats.seed  # 32 random bits
    assert endless.generate(PROMPT, **options, seed=one.stats.seed).token_ids == one.token_ids


def test_prefetch_and_access_change_no_token(endless: Engine) -> None:
    options = {"max_new_tokens": 16, "seed": 3}
    expected = endless.generate(PROMPT, **options).token_ids
    assert endless.generate(PROMPT, **options, prefetch=False).token_ids == expected
    for access in ("pread", "direct"):
        other = Engine(endless.path, threads=1, rom_access=access)
        assert other.generate(PROMPT, **options).token_ids == expected


def test_stream_is_generate_in_pieces(endless: Engine) -> None:
    expected = endless.generate(PROMPT, max_new_tokens=32, seed=2)
    stream = endless.stream(PROMPT, max_new_tokens=32, seed=2)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.result.text == expected.text
    assert stream.result.token_ids == expected.token_ids
    assert stream.result.finish_reason == "length"


def test_stop_strings_end_the_text(endless: Engine) -> None:
    options = {"max_new_tokens": 48, "seed": 4, "temperature": 1.0}
    whole = endless.generate(PROMPT, **options)
    decode = endless.tokenizer.decode
    for start in range(2, len(whole.text) - 3, 5):
        stop = whole.text[start : start + 3]
        result = endless.generate(PROMPT, **options, stop=[stop, "never in the text"])
        assert result.finish_reason == "stop"
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert stop in decode(result.token_ids)
        before = decode(result.token_ids[:-1])
        assert stop not in before or before.endswith("\ufffd")  # what may be half a character waits for the next token
    assert endless.generate(PROMPT, **options, stop="never in the text").text == whole.text


def test_a_stop_string_in_the_flushed_end(endless: Engine) -> None:
    """Text that was held back until the generation ended is searched too."""
    options = {"temperature": 0, "max_new_tokens": 40}
    ids = endless.generate(PROMPT, **options).token_ids
    decode = endless.tokenizer.decode
    cut = next((n for n in range(1, len(ids)) if decode(ids[:n]).endswith("\ufffd")), None)
    if cut is None:
        pytest.fail("the random model's text has no broken character any more; choose another prompt")
    result = endless.generate(PROMPT, temperature=0, max_new_tokens=cut, stop="\ufffd")
    assert result.finish_reason == "stop"
    assert result.text == decode(ids[:cut]).split("\ufffd")[0]


def test_the_end_token_ends_the_text(endless: Engine) -> None:
    ids = endless.generate(PROMPT, max_new_tokens=8, temperature=0).token_ids
    manifest = json.loads((endless.path / "manifest.json").read_text())
    manifest["tokenizer"]["eos_token_ids"] = [ids[5]]
    (endless.path / "manifest.json").write_text(json.dumps(manifest))
    result = Engine(endless.path, threads=1).generate(PROMPT, max_new_tokens=8, temperature=0)
    assert result.finish_reason == "eos"
    assert result.token_ids == ids[: ids.index(ids[5])]


def test_the_context_ends_the_text(endless: Engine) -> None:
    prompt = len(endless.tokenizer.encode(PROMPT).ids)
    result = endless.generate(PROMPT, max_new_tokens=0, context=prompt + 7)
    assert (result.finish_reason, len(result.token_ids)) == ("context", 7)


def test_a_prompt_longer_than_the_context_names_both(engine: Engine) -> None:
    text = "a b " * 200
    tokens = len(engine.tokenizer.encode(text).ids)
    with pytest.raises(ValueError, match=f"{tokens}.*{engine.context}"):
        engine.generate(text)


def test_turns_share_one_sequence(endless: Engine) -> None:
    session = endless.session()
    encode = endless.tokenizer.encode
    first = session.generate(PROMPT, max_new_tokens=7, temperature=0)
    second = session.generate(" The fox", max_new_tokens=5, temperature=0)
    third = session.generate("", max_new_tokens=4, temperature=0)  # goes on
    prompt, turn = encode(PROMPT).ids, encode(" The fox").ids
    assert session.tokens == prompt + first.token_ids + turn + second.token_ids + third.token_ids
    assert_greedy(endless, session.tokens[: len(prompt) + 7], len(prompt))
    assert_greedy(endless, session.tokens, len(prompt) + 7 + len(turn))
    assert third.stats.prompt_tokens == 0


def test_an_abandoned_stream_leaves_a_usable_session(endless: Engine) -> None:
    session = endless.session()
    stream = session.stream(PROMPT, max_new_tokens=50, temperature=0)
    next(stream)
    second = session.generate(" The fox", max_new_tokens=5, temperature=0)
    assert list(stream) == []  # ended by the second generation
    assert stream.result.finish_reason is None
    before = len(session.tokens) - 5
    assert session.tokens[before:] == second.token_ids
    assert_greedy(endless, session.tokens, before)


def test_a_closed_stream_has_ended(endless: Engine) -> None:
    stream = endless.stream(PROMPT, max_new_tokens=50, seed=1)
    text = next(stream) + next(stream)
    stream.close()
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == (text, None)


def test_a_refused_call_changes_nothing(endless: Engine) -> None:
    session, untouched = endless.session(), endless.session()
    for one in (session, untouched):
        one.generate(PROMPT, max_new_tokens=6, temperature=0)
    with pytest.raises(ValueError, match="temperature"):
        session.generate(" The fox", temperature=-1)
    with pytest.raises(ValueError, match="context"):
        session.generate("a b " * 200)
    assert session.tokens == untouched.tokens
    after = [one.generate(" said", max_new_tokens=6, temperature=0).token_ids for one in (session, untouched)]
    assert after[0] == after[1]


def test_threads_get_what_they_get_alone(endless: Engine) -> None:
    def generate(seed: int) -> list[int]:
        return endless.generate(PROMPT, max_new_tokens=24, seed=seed).token_ids

    alone = [generate(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generate, range(8))) == alone


def test_logits(endless: Engine) -> None:
    ids = [5, 6, 7, 8]
    logits = endless.logits(ids)
    assert (logits.dtype, logits.shape) == (np.float32, (4, endless.vocab_size))
    # One token at a time sums in another order than all at once: float32 noise, far below the logits' spread of 1.
    session = endless.session()
    np.testing.assert_allclose(np.concatenate([session.logits([token_id]) for token_id in ids]), logits, atol=1e-4)


def test_logits_after_a_generation_are_those_asked_for(endless: Engine) -> None:
    session = endless.session()
    session.generate(PROMPT, max_new_tokens=3)
    logits = session.logits([9, 10])
    np.testing.assert_allclose(logits, endless.logits(session.tokens)[-2:], atol=1e-4)


def test_logits_from_a_position_on(endless: Engine) -> None:
    ids = [5, 6, 7, 8, 9]
    logits = endless.logits(ids)
    for start in range(len(ids)):
        # Fewer rows of the output head at once may sum in another order: float32 noise, as above.
        np.testing.assert_allclose(endless.logits(ids, start=start), logits[start:], atol=1e-4)
    session = endless.session()
    session.logits(ids[:2])
    np.testing.assert_allclose(session.logits(ids[2:], 1), logits[3:], atol=1e-4)
    assert session.tokens == ids


def test_a_rewound_session_goes_on_from_there(endless: Engine) -> None:
    session = endless.session()
    stream = session.stream([5, 6, 7, 8], max_new_tokens=9, temperature=0)
    next(stream)
    session.rewind(3)
    assert session.tokens == [5, 6, 7]
    assert list(stream) == []  # it has ended
    np.testing.assert_allclose(session.logits([9]), endless.logits([5, 6, 7, 9], start=3), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="length must be from 0 to 4, got 5"):
        session.rewind(5)
    assert session.tokens == [5, 6, 7, 9]


@pytest.mark.parametrize("start", [-1, 3, 2**40])
def test_logits_from_an_impossible_position(engine: Engine, start: int) -> None:
    session = engine.session()
    with pytest.raises(ValueError, match="start must be from 0 to 2"):
        session.logits([5, 6, 7], start)
    assert session.tokens == []


@pytest.mark.parametrize("ids", [[], [-1], [10_000], [1] * 1000])
def test_logits_of_impossible_tokens(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"token|context"):
        engine.logits(ids)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("max_new_tokens", -2),
        ("stop", ["x", ""]),
        ("context", -1),
        ("context", 10**6),
    ],
)
def test_options_out_of_range(engine: Engine, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option.replace("_", ".")):
        engine.generate(PROMPT, **{option: value})


def test_options_that_do_not_exist(engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"'max_tokens'.*max_new_tokens"):
        engine.generate(PROMPT, max_tokens=3)
    with pytest.raises(TypeError, match="seed must be an integer"):
        engine.generate(PROMPT, seed=1.5)


WRONG = {
    **dict.fromkeys(("threads", "context", "top_k", "row_cache"), (None, "4", [4], 1.5)),
    **dict.fromkeys(("max_new_tokens", "seed"), ("4", [4], 1.5)),  # None: no limit; a fresh one
    "stop_token_ids": (None, 1, "12", ["1"], [1.0]),
    "ignore_eos": (None, "yes", [1], 1),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "rom_delay_ms"), (None, "1", [1], 10**400)),
    **dict.fromkeys(("memory", "prefetch"), (None, "yes", [1], 1)),
    **dict.fromkeys(("rom_access", "provider"), (None, 1, ["pread"], b"pread")),
    **dict.fromkeys(("kv_type", "soc"), (1, ["int8"], b"int8")),
    **dict.fromkeys(("model", "profile"), (None, 1, ["a"], b"a")),
    "chat_template": (1, ["a"], b"a"),
    "stop": (None, 1),
    "prompt": (None, 1, b"a"),
    "token_ids": (None, 1, "12", b"12", ["1"], [1.0], [None], [[1]], [2**70]),
    "start": (None, "1", [1], 1.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=repr
)
def test_arguments_of_wrong_types_are_named(package: Path, engine: Engine, name: str, value: Any) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: Engine(value),
        "prompt": lambda: engine.generate(value),
        "token_ids": lambda: engine.logits(value),
        "start": lambda: engine.logits([1, 2], value),
    }
    options = inspect.signature(Engine).parameters
    other = (
        (lambda: Engine(package, **{name: value})) if name in options else lambda: engine.generate("a", **{name: value})
    )
    with pytest.raises(TypeError) as caught:
        calls.get(name, other)()
    message = str(caught.value)
    assert message.startswith(name) and " must be " in message
    assert "\n" not in message


def test_engine_options_out_of_range(package: Path) -> None:
    with pytest.raises(ValueError, match="threads must be from 0"):
        Engine(package, threads=-1)
    with pytest.raises(ValueError, match=r"tape.*expected mmap, pread or direct"):
        Engine(package, rom_access="tape")


@pytest.mark.parametrize("size", [-1, 2**20 + 1])
def test_a_row_cache_out_of_range(package: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"row_cache must be from 0 to 1048576, got {size}"):
        Engine(package, row_cache=size)


def test_a_row_cache_is_there_unless_it_is_switched_off(package: Path) -> None:
    for options, cached in (({}, True), ({"row_cache": 1}, True), ({"row_cache": 0}, False)):
        engine = Engine(package, threads=1, **options)
        first, second = (engine.generate(PROMPT, max_new_tokens=8, temperature=0).stats for _ in range(2))
        assert first.rom_requests == second.rom_requests == second.rom_hits + (0 if cached else first.rom_requests)
        assert (second.rom_bytes == 0) == cached and first.rom_bytes > 0


def test_a_path_that_is_not_utf8(package: Path, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    shutil.copytree(package, path)
    assert Engine(path, threads=1).generate(PROMPT, seed=1).token_ids == engine.generate(PROMPT, seed=1).token_ids


@pytest.mark.parametrize("delay", [-0.001, 10_001, float("nan")])
def test_a_delay_out_of_range(package: Path, delay: float) -> None:
    with pytest.raises(ValueError, match="rom_delay_ms must be from 0 to 10000, got "):
        Engine(package, rom_delay_ms=delay)


def test_a_memory_switched_off(package: Path, engine: Engine) -> None:
    backbone = Engine(package, threads=1, memory=False, rom_delay_ms=10_000)  # no reads, no delay
    assert backbone.rom_access is None
    result = backbone.generate(PROMPT, max_new_tokens=3, temperature=0)
    assert result.stats.rom_requests == 0
    assert np.abs(backbone.logits([5, 6]) - engine.logits([5, 6])).max() > 0.01  # what the memory adds is not noise


def test_a_delayed_rom_stalls_every_step(package: Path) -> None:
    engine = Engine(package, threads=1, row_cache=0, rom_delay_ms=20.0)
    stats = engine.generate(PROMPT, max_new_tokens=6, temperature=0).stats
    # What is not waited for is what a step computes meanwhile: far below 10 ms, so that a busy machine has room.
    assert stats.stall_us_p50 is not None and stats.stall_us_p50 > 10_000


def test_a_profile_is_there_when_the_engine_is_gone(package: Path, tmp_path: Path) -> None:
    engine = Engine(package, threads=1, profile=tmp_path / "trace")
    engine.generate(PROMPT, max_new_tokens=2)
    del engine
    traces = list(tmp_path.glob("trace*"))
    assert len(traces) == 2  # one a stage
    for trace in traces:
        assert any(event["name"] == "model_run" for event in json.loads(trace.read_bytes()))


def prompt_of(session: Session) -> list[int]:
    session.generate("", max_new_tokens=1)
    return session.tokens[:-1]


def test_an_empty_prompt_begins_a_text_after_the_end_token(engine: Engine) -> None:
    assert prompt_of(engine.session()) == [engine.tokenizer.token_to_id(END_OF_STORY)]


def test_an_empty_prompt_begins_with_bos(change_package: Callable[..., Path]) -> None:
    engine = Engine(change_package(lambda manifest: manifest["tokenizer"].update(bos_token_id=7)), threads=1)
    assert prompt_of(engine.session()) == [7]
    session = engine.session()
    session.generate("a", max_new_tokens=1)
    session.generate("b", max_new_tokens=1)
    assert session.tokens[0] == 7 and session.tokens.count(7) == 1


def test_bos_of_the_tokenizer_is_not_doubled(package: Path, change_package: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    bos = tokenizer.token_to_id(END_OF_STORY)
    tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_STORY} $A", special_tokens=[(END_OF_STORY, bos)])

    def edit(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["bos_token_id"] = bos
        manifest["contents"]["tokenizer.json"] = tokenizer.to_str().encode()

    session = Engine(change_package(edit), threads=1).session()
    session.generate("a", max_new_tokens=1)
    session.generate("b", max_new_tokens=1)
    assert session.tokens[0] == bos and session.tokens[1] != bos
    assert session.tokens[-2] != bos


def test_an_empty_prompt_needs_a_token(endless: Engine) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        endless.generate("")


def test_a_prompt_is_never_truncated(package: Path, change_package: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    plain = tokenizer.encode(PROMPT).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    path = change_package(lambda manifest: manifest["contents"].update({"tokenizer.json": tokenizer.to_str().encode()}))
    session = Engine(path, threads=1).session()
    result = session.generate(PROMPT, max_new_tokens=1)
    assert session.tokens == plain + result.token_ids


def test_a_broken_tokenizer(change_package: Callable[..., Path]) -> None:
    path = change_package(lambda manifest: manifest["contents"].update({"tokenizer.json": b"{}"}))
    with pytest.raises(PackageError, match=r"tokenizer\.json: the tokenizer fails"):
        Engine(path)


@pytest.mark.parametrize("name", ["weights.bin", "memory.rom", "tokenizer.json"])
def test_a_clone_without_its_files(package: Path, tmp_path: Path, name: str) -> None:
    """Of a package that Git LFS keeps."""
    path = shutil.copytree(package, tmp_path / "p")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(PackageError, match=f"{name}: is a Git LFS pointer, .*: git lfs pull"):
        Engine(path)


def test_a_tokenizer_of_a_larger_model(package: Path, change_package: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(100)])
    path = change_package(lambda manifest: manifest["contents"].update({"tokenizer.json": tokenizer.to_str().encode()}))
    with pytest.raises(PackageError, match="largest token id is 399, the model has 300 tokens"):
        Engine(path)


def test_a_token_that_the_model_does_not_have(package: Path, change_package: Callable[..., Path]) -> None:
    """Behind a gap, where opening does not look: a prompt with it is refused."""
    tokenizer = json.loads((package / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    del vocabulary["z"]
    vocabulary["q"] = 4000
    path = change_package(
        lambda manifest: manifest["contents"].update({"tokenizer.json": json.dumps(tokenizer).encode()})
    )
    engine = Engine(path)
    with pytest.raises(ValueError, match="4000"):
        engine.generate("q")
    assert engine.generate("a", max_new_tokens=1).token_ids


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"provenance": None}, "provenance is None"),
        ({"parameters": {"ram": 1.5, "rom": 0}}, r"parameters\.ram is 1\.5"),
        ({"parameters": {"ram": 1, "rom": -1}}, r"parameters\.rom is -1"),
        ({"parameters": {"ram": 1, "rom": 0, "active": "1"}}, r"parameters\.active is '1'"),
        ({"weights": "int8"}, 'weights is "int8"'),
        ({"quantization_error": 0.1}, "quantization_error is 0.1"),
    ],
)
def test_manifest_fields_that_python_reads(
    change_package: Callable[..., Path], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(PackageError, match=named):
        Engine(change_package(lambda manifest: manifest.update(change)))


@pytest.mark.parametrize("bos", [-1, 1 << 31, "0", True])
def test_a_wrong_bos(change_package: Callable[..., Path], bos: object) -> None:
    with pytest.raises(PackageError, match="bos_token_id"):
        Engine(change_package(lambda manifest: manifest["tokenizer"].update(bos_token_id=bos)))


def test_no_onnxruntime(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meki.engine, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        Engine(package)


def test_running_a_model_imports_only_what_it_needs(package: Path) -> None:
    program = (
        "import sys; from meki import Engine; Engine(sys.argv[1]).generate('a', max_new_tokens=2);"
        "print([name for name in ('torch', 'numpy', 'onnx', 'onnxruntime', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, package], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_rejected_call_leaves_the_stream_running(engine: Engine) -> None:
    session = engine.session()
    stream = session.stream("The old", max_new_tokens=12, temperature=0)
    next(stream)
    with pytest.raises(ValueError, match="temperature"):
        session.stream("and", temperature=-1)
    with pytest.raises(ValueError, match="vocabulary"):
        session.logits([2**40])
    with pytest.raises(ValueError, match="context"):
        session.stream("and " * 500)
    for _ in stream:
        pass
    assert stream.result.text == engine.generate("The old", max_new_tokens=12, temperature=0).text


@pytest.mark.parametrize("stop", [[5], [None], b"x", [""]])
def test_stop_strings_of_a_wrong_type(engine: Engine, stop: object) -> None:
    session = engine.session()
    with pytest.raises(ValueError, match="stop string"):
        session.stream("The old", stop=stop)
    assert session.tokens == []


def test_a_prompt_that_is_not_unicode(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        engine.generate("a \udcff")


def test_prompting_ends_a_running_generation(engine: Engine) -> None:
    core = _core.Session(engine._core, _core.SessionOptions(context=8))
    core.append([1, 2, 3])
    core.start(_core.SamplingOptions(seed=1), 0)
    assert core.next() is not None
    core.append([4] * 4)  # the context is full
    with pytest.raises(ValueError, match="no generation"):
        core.next()
    with pytest.raises(ValueError, match="context holds 8"):
        core.append([5])


def test_a_dense_model_waits_for_no_rows(make_package: Callable[..., Path]) -> None:
    stats = Engine(make_package(memory_dim=0)).generate("The old", max_new_tokens=5, temperature=0).stats
    assert stats.stall_us_p50 is None and stats.rom_access is None
    assert stats.decode_tokens_per_s is not None
