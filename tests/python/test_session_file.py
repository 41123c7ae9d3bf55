"""Session.save and Session.load: a session that goes on as if it had never been a file, and files that are refused."""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki import Engine, Session, SessionFileError, _core, session_file

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
IDS = [int(token) for token in np.random.default_rng(3).integers(1, 300, 90)]
HEADER = 256


@functools.cache
def opened(package: Path, **options: Any) -> Engine:
    return Engine(package, threads=1, **options)


@pytest.fixture(scope="module", autouse=True)
def close_engines() -> Iterator[None]:
    yield
    opened.cache_clear()


def one_by_one(engine: Engine) -> Session:
    """Computes every token in a step of its own: results are then equal to the last bit."""
    session = engine.session()
    session._core = _core.Session(engine._core, _core.SessionOptions(chunk=1))
    return session


@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize("package", ["chat_package", "ngrams_chat_package"])
def test_a_loaded_session_goes_on_from_every_length(
    request: pytest.FixtureRequest, tmp_path: Path, package: str, kv_type: str
) -> None:
    engine = opened(request.getfixturevalue(package), kv_type=kv_type)
    session = one_by_one(engine)
    session.generate(IDS, **GREEDY)
    session.save(tmp_path / "file")
    for length in (*range(0, len(session.tokens), 7), len(session.tokens)):
        loaded, other = one_by_one(engine), one_by_one(engine)
        loaded.generate([5, 6], **GREEDY)
        loaded.load(tmp_path / "file")
        assert loaded.tokens == session.tokens
        assert loaded.computed_tokens == session.computed_tokens
        loaded.rewind(length)
        other.logits([*session.tokens[:length], 7])
        np.testing.assert_array_equal(loaded.logits([7, 8])[1:], other.logits([8]))


def test_what_is_not_computed_yet_is_saved_as_well(chat_engine: Engine, tmp_path: Path) -> None:
    session = chat_engine.session()
    session.logits(IDS[:20])
    session._core.append(IDS[20:40])  # as an interrupted prefill leaves them
    session.save(tmp_path / "file")
    loaded = chat_engine.session()
    loaded.load(tmp_path / "file")
    assert (loaded.tokens, loaded.computed_tokens) == (IDS[:40], IDS[:20])
    empty = chat_engine.session()
    empty.save(tmp_path / "file")
    loaded.load(tmp_path / "file")
    assert loaded.tokens == []


def test_a_stream_goes_on_after_it_is_saved(chat_engine: Engine, tmp_path: Path) -> None:
    session = chat_engine.session()
    stream = session.stream(IDS, **GREEDY)
    next(stream)
    session.save(tmp_path / "file")
    so_far = session.tokens
    assert stream.finish().token_ids == chat_engine.session().generate(IDS, **GREEDY).token_ids
    session.load(tmp_path / "file")
    assert session.tokens == so_far
    assert stream.advance() == ""  # the sequence is another one: that stream is over


def test_a_session_of_another_context_or_draft_goes_on(chat_engine: Engine, tmp_path: Path) -> None:
    session = chat_engine.session(draft="lookup")
    session.generate(IDS[:30], **GREEDY)
    session.save(tmp_path / "file")
    small = chat_engine.session(context=40, prefetch=False)
    small.load(tmp_path / "file")
    assert small.generate([9], **GREEDY).token_ids == session.generate([9], **GREEDY).token_ids
    smaller = chat_engine.session(context=20)
    smaller.generate([7], **GREEDY)
    before = smaller.tokens
    with pytest.raises(ValueError, match=r"file: has 34 tokens, the context holds 20; choose a larger context"):
        smaller.load(tmp_path / "file")
    assert smaller.tokens == before


def test_packages_with_the_same_weights_have_the_same_sessions(
    chat_engine: Engine, change_package: Callable[..., Path], chat_package: Path, tmp_path: Path
) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["name"] = "another name"
        manifest["contents"]["chat_template.jinja"] = b"{{ messages }}"

    session = chat_engine.session()
    session.generate(IDS, **GREEDY)
    session.save(tmp_path / "file")
    other = Engine(change_package(rename, source=chat_package), threads=1, kv_type="float32").session()
    other.load(tmp_path / "file")
    assert other.tokens == session.tokens


def test_sessions_of_other_kinds_are_refused(
    make_package: Callable[..., Path], chat_package: Path, tmp_path: Path
) -> None:
    session = opened(chat_package).session()
    session.generate(IDS, **GREEDY)
    session.save(tmp_path / "file")
    for engine, message in (
        (opened(chat_package, kv_type="float16"), "the kv_type of its session is int8, expected float16; open the"),
        (opened(chat_package, memory=False), "the memory of its session is on, expected off; "),
        (opened(make_package("int8")), "the model of its session is [0-9a-f]{16}, expected [0-9a-f]{16}; "),
    ):
        its = engine.session()
        its.generate([7], **GREEDY)
        before = its.tokens
        with pytest.raises(SessionFileError, match=f"file: {message}"):
            its.load(tmp_path / "file")
        assert its.tokens == before


