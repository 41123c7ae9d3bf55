from __future__ import annotations

import re
from pathlib import Path

import pytest

from meki import ModelNotFoundError, PackageError
from meki.package import find_model, registry, stored_model


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that bundles one package, "meki-tiny", beside a directory that is none."""
    packages = tmp_path / "packages"
    (packages / "meki-tiny").mkdir(parents=True)
    (packages / "meki-tiny" / "manifest.json").touch()
    (packages / "data").mkdir()
    monkeypatch.setattr(registry, "files", lambda name: tmp_path)
    return packages


def test_a_directory_is_a_path(package: Path) -> None:
    assert find_model(package) == package
    assert find_model(str(package)) == package


def test_a_bundled_name(
    bundled: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert find_model("meki-tiny") == bundled / "meki-tiny"


def test_a_home_directory(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(package.parent))
    assert find_model(f"~/{package.name}") == package
    (tmp_path / "~" / package.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model(f"~/{package.name}") == Path("~", package.name)  # what is there comes first


def test_what_is_yet_to_be_converted_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "qwen 3"
    folder.mkdir()
    (folder / "config.json").touch()
    (tmp_path / "model-q8_0.gguf").touch()
    (tmp_path / "model.safetensors").touch()
    for name, parts in (
        (str(folder), ("is a Hugging Face folder, not a package", f"`meki-convert '{folder}'`, then give qwen-3")),
        ("~/model-q8_0.gguf", ("is a GGUF file, not a package", "/model-q8_0.gguf`, then give model-q8_0")),
        (
            "hf:org/Qwen3-0.6B",
            ("is a checkpoint, not a package", "`meki-convert hf:org/Qwen3-0.6B`, then give qwen3-0.6b"),
        ),
        (str(tmp_path / "model.safetensors"), ("is a file, a package is a directory; meki-convert makes",)),
    ):
        with pytest.raises(ModelNotFoundError) as caught:
            find_model(name)
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize("name", ["meki-0.6b", "meki-1.7b", "meki-4b"])
def test_a_configuration_without_weights_says_how_to_get_them(bundled: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        find_model(name)
    commands = (f"meki-convert CHECKPOINT --name {name}", f"meki-convert --random {name} --name {name}")
    for part in (name, "nobody has published", "pip install 'meki[models]'", *commands):
        assert part in str(caught.value)


def put(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "manifest.json").touch()
    return directory


def test_a_path_comes_first_then_the_store_then_what_is_bundled(
    bundled: Path, meki_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("meki-tiny") == bundled / "meki-tiny"
    stored = put(meki_home / "models" / "meki-tiny")
    assert find_model("meki-tiny") == stored
    folder = tmp_path / "meki-tiny"
    folder.mkdir()
    (folder / "config.json").touch()  # a checkpoint of the same name is no package
    assert find_model("meki-tiny") == stored
    (folder / "config.json").unlink()
    assert find_model("meki-tiny") == Path("meki-tiny")


def test_names_that_are_paths_are_not_looked_up_in_the_store(meki_home: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere")
    stored = put(meki_home / "models" / "mine")
    for name in ("../../elsewhere", ".mine", ".", "..", "./mine", "mine/", str(stored.parent / "other")):
        assert stored_model(name) is None
    assert find_model(stored) == stored


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smollm2", "did you mean smollm2-135m?"),
        ("SmolLM2-135m", "did you mean smollm2-135m?"),
        ("mekitiny", "did you mean meki-tiny?"),
        ("meki-4", "did you mean meki-4b?"),
        ("meki", "did you mean meki-0.6b or meki-1.7b or meki-4b or meki-tiny?"),
    ],
)
def test_a_name_that_is_almost_one(bundled: Path, meki_home: Path, name: str, meant: str) -> None:
    put(meki_home / "models" / "smollm2-135m")
    with pytest.raises(ModelNotFoundError, match=re.escape(meant)):
        find_model(name)


@pytest.mark.parametrize("name", ["", "no-such-model", "no/such/directory", "data", "nul\0name"])
def test_any_other_name_says_how_to_see_the_known_ones(bundled: Path, name: str) -> None:
    with pytest.raises(PackageError) as caught:
        find_model(name)
    assert isinstance(caught.value, ModelNotFoundError)
    for part in (repr(name), "meki-list shows all", "path of a package directory"):
        assert part in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_store_that_cannot_be_read_hides_no_bundled_model(bundled: Path, meki_home: Path, tmp_path: Path) -> None:
    (meki_home / "models").parent.mkdir(parents=True)
    (meki_home / "models").write_text("a file")
    assert find_model("meki-tiny") == bundled / "meki-tiny"
    with pytest.raises(ModelNotFoundError, match="meki-list"):
        find_model("no-such-model")
