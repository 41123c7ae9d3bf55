"""Packages that are damaged, inconsistent or malicious: one PackageError, never a crash, a hang or a wrong answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from meki import Engine, PackageError, _core


@pytest.fixture
def package(make_package: Callable[..., Path], tmp_path: Path) -> Path:
    """A package of the test's own, to be damaged."""
    return Path(shutil.copytree(make_package(weights="int8"), tmp_path / "package"))


def edit_manifest(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = package / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def mutations(good: bytes, seed: int) -> Iterator[bytes]:
    """300 times `good` with one to four bytes changed."""
    generator = random.Random(seed)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        yield bytes(data)


def test_every_byte_of_the_rom_header_counts(package: Path) -> None:
    rom = package / "memory.rom"
    good = rom.read_bytes()
    _core.Rom(str(rom))
    with rom.open("r+b") as file:
        for offset in range(4096):
            for flip in (0x01, 0x80, 0xFF):
                os.pwrite(file.fileno(), bytes([good[offset] ^ flip]), offset)
                with pytest.raises(PackageError, match=r"memory\.rom"):
                    _core.Rom(str(rom))
            os.pwrite(file.fileno(), good[offset : offset + 1], offset)
    _core.Rom(str(rom))


@pytest.mark.parametrize("access", ["mmap", "pread", "direct"])
def test_a_damaged_bundle_is_named(package: Path, access: str) -> None:
    rom = package / "memory.rom"
    info = _core.Rom(str(rom)).info
    with rom.open("r+b") as file:
        file.seek(4096 + 77 * info.bundle_stride + 11)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    engine = Engine(package, rom_access=access)
    engine.logits([76, 78])
    with pytest.raises(PackageError, match="bundle 77 has checksum"):
        engine.logits([76, 77, 78])


@pytest.mark.parametrize("name", ["memory.rom", "weights.bin", "stage0.onnx", "stage1.onnx", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1], ids=["empty", "one-byte", "100-bytes", "one-byte-short"])
def test_truncated_files(package: Path, name: str, keep: int) -> None:
    path = package / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PackageError, match=name):
        Engine(package)
    # An attacker states the size that is there.
    edit_manifest(package, lambda manifest: manifest["files"][name].update(bytes=path.stat().st_size))
    with pytest.raises(PackageError):
        Engine(package)


@pytest.mark.parametrize("name", ["memory.rom", "weights.bin", "stage0.onnx", "tokenizer.json", "manifest.json"])
def test_missing_files(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(PackageError, match=name):
        Engine(package)


@pytest.mark.parametrize("name", ["stage0.onnx", "stage1.onnx", "tokenizer.json"])
def test_a_changed_graph_or_tokenizer_is_noticed(package: Path, name: str) -> None:
    path = package / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=f"{name}.*SHA-256"):
        Engine(package)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 299),
        ("vocab_size", 2**31 - 1),
        ("vocab_size", 2**63),
        ("layers", 4),
        ("layers", 65_535),
        ("hidden", 63),
        ("hidden", 2**20),
        ("kv_heads", 4),
        ("kv_heads", 2**20),
        ("head_dim", 32),
        ("head_dim", 15),
        ("memory.row_dim", 0),
        ("memory.row_dim", 31),
        ("memory.layers", 4),
        ("context", 0),
        ("context", -5),
        ("context", 1e9),
        ("layers", "3"),
        ("layers", None),
    ],
)
def test_architectures_that_the_files_contradict(package: Path, field: str, value: object) -> None:
    *_, member, name = f"architecture.{field}".split(".")
    edit_manifest(package, lambda manifest: manifest[member].update({name: value}))
    with pytest.raises(PackageError):
        Engine(package)


def test_a_context_beyond_the_rotary_tables(package: Path) -> None:
    """The manifest promises more positions than the graph has: an error when they are used, no read out of bounds."""
    edit_manifest(package, lambda manifest: manifest["architecture"].update(context=2**31 - 1))
    with pytest.raises(PackageError, match=r"rotary tables"):
        Engine(package).session(context=1000).logits([1] * 1000)


