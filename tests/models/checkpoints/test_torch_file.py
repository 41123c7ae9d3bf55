"""Files of torch.save: tensors are read as they were saved, in bounded memory; hostile and damaged ones are refused."""

from __future__ import annotations

import io
import os
import random
import signal
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.torch_file import Inert, TorchFile, is_torch_zip, load_torch_file

NUMPY = {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
SIGNALS = {"signal.Signals", "signal.SIGTERM"}  # Python 3.11.0 to 3.11.3 write the latter
STAND_INS = frozenset({*NUMPY, *SIGNALS, "numpy.dtype", "numpy.ndarray", "_io.BytesIO", "torch._C.Generator"})


def save(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Every member of a zip anew, as `change(name without directory, content)`; None: without it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            changed = change(name.split("/", 1)[1], content)
            if changed is not None:
                archive.writestr(name, changed)


def open_file(path: Path) -> TorchFile:
    tensors = load_torch_file(path, STAND_INS)
    assert isinstance(tensors, dict)
    return TorchFile(path, tensors)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of a larger storage: cut, with steps, permuted, expanded, or a scalar or empty one."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    base = torch.randn([2 * n + 3 for n in shape], generator=torch.Generator().manual_seed(1))
    base = base.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))
    for dimension, n in enumerate(shape):
        start, step = draw(st.integers(0, 3)), draw(st.integers(1, 2))
        base = base.narrow(dimension, start, 2 * n)[(slice(None),) * dimension + (slice(None, None, step),)]
    base = base.permute(draw(st.permutations(range(len(shape)))))
    return base.expand(2, *base.shape) if draw(st.booleans()) else base


@settings(max_examples=60, deadline=None)
@given(tensors=st.lists(views(), min_size=1, max_size=4), bounds=st.tuples(st.integers(-4, 8), st.integers(-4, 8)))
def test_reads_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[torch.Tensor], bounds: tuple[int, int]
) -> None:
    path = tmp_path_factory.mktemp("torch") / "x.pt"
    saved = {str(i): torch.nn.Parameter(tensor) if i % 2 else tensor for i, tensor in enumerate(tensors)}
    file = open_file(save(path, saved))
    for name, tensor in saved.items():
        assert file.shapes[name] == tuple(tensor.shape)
        for rows in (slice(None), slice(*bounds)) if tensor.dim() else (slice(None),):
            expected = tensor.detach()[rows].float() if tensor.dim() else tensor.detach().float()
            got = file.read(name, rows)
            assert got.dtype == torch.float32 and got.device.type == "cpu"
            assert torch.equal(got, expected)


def test_tensors_of_a_shared_storage(tmp_path: Path) -> None:
    """As a distributed optimizer leaves them: all parameters are pieces of one buffer."""
    buffer = torch.arange(60, dtype=torch.bfloat16)
    file = open_file(save(tmp_path / "x.pt", {"a": buffer[:20].view(4, 5), "b": buffer[20:].view(5, 8)}))
    assert torch.equal(file.read("b", slice(2, 4)), torch.arange(36.0, 52.0).view(2, 8))


def test_tensors_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        save(tmp_path / "x.pt", {"a": torch.arange(6.0)})
    assert torch.equal(open_file(tmp_path / "x.pt").read("a"), torch.arange(6.0))


def test_files_of_older_torch(tmp_path: Path) -> None:
    """Which do not say how their members are aligned, nor their byte order."""
    path = save(tmp_path / "x.pt", {"a": torch.arange(6.0), "b": torch.arange(4.0)})
    extra = (".format_version", ".storage_alignment", "byteorder", ".data/serialization_id")
    rewrite(path, lambda name, content: None if name in extra else content)
    assert torch.equal(open_file(path).read("b"), torch.arange(4.0))