@pytest.fixture(scope="module")
def saved(chat_package: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "file"
    session = opened(chat_package).session()
    session.generate(IDS, **GREEDY)
    session.save(path)
    return path.read_bytes()


def refusal(session: Session, path: Path, data: bytes) -> str:
    """What refuses a file, after which the session is as before."""
    path.write_bytes(data)
    before = session.tokens
    with pytest.raises(SessionFileError) as error:
        session.load(path)
    assert session.tokens == before
    assert str(error.value).startswith(f"{path}: ")
    assert "; " in str(error.value)  # the remedy
    return str(error.value)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_damage_goes_unnoticed(
    chat_package: Path, saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.session"
    session = opened(chat_package).session()
    places = st.one_of(st.integers(0, HEADER + 400), st.integers(0, len(saved) - 1))
    place = data.draw(places)
    if data.draw(st.booleans()):
        assert refusal(session, path, saved[:place])
    else:
        changed = bytearray(saved)
        changed[place] ^= data.draw(st.integers(1, 255))
        assert refusal(session, path, bytes(changed))
    assert refusal(session, path, saved + b"\0")


def sealed(saved: bytes, **fields: int) -> bytes:
    """With other fields of the header, and its checksum made right."""
    places = {"version": ("I", 8), "tokens": ("Q", 16), "computed": ("Q", 24), "state": ("Q", 32), "file": ("Q", 40)}
    head = bytearray(saved[: HEADER - 4])
    for name, value in fields.items():
        kind, offset = places[name]
        struct.pack_into(f"<{kind}", head, offset, value)
    return bytes(head) + struct.pack("<I", _core.crc32c(head)) + saved[HEADER:]


@settings(deadline=None, max_examples=100)
@given(
    fields=st.dictionaries(
        st.sampled_from(["tokens", "computed", "state", "file"]),
        st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])),
        min_size=1,
    )
)
def test_no_header_makes_it_read_more_than_there_is(
    chat_package: Path, saved: bytes, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, int]
) -> None:
    session = opened(chat_package).session()
    assert "damaged: " in refusal(session, tmp_path_factory.getbasetemp() / "sealed.session", sealed(saved, **fields))


def test_each_refusal_says_what_is_wrong(chat_package: Path, saved: bytes, tmp_path: Path) -> None:
    session = opened(chat_package).session()
    path = tmp_path / "file"
    tokens = struct.unpack_from("<Q", saved, 16)[0]
    end = HEADER + 4 * tokens
    outside = bytearray(saved)
    struct.pack_into("<i", outside, HEADER, 300)
    struct.pack_into("<I", outside, 116, _core.crc32c(outside[HEADER:end]))
    fewer = sealed(saved, computed=10)
    for data, message in (
        (b"", "not a session file"),
        (b"MEKIROM\n" + saved[8:], "not a session file"),
        (sealed(saved, version=2), "has version 2, expected 1"),
        (saved[:-1], f"it has {len(saved) - 1:,} bytes, expected {len(saved):,}"),
        (sealed(bytes(outside)), "a token is outside the vocabulary of 300"),
        (fewer, "its state has"),
        (sealed(saved, computed=tokens + 1), f"{tokens + 1} of {tokens} tokens are computed"),
        (saved[: end + 1] + bytes([saved[end + 1] ^ 1]) + saved[end + 2 :], "a checksum of its state is wrong"),
    ):
        assert message in refusal(session, path, data)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(SessionFileError, match="pipe: not a session file"):
        session.load(pipe)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=missing.name):
            session.load(missing)


def test_the_file_is_what_the_documentation_says(chat_package: Path, saved: bytes) -> None:
    """Read by the offsets of docs/session-format.md alone."""
    magic, version, mark, tokens, computed, state, size = struct.unpack_from("<8sIIQQQQ", saved)
    assert (magic, version, mark, size) == (b"MEKISES\n", 1, 0x01020304, len(saved))
    assert (saved[80:96], saved[96:112]) == (b"cpu".ljust(16, b"\0"), b"int8".ljust(16, b"\0"))
    assert struct.unpack_from("<I", saved, 112) == (1,)
    assert not any(saved[120:252])
    ids = struct.unpack_from(f"<{tokens}i", saved, 256)
    assert list(ids[: len(IDS)]) == IDS
    assert (tokens, computed) == (len(IDS) + 4, len(IDS) + 3)
    assert len(saved) == 256 + 4 * tokens + state + 4 * -(-state // 2**20)
    assert struct.unpack_from("<I", saved, 252) == (_core.crc32c(saved[:252]),)
    assert struct.unpack_from("<I", saved, 116) == (_core.crc32c(saved[256 : 256 + 4 * tokens]),)


def test_every_block_has_a_checksum(chat_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_file, "_BLOCK", 4096)  # else it takes a large model to fill two
    session = opened(chat_package).session()
    session.logits(IDS)
    path = tmp_path / "file"
    session.save(path)
    data = path.read_bytes()
    begin, state = HEADER + 4 * len(IDS), session.snapshot_bytes(len(IDS))
    assert len(data) == begin + state + 4 * -(-state // 4096)
    loaded = opened(chat_package).session()
    loaded.load(path)
    np.testing.assert_array_equal(loaded.logits([5]), session.logits([5]))
    for place in (*range(begin, begin + state, 4096), begin + state - 1, *range(begin + state, len(data), 4)):
        assert "checksum" in refusal(loaded, path, data[:place] + bytes([data[place] ^ 128]) + data[place + 1 :])


def test_a_full_disk_leaves_what_was_there(chat_package: Path, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    code = f"""
import resource, sys
from meki import Engine
session = Engine({str(chat_package)!r}, threads=1).session()
session.generate({IDS}, max_new_tokens=4)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    session.save({str(path)!r})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path}: cannot be written: File too large; ")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"
    session = opened(chat_package).session()
    with pytest.raises(OSError, match=r"none/file: cannot be written: No such file or directory; "):
        session.save(tmp_path / "none" / "file")
