"""Text as token ids, and the order in which it is seen."""

from __future__ import annotations

import gzip
import itertools
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from meki.models.tokenizer import END_OF_STORY, train_tokenizer
from meki.models.train import command, data

from .small import STORIES

LINES = st.lists(st.sampled_from(["one", "two words", "", "  indented", END_OF_STORY, "ünï"]), max_size=30)


@settings(deadline=None)
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), piece=st.sampled_from([1, 10, 1 << 20]))
def test_documents_are_what_stands_between_separators(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, piece: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(end.join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PIECE", piece)
        pieces = list(data.documents(path, END_OF_STORY))
    got, document = [], ""
    for text, ends in pieces:
        document += text
        if ends:
            got.append(document.strip())
            document = ""
    assert document == ""
    parts = "\n".join(lines).split(END_OF_STORY)  # the separator is nothing else here
    assert got == [part.strip() for part in parts if part.strip()]


@pytest.mark.parametrize(
    "pack", [lambda b: ("txt", b), lambda b: ("txt.gz", gzip.compress(b)), lambda b: ("txt.xz", lzma.compress(b))]
)
def test_compressed_text(tmp_path: Path, pack: Callable[[bytes], tuple[str, bytes]]) -> None:
    suffix, packed = pack(f"one\n{END_OF_STORY}\ntwo".encode())
    (tmp_path / f"text.{suffix}").write_bytes(packed)
    assert list(data.documents(tmp_path / f"text.{suffix}", END_OF_STORY)) == [("one", True), ("two", True)]


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n{"text": "three"}\n')
    assert list(data.documents(path, END_OF_STORY)) == [("one\n\ntwo", True), ("three", True)]
    for line in ('{"txt": "x"}', '{"text": 5}', "[]", "{", '{"text": "\\ud800"}', "[" * 100_000):
        path.write_text('{"text": "one"}\n' + line)
        with pytest.raises(ValueError, match=r'text.jsonl: line 2 is no object with a "text"'):
            list(data.documents(path, END_OF_STORY))


def test_tokens_hold_every_document_with_its_end(tokens: data.TokenFile, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(STORIES, 300)
    assert tokens.documents == len(STORIES) == (tokens.ids == 0).sum()
    assert tokens.bytes == sum(len(story.encode()) + 1 for story in STORIES)
    assert tokens.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)
    ends = [-1, *np.flatnonzero(tokens.ids == 0)]
    assert [tokenizer.decode(tokens.ids[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)] == STORIES


def test_text_without_a_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(f"\n{END_OF_STORY}\n \n")
    with pytest.raises(ValueError, match=r"empty.txt: no text; give files with at least one document"):
        data.write_tokens(tmp_path / "t.tokens", [tmp_path / "empty.txt"], train_tokenizer(STORIES, 300), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]  # nothing half-written


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{END_OF_STORY}\none", encoding="utf-8-sig")
    assert list(data.documents(tmp_path / "text.txt", END_OF_STORY)) == [("one", True)]


NOISE = np.random.default_rng(0).bytes(1000).hex().encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "ü".encode("latin-1"), "not UTF-8: "),
        ("latin.jsonl", '{"text": "ü"}'.encode("latin-1"), "not UTF-8: "),
        ("latin.txt.gz", gzip.compress("ü".encode("latin-1"), mtime=0), "not UTF-8: "),
        ("cut.txt.gz", gzip.compress(NOISE)[:-100], "damaged or cut off: "),
        ("cut.txt.xz", lzma.compress(NOISE)[:-100], "damaged or cut off: "),
        ("no.txt.gz", NOISE, "damaged or cut off: "),
        ("no.txt.xz", NOISE, "damaged or cut off: "),
        (
            "decayed.txt.gz",
            gzip.compress(NOISE)[:20] + b"\xff" * 100 + gzip.compress(NOISE)[120:],
            "damaged or cut off",
        ),
        ("decayed.jsonl.xz", lzma.compress(NOISE)[:-100] + b"\0" * 100, "damaged or cut off"),
    ],
)
def test_text_that_cannot_be_read(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    for option in (2, 4):  # --data, --valid
        changed = list(arguments)
        changed[option] = str(tmp_path / name)
        assert command.main(changed) == 1
        assert capsys.readouterr().err.startswith(f"meki-train: error: {tmp_path / name}: {message}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"tokenizer.json", "train.json", "train.tokens"}


def test_an_end_that_the_tokenizer_does_not_have(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: has no token 300, which is to end a text"):
        data.write_tokens(tmp_path / "t.tokens", [text], train_tokenizer(STORIES, 300), 300)
    assert not list(tmp_path.iterdir())


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab")
    sparse = Tokenizer(models.BPE({"end": 0, "a": 1, "b": 70_000}, []))  # three tokens, as far as their number goes
    tokens = data.write_tokens(tmp_path / "t.tokens", [tmp_path / "text.txt"], sparse, 0)
    assert tokens.ids.tolist() == [1, 70_000, 0]


def test_tokens_that_are_not_as_they_were_written(tokens: data.TokenFile, tmp_path: Path) -> None:
    path, about = tmp_path / "train.tokens", tmp_path / "train.json"
    whole, known = path.read_bytes(), about.read_bytes()
    for content, said in ((whole[:-2], known), (whole[:-1], known), (b"", known), (whole, b"{"), (whole, b"{}")):
        path.write_bytes(content)
        about.write_bytes(said)
        with pytest.raises(ValueError, match=r"train.tokens: not as it was written: .*; remove train.json, and"):
            data.TokenFile.open(path)
    path.unlink()
    about.write_bytes(known)
    with pytest.raises(ValueError, match=r"train.tokens: not as it was written"):
        data.TokenFile.open(path)


def test_an_epoch_shows_every_window_once() -> None:
    length, batch = 8, 2
    ids = np.arange(8 * 41 + 1, dtype=np.uint16)
    per_epoch = (len(ids) - length - 1) // length
    seen = torch.cat([data.batch_at(ids, step, batch, length, seed=3) for step in range(per_epoch // batch)])
    assert seen.shape == (per_epoch, length + 1)
    for window in seen:
        assert window.tolist() == list(range(int(window[0]), int(window[0]) + length + 1))
    assert len({int(window[0]) for window in seen}) == per_epoch  # no window twice
    again = data.batch_at(ids, 0, batch, length, seed=3)
    assert torch.equal(again, seen[:batch])
    assert not torch.equal(again, data.batch_at(ids, 0, batch, length, seed=4))
