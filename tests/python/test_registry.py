from __future__ import annotations

from pathlib import Path

import pytest

from meki import ModelNotFoundError, PackageError
from meki.package import find_model, registry


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
        (str(folder), ("is a Hugging Face folder, not a package", f"`meki-convert '{folder}' -o 'qwen 3-meki'`")),
        ("~/model-q8_0.gguf", ("is a GGUF file, not a package", "/model-q8_0.gguf -o model-q8_0-meki`")),
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
    commands = (f"meki-convert CHECKPOINT -o {name}", f"meki-convert --random {name} -o {name}")
    for part in (name, "nobody has published", "pip install 'meki[models]'", *commands):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["", "no-such-model", "no/such/directory", "data", "nul\0name"])
def test_any_other_name_lists_the_known_ones(bundled: Path, name: str) -> None:
    with pytest.raises(PackageError) as caught:
        find_model(name)
    assert isinstance(caught.value, ModelNotFoundError)
    for part in (repr(name), "meki-tiny (bundled)", "meki-4b (configuration only)", "path of a package directory"):
        assert part in str(caught.value)