def test_memory_is_that_of_what_was_asked_for(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    rows, width, block = 1 << 17, 512, 1024
    path = save(tmp_path / "x.pt", {"table": torch.ones(rows, width, dtype=torch.bfloat16)})  # 128 MiB
    file = open_file(path)
    file.read("table", slice(0, block))
    before = largest = resident()
    for start in range(0, rows, block):
        assert file.read("table", slice(start, start + block)).shape == (block, width)
        largest = max(largest, resident())
    # A block takes 1 MiB and 2 as float32; a mapping would keep 128.
    assert largest - before < 32 << 20


class Shell:
    """Unpickling it would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Unknown:
    pass


def test_a_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = save(tmp_path / "x.pt", {"args": Namespace(x=Shell(f"touch {proof}")), "model": {}})
    with pytest.raises(CheckpointError, match=r"x\.pt: refused, its pickle wants 'posix\.system'; expected tensors"):
        load_torch_file(path, STAND_INS)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # it was a real one
    assert proof.exists()


def test_every_unknown_name_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"args": Namespace(x=Unknown()), "code": eval})
    with pytest.raises(CheckpointError, match=r"wants '\S*eval', '\S+\.Unknown';"):
        load_torch_file(path, STAND_INS)


def test_names_that_a_newer_pickle_makes_on_its_stack(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"x": Shell("true")}, pickle_protocol=4)
    with pytest.raises(CheckpointError, match="refused, its pickle does what weights do not need: Unsupported operand"):
        load_torch_file(path, STAND_INS)


def test_stand_ins_do_nothing(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    saved = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "scalar": np.float32(3),
        "array": generator.random((3, 4)),
        "signal": signal.SIGTERM,
        "bytes": io.BytesIO(b"pickled, or worse"),
        "args": Namespace(dtype=torch.bfloat16, size=torch.Size([3]), layers=3),
    }
    loaded = load_torch_file(save(tmp_path / "x.pt", saved), STAND_INS)
    assert isinstance(loaded, dict)
    assert loaded["args"] == saved["args"] and loaded["python"] == saved["python"]
    for value in (loaded["numpy"][1], loaded["scalar"], loaded["array"], loaded["bytes"]):
        assert type(value) is Inert and vars(value) == {}
    assert loaded["signal"] is Inert or type(loaded["signal"]) is Inert


def test_the_process_trusts_nothing_more_afterwards(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"args": Namespace(x=1)})
    load_torch_file(path, STAND_INS)
    trusted = {entry[0] if isinstance(entry, tuple) else entry for entry in torch.serialization.get_safe_globals()}
    assert not trusted & {Inert, Namespace}


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, kept: float) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.ones(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"x\.pt: not a complete file of torch\.save: .*; copy it again"):
        load_torch_file(path, STAND_INS)


def test_not_a_zip(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert not is_torch_zip(path)
    with pytest.raises(CheckpointError, match=r"not a complete file of torch\.save"):
        load_torch_file(path, STAND_INS)


def test_another_byte_order(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.ones(2)})
    rewrite(path, lambda name, content: b"big" if name == "byteorder" else content)
    with pytest.raises(CheckpointError, match="big-endian"):
        load_torch_file(path, STAND_INS)


@pytest.mark.parametrize("kind", ["shortened", "compressed", "moved"])
def test_members_that_do_not_hold_their_tensors(tmp_path: Path, kind: str) -> None:
    """`moved`: by other tools, while the file says that members lie as torch.save aligns them."""
    path = save(tmp_path / "x.pt", {"a": torch.ones(100), "b": torch.ones(100)})
    compression = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    dropped = () if kind == "moved" else (".format_version",)

    def change(name: str, content: bytes) -> bytes | None:
        if name in dropped:
            return None
        return content[:-4] if kind == "shortened" and name == "data/1" else content

    rewrite(path, change, compression)
    with pytest.raises(CheckpointError, match=r"tensor [ab] of shape \[100\] needs 400 bytes, its member of the zip"):
        open_file(path)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.ones(1000)})
    file = open_file(path)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="tensor a is cut off"):
        file.read("a")


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, dtype=torch.int8), torch.ones(3, 3).to_sparse()], ids=["int", "sparse"]
)
def test_not_a_weight(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = save(tmp_path / "x.pt", {"a": tensor})
    with pytest.raises(CheckpointError, match=r"tensor a is a \w+ of torch\.\w+, torch\.\w+; expected a dense one"):
        open_file(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_checkpoint_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("torch") / "x.pt"
    save(path, {"args": Namespace(n=3, d=torch.float16), "model": {"a": torch.ones(4, 3), "b": io.BytesIO(b"x")}})

    def change(name: str, content: bytes) -> bytes:
        if name != "data.pkl":
            return content
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)

    rewrite(path, change)
    try:
        loaded = load_torch_file(path, STAND_INS)
        model = loaded.get("model") if isinstance(loaded, dict) else None
        tensors = {name: x for name, x in model.items() if isinstance(x, torch.Tensor)} if type(model) is dict else {}
        file = TorchFile(path, tensors)
        for name in file.shapes:
            file.read(name, slice(0, 2)) if file.shapes[name] else file.read(name)
    except CheckpointError:
        pass


def test_recognised(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("PK")
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("model/data.txt", b"x")
    assert is_torch_zip(save(tmp_path / "x.pt", {"a": 1}))
    assert not any(is_torch_zip(tmp_path / name) for name in ("text", "empty", "other.zip"))


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for source in (path, tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: is a Git LFS pointer, .*: git lfs pull"):
            open_checkpoint(source, {})
