"""Checkpoints of the Hugging Face Hub, which a server on the loopback stands in for.

huggingface_hub reads where the Hub is when it is imported, so that what is tested runs in processes of its own.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import CheckpointError
from meki.models.checkpoints.huggingface import save_pretrained
from meki.models.convert import main
from meki.models.download import _hub_errors, is_remote
from meki.models.tokenizer import TokenizerSpec
from meki.package import find_model, read_manifest

from .hub import COMMIT, OLDER, Hub, serve

CONVERT = "import sys; from meki.models.convert import main; sys.exit(main())"
DOWNLOAD = """
import json, sys
from pathlib import Path
from meki.models.download import download

for source in sys.argv[1:]:
    try:
        path, provenance = download(Path(source))
        print(json.dumps([str(path), provenance]))
    except (ValueError, FileNotFoundError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run(code, *arguments): a Python process for which the Hub is the stand-in, and its cache in tmp_path/cache."""
    mine = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    mine = {name: value for name, value in mine.items() if not name.startswith("HF_")}
    hubs = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache")}

    def run(code: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**mine, **hubs, **changes})

    return run


@pytest.fixture
def download(run: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., list[list[str]]]:
    """download(*sources): the path and provenance of each, or the error and its message."""

    def download(*sources: str) -> list[list[str]]:
        done = run(DOWNLOAD, *sources)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return download


@pytest.fixture(scope="session")
def folder(
    make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("folder") / "run"
    save_pretrained(path, make_model(), tokenizer_spec, provenance={"weights": "random"})
    return path


OTHERS = {"README.md": b"#", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"again", "vocab.json": b"{}"}


def test_a_folder_goes_into_the_store(
    hub: Hub, run: Callable[..., subprocess.CompletedProcess[str]], folder: Path, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.models["org/My_Model"] = {**files, **OTHERS}
    done = run(CONVERT, "hf:org/My_Model@v1", "--weights", "float32")
    assert (done.returncode, done.stderr) == (0, "")  # progress is for terminals
    assert "to run it: meki-run --model my_model " in done.stdout
    manifest = read_manifest(find_model("my_model"))
    provenance = {"source": "hf:org/My_Model@v1", "format": "huggingface", "weights": "random", "commit": OLDER}
    assert manifest["provenance"] == provenance
    assert sorted(hub.loaded) == sorted((name, None) for name in files)  # no more than the conversion reads
    assert main([str(folder), "--weights", "float32", "-o", str(tmp_path / "local")]) == 0
    assert manifest["files"] == read_manifest(tmp_path / "local")["files"]


def test_the_weights_that_an_index_names(hub: Hub, download: Callable[..., list[list[str]]]) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    shards = {name: name.encode() for name in names}
    hub.models["org/sharded"] = {**files, **shards, **OTHERS, "original/model-00001-of-00002.safetensors": b"other"}
    (path, provenance), again = download("hf:org/sharded", "hf:org/sharded")
    assert again == [path, provenance] and len(hub.loaded) == 4  # each once: the second time all is in the cache
    assert provenance == {"source": "hf:org/sharded", "commit": COMMIT}
    found = {file.name: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
    assert found == {**files, **shards}


def test_gguf_files(hub: Hub, download: Callable[..., list[list[str]]]) -> None:
    parts = [f"BF16/m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    files = [*parts, "m-Q4_0.gguf", "m [q8].gguf", "odd-00000-of-00000.gguf"]
    hub.models["org/gguf"] = {file: file.encode() for file in files}
    sources = [f"hf:org/gguf/{file}" for file in (parts[0], "m [q8].gguf", "odd-00000-of-00000.gguf")]
    found = download(*sources, "hf:org/gguf@v1/m-Q4_0.gguf")
    for (path, provenance), source in zip(found, sources, strict=False):
        assert Path(path).read_bytes() == source.removeprefix("hf:org/gguf/").encode()
        assert provenance == {"source": source, "commit": COMMIT}
    assert [Path(found[0][0]).with_name(Path(part).name).read_bytes() for part in parts] == [p.encode() for p in parts]
    assert found[3][1] == {"source": "hf:org/gguf@v1/m-Q4_0.gguf", "commit": OLDER}
    assert sorted(name for name, _ in hub.loaded) == sorted(files)


def test_a_connection_that_breaks(hub: Hub, download: Callable[..., list[list[str]]]) -> None:
    data = bytes(range(256)) * (12 << 12)  # huggingface_hub writes pieces of 10 MiB
    hub.models["org/gguf"] = {"m.gguf": data}
    hub.breaks_at = {"m.gguf": 11 << 20}
    ((path, _),) = download("hf:org/gguf/m.gguf")
    assert Path(path).read_bytes() == data
    (_, first), (_, second) = hub.loaded
    assert first is None and second is not None and 0 < int(second[len("bytes=") : -1]) <= 11 << 20


def test_a_download_that_failed_keeps_its_files(hub: Hub, download: Callable[..., list[list[str]]]) -> None:
    parts = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    hub.models["org/gguf"] = {part: part.encode() for part in parts}
    hub.failing = {parts[1]}
    ((kind, message),) = download(f"hf:org/gguf/{parts[0]}")
    assert kind == "CheckpointError"
    assert message.startswith(f"hf:org/gguf/{parts[0]}: the download from {hub.address} failed: ")
    assert "500" in message and "files that are complete are not loaded again" in message
    hub.failing, hub.loaded = set(), []
    ((path, _),) = download(f"hf:org/gguf/{parts[0]}")
    assert [Path(path).with_name(part).read_bytes() for part in parts] == [part.encode() for part in parts]
    assert hub.loaded == [(parts[1], None)]


def test_what_the_hub_does_not_give(hub: Hub, download: Callable[..., list[list[str]]]) -> None:
    parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    hub.models["org/gguf"] = dict.fromkeys([*parts, "q4.gguf", "cut-00001-of-00002.gguf", "README.md"], b"")
    hub.models["org/bin"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    hub.models["org/empty"] = {}
    index = {"weight_map": {"a": "model-1.safetensors"}}
    hub.models["org/lost"] = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    hub.models["org/gated"] = {"m.gguf": b"weights"}
    hub.gated = {"org/gated"}
    there = (
        "give one of its GGUF files, as hf:ORG/NAME/FILE.gguf: cut-00001-of-00002.gguf, m-00001-of-00002.gguf, q4.gguf"
    )
    expected = {
        "hf:org/nothing": f"{hub.address} has no model org/nothing, or it is private; check the name, or log in",
        "hf:org/gguf@v2/q4.gguf": "org/gguf has no such revision; expected a branch, tag or commit",
        "hf:org/gguf/q8.gguf": f"the repository has no q8.gguf; {there}",
        "hf:org/gguf/cut-00001-of-00002.gguf": f"the repository has no cut-00002-of-00002.gguf; {there}",
        "hf:org/gguf/m-00002-of-00002.gguf": "is a part of a split model; give the first, m-00001-of-00002.gguf",
        "hf:org/gguf": f"has no config.json with safetensors; {there}",
        "hf:org/bin": "has no config.json with safetensors; nor has it GGUF files, but config.json, pytorch_model.bin;",
        "hf:org/lost": "its model.safetensors.index.json names model-1.safetensors, which is not there;",
        "hf:org/empty": "has no config.json with safetensors; nor has it GGUF files, but nothing;",
        "hf:org/gated/m.gguf": f"is gated: accept its conditions at {hub.address}/org/gated, then log in",
    }
    for (source, message), (kind, got) in zip(expected.items(), download(*expected), strict=True):
        assert kind == "CheckpointError" and got.startswith(f"{source}: {message}"), got
    assert [file for file, _ in hub.loaded] == ["config.json", "model.safetensors.index.json"]


def test_sources_of_another_form(hub: Hub, download: Callable[..., list[list[str]]]) -> None:
    sources = ("hf:", "hf:name", "hf:org/name/file.bin", "hf:org/name@", "hf:org/name/file.gguf@v1", "hf:org/na me")
    for source, (kind, message) in zip(sources, download(*sources), strict=True):
        assert kind == "FileNotFoundError" and message.startswith(f"{source}: no checkpoint on the Hugging Face Hub")
        assert "expected hf:ORG/NAME or hf:ORG/NAME/FILE.gguf, or of a branch" in message


def test_exit_codes(run: Callable[..., subprocess.CompletedProcess[str]], meki_home: Path) -> None:
    for source, changes, code, message in (
        ("hf:org/nothing", {}, 1, "has no model org/nothing"),
        ("hf:nothing", {}, 2, "no checkpoint on the Hugging Face Hub"),
        ("hf:org/name", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "the download from http://127.0.0.1:9 failed: "),
    ):
        done = run(CONVERT, source, **changes)
        assert done.returncode == code and done.stdout == ""
        (error,) = done.stderr.splitlines()
        assert error.startswith(f"meki-convert: error: {source}: ") and message in error
    assert not meki_home.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(number: int) -> None:
    message = r"hf:a/b: there is no space left in .*; free some, or .* HF_HUB_CACHE"
    with pytest.raises(CheckpointError, match=message), _hub_errors(Path("hf:a/b"), "a/b"):
        raise OSError(number, os.strerror(number))


def test_what_is_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_remote(Path("hf:org/name")) and not is_remote(Path("org/name"))
    (tmp_path / "hf:org" / "name").mkdir(parents=True)
    assert not is_remote(Path("hf:org/name"))