@pytest.mark.parametrize("name", ["../stage0.onnx", "/etc/hostname", "a/b", "..", ".", "", "x\x00y", "a\\b"])
@pytest.mark.parametrize("where", ["stage", "memory", "tokenizer", "files"])
def test_names_that_leave_the_directory(package: Path, where: str, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if where == "stage":
            manifest["stages"][0]["file"] = name
        elif where == "files":
            manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        else:
            manifest[where]["file"] = name

    edit_manifest(package, change)
    with pytest.raises(PackageError, match="plain file name"):
        Engine(package)


def test_weights_outside_the_directory(package: Path) -> None:
    """A graph whose external data points elsewhere; its checksum in the manifest is right."""
    shutil.copy(package / "weights.bin", package.parent / "weights.bin")
    path = package / "stage0.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    onnx.save(model, path)
    restate(package, "stage0.onnx")
    with pytest.raises(PackageError, match=r"stage0\.onnx"):
        Engine(package)


# ONNX Runtime says it where matrices are mapped.
BEYOND = r"(weights\.bin: \d+ bytes, the stages have a matrix of \d+ bytes from byte %s on|ONNX Runtime: ).*convert"
NO_NUMBER = r"stage1\.onnx: where a tensor lies in its file is no number; .*convert the model again"


@pytest.mark.parametrize(
    ("offset", "said"),
    [
        *((str(offset), BEYOND % offset) for offset in (2**40, 2**64 - 4096, 2**64 - 1)),
        *((offset, NO_NUMBER) for offset in ("", "-1", "4096x", str(2**64))),
    ],
)
def test_matrices_that_are_nowhere(package: Path, offset: str, said: str) -> None:
    path = package / "stage1.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.data_type == onnx.TensorProto.UINT8)
    next(entry for entry in tensor.external_data if entry.key == "offset").value = offset
    onnx.save(model, path)
    restate(package, path.name)
    with pytest.raises(PackageError, match=said):
        Engine(package)


@pytest.fixture
def graph(package: Path) -> Iterator[onnx.ModelProto]:
    """The second stage, to be made what no exporter makes."""
    path = package / "stage1.onnx"
    model = onnx.load(path, load_external_data=False)
    yield model
    onnx.save(model, path)
    restate(package, path.name)
    with pytest.raises(PackageError, match=r"stage1\.onnx: .*convert the model again"):
        Engine(package)


def test_functions_that_expand_without_end(graph: onnx.ModelProto) -> None:
    """Each of forty calls the one before twice: 2^40 nodes, which ONNX Runtime would inline."""
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("bomb", 1)]
    body = [onnx.helper.make_node("Sigmoid", ["x"], ["y"])]
    for level in range(40):
        graph.functions.append(onnx.helper.make_function("bomb", f"f{level}", ["x"], ["y"], body, opsets))
        calls = [("x", "t"), ("t", "y")]
        body = [onnx.helper.make_node(f"f{level}", [a], [b], domain="bomb") for a, b in calls]
    graph.opset_import.append(opsets[1])


def test_functions_under_a_field_number_of_more_than_32_bits(package: Path) -> None:
    """Of which Protocol Buffers' parser in ONNX Runtime drops what is too much."""
    opsets = [onnx.helper.make_opsetid("", 23)]
    body = [onnx.helper.make_node("Sigmoid", ["x"], ["y"])]
    function = onnx.helper.make_function("bomb", "f", ["x"], ["y"], body, opsets).SerializeToString()
    assert len(function) < 128
    with (package / "stage1.onnx").open("ab") as file:
        file.write(b"\xca\x81\x80\x80\x10" + bytes([len(function)]) + function)  # field 25, and bit 32
    restate(package, "stage1.onnx")
    with pytest.raises(PackageError, match=r"stage1\.onnx: not an ONNX model"):
        Engine(package)


@pytest.mark.parametrize(
    "kind", ["ConstantOfShape", "Range", "Tile", "Expand", "Concat", "Constant", "Sigmoid\0", "", "meki.Linear"]
)
def test_operators_that_no_stage_has(graph: onnx.ModelProto, kind: str) -> None:
    graph.graph.node.append(onnx.helper.make_node(kind, [], ["bomb"], name="bomb"))


def test_operators_of_other_domains(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(onnx.helper.make_node("Add", ["x"], ["bomb"], domain="com.microsoft"))


def test_graphs_in_graphs(graph: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("Sigmoid", ["x"], ["y"])], "inner", [], [])
    graph.graph.node[0].attribute.append(onnx.helper.make_attribute("then_branch", inner))


def test_tensors_in_attributes_and_sparse_ones(package: Path, graph: onnx.ModelProto) -> None:
    values = onnx.helper.make_tensor("values", onnx.TensorProto.FLOAT, [1], [1.0])
    indices = onnx.helper.make_tensor("indices", onnx.TensorProto.INT64, [1], [0])
    graph.graph.node[0].attribute.append(onnx.helper.make_attribute("value", values))
    onnx.save(graph, package / "stage1.onnx")
    restate(package, "stage1.onnx")
    with pytest.raises(PackageError, match="attribute value"):
        Engine(package)
    del graph.graph.node[0].attribute[-1]
    graph.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [2**34]))


def test_more_nodes_than_any_stage_has(graph: onnx.ModelProto) -> None:
    graph.graph.node.extend(onnx.helper.make_node("Sigmoid", ["x"], [f"n{i}"]) for i in range(16_384))


def test_a_tensor_that_says_more_than_it_has(graph: onnx.ModelProto) -> None:
    graph.graph.initializer.append(onnx.TensorProto(name="bomb", dims=[2**34], data_type=onnx.TensorProto.FLOAT))
    graph.graph.node.append(onnx.helper.make_node("Sigmoid", ["bomb"], ["n"]))


