"""The store of models: where it is, names, and what is removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki.package import remove_model, store, stored_model, stored_models
from meki.package.files import locked
from meki.package.store import name_of_source, plain_name


@pytest.fixture
def models(meki_home: Path) -> Path:
    (meki_home / "models").mkdir(parents=True)
    return meki_home / "models"


def put(directory: Path) -> Path:
    directory.mkdir()
    (directory / "manifest.json").touch()
    return directory


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for meki_home, data_home, expected in (
        ("/disk", "/data", "/disk/models"),
        ("~/big", "/data", "/home/ann/big/models"),
        ("", "/data", "/data/meki/models"),
        ("", "", "/home/ann/.local/share/meki/models"),
    ):
        monkeypatch.setenv("MEKI_HOME", meki_home)
        monkeypatch.setenv("XDG_DATA_HOME", data_home)
        assert store() == Path(expected)
    monkeypatch.delenv("MEKI_HOME")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert store() == Path("/home/ann/.local/share/meki/models")


def test_what_is_in_it(models: Path, tmp_path: Path) -> None:
    put(models / "b")
    (models / "a").symlink_to(tmp_path / "nowhere")
    put(models / ".c.7.partial")  # of a conversion at work
    assert list(stored_models()) == ["a", "b"]
    assert stored_model("a") == models / "a" and stored_model("c") is None and stored_model(".c.7.partial") is None


def test_it_need_not_exist() -> None:
    assert not store().exists() and stored_models() == {} and stored_model("a") is None


@given(st.text() | st.text("aZ9-._/ "))
def test_a_plain_name_is_one_file_name_and_stays(text: str) -> None:
    name = plain_name(text)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._")
    assert not name.startswith((".", "-", "_")) and "/" not in name
    assert plain_name(name) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("path/to/Qwen3-0.6B", "qwen3-0.6b"),
        ("path/to/Qwen3-0.6B/", "qwen3-0.6b"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
        ("Big-00001-of-00012.gguf", "big"),
        ("My model (new)", "my-model-new"),
        ("hf:Org/Name", "name"),
        ("hf:Org/Name@v1.0", "name"),
        ("hf:Org/Name/sub/File-Q8_0.gguf", "file-q8_0"),
        ("hf:Org/Name@v1.0/File-00001-of-00002.gguf", "file"),
        ("...", ""),
        ("模型", ""),
    ],
)
def test_the_name_of_a_source(source: str, name: str) -> None:
    assert name_of_source(source) == name


def test_a_folder_that_is_named_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Model" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Model" / "inner")
    assert name_of_source("..") == "model"


def test_removing(models: Path, tmp_path: Path) -> None:
    put(models / "kept")
    put(models / "gone")
    target = put(tmp_path / "target")
    (models / "link").symlink_to(target)
    (models / "dangling").symlink_to(tmp_path / "nowhere")
    (models / "file").touch()
    for name in ("gone", "link", "dangling", "file"):
        remove_model(name)
    assert [path.name for path in models.iterdir()] == ["kept"]
    assert (target / "manifest.json").exists()


def test_an_interrupted_removal_leaves_no_half_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(models / "gone")

    def interrupted(path: Path) -> None:
        assert stored_models() == {}  # before the first file goes
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_model("gone")
    assert stored_models() == {}


def test_what_is_being_written_is_not_removed(models: Path) -> None:
    put(models / "busy")
    with locked(models / "busy"), pytest.raises(RuntimeError, match="is writing it"):
        remove_model("busy")
    assert list(stored_models()) == ["busy"]


def test_what_cannot_be_removed_is_named(models: Path) -> None:
    with pytest.raises(OSError, match="gone: cannot be removed: No such file"):
        remove_model("gone")