def test_a_graph_that_multiplies_ends_where_the_system_says(package: Path) -> None:
    """What the operators of a stage can make large is not bounded here, but by the system (SECURITY.md)."""
    path = package / "stage1.onnx"
    model = onnx.load(path, load_external_data=False)
    for name, shape in (("column", (50_000, 1)), ("row", (1, 50_000))):  # 10 GB of float32 if multiplied
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.node.append(onnx.helper.make_node("Add", ["column", "row"], ["bomb"]))
    onnx.save(model, path)
    restate(package, path.name)
    command = [sys.executable, "-c", "import sys, meki; meki.Engine(sys.argv[1])", str(package)]
    run = subprocess.run(["sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh", *command], capture_output=True, text=True)
    assert run.returncode == 1
    assert "PackageError: " in run.stderr
    assert "stage1.onnx" in run.stderr


@pytest.mark.parametrize("keep", [1, 7, 1000, -1])
def test_graphs_that_end_early(package: Path, keep: int) -> None:
    path = package / "stage1.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    restate(package, path.name)
    with pytest.raises(PackageError, match=r"stage1\.onnx: not an ONNX model"):
        Engine(package)


@pytest.mark.slow
def test_mutated_graphs_open_or_fail_cleanly(package: Path) -> None:
    path = package / "stage1.onnx"
    good = path.read_bytes()
    for data in mutations(good, seed=6):
        path.write_bytes(data)
        restate(package, path.name)
        with contextlib.suppress(PackageError):
            Engine(package).logits([1, 2, 3])


def restate(package: Path, name: str) -> None:
    """Makes the manifest's size and checksum of a file those that it has."""
    data = (package / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(package, lambda manifest: manifest["files"].update({name: entry}))


def test_the_rom_of_another_model(package: Path, make_package: Callable[..., Path]) -> None:
    """Same shape, other content: only the content id tells."""
    other = make_package(weights="int8", projector_norm=True)
    shutil.copy(other / "memory.rom", package / "memory.rom")
    restate(package, "memory.rom")
    with pytest.raises(PackageError, match="content id"):
        Engine(package)


@pytest.mark.parametrize("special", ["fifo", "directory", "missing-link"])
@pytest.mark.parametrize("name", ["manifest.json", "memory.rom", "weights.bin"])
def test_files_that_are_none(package: Path, name: str, special: str) -> None:
    path = package / name
    path.unlink()
    if special == "fifo":
        os.mkfifo(path)
    elif special == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(PackageError, match=name):
        Engine(package)


def test_deep_nesting(package: Path) -> None:
    path = package / "manifest.json"
    text = path.read_text()
    for levels in (100, 100_000):
        path.write_text(text.replace('"meki-package"', "[" * levels + "]" * levels))
        with pytest.raises(PackageError, match="nested"):
            Engine(package)


def test_a_byte_order_mark(package: Path) -> None:
    path = package / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(PackageError, match=r"manifest\.json"):
        Engine(package)


@pytest.mark.parametrize("field", ["type", "block"])
def test_weights_that_are_not_described(package: Path, field: str) -> None:
    edit_manifest(package, lambda manifest: manifest["weights"].update({field: ["?"]}))
    with pytest.raises(PackageError, match=f"weights.{field}"):
        Engine(package)


def test_a_vocabulary_that_would_fill_the_memory(make_package: Callable[..., Path], tmp_path: Path) -> None:
    """A dense package has no ROM whose header would contradict; nothing is allocated on the manifest's word."""
    package = Path(shutil.copytree(make_package(memory_dim=0), tmp_path / "package"))
    edit_manifest(package, lambda manifest: manifest["architecture"].update(vocab_size=10**9))
    command = [sys.executable, "-c", "import sys, meki; meki.Engine(sys.argv[1])", str(package)]
    # 4 GB of logits would not fit beside what ONNX Runtime maps.
    run = subprocess.run(["sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh", *command], capture_output=True, text=True)
    assert run.returncode == 1
    assert "PackageError" in run.stderr or "bad_alloc" in run.stderr


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "<none>"}},
    ],
    ids=["panic", "no-unknown-token"],
)
def test_tokenizers_that_fail(package: Path, tokenizer: dict[str, Any]) -> None:
    path = package / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **tokenizer}))
    restate(package, "tokenizer.json")
    with pytest.raises(PackageError, match=r"tokenizer"):
        Engine(package)


def test_two_layers_in_one_cache(package: Path) -> None:
    """`past.00` names layer 0 as `past.0` does."""
    path = package / "stage1.onnx"
    model = onnx.load(path, load_external_data=False)
    renamed = {"past.1": "past.00", "present.1": "present.00"}
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed.get(value.name, value.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    onnx.save(model, path)
    restate(package, "stage1.onnx")
    with pytest.raises(PackageError, match="cache"):
        Engine(package)


def test_weights_that_are_not_numbers(package: Path) -> None:
    weights = package / "weights.bin"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    with pytest.raises(PackageError, match="NaN"):
        Engine(package)


@pytest.mark.slow
def test_mutated_manifests_open_or_fail_cleanly(package: Path) -> None:
    path = package / "manifest.json"
    text = path.read_bytes()
    for data in mutations(text, seed=5):
        path.write_bytes(data)
        with contextlib.suppress(PackageError):
            Engine(package).logits([1, 2, 3])
